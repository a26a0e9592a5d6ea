"""Layers that see few tokens are not gutted."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import tp_amp


def small(kind: str, seed: int = 0) -> nn.Module:
    """A model of random weights, large enough to matter."""
    torch.manual_seed(seed)
    name, arguments = {
        "vit": ("vit_small_patch14_dinov2", {"img_size": 56, "num_heads": 2, "depth": 3}),
        "siglip": ("vit_base_patch16_siglip_224", {"img_size": 64, "num_heads": 2, "depth": 3}),
        "swin": (
            "swin_tiny_patch4_window7_224",
            {"img_size": 56, "num_heads": (2, 2, 4), "depths": (1, 2, 1)},
        ),
    }[kind]
    width = 24 if kind == "swin" else 48
    model = timm.create_model(name, embed_dim=width, num_classes=0, **arguments).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.12)
        elif parameter.numel() and float(parameter.detach().abs().max()) < 1e-3:
            nn.init.normal_(parameter, std=0.3)  # a LayerScale next to nought
    return model


def pictures(kind: str, count: int, seed: int) -> torch.Tensor:
    side = {"vit": 56, "siglip": 64, "swin": 56}[kind]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("target", [0.8, 0.65])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_pooling_head_that_sees_a_token_an_image_is_left_wide(seed: int, target: float) -> None:
    """With 32 images, 31 channels rebuild its tokens exactly: it was cut to 31 at every target.

    And similarities that are saturated made its errors all but free.
    """
    model, images = small("siglip", seed), list(pictures("siglip", 32, 1).split(8))
    importance = tp_amp.ReconstructionImportance(data=images)
    plan = tp_amp.plan_for_target(model, images[0][:1], importance, {"params": target})
    head, *blocks = sorted(plan.widths.items())
    assert head[0] == "attn_pool.mlp.fc2"
    assert head[1] >= sum(width for _, width in blocks) / len(blocks)


@pytest.mark.parametrize("every_linear", [False, True])
@pytest.mark.parametrize("count", [5, 20, 80])
@pytest.mark.parametrize("kind", ["vit", "siglip", "swin"])
def test_compensation_is_never_worse_than_none_on_other_images(
    kind: str, count: int, every_linear: bool
) -> None:
    """Of the plan that the same few images gave."""
    model, images = small(kind), list(pictures(kind, count, 1).split(8))
    importance = tp_amp.ReconstructionImportance(data=images)
    plan = tp_amp.plan_for_target(model, images[0][:1], importance, {"params": 0.65})
    other = pictures(kind, 64, 2)
    cosines = {}
    with torch.no_grad():
        dense = model(other)
        for method in ("none", "affine"):
            pruned = copy.deepcopy(model)
            options = {"method": method, "every_linear": every_linear and method != "none"}
            tp_amp.compensate(pruned, plan, images, progress=False, **options)
            cosines[method] = float(nn.functional.cosine_similarity(pruned(other), dense).mean())
    assert cosines["affine"] > cosines["none"]


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
