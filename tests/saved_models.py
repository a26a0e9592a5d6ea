"""Models saved with half of every MLP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn
from toys import images
from zoo import TINY

import tp_amp


def save(loaded: Any, folder: Path) -> tp_amp.PruningPlan:
    importance = tp_amp.DIMAPImportance()
    plan = tp_amp.plan_from_importance(loaded.model, loaded.blank(), importance, 0.5)
    tp_amp.apply_plan(loaded.model, loaded.blank(), plan)
    origin = {"library": loaded.library, "name": loaded.name, "arguments": loaded.arguments}
    tp_amp.save_pruned(loaded.model, folder, plan, **origin)
    if loaded.processor:
        loaded.processor.save_pretrained(folder)
    return plan


def planned(model: nn.Module, inputs: Any) -> tp_amp.PruningPlan:
    """Half of every MLP, and one head less in every attention that can lose one."""
    inspected = tp_amp.inspect(model, inputs)
    widths = {mlp.down: max(1, mlp.width // 2) for mlp in inspected.mlps}
    widths |= {attention.down: attention.width - 1 for attention in inspected.attentions}
    return tp_amp.plan_from_importance(model, inputs, tp_amp.DIMAPImportance(), widths)


def vit(**arguments: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, **{**TINY, **arguments})


def saved_vit(folder: Path) -> Path:
    """A folder with a pruned ViT."""
    model = vit()
    inputs = images(1, size=32, channels=3)
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, inputs, plan)
    tp_amp.save_pruned(model, folder, plan)
    return folder
