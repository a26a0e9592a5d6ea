"""The forward pass of an attention that went as a whole: its projection gives its bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Removed:
    """How an attention that went answers.

    Attributes:
        projection: path of its output projection, as seen from the attention.
        values: how many its forward gives: the output and None for all others; 0 for the output
            alone.
    """

    projection: str
    values: int


class RemovedForward(nn.Module):
    """Calls the projection, which reads nothing any more, and nothing else.

    Attributes:
        removed: how it answers.
    """

    removed: Removed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Give the projection's bias for each token of the first tensor."""
        tokens = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        # A part of them, so that what comes before has gradients in training.
        output = self.get_submodule(self.removed.projection)(tokens[..., :0])
        return (output, *[None] * (self.removed.values - 1)) if self.removed.values else output
