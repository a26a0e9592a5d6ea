"""Layers that see few tokens are not gutted."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import tp_amp


def test_a_pooling_head_that_sees_a_token_an_image_is_left_wide() -> None:
    """With 32 images, 31 channels rebuild its tokens exactly: it was cut to 31 at every target."""
    torch.manual_seed(0)
    arguments = {"embed_dim": 48, "num_heads": 2, "depth": 3, "img_size": 64}
    model = timm.create_model("vit_base_patch16_siglip_224", **arguments).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.12)
    images = [torch.randn(8, 3, 64, 64) for _ in range(4)]
    importance = tp_amp.ReconstructionImportance(data=images)
    plan = tp_amp.plan_for_target(model, images[0][:1], importance, {"params": 0.8})
    head, *blocks = sorted(plan.widths.items())
    assert head[0] == "attn_pool.mlp.fc2"
    assert head[1] >= sum(width for _, width in blocks) / len(blocks)


@pytest.mark.parametrize("count", [2, 5, 20])
def test_few_images_are_not_worse_than_no_compensation(count: int) -> None:
    """On other images: an exact fit of few tokens was worse than the cut alone."""
    torch.manual_seed(0)
    arguments = {"embed_dim": 48, "num_heads": 2, "depth": 2, "img_size": 32, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    images, other = torch.randn(count, 3, 32, 32), torch.randn(256, 3, 32, 32)
    plan = tp_amp.plan_from_importance(model, images[:1], tp_amp.DIMAPImportance(), 0.5)
    errors = {}
    with torch.no_grad():
        dense = model(other)
        for method in ("none", "affine"):
            pruned = copy.deepcopy(model)
            tp_amp.compensate(pruned, plan, [images], method=method, progress=False)
            errors[method] = float((pruned(other) - dense).square().mean())
    assert errors["affine"] <= errors["none"]
