"""An attention module's own forward pass, on arguments fit for the heads that are left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.structure.attention.fitting_reshapes import FittingReshapes


@dataclass(frozen=True)
class HeadCut:
    """What a forward pass with fewer heads must know of the dense one.

    Attributes:
        dense: number of heads of the dense module.
        kept: those that are left.
        arguments: positions and names of the arguments `(..., heads, rows, columns)` with an entry
            for each dense head: rotary embeddings, position biases.
        width: what the input shall say is its width, None for the truth.
        block: channels of one head, where sizes that the code writes down are changed.
    """

    dense: int
    kept: tuple[int, ...]
    arguments: tuple[int | str, ...] = ()
    width: int | None = None
    block: int | None = None

    def take(self, values: Any, dim: int) -> Any:
        """Take the kept heads of what has an entry for each dense head; all else broadcasts."""
        if not isinstance(values, Tensor) or values.dim() < 3 or values.shape[dim] != self.dense:
            return values
        return values.index_select(dim, torch.tensor(self.kept, device=values.device))


class HeadForward(nn.Module):
    """Runs the module's own forward on arguments fit for the heads that are left."""

    head_cut: HeadCut

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take the kept heads of per-head arguments; let the input say the width of the heads."""
        cut = self.head_cut
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for key in set(cut.arguments) & set(given):
            given[key] = cut.take(given[key], -3)
        if cut.width is not None:
            first = next(key for key, value in given.items() if isinstance(value, Tensor))
            given[first] = _SaysWidth(given[first], cut.width)
        positional = (given[place] for place in range(len(args)))
        named = {name: given[name] for name in kwargs}
        if cut.block is None:
            return super().forward(*positional, **named)
        with FittingReshapes(cut.dense, len(cut.kept), cut.block):
            return super().forward(*positional, **named)


class _SaysWidth:
    """A tensor that says another width when asked for its shape, and is itself in all else.

    Many attention modules reshape the heads to the width of their input, which is not theirs any
    more. No subclass of Tensor, which compilers refuse.
    """

    def __init__(self, tensor: Tensor, width: int) -> None:
        self.tensor = tensor
        self.shape = (*tensor.shape[:-1], width)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def permute(self, *dims: Any) -> Any:
        order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
        return self._moved(self.tensor.permute(*dims), order[-1])

    def transpose(self, first: int, second: int) -> Any:
        last = {first: second, second: first}
        place = last.get(-1, last.get(self.tensor.dim() - 1, -1))
        return self._moved(self.tensor.transpose(first, second), place)

    def _moved(self, tensor: Tensor, last: int) -> Any:
        """What has its dimensions in another order, which says the width while that is the last."""
        kept = last % tensor.dim() == tensor.dim() - 1
        return _SaysWidth(tensor, self.shape[-1]) if kept else tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_plain(args), **{key: _plain(value) for key, value in (kwargs or {}).items()})


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    return value.tensor if isinstance(value, _SaysWidth) else value
