"""Plans that let whole MLPs go where that loses least."""

from __future__ import annotations

import copy
import itertools
import logging

import pytest
import torch
from small_models import vit
from torch import nn
from toys import images, relative, toy

import tp_amp
from tp_amp.budget.allocation import allocate
from tp_amp.budget.budget import Budget
from tp_amp.budget.joint_widths import joint_widths, smallest
from tp_amp.budget.removal import least_widths
from tp_amp.structure.model_structure import ModelStructure

BATCHES = [images(16, seed) for seed in range(4)]


def faint() -> nn.Module:
    """A model whose second MLP gives nearly the same for all tokens, far from nought."""
    model = toy(depth=3)
    with torch.no_grad():
        model.blocks[1].mlp.second.weight.mul_(1e-3)
        model.blocks[1].mlp.second.bias.add_(1.0)
    return model


def test_the_error_of_none_is_the_variance_of_what_the_mlp_gives() -> None:
    """In the unit of all others, of which the first is what one channel less than that leaves."""
    model = toy()
    importance = tp_amp.ReconstructionImportance("reconstruction", data=BATCHES)
    plan = tp_amp.plan_for_target(model, BATCHES[0], importance, {"params": 0.9})
    given = {name: [] for name in plan.keep}
    for name, rows in given.items():
        layer = model.get_submodule(name)
        layer.register_forward_hook(
            lambda _m, _a, y, rows=rows: rows.append(y.detach().flatten(0, 1).double())
        )
    for batch in BATCHES:
        model(batch)
    for name, rows in given.items():
        variance = torch.cat(rows).var(0, correction=0).sum()
        assert float(importance.errors[name][0]) == pytest.approx(float(variance), rel=1e-5)


