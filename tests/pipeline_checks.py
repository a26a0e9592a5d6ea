"""A real class through all that a user does, on a model that was never called before."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from toys import perturbed
from zoo_checks import check_halves, left_as_it_was, tensors
from zoo_more import Tiny

import tp_amp

# The recommended recipe, with few steps.
RECIPE: dict[str, Any] = {
    "every_linear": True,
    "token_weights": "sensitivity",
    "refine": 1,
    "progress": False,
}


def held(model: nn.Module, entry: Tiny) -> list[Tensor]:
    """All that a model gives, hidden states too where it gives any."""
    inputs = entry.inputs | ({"output_hidden_states": True} if entry.states else {})
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(**inputs))


def size_without_some(found: tp_amp.Inspection) -> float:
    """Parameters of a model that has lost two fifths of its MLPs."""
    return found.shares["total"].parameters - 0.4 * found.shares["MLPs"].parameters


def through_the_pipeline(name: str, entry: Tiny, folder: Path) -> None:
    """Check inspect, apply_plan, plan_for_target, compensate, save_pruned and load_pruned."""
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
    torch.manual_seed(0)
    model = perturbed(entry.make())
    dense, third = copy.deepcopy(model), copy.deepcopy(model)
    expected = held(copy.deepcopy(model), entry)
    batches = [entry.batch(4, 1), entry.batch(4, 2)]
    importance = tp_amp.ReconstructionImportance(data=batches)
    with left_as_it_was(model, entry.inputs):
        found = tp_amp.inspect(model, entry.inputs)
        target = size_without_some(found)
        plan = tp_amp.plan_for_target(model, entry.inputs, importance, {"params": target})
    assert len(found.mlps) == entry.count, [mlp.down for mlp in found.mlps]
    check_halves(name, copy.deepcopy(model), found.mlps, entry.inputs, traced=False)
    assert all(map(torch.equal, held(model, entry), expected))
    cut = copy.deepcopy(dense)
    tp_amp.apply_plan(cut, plan)
    size = sum(parameter.numel() for parameter in cut.parameters())
    assert 0.97 * target < size <= target
    fitted = tp_amp.compensate(model, plan, batches, **RECIPE)
    assert {name for name, width in plan.widths.items() if name in fitted}
    assert all(c.error <= c.error_before * (1 + 1e-6) for c in fitted.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    tp_amp.save_pruned(model, folder, plan)
    tp_amp.load_pruned(third, folder)
    assert all(map(torch.equal, held(third, entry), held(model, entry)))
