"""Models whose transformer blocks are looked for."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn


def vit(**arguments: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3} | arguments
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5, **arguments).eval()


def swin(name: str = "swin_tiny_patch4_window7_224", **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        name,
        img_size=32,
        patch_size=2,
        window_size=2,
        embed_dim=8,
        depths=(2, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
        num_classes=5,
        **arguments,
    ).eval()


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
        )
        return transformers.ViTForImageClassification(config).eval()
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=2,
    )
    return transformers.SwinForImageClassification(config).eval()


class OldAttention(nn.Module):
    """Names and nesting of Hugging Face's layers before version 5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Module()
        for name in ("query", "key", "value"):
            setattr(self.attention, name, nn.Linear(width, width))
        self.attention.num_attention_heads = 3
        self.output = nn.Module()
        self.output.dense = nn.Linear(width, width)


def old_hugging_face(width: int = 12, hidden: int = 20) -> nn.Module:
    model = nn.Module()
    model.layer = nn.ModuleList()
    for _ in range(2):
        block = nn.Module()
        block.attention = OldAttention(width)
        block.intermediate = nn.Module()
        block.intermediate.dense = nn.Linear(width, hidden)
        block.output = nn.Module()
        block.output.dense = nn.Linear(hidden, width)
        model.layer.append(block)
    model.pooler = nn.Linear(width, width)
    return model
