"""Tensors that are held between the steps of a long run: in memory up to a bound, then in files."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Held(Generic[T]):
    """One value on a shelf; it leaves the shelf when nothing refers to it any more."""

    def __init__(self, value: T | None, path: str | None = None, device: Any = None) -> None:
        self._value, self._path, self._device = value, path, device

    def get(self) -> T:
        """The value, bit for bit as it was put there."""
        if self._path is None:
            return self._value  # type: ignore[return-value]
        loaded: Any = torch.load(self._path, map_location=self._device, weights_only=True)
        return loaded  # type: ignore[no-any-return]


class Shelf:
    """Holds tensors in memory up to a number of bytes, and others in files of a folder of its own.

    The folder is made once it is needed and removed with the shelf. What is no tensor stays in
    memory and is not counted.

    Args:
        memory_bytes: how much is held in memory; all where None.

    Attributes:
        bytes: held in memory now.
        spilled: how many tensors were written to files so far.

    Example:
        >>> shelf = Shelf(memory_bytes=100)
        >>> held = [shelf.hold(torch.full((20,), float(i))) for i in range(3)]
        >>> shelf.bytes, shelf.spilled, float(held[2].get()[0])
        (80, 2, 2.0)
        >>> shelf.close()
    """

    def __init__(self, memory_bytes: int | None = None) -> None:
        self._bound = math.inf if memory_bytes is None else memory_bytes
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.bytes = 0
        self.spilled = 0

    def hold(self, value: T) -> Held[T]:
        """Put a value on the shelf; it must not be changed afterwards."""
        if not isinstance(value, Tensor):
            return Held(value)
        size = value.numel() * value.element_size()
        if self.bytes + size <= self._bound:
            held: Held[T] = Held(value)
            self.bytes += size
            weakref.finalize(held, self._gone, size)
            return held
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tp_amp-")
        path = os.path.join(self._folder.name, f"{self.spilled}.pt")
        self.spilled += 1
        torch.save(value.detach().clone(), path)  # a clone: of a view, all it is a view of is saved
        held = Held(None, path, value.device)
        weakref.finalize(held, _remove, path)
        return held

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gone(self, size: int) -> None:
        self.bytes -= size


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)
