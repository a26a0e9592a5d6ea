"""Images from every source, drawn at random into sets that share none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from pictures import encoded, numbers, picture, to_tensor, two_classes

from tp_amp.data.drawing import draw
from tp_amp.data.images import open_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_classes(tmp_path)


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


def test_no_classes_where_pictures_lie_beside_the_folders(folder: Path) -> None:
    (folder / "extra.png").write_bytes(encoded(12))
    assert open_images(str(folder)).classes is None
    assert open_images(str(folder / "a")).classes is None


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
