"""Costs against models that are really cut; the bisection against functions that are known."""

import copy
import math

import pytest
import timm
from toys import images
from zoo import SWIN_HEADS

import tp_amp
from tp_amp.budget.budget import Budget
from tp_amp.structure.model_structure import ModelStructure


def swin_budget(target: dict[str, float]) -> tuple[Budget, object, object]:
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN_HEADS)
    inputs = images(1, size=64, channels=3)
    structure = ModelStructure(model, inputs)
    sites = [*structure.mlps, *structure.attentions[0]]
    return Budget(target, structure, sites), model, inputs


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_cost_is_that_of_the_model_cut_for_real(kind: str) -> None:
    budget, model, inputs = swin_budget({kind: 0.5})
    widths = {name: max(1, width // 3) for name, width in budget.widths.items()}
    cut = copy.deepcopy(model)
    plan = tp_amp.PruningPlan({name: list(range(width)) for name, width in widths.items()})
    tp_amp.apply_plan(cut, inputs, plan)
    total = tp_amp.inspect(cut, inputs).shares["total"]
    assert budget.cost(widths) == (total.parameters if kind == "params" else total.macs)
    assert budget.amount == 0.5 * budget.dense


def test_tolerances_grow_with_what_a_site_costs() -> None:
    budget, _, _ = swin_budget({"params": 0.5})
    tolerances = budget.tolerances(0.01)
    assert sum(tolerances.values()) / len(tolerances) == pytest.approx(0.01)
    first, last = "layers.0.blocks.0.mlp.fc2", "layers.3.blocks.0.mlp.fc2"
    costs = [budget.units[name] * budget.widths[name] for name in (first, last)]
    assert tolerances[last] / tolerances[first] == pytest.approx(costs[1] / costs[0])


@pytest.mark.parametrize("needed", [1e-5, 3e-3, 0.02, 0.7])
def test_the_smallest_tolerance_that_meets_the_target_is_found(needed: float) -> None:
    """Everything above `needed` is small enough, all below too large, as with coarse widths."""
    budget, _, _ = swin_budget({"params": 0.9})
    smallest = dict.fromkeys(budget.widths, 1)
    tried: list[float] = []

    def widths_at(increase: float) -> dict[str, int]:
        tried.append(increase)
        return smallest if increase >= needed else budget.widths

    found = budget.meet(widths_at, 1e-2)
    assert needed <= found <= 4 * needed
    assert found in tried


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"flops": 0.5}, r"target must name one of \('params', 'macs', 'latency'\)"),
        ({"params": 0.5, "macs": 0.5}, "target must name one of"),
        ({}, "target must name one of"),
        ({"params": 0.0}, "target must be a positive number"),
        ({"macs": math.nan}, "target must be a positive number"),
    ],
)
def test_bad_targets_raise(target: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swin_budget(target)


def test_a_start_far_too_small_ends_with_the_smallest_widths() -> None:
    budget, _, _ = swin_budget({"params": 0.5})
    smallest, tried = dict.fromkeys(budget.widths, 1), []

    def widths_at(increase: float) -> dict[str, int]:
        tried.append(increase)
        return smallest if increase > 1 else budget.widths

    assert budget.meet(widths_at, 1e-12) == tried[-1] == math.inf
