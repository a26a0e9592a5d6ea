"""Widths for a target against a brute force over all widths, and against real models' sizes."""

import itertools

import pytest
import timm
import torch
from toys import fingerprint, images, perturbed, toy
from zoo import SWIN_HEADS, TIMM, TINY

import tp_amp
from tp_amp.budget.allocation import allocate


def convex_errors(width: int, seed: int) -> torch.Tensor:
    """Falling ever more slowly, down to nothing."""
    steps = torch.rand(width, generator=torch.Generator().manual_seed(seed)).sort().values
    return torch.cat([steps.cumsum(0).flip(0), torch.zeros(1)])


def linear(errors: dict[str, torch.Tensor], **units: float) -> dict[str, torch.Tensor]:
    """Costs of all widths where each channel costs the same, 1 by default."""
    return {n: units.get(n, 1.0) * torch.arange(len(values)) for n, values in errors.items()}


@pytest.mark.parametrize("seed", range(5))
def test_convex_errors_are_allocated_as_by_brute_force(seed: int) -> None:
    errors = {name: convex_errors(6, 10 * seed + i) for i, name in enumerate("abc")}
    for budget in (3, 7, 12, 18):
        found = allocate(errors, linear(errors), budget)
        best = min(
            sum(float(errors[n][w]) for n, w in zip("abc", widths, strict=True))
            for widths in itertools.product(range(1, 7), repeat=3)
            if sum(widths) <= budget
        )
        assert sum(found.values()) <= budget
        assert sum(float(errors[n][w]) for n, w in found.items()) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_costs_with_kinks_are_kept_to_and_used(seed: int) -> None:
    """As times are: a step up, then nearly nothing. The errors are near those of a brute force."""
    generator = torch.Generator().manual_seed(seed)
    errors = {name: convex_errors(6, 10 * seed + i) for i, name in enumerate("abc")}
    costs = {n: torch.rand(7, generator=generator).pow(3).cumsum(0) for n in "abc"}
    smallest = sum(float(costs[n][1]) for n in "abc")
    for share in (0.2, 0.5, 0.8, 1.0):
        largest = sum(float(costs[n][6]) for n in "abc")
        budget = smallest + share * (largest - smallest) + 1e-6
        found = allocate(errors, costs, budget)
        assert sum(float(costs[n][w]) for n, w in found.items()) <= budget
        best = min(
            sum(float(errors[n][w]) for n, w in zip("abc", widths, strict=True))
            for widths in itertools.product(range(1, 7), repeat=3)
            if sum(float(costs[n][w]) for n, w in zip("abc", widths, strict=True)) <= budget
        )
        assert sum(float(errors[n][w]) for n, w in found.items()) <= best + 0.8


def test_expensive_channels_go_first() -> None:
    errors = {"cheap": convex_errors(8, 1), "dear": convex_errors(8, 1)}
    found = allocate(errors, linear(errors, dear=4.0), budget=20)
    assert found["cheap"] > found["dear"]
    assert found["cheap"] + 4 * found["dear"] <= 20


def test_widths_are_multiples_or_dense() -> None:
    errors = {"a": convex_errors(10, 1), "b": convex_errors(12, 2)}
    for budget in (8, 12, 20, 22):
        found = allocate(errors, linear(errors), budget, steps=dict.fromkeys(errors, 4))
        assert found["a"] in (4, 8, 10)
        assert found["b"] in (4, 8, 12)


def test_budget_below_the_smallest_widths_raises() -> None:
    errors = {"a": convex_errors(3, 1), "b": convex_errors(3, 2)}
    with pytest.raises(ValueError, match="a budget of 1 can't be met: the smallest widths cost 2"):
        allocate(errors, linear(errors), 1)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("target", [{"params": 0.7}, {"macs": 0.8}])
