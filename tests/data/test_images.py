"""Images from every source, drawn at random into sets that share none."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import Tensor

from tp_amp.data.drawing import draw
from tp_amp.data.images import open_images


def picture(number: int, mode: str = "RGB") -> Image.Image:
    """A picture of one colour, that tells which it is."""
    return Image.new("RGB", (6, 6), (number, 0, 0)).convert(mode)


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def to_tensor(found: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(found)).permute(2, 0, 1)


def numbers(batches: list[Any]) -> list[int]:
    tensors = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    return torch.cat(tensors)[:, 0, 0, 0].tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures: 0 to 5 are of class a, 6 to 11 of class b, two of these one level deeper."""
    for number in range(12):
        place = tmp_path / ("a" if number < 6 else "b") / ("deep" if number > 9 else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02}.png").write_bytes(encoded(number))
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "a" / "._00.png").write_text("what a Mac leaves")
    return tmp_path


def test_a_folder_with_classes(folder: Path) -> None:
    found = open_images(str(folder))
    assert len(found) == 12
    assert found.classes == 2
    [one, other] = draw(found, to_tensor, (8, 4), labelled=True, batch_size=3)
    assert sorted(numbers(one) + numbers(other)) == list(range(12))
    assert [len(batch[0]) for batch in one] == [3, 3, 2]
    for images, labels in [*one, *other]:
        assert labels.tolist() == [int(n > 5) for n in images[:, 0, 0, 0].tolist()]
    assert numbers(one) != sorted(numbers(one))


def test_draws_are_seeded(folder: Path) -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [numbers(s) for s in draw(open_images(str(folder)), to_tensor, (4, 3), seed=seed)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len({*drawn(0)[0], *drawn(0)[1]}) == 7


def test_no_classes_where_pictures_lie_beside_the_folders(folder: Path) -> None:
    (folder / "extra.png").write_bytes(encoded(12))
    assert open_images(str(folder)).classes is None
    assert open_images(str(folder / "a")).classes is None


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


@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path: Path, struct: bool) -> None:
    cells = [encoded(n) for n in range(12)]
    rows: list[Any] = [{"bytes": cell, "path": None} for cell in cells] if struct else cells
    table = pyarrow.table({"other": list(range(12)), "img": rows, "label": [0, 1, 2] * 4})
    for shard in range(2):
        part = table.slice(6 * shard, 6)
        pyarrow.parquet.write_table(part, tmp_path / f"{shard}.parquet", row_group_size=4)
    found = open_images(str(tmp_path))
    assert len(found) == 12
    assert found.classes == 3
    sets = draw(found, to_tensor, (7, 5), labelled=True, batch_size=2)
    assert sorted(numbers(sets[0] + sets[1])) == list(range(12))
    for images, labels in sets[0] + sets[1]:
        assert labels.tolist() == [n % 3 for n in images[:, 0, 0, 0].tolist()]
    assert len(open_images(str(tmp_path / "0.parquet"))) == 6


def test_a_corrupt_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"image": [encoded(0), b"nothing", None, encoded(1)]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"x\.parquet, row 1 can't be decoded"):
        draw(open_images(str(path)), to_tensor, (1, 1, 1, 1))
    [a, b] = draw(open_images(str(path)), to_tensor, (1, 1), skip_corrupt=True)
    assert sorted(numbers(a) + numbers(b)) == [0, 1]


def test_a_missing_label_is_told(tmp_path: Path) -> None:
    table = pyarrow.table({"image": [encoded(0), encoded(1)], "label": [0, None]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="some images have no label"):
        draw(open_images(str(tmp_path)), to_tensor, (2,), labelled=True)


@pytest.mark.parametrize("saved", ["dataset", "dict"])
def test_a_saved_dataset(tmp_path: Path, saved: str) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])}
    )
    rows = {"picture": [picture(n) for n in range(4)], "label": [0, 1, 0, 1]}
    made = datasets.Dataset.from_dict(rows, features=features)
    (made if saved == "dataset" else datasets.DatasetDict(test=made)).save_to_disk(tmp_path / "d")
    found = open_images(f"datasets:{tmp_path / 'd'}", "test")
    assert found.classes == 3
    [batches] = draw(found, to_tensor, (4,), labelled=True)
    assert sorted(numbers(batches)) == [0, 1, 2, 3]
    for images, labels in batches:
        assert labels.tolist() == [n % 2 for n in images[:, 0, 0, 0].tolist()]
    if saved == "dict":
        with pytest.raises(ValueError, match=r"has no split .*train.*--split"):
            open_images(f"datasets:{tmp_path / 'd'}", "train")


def test_the_sample_is_the_same_each_time_and_varied() -> None:
    found = open_images("sample")
    [first] = draw(found, to_tensor, (20,))
    [again] = draw(found, to_tensor, (20,))
    assert torch.equal(first[0], again[0])
    assert len({tuple(image.flatten().tolist()) for image in first[0]}) == 20
    assert found.classes is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", r"no such file or folder: .*missing; --data takes a folder"),
        ("empty", r"empty holds no images: the folder is empty"),
        ("texts", r"texts holds no images: none of its 1 files is an image"),
        ("texts/a.txt", r"single file and not \.parquet"),
        ("broken.parquet", r"no Parquet file or damaged"),
        ("columns.parquet", r"has no column of images .* only \['label'\]"),
        ("rows.parquet", r"it has no rows"),
    ],
)
def test_wrong_data_is_told(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    pyarrow.parquet.write_table(pyarrow.table({"label": [1]}), tmp_path / "columns.parquet")
    empty = pyarrow.table({"image": pyarrow.array([], pyarrow.binary())})
    pyarrow.parquet.write_table(empty, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        open_images(str(tmp_path / name))


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        ("datasets", "datasets:cifar10", r"install tp-amp\[data\]"),
        ("pyarrow", "x.parquet", r"install tp-amp\[cli\]"),
    ],
)
def test_missing_extras_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, data: str, message: str
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        open_images(data)
