"""Small models of kinds that the toys are not: packed gates, and convolutions."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn


def vit(**arguments: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3} | arguments
    arguments = {"depth": 1, "num_classes": 5} | arguments
    return timm.create_model("vit_tiny_patch16_224", **arguments).eval()


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3)
        self.second = nn.Conv2d(12, 8, 3)
        self.head = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().flatten(1))


def packed() -> Any:
    model = vit(mlp_layer=partial(timm.layers.GluMlp, gate_last=False))
    assert model.blocks[0].mlp.fc1.out_features == 2 * model.blocks[0].mlp.fc2.in_features
    return model
