"""Costs against models that are really cut, and what is told where a target is missed."""

import copy
import math
import re

import pytest
import timm
from toys import images, toy
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


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_the_range_that_is_told_can_be_reached(kind: str) -> None:
    """Rounded inwards: with either end of what the message tells, nothing is raised."""
    budget, model, inputs = swin_budget({kind: 1e-6})
    smallest = dict.fromkeys(budget.widths, 1)
    with pytest.raises(ValueError, match="can't be met: reachable are") as told:
        budget.check(smallest)
    numbers = re.search(r"are (\S+) to (\S+), fractions (\S+) to 1", str(told.value))
    assert numbers is not None
    structure = ModelStructure(model, inputs)  # type: ignore[arg-type]
    sites = [*structure.mlps, *structure.attentions[0]]
    for end in numbers.groups():
        other = Budget({kind: float(end)}, structure, sites)
        other.check(smallest)
    # And not far from the ends that there are.
    least = budget.cost(smallest)
    assert float(numbers[1]) == pytest.approx(least, rel=1e-3)
    assert float(numbers[2]) == pytest.approx(budget.dense, rel=1e-3)


@pytest.mark.parametrize(
    ("foreseen", "measured", "remedy"),
    [
        (0.5, 0.5, None),
        (0.499, 0.53, None),
        (0.47, 0.47, "below the target of"),  # by widths alone
        (0.4, 0.4, "a smaller round_to"),
        (0.499, 0.6, "a machine that does nothing else"),
        (0.4, 0.5, "a machine that does nothing else"),
        (0.4, 0.6, "a machine that does nothing else"),
    ],
)
def test_a_latency_off_its_target_is_told_by_one_warning(
    foreseen: float,
    measured: float,
    remedy: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    structure = ModelStructure(toy(), images(1))
    budget = Budget({"latency": 0.9}, structure, structure.mlps)
    keep = {name: list(range(width)) for name, width in budget.widths.items()}
    budget.dense, budget.amount = 10.0, 5.0
    monkeypatch.setattr(budget, "cost", lambda widths: 10 * foreseen)
    monkeypatch.setattr(budget.latency, "measure", lambda keep: 10 * measured)
    caplog.clear()
    budget.confirm(keep)
    assert budget.measured == 10 * measured
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (remedy is not None)
    assert all(str(remedy) in text for text in warnings)
    if measured == 0.6:
        assert "the latency is 6 ms (0.600 of the dense model's), the target 5 ms" in warnings[0]
