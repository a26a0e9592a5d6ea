"""CIFAR-10 as tensors, from Parquet in the Hugging Face layout or from image folders."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLASSES = 10
SIZE = 32
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def load_split(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Load one split as uint8 images `(images, 3, 32, 32)` and int64 labels `(images,)`.

    Args:
        data: a folder with `<split>.parquet`, or with `<split>/<class>/<image files>`.
        split: "train" or "test".

    Raises:
        FileNotFoundError: neither layout is there.
    """
    if (data / f"{split}.parquet").is_file():
        return _from_parquet(data / f"{split}.parquet")
    if (data / split).is_dir():
        return _from_folder(data / split)
    raise FileNotFoundError(
        f"{data} holds neither {split}.parquet nor a folder {split}/<class>/<images>; "
        "pass the folder that does with --data"
    )


def load_test(data: Path, count: int) -> tuple[Tensor, Tensor]:
    """Draw test images, always the same ones, normalised, with their labels; all of them for 0."""
    images, labels = load_split(data, "test")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    picked = order[: count or None]
    return normalize(images[picked]), labels[picked]


def normalize(images: Tensor) -> Tensor:
    """Turn uint8 images `(images, 3, height, width)` into standardised float32."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def _from_parquet(path: Path) -> tuple[Tensor, Tensor]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    image_column = next(name for name in ("img", "image") if name in table.column_names)
    images = [Image.open(io.BytesIO(row["bytes"])) for row in table[image_column].to_pylist()]
    return _stack(images), torch.tensor(table["label"].to_pylist())


def _from_folder(folder: Path) -> tuple[Tensor, Tensor]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(path, label) for label, c in enumerate(classes) for path in sorted(c.iterdir())]
    return _stack([Image.open(path) for path, _ in files]), torch.tensor([y for _, y in files])


def _stack(images: list[Image.Image]) -> Tensor:
    arrays = [np.asarray(image.convert("RGB").resize((SIZE, SIZE))) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
