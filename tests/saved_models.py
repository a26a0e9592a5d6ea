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
    sites = {site.down: site for site in (*inspected.mlps, *inspected.attentions)}
    keep = {m.down: list(range(m.width))[::2][: max(1, m.width // 2)] for m in inspected.mlps}
    keep |= {a.down: [head for head in range(a.width) if head != 1] for a in inspected.attentions}
    dense = {name: site.width for name, site in sites.items()}
    return tp_amp.PruningPlan(keep, dense, sites=sites)


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
