"""Sets of images drawn at random."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from pictures import encoded, numbers, picture, to_tensor, two_classes
from PIL import Image
from torch import Tensor

from tp_amp.data.drawing import draw
from tp_amp.data.images import open_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_classes(tmp_path)


def test_draws_are_seeded(folder: Path) -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [numbers(s) for s in draw(open_images(str(folder)), to_tensor, (4, 3), seed=seed)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len({*drawn(0)[0], *drawn(0)[1]}) == 7


def test_fewer_images_than_asked_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    sets = draw(open_images(str(folder)), to_tensor, (256, 128))
    assert [len(numbers(s)) for s in sets] == [8, 4]
    assert "12 images are there, 256 + 128 were asked for: taking 8 + 4" in caplog.text


def test_no_batch_of_one_image(folder: Path) -> None:
    [only] = draw(open_images(str(folder)), to_tensor, (9,), batch_size=4)
    assert [len(batch) for batch in only] == [3, 3, 3]


@pytest.mark.parametrize("content", [b"", b"no picture", encoded(3)[:45]])
def test_corrupt_images(folder: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "a" / "03.png").write_bytes(content)
    found = open_images(str(folder))
    with pytest.raises(ValueError, match=r"03\.png can't be decoded.*--skip-corrupt"):
        draw(found, to_tensor, (8, 4))
    sets = draw(found, to_tensor, (8, 4), skip_corrupt=True)
    assert sorted(numbers(sets[0] + sets[1])) == [n for n in range(12) if n != 3]
    assert "1 corrupt images are left out" in caplog.text
    # Where there are others, they take its place.
    sets = draw(found, to_tensor, (7, 4), skip_corrupt=True)
    assert [len(numbers(s)) for s in sets] == [7, 4]


def test_too_few_readable_images(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(encoded(1))
    with pytest.raises(ValueError, match="1 readable images are too few: 2 sets"):
        draw(open_images(str(tmp_path)), to_tensor, (8, 4))


def test_pictures_are_converted(tmp_path: Path) -> None:
    picture(200, "P").save(tmp_path / "palette.gif")
    picture(200, "LA").save(tmp_path / "alpha.png")
    modes = []

    def transform(found: Image.Image) -> Tensor:
        modes.append(found.mode)
        return torch.zeros(1)

    draw(open_images(str(tmp_path)), transform, (1, 1))
    draw(open_images(str(tmp_path)), transform, (1, 1), mode="L")
    assert modes == ["RGB", "RGB", "L", "L"]


def test_a_missing_label_is_told(tmp_path: Path) -> None:
    table = pyarrow.table({"image": [encoded(0), encoded(1)], "label": [0, None]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="some images have no label"):
        draw(open_images(str(tmp_path)), to_tensor, (2,), labelled=True)
