"""A model that draws in its forward pass, as masked autoencoders do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from toys import toy


class Drawing(nn.Module):
    """Sees half of the images' tokens, others each time."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = toy()

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.toy
        tokens = inner.embed(x).flatten(2).transpose(1, 2)
        tokens = tokens[:, torch.randperm(tokens.shape[1])[:2]]
        output: Tensor = inner.head(inner.norm(inner.blocks(tokens)).mean(1))
        return output
