"""Small pictures, encoded and as tensors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


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


def two_classes(folder: Path) -> Path:
    """Twelve pictures: 0 to 5 are of class a, 6 to 11 of class b, two of these one level deeper."""
    for number in range(12):
        place = folder / ("a" if number < 6 else "b") / ("deep" if number > 9 else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02}.png").write_bytes(encoded(number))
    (folder / "a" / "notes.txt").write_text("no picture")
    (folder / "a" / "._00.png").write_text("what a Mac leaves")
    return folder
