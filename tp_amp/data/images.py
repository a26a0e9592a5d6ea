"""Images by name for the command line: a folder, Parquet, a `datasets` source or the sample."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tp_amp.data.image_places import DATASETS, KINDS, SAMPLE, check_place

_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img", "pixel_values"), ("label", "labels")
_SAMPLE_SIZE = 96


class Images(Protocol):
    """Pictures that are opened one at a time."""

    classes: int | None
    """How many classes the labels come from; None where that is not known."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where a picture is, for messages."""

    def read(self, index: int) -> tuple[Any, int | None]:
        """Open a picture; gives it, and its label if it has one."""


@dataclass
class Folder:
    """Image files, at any depth; folders of the first level are classes, in alphabetical order."""

    path: Path
    files: list[Path]
    classes: int | None = None
    _labels: list[int | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        tops = [file.relative_to(self.path).parts[:-1][:1] for file in self.files]
        names = sorted(set(tops))
        if () not in names and len(names) > 1:
            self.classes = len(names)
        self._labels = [names.index(top) if self.classes else None for top in tops]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:  # noqa: D102
        return str(self.files[index])

    def read(self, index: int) -> tuple[Any, int | None]:  # noqa: D102
        return _decode(self.files[index]), self._labels[index]


class Parquet:
    """Rows with a column of encoded images: bytes, or a struct with `bytes` (Hugging Face)."""

    classes: int | None = None

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ImportError("install tp-amp[cli] (pyarrow) to read Parquet") from error
        self.path, self.rows = path, []
        self.files: list[Any] = []
        for file in files:
            try:
                opened = parquet.ParquetFile(file)
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(
                    f"{file} is no Parquet file or damaged ({_first_line(error)}); get it again"
                ) from error
            number = len(self.files)
            self.files.append(opened)
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                self.rows += [(number, group, row) for row in range(rows)]
        schema = self.files[0].schema_arrow
        self.column = self._image_column(schema)
        self.label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
        if self.label is not None and pyarrow.types.is_integer(schema.field(self.label).type):
            columns = [file.read(columns=[self.label])[self.label] for file in self.files]
            self.classes = _classes([n for c in columns for n in c.to_pylist() if n is not None])
        self._group: tuple[tuple[int, int], Any] | None = None

    def _image_column(self, schema: Any) -> str:
        from pyarrow import types

        def holds_bytes(kind: Any) -> bool:
            if types.is_struct(kind):
                return any(part.name == "bytes" for part in kind)
            return bool(types.is_binary(kind) or types.is_large_binary(kind))

        found = [name for name in schema.names if holds_bytes(schema.field(name).type)]
        if not found:
            raise ValueError(
                f"{self.path} has no column of images (bytes, or a struct with bytes), only "
                f"{schema.names}; pass a file that has one"
            )
        named = [name for name in _IMAGE_COLUMNS if name in found]
        return str((named or found)[0])

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self.path}, row {index}"

    def read(self, index: int) -> tuple[Any, int | None]:  # noqa: D102
        file, group, row = self.rows[index]
        if self._group is None or self._group[0] != (file, group):
            columns = [self.column, *([self.label] if self.label else [])]
            self._group = (file, group), self.files[file].read_row_group(group, columns=columns)
        table = self._group[1]
        content = table[self.column][row].as_py()
        content = content.get("bytes") if isinstance(content, dict) else content
        label = table[self.label][row].as_py() if self.label else None
        return _decode(io.BytesIO(content or b"")), label if isinstance(label, int) else None


