"""Reshapes to sizes that a forward pass writes down, made to fit the heads that are left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_RESHAPES = (Tensor.view, Tensor.reshape, torch.reshape)
_UNFLATTENS = (Tensor.unflatten, torch.unflatten)


class FittingReshapes(TorchFunctionMode):
    """While it is entered, sizes for all dense heads become those of the heads that are left.

    Only the last sizes are changed, heads and their width or the channels of all heads, and only
    where they do not fit. A number of images or tokens that equals one of heads stands before them,
    so it is never taken for it; a forward pass with heads elsewhere fails.

    Args:
        dense: heads that the sizes are written for.
        kept: heads that are left.
        block: channels of one head.
    """

    def __init__(self, dense: int, kept: int, block: int) -> None:
        super().__init__()
        self.dense, self.kept, self.block = dense, kept, block

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Change the sizes of a reshape."""
        if func in _RESHAPES and len(args) > 1 and not isinstance(args[1], torch.dtype):
            sizes = args[1] if isinstance(args[1], Sequence) else args[1:]
            last = args[0].shape[-1] if args[0].dim() else 1
            args = (args[0], self.fitting(sizes, args[0].numel(), last))
        elif func in _UNFLATTENS and len(args) > 2:
            entries = args[0].shape[args[1]]
            args = (*args[:2], self.fitting(args[2], entries, entries))
        return func(*args, **(kwargs or {}))

    def fitting(self, sizes: Sequence[int], entries: int, last: int) -> tuple[int, ...]:
        """Sizes for the heads that are left.

        Args:
            sizes: as the forward pass writes them down.
            entries: what they are to multiply to.
            last: entries of the last dimension before, in which heads may lie side by side.
        """
        sizes, left = tuple(sizes), self.kept * self.block
        fits = -1 in sizes or math.prod(sizes) == entries
        # Channels divided by the dense number of heads may fit by chance.
        widths = (-1, left // self.dense) if fits else (self.block, left // self.dense)
        changed = sizes
        if len(sizes) > 1 and sizes[-2] == self.dense and sizes[-1] in widths:
            changed = (*sizes[:-2], self.kept, self.block)
        elif not fits and sizes and sizes[-1] % (self.dense * self.block) == 0:
            changed = (*sizes[:-1], sizes[-1] // self.dense * self.kept)
        if fits:
            return changed if last % left == 0 else sizes
        return changed if math.prod(changed) == entries else sizes
