"""Two Linears with something in between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Packed(nn.Module):
    """A gated MLP with both halves in one layer, and ways to get its channels wrong."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down, self.kind = nn.Linear(4, 16), nn.Linear(8, 4), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "interleaved":
            gate, value = self.up(x)[..., ::2], self.up(x)[..., 1::2]
        else:
            gate, value = self.up(x).chunk(2, -1)
        if self.kind == "swapped":
            value = value.flip(-1)
        elif self.kind == "shifted":
            value = value.roll(1, -1)
        elif self.kind == "gate first":
            gate, value = value, gate
        return self.down(nn.functional.silu(gate) * value)


class Between(nn.Module):
    """Two-dimensional inputs, as many as hidden channels, with something in between."""

    def __init__(self, between: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.randn(8, 8))
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(torch.relu(self.up(x)), self.table))
