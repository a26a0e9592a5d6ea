"""A ViT and a Swin of weights so large that every channel matters, and images for both."""

from __future__ import annotations

import small_models
import timm
import torch
from torch import Tensor, nn
from toys import images


def vit(width: int = 24, heads: int = 3, std: float = 0.3) -> nn.Module:
    model: nn.Module = small_models.vit(img_size=32, depth=2, embed_dim=width, num_heads=heads)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def swin(std: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=4,
        window_size=2,
        embed_dim=16,
        depths=(1, 1, 1),  # the first stage's stream can't be rotated, the others' can
        num_heads=(2, 4, 8),
        num_classes=5,
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
    return model.eval()


def pictures(count: int = 16, seed: int = 1) -> list[Tensor]:
    return list(images(count, seed, size=32, channels=3).split(8))
