"""To know tensors again: what changes when they are replaced or changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


def fingerprint(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """Changes when a parameter or buffer is replaced (pruning) or changed (training).

    A change through `.data` leaves no trace but in the values, of which a few of each tensor are
    looked at: training changes them all.
    """
    return tuple(
        (id(tensor), tensor._version, tensor.shape, some_values(tensor.detach()))
        for tensor in tensors
    )


def some_values(tensor: Tensor) -> bytes:
    """A few values of a tensor, to know it again."""
    if tensor.is_meta:
        return b""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()
    few = flat[:: max(1, len(flat) // 16)]
    return bytes(few.to("cpu", torch.float32).numpy().tobytes())