class Dataset:
    """A source of the `datasets` library: a name on the hub, or a folder of `save_to_disk`."""

    def __init__(self, path: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("install tp-amp[data] (datasets) for --data datasets:...") from error
        try:
            if (Path(path) / "state.json").is_file() or (
                Path(path) / "dataset_dict.json"
            ).is_file():
                loaded: Any = datasets.load_from_disk(path)
                self.rows: Any = loaded[split] if isinstance(loaded, dict) else loaded
            else:
                self.rows = datasets.load_dataset(path, split=split)
        except KeyError as error:
            raise ValueError(f"datasets:{path} has no split {error}; see --split") from error
        except Exception as error:
            raise ValueError(
                f"datasets:{path} can't be loaded, split {split} ({_first_line(error)}); check "
                "name, --split and network"
            ) from error
        self.path, features = path, self.rows.features
        columns = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        if not columns:
            raise ValueError(f"datasets:{path} has no column of images, only {list(features)}")
        self.column = columns[0]
        self.label = next((name for name in _LABEL_COLUMNS if name in features), None)
        self.classes: int | None = getattr(features.get(self.label), "num_classes", None)
        if self.classes is None and self.label and "int" in str(features[self.label].dtype):
            self.classes = _classes(self.rows[self.label])
        # Bytes, so that a corrupt image is found by the same code as everywhere.
        self.rows = self.rows.cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:  # noqa: D102
        return f"datasets:{self.path}, row {index}"

    def read(self, index: int) -> tuple[Any, int | None]:  # noqa: D102
        row = self.rows[index]
        content = row[self.column]
        label = row[self.label] if self.label else None
        source = io.BytesIO(content["bytes"]) if content["bytes"] is not None else content["path"]
        return _decode(source), label if isinstance(label, int) else None


class Sample:
    """Discs and stripes in random colours on a gradient, drawn on the spot.

    Enough to try every command without a network or data. Nobody should choose neurons of a model
    that is in use by them: they are no photographs. There are no labels.
    """

    classes: int | None = None

    def __len__(self) -> int:
        return 4096

    def name(self, index: int) -> str:  # noqa: D102
        return f"sample image {index}"

    def read(self, index: int) -> tuple[Any, int | None]:  # noqa: D102
        from PIL import Image

        random = np.random.default_rng(index)
        y, x = np.mgrid[0:_SAMPLE_SIZE, 0:_SAMPLE_SIZE] / _SAMPLE_SIZE
        colours = random.uniform(0, 255, (6, 3))
        picture = x[..., None] * colours[0] + (1 - x[..., None]) * colours[1]
        for i in range(random.integers(1, 4)):
            centre, radius = random.uniform(0.2, 0.8, 2), random.uniform(0.08, 0.3)
            inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
            picture[inside] = colours[2 + i]
        angle, period = random.uniform(0, math.pi), random.uniform(0.05, 0.3)
        stripes = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period) > 0.6
        picture[stripes] = 0.5 * picture[stripes] + 0.5 * colours[5]
        return Image.fromarray(picture.astype(np.uint8)), None


def open_images(data: str, split: str = "train") -> Images:
    """Find the images that `--data` names; none is decoded yet.

    Args:
        data: a folder, a Parquet file, `datasets:NAME` or `sample`.
        split: of a `datasets` source.

    Raises:
        ValueError: there are none, or the source can't be read.
        ImportError: the source needs an extra.
    """
    check_place(data)
    if data == SAMPLE:
        return Sample()
    if data.startswith(DATASETS):
        return Dataset(data.removeprefix(DATASETS), split)
    path = Path(data)
    if path.is_file():
        return _not_empty(Parquet(path, [path]), data)
    from PIL import Image

    endings = Image.registered_extensions()
    entries = [entry for entry in sorted(path.rglob("*")) if entry.is_file()]
    files = [
        entry
        for entry in entries
        if entry.suffix.lower() in endings and not entry.name.startswith(".")
    ]
    if not files and (shards := [entry for entry in entries if entry.suffix == ".parquet"]):
        return _not_empty(Parquet(path, shards), data)
    if not files:
        holds = (
            f"none of its {len(entries)} files is an image" if entries else "the folder is empty"
        )
        raise ValueError(f"{data} holds no images: {holds}; --data takes {KINDS}")
    return Folder(path, files)


def _not_empty(images: Images, data: str) -> Images:
    if not len(images):
        raise ValueError(f"{data} holds no images: it has no rows; --data takes {KINDS}")
    return images


def _classes(labels: Sequence[int]) -> int | None:
    """How many classes there are if all of them occur."""
    return max(labels) + 1 if len(labels) else None


class UnreadableImage(ValueError):
    """The bytes are no picture that Pillow can decode."""


def _decode(source: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source) as picture:
            return picture.copy()
    except UnidentifiedImageError as error:
        raise UnreadableImage("no known format") from error
    except Exception as error:  # damaged bytes fail in many ways, SyntaxError and struct.error too
        raise UnreadableImage(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
