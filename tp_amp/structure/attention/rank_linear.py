"""Linears that are narrow inside and as wide as before to the attention that calls them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Part:
    """The channels of all heads that stand side by side: `kept`, the first ones, of `width`."""

    heads: int
    kept: int
    width: int

    @property
    def channels(self) -> int:
        """How many the Linear holds."""
        return self.heads * self.kept

    def padded(self, values: Tensor) -> Tensor:
        """`(..., heads * kept)` with zeros for the channels that were cut."""
        split = values.reshape(*values.shape[:-1], self.heads, self.kept)
        return functional.pad(split, (0, self.width - self.kept)).flatten(-2)

    def taken(self, values: Tensor) -> Tensor:
        """The kept channels of `(..., heads * width)`."""
        split = values.reshape(*values.shape[:-1], self.heads, self.width)
        return split[..., : self.kept].flatten(-2)


class RankLinear(nn.Linear):
    """A Linear whose weight holds some channels of each head alone.

    The attention reads zeros for the others. Logits and averages of values are then those of the
    kept channels, at the dense scale, in whatever way the module computes them.

    Attributes:
        gives: the parts of its output, `(query, key, value)` or some of them; none as it is.
        reads: the part of its input, if that is of heads.
    """

    gives: tuple[Part, ...]
    reads: Part | None

    def forward(self, values: Tensor) -> Tensor:
        """Apply the narrow weight: `(..., dense inputs)` to `(..., dense outputs)`."""
        if self.reads is not None:
            values = self.reads.taken(values)
        output = super().forward(values)
        if not self.gives:
            return output
        parts = torch.split(output, [part.channels for part in self.gives], -1)
        padded = [part.padded(x) for part, x in zip(self.gives, parts, strict=True)]
        return torch.cat(padded, -1)


def held_inputs(layer: nn.Module, values: Tensor) -> Tensor:
    """Of what a layer is called with, `(tokens, inputs)`, what its weight has columns for."""
    reads = layer.reads if isinstance(layer, RankLinear) else None
    return values if reads is None else reads.taken(values)


def held_outputs(layer: nn.Module, values: Tensor) -> Tensor:
    """Of what a layer gives, `(tokens, outputs)`, what its weight has rows for."""
    gives = layer.gives if isinstance(layer, RankLinear) else ()
    if not gives:
        return values
    parts = torch.split(values, [part.heads * part.width for part in gives], -1)
    return torch.cat([part.taken(x) for part, x in zip(gives, parts, strict=True)], -1)