@pytest.mark.parametrize("least", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 2])
def test_the_best_widths_from_the_smallest_on_are_those_of_a_brute_force(
    least: int, step: int
) -> None:
    generator = torch.Generator().manual_seed(least)
    steps = {name: torch.rand(6, generator=generator).sort().values for name in "abc"}
    errors = {n: torch.cat([s.cumsum(0).flip(0), torch.zeros(1)]) for n, s in steps.items()}
    costs = {name: torch.arange(7.0) for name in "abc"}
    widths = range(-(-least // step) * step, 7, step)
    for budget in (6, 10, 14):
        found = allocate(
            errors, costs, budget, dict.fromkeys("abc", step), dict.fromkeys("abc", least)
        )
        best = min(
            sum(float(errors[n][w]) for n, w in zip("abc", some, strict=True))
            for some in itertools.product(widths, repeat=3)
            if sum(some) <= budget
        )
        assert sum(found.values()) <= budget
        assert sum(float(errors[n][w]) for n, w in found.items()) == pytest.approx(best)
        assert all(width in widths for width in found.values())


@pytest.mark.parametrize("target", ["params", "macs"])
def test_a_faint_mlp_goes_and_its_mean_stays(target: str) -> None:
    model = faint()
    importance = tp_amp.ReconstructionImportance(data=BATCHES)
    plan = tp_amp.plan_for_target(model, BATCHES[0], importance, {target: 0.7}, min_width=0)
    assert plan.widths["blocks.1.mlp.second"] == 0
    assert plan.widths["blocks.0.mlp.second"] > 0
    other = tp_amp.PruningPlan({**plan.keep, "blocks.1.mlp.second": [*range(20)]})
    outputs = []
    for tried in (plan, other):
        pruned = copy.deepcopy(model)
        tp_amp.compensate(pruned, tried, BATCHES, progress=False)
        outputs.append(pruned(BATCHES[0]))
    assert relative(*outputs) < 1e-2


def test_sizes_are_those_of_the_cut_model() -> None:
    """Of none but the bias; and smaller than what one channel of each could reach."""
    model = toy(depth=3)
    structure = ModelStructure(model, BATCHES[0])
    importance = tp_amp.ReconstructionImportance(data=BATCHES)
    sizes = {}
    for min_width in (1, 0):
        budget = Budget({"params": 1.0}, structure, structure.mlps, min_width=min_width)
        least = smallest(budget)
        assert set(least.values()) == {min_width}
        cut = copy.deepcopy(model)
        keep = {name: list(range(width)) for name, width in least.items()}
        tp_amp.apply_plan(cut, tp_amp.PruningPlan(keep), BATCHES[0])
        sizes[min_width] = sum(parameter.numel() for parameter in cut.parameters())
        assert budget.cost(least) == sizes[min_width]
    assert sizes[1] - sizes[0] == 3 * (12 + 1 + 12)
    target = {"params": (sizes[0] + sizes[1]) // 2}
    with pytest.raises(ValueError, match="can't be met"):
        tp_amp.plan_for_target(model, BATCHES[0], importance, target)
    plan = tp_amp.plan_for_target(model, BATCHES[0], importance, target, min_width=0)
    assert 0 in plan.widths.values()


@pytest.mark.parametrize("seed", range(4))
def test_what_goes_together_is_chosen_as_by_a_brute_force(seed: int) -> None:
    """Of two that have none together or some each, on curves whose last channel is dear."""
    generator = torch.Generator().manual_seed(seed)
    errors, costs = {}, {}
    for name in "abc":
        steps = torch.rand(4, generator=generator).sort().values
        errors[name] = torch.cat([steps.cumsum(0).flip(0), torch.zeros(1)])
        costs[name] = torch.arange(5.0)
    costs["a"][1:] += 2  # what all of it saves besides
    errors["b"][0] = 0
    least = {"a": 0, "b": 0}
    priced = {}
    for widths in itertools.product(range(5), range(5), range(1, 5)):
        if bool(widths[0]) == bool(widths[1]):
            some = dict(zip("abc", widths, strict=True))
            cost = sum(float(costs[n][w]) for n, w in some.items())
            priced[widths] = cost, sum(float(errors[n][w]) for n, w in some.items())
    for price in (0.01, 0.1, 0.3, 1.0):
        best = min(priced.values(), key=lambda found: found[1] + price * found[0])
        found = allocate(errors, costs, best[0], least=least, together={"a": "b"})
        assert priced[tuple(found.values())] == pytest.approx(best)


@pytest.mark.parametrize("kinds", [("mlp", "qk", "vo"), ("mlp", "vo")])
@pytest.mark.parametrize("target", ["params", "macs"])
def test_a_faint_attention_goes_with_its_queries(target: str, kinds: tuple[str, ...]) -> None:
    """And what is foreseen is the size of the cut model."""
    model = vit(depth=3)
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.mul_(1e-4)
    batches = [images(16, seed, 16, 3) for seed in range(3)]
    tp_amp.rotate_heads(model, batches[0], batches, progress=False)
    importance = tp_amp.ReconstructionImportance(data=batches)
    image = batches[0][:1]
    plan = tp_amp.plan_for_target(
        model, image, importance, {target: 0.7}, widths=kinds, min_width=0
    )
    zero = [name for name, width in plan.widths.items() if not width]
    assert "blocks.1.attn.proj" in zero
    assert ("blocks.1.attn.qkv" in zero) == ("qk" in kinds)
    structure = ModelStructure(model, image)
    budget = Budget({target: 0.7}, structure, list(plan.sites.values()), min_width=0)
    tp_amp.apply_plan(model, plan)
    measured = tp_amp.measure(model, [image])
    size = {"params": measured.parameters, "macs": measured.macs}[target]
    assert budget.cost(plan.widths) == pytest.approx(size)
    assert size <= budget.amount
    assert set(model.blocks[1].attn.qkv.weight.shape) == {0, 24}


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_a_narrower_stream_beside_what_went_is_counted_as_it_is(kind: str) -> None:
    """The products of queries with keys are no part of it, all else of an attention is."""
    model = vit(depth=2)
    batches = [images(8, seed, 16, 3) for seed in range(2)]
    image = batches[0][:1]
    tp_amp.rotate(model, image, batches, progress=False)
    structure = ModelStructure(model, image)
    sites = [*structure.mlps, *structure.some_ranks(["qk", "vo"]), *structure.some_streams()]
    budget = Budget({kind: 1.0}, structure, sites, min_width=0)
    gone = ("blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc2")
    widths = {site.down: 0 if site.down in gone else site.width // 2 for site in sites}
    keep = {name: list(range(width)) for name, width in widths.items()}
    tp_amp.apply_plan(model, tp_amp.PruningPlan(keep, sites={site.down: site for site in sites}))
    measured = tp_amp.measure(model, [image])
    size = {"params": measured.parameters, "macs": measured.macs}[kind]
    assert budget.cost(widths) == pytest.approx(size, rel=1e-12)


def test_where_nothing_goes_the_plan_is_the_one_without() -> None:
    model = toy(depth=3)
    importance = tp_amp.ReconstructionImportance(data=BATCHES)
    plans = [
        tp_amp.plan_for_target(model, BATCHES[0], importance, {"params": 0.9}, min_width=width)
        for width in (0, 1)
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("round_to", [1, 4, 7])
def test_steps_and_smallest_widths_are_kept_to(round_to: int) -> None:
    model = faint()
    importance = tp_amp.ReconstructionImportance(data=BATCHES)
    for min_width, allowed in ((0, range(0, 21, round_to)), (5, range(5, 21))):
        plan = tp_amp.plan_for_target(
            model,
            BATCHES[0],
            importance,
            {"params": 0.8},
            min_width=min_width,
            round_to=round_to,
        )
        assert all(
            w in (*allowed, 20) and w % round_to in (0, 20 % round_to) for w in plan.widths.values()
        )


def test_streams_are_narrowed_beside_mlps_that_go() -> None:
    """The sizes of both multiply: what is foreseen is what the cut model has."""
    model = vit(depth=3)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(1e-3)
    batches = [images(8, seed, 16, 3) for seed in range(3)]
    tp_amp.rotate(model, batches[0], batches, progress=False)
    structure = ModelStructure(model, batches[0])
    sites = [*structure.mlps, *structure.some_streams()]
    streams = [site.down for site in sites[len(structure.mlps) :]]
    budget = Budget({"params": 0.7}, structure, sites, min_width=0)
    importance = tp_amp.ReconstructionImportance(data=batches)
    foreseen = importance.foreseen(model, sites)
    widths = joint_widths(budget, {n: found.errors for n, found in foreseen.items()}, streams)
    assert widths["blocks.1.mlp.fc2"] == 0
    keep = {name: list(range(width)) for name, width in widths.items()}
    plan = tp_amp.PruningPlan(keep, sites={site.down: site for site in sites})
    tp_amp.compensate(model, plan, batches, every_linear=True, progress=False)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == budget.cost(widths) <= budget.amount


class Reshaping(nn.Module):
    """An MLP whose hidden channels are counted by what is left of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        return self.second(hidden.reshape(*hidden.shape[:-2], -1, hidden.shape[-1]))


def test_what_cannot_go_keeps_a_channel_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    models = {
        "has no bias": toy(bias=False),
        "no longer runs": Reshaping(),
    }
    for reason, model in models.items():
        inputs = torch.randn(2, 4, 6) if isinstance(model, Reshaping) else BATCHES[0]
        structure = ModelStructure(model, inputs)
        downs = [mlp.down for mlp in structure.mlps]
        with caplog.at_level(logging.WARNING, "tp_amp"):
            found = least_widths(structure, structure.mlps, 0, dict.fromkeys(downs, 1))
        assert downs
        assert found == dict.fromkeys(downs, 1)
        assert reason in caplog.text
        caplog.clear()


def test_wrong_smallest_widths_are_refused() -> None:
    importance = tp_amp.ReconstructionImportance(data=BATCHES)
    for wrong in (-1, 0.5, True):
        with pytest.raises(ValueError, match="min_width must be an integer of at least 0"):
            tp_amp.plan_for_target(toy(), BATCHES[0], importance, {"params": 0.9}, min_width=wrong)
