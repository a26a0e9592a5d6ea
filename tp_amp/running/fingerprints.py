"""To know tensors again: what changes when they are replaced or changed."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Fingerprint:
    """Knows some tensors again: the very same ones at once, and copies of them by their values.

    Pruning replaces parameters and training changes them. A change through `.data` leaves no trace
    but in the values, of which a few of each tensor are looked at: training changes them all.

    Args:
        tensors: parameters or buffers.

    Example:
        >>> weight = torch.randn(3, 2)
        >>> known = Fingerprint([weight])
        >>> known.fits([weight.clone()]), known.fits([weight + 1])
        (True, False)
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        self._identity = _identity(tensors)
        self._digest = _values(tensors)

    def fits(self, tensors: Iterable[Tensor]) -> bool:
        """Whether tensors are these, or have the same shapes, dtypes and values."""
        tensors = list(tensors)
        return self._identity == _identity(tensors) or self._digest == _values(tensors)


def _identity(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(id(t), t._version, t.shape, some_values(t.detach())) for t in tensors]


def _values(tensors: Sequence[Tensor]) -> str:
    """A digest of all values; of tensors without values none, which fits nothing."""
    if any(tensor.is_meta for tensor in tensors):
        return f"no values {id(tensors)}"
    return digest(("", tensor) for tensor in tensors)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A short name for names, shapes, dtypes and values."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = resolved(tensor.detach()).cpu().contiguous().flatten()
        found.update(values.view(torch.uint8).numpy().data)
    return found.hexdigest()


def in_second_half(images: Tensor) -> Tensor:
    """Deal images into two halves, by their values alone: `(images,)`, True for the second.

    So an image falls into the same half in whatever batch, at whatever place and on whatever rank
    it comes, and the same image twice falls into one half.
    """
    flat = images.detach().flatten(1)
    if flat.is_meta or not flat.shape[1]:
        return torch.arange(len(images)) % 2 == 1
    flat = torch.view_as_real(resolved(flat)).flatten(1) if flat.is_complex() else flat
    few = flat[:, :: max(1, flat.shape[1] // 16)].to("cpu", torch.float32).numpy()
    return torch.tensor([zlib.crc32(row.tobytes()) % 2 == 1 for row in few])


def resolved(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its values: torch may only note that they are conjugates."""
    return tensor.resolve_conj().resolve_neg()


def some_values(tensor: Tensor) -> bytes:
    """A few values of a tensor, to know it again."""
    if tensor.is_meta:
        return b""
    tensor = resolved(tensor)
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()
    few = flat[:: max(1, len(flat) // 16)]
    return bytes(few.to("cpu", torch.float32).numpy().tobytes())