def test_the_target_is_met_closely(family: str, target: dict[str, float]) -> None:
    name, arguments, size = {
        "vit": ("vit_tiny_patch16_224", {**TINY, "img_size": 32}, 32),
        "swin": ("swin_tiny_patch4_window7_224", SWIN_HEADS, 64),
    }[family]
    model = perturbed(timm.create_model(name, num_classes=10, **arguments))
    inputs = images(4, size=size, channels=3)
    importance = tp_amp.ReconstructionImportance("prediction", data=[inputs])
    before = fingerprint(model)
    dense = tp_amp.inspect(model, inputs[:1]).shares["total"]
    plan = tp_amp.plan_for_target(model, inputs[:1], importance, target)
    assert fingerprint(model) == before
    tp_amp.apply_plan(model, inputs[:1], plan)
    cut = tp_amp.inspect(model, inputs[:1]).shares["total"]
    reached = {"params": cut.parameters / dense.parameters, "macs": cut.macs / dense.macs}
    [(kind, amount)] = target.items()
    assert 0.97 * amount < reached[kind] <= amount


def test_absolute_target_and_ignored_layers() -> None:
    model = toy()
    importance = tp_amp.ReconstructionImportance("prediction", data=[images()])
    amount = parameters(model) - 5 * 25  # 12 + 1 + 12 parameters for each channel
    ignored = [model.blocks[0].mlp.second]
    plan = tp_amp.plan_for_target(
        model, images(1), importance, {"params": amount}, ignored_layers=ignored
    )
    assert plan.widths == {"blocks.1.mlp.second": 15}
    order = importance.orders["blocks.1.mlp.second"][:15].tolist()
    assert plan.keep["blocks.1.mlp.second"] == sorted(order)


def test_target_out_of_reach_tells_the_range() -> None:
    importance = tp_amp.ReconstructionImportance("prediction", data=[images()])
    with pytest.raises(ValueError, match=r"can't be met: reachable are .* fractions 0\.\d+ to 1"):
        tp_amp.plan_for_target(toy(), images(1), importance, {"params": 0.1})


def test_importance_that_has_seen_nothing_raises() -> None:
    importance = tp_amp.ReconstructionImportance()
    with pytest.raises(ValueError, match=r"has not seen \['blocks\.0\.mlp\.second"):
        tp_amp.plan_for_target(toy(), images(1), importance, {"params": 0.8})


def test_projections_fused_with_attention_are_refused() -> None:
    make, inputs, _ = TIMM["pwee_fused_out"]
    importance = tp_amp.ReconstructionImportance("prediction", data=[inputs.repeat(2, 1, 1, 1)])
    with pytest.raises(ValueError, match=r"\['blocks\.0\.out_proj', .* not foreseen apart"):
        tp_amp.plan_for_target(make(), inputs, importance, {"params": 0.8})


def test_ignored_containers_and_other_weights_are_respected() -> None:
    model = toy(hidden=40)
    importance = tp_amp.ReconstructionImportance("prediction", data=[images()])
    plan = tp_amp.plan_for_target(
        model, images(1), importance, {"params": 0.8}, ignored_layers=[model.blocks[0]]
    )
    assert list(plan.keep) == ["blocks.1.mlp.second"]
    other = perturbed(toy(hidden=40))
    fresh = tp_amp.ReconstructionImportance("prediction", data=[images()])
    again = tp_amp.plan_for_target(other, images(1), importance, {"params": 0.8})
    assert again == tp_amp.plan_for_target(other, images(1), fresh, {"params": 0.8})
    tp_amp.apply_plan(other, images(1), again)
    tp_amp.apply_plan(
        other, images(1), tp_amp.plan_for_target(other, images(1), importance, {"params": 0.95})
    )


def test_nothing_left_to_prune_is_told() -> None:
    model = toy()
    importance = tp_amp.ReconstructionImportance().collect(model, [images(8)])
    with pytest.raises(ValueError, match="all 2 MLPs are ignored layers"):
        tp_amp.plan_for_target(
            model,
            images(1),
            importance,
            {"params": 0.9},
            ignored_layers=[block.mlp.first for block in model.blocks],
        )
