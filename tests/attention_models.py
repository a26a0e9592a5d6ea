"""Small attentions, and all that a module holds."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from toys import perturbed


def small(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 32, "num_heads": 4, "depth": 1, "num_classes": 5}
    torch.manual_seed(0)
    return perturbed(timm.create_model(name, **{**sizes, **arguments}))


def snapshot(model: nn.Module) -> list[object]:
    """Every module's class, attributes, parameters and buffers, as objects."""
    return [
        (
            type(module),
            *({key: id(value) for key, value in part.items()} for part in parts),
            [
                tensor._version
                for tensor in (*parts[1].values(), *parts[2].values())
                if tensor is not None
            ],
        )
        for module in model.modules()
        for parts in [(vars(module), module._parameters, module._buffers)]
    ]


class PerHead(nn.Module):
    """q, k and v of one head lie together, which is not how this package cuts them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(8, 96), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], self.num_heads, 3, 8).permute(3, 0, 2, 1, 4)
        hidden = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(hidden.transpose(1, 2).flatten(2))
