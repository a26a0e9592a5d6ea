"""Streams priced with all that reads and writes them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_width_kinds import planned, size
from tiny_models import pictures, swin, vit
from torch import nn

import tp_amp
from tp_amp.budget.budget import Budget
from tp_amp.budget.joint_widths import joint_widths, stream_choices
from tp_amp.budget.width_kinds import sites_of
from tp_amp.running.inputs import prepare
from tp_amp.running.runtimes.building import Built
from tp_amp.running.snapshot import given_back
from tp_amp.structure.macs import count_macs
from tp_amp.structure.model_structure import ModelStructure
from tp_amp.structure.streams.residual_stream import Stream

ALL = ["mlp", "qk", "vo", "stream"]


def rotated(build: Any) -> nn.Module:
    model, images = build(), pictures()
    tp_amp.rotate(model, images[0][:1], images, progress=False)
    tp_amp.rotate_heads(model, images[0][:1], images, progress=False)
    return model


def drawn_cuts(
    build: Any, kind: str, runtime: str = "eager"
) -> Iterator[tuple[Budget, dict[str, int], nn.Module]]:
    """What it costs at some widths, drawn, and the model that is cut to them."""
    model, image = rotated(build), pictures()[0][:1]
    structure = ModelStructure(model, image)
    sites = sites_of(structure, ALL)
    budget = Budget({kind: 0.5}, structure, sites, runtime=runtime)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        widths = {
            name: int(torch.randint(max(2, width // 2), width, (1,), generator=generator))
            for name, width in budget.widths.items()
        }
        keep = {name: list(range(width)) for name, width in widths.items()}
        cut = copy.deepcopy(model)
        tp_amp.apply_plan(cut, tp_amp.PruningPlan(keep, sites={s.down: s for s in sites}))
        yield budget, widths, cut


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("build", [vit, swin])
def test_cost_is_that_of_the_model_cut_for_real(build: Any, kind: str) -> None:
    for budget, widths, cut in drawn_cuts(build, kind):
        total = tp_amp.inspect(cut, pictures()[0][:1]).shares["total"]
        assert budget.cost(widths) == (total.parameters if kind == "params" else total.macs)


@pytest.mark.parametrize("build", [vit, swin])
def test_what_others_cost_beside_narrower_streams(build: Any) -> None:
    """Each alone, by parameters of models that are cut in nothing else."""
    model, image = rotated(build), pictures()[0][:1]
    sites = {site.down: site for site in sites_of(ModelStructure(model, image), ALL)}
    budget = Budget({"params": 0.5}, ModelStructure(model, image), list(sites.values()))
    streams = {name: site.width // 2 for name, site in sites.items() if isinstance(site, Stream)}

    def cut(**further: int) -> int:
        kept = {name: list(range(width)) for name, width in {**streams, **further}.items()}
        copied = copy.deepcopy(model)
        tp_amp.apply_plan(copied, tp_amp.PruningPlan(kept, sites=sites))
        return size(copied)

    for name, site in sites.items():
        if name not in streams:
            costs = budget.costs(name, streams)
            assert float(costs[0]) == 0
            assert float(costs[site.width] - costs[1]) == cut() - cut(**{name: 1})
            widths = {**budget.widths, **streams, name: 1}
            assert budget.separate_cost(widths, streams) == cut(**{name: 1})


@pytest.mark.parametrize("build", [vit, swin])
def test_the_target_is_met_by_a_stream_too(build: Any) -> None:
    model = rotated(build)
    plan, _ = planned(model, ALL, {"params": 0.5})
    cut = copy.deepcopy(model)
    tp_amp.apply_plan(cut, plan)
    assert 0.97 * 0.5 * size(model) <= size(cut) <= 0.5 * size(model)
    kinds = {getattr(site, "pair", type(site).__name__) for site in plan.sites.values()}
    assert kinds == {"MLP", "qk", "vo", "Stream"}


def test_no_other_widths_of_that_size_are_foreseen_to_lose_much_less() -> None:
    model = rotated(vit)
    plan, importance = planned(model, ALL, {"params": 0.6})
    structure = ModelStructure(model, pictures()[0][:1])
    budget = Budget({"params": 0.6}, structure, sites_of(structure, ALL))
    found = importance.foreseen(model, list(plan.sites.values()))
    lost = sum(float(found[n].errors[width]) for n, width in plan.widths.items())
    generator, others = torch.Generator().manual_seed(0), []
    for _ in range(5000):
        power = 3 * torch.rand(1, generator=generator)
        shares = torch.rand(len(found), generator=generator).pow(power)
        widths = {
            n: max(2, round(plan.dense_widths[n] * float(share)))
            for n, share in zip(found, shares, strict=True)
        }
        if budget.cost(widths) <= 0.6 * budget.dense:
            others.append(sum(float(found[n].errors[width]) for n, width in widths.items()))
    assert len(others) > 100
    assert lost < min(others)


def test_a_stream_alone_keeps_the_most_that_fits() -> None:
    model = rotated(vit)
    plan, _ = planned(model, ["stream"], {"params": 0.7})
    [(name, width)] = plan.widths.items()
    sizes = {}
    for kept in stream_choices(24, 1):
        cut = copy.deepcopy(model)
        sites = {name: plan.sites[name]}
        tp_amp.apply_plan(cut, tp_amp.PruningPlan({name: list(range(kept))}, sites=sites))
        sizes[kept] = size(cut)
    assert width == max(kept for kept, of in sizes.items() if of <= 0.7 * size(model))


def test_a_stream_that_is_not_rotated_is_foreseen_to_lose_more() -> None:
    lost = []
    for model in (rotated(vit), vit()):
        plan, importance = planned(model, ["mlp", "stream"], {"params": 0.5})
        [stream] = [site for site in plan.sites.values() if isinstance(site, tp_amp.Stream)]
        lost.append(importance.foreseen(model, [stream])[stream.name].errors[8:20])
    assert bool((lost[0] < lost[1]).all())


def test_each_of_several_streams_has_a_width_of_its_own() -> None:
    """One loses nothing and the other more than all MLPs: alike, both would stay whole."""
    structure = ModelStructure(rotated(swin), pictures()[0][:1])
    sites = sites_of(structure, ["mlp", "stream"])
    free, dear = (site.down for site in sites if isinstance(site, Stream))
    budget = Budget({"params": 0.8}, structure, sites)
    lost = {free: 0.0, dear: 1e3}
    errors = {
        name: lost.get(name, 1.0) * torch.arange(width, -1, -1.0)
        for name, width in budget.widths.items()
    }
    widths = joint_widths(budget, errors, [free, dear])
    assert widths[dear] == budget.widths[dear]
    assert widths[free] == stream_choices(budget.widths[free], 1)[0]


def test_several_streams_keep_about_the_same_share_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[dict[str, int]] = []

    def best(budget: Any, errors: Any, widths: list[dict[str, int]]) -> dict[str, int]:
        tried.extend(widths)
        return {**budget.widths}

    monkeypatch.setattr("tp_amp.budget.joint_widths._best", best)
    structure = ModelStructure(rotated(swin), pictures()[0][:1])
    sites = [site for site in sites_of(structure, ["stream"]) if isinstance(site, Stream)]
    budget = Budget({"params": 0.9}, structure, sites, round_to=4)
    choices = {name: stream_choices(width, 4) for name, width in budget.widths.items()}
    assert len({len(kept) for kept in choices.values()}) == 2  # not as many of each
    joint_widths(budget, {}, list(choices))
    alike = tried[: max(map(len, choices.values()))]
    for widths in alike:
        one, other = (width / budget.widths[name] for name, width in widths.items())
        assert abs(one - other) < 0.2
    assert {one for one, _ in (widths.values() for widths in alike)} == set(choices[sites[0].down])


def test_steps_of_a_stream() -> None:
    plan, _ = planned(rotated(vit), ["mlp", "stream"], {"params": 0.3}, round_to={"stream": 8})
    assert plan.widths["patch_embed.proj"] in (8, 16)
    assert stream_choices(24, 8) == [8, 16, 24]
    assert stream_choices(20, 1)[0] == 2


def test_what_reads_a_stream_and_is_ignored_keeps_it_whole() -> None:
    plan, _ = planned(
        rotated(vit), ["mlp", "stream"], {"params": 0.8}, ignored_layers=["blocks.0.attn"]
    )
    assert plan.sites.keys() == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}


@pytest.fixture
def macs_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a forward pass take a millisecond, and one for each 10,000 MACs; compiled a third."""

    def seconds(run: Any, *_: Any) -> float:
        return float(passing(run) if isinstance(run, nn.Module) else run()) / 1000

    def built(model: nn.Module, *_: Any) -> Built:
        taken = passing(model) / 3
        return Built(lambda *_: taken)

    monkeypatch.setattr("tp_amp.budget.latency.seconds", seconds)
    monkeypatch.setattr("tp_amp.budget.latency.build", built)


def passing(model: nn.Module) -> float:
    with given_back(model):
        return 1 + count_macs(model, prepare(pictures()[0][:1], model), None)[""] / 1e4


@pytest.mark.usefixtures("macs_clock")
@pytest.mark.parametrize("build", [vit, swin])
def test_milliseconds_are_those_of_the_model_cut_for_real(build: Any) -> None:
    """Where time goes with MACs: what others save beside a narrower stream is less."""
    for budget, widths, cut in drawn_cuts(build, "latency"):
        assert budget.cost(widths) == pytest.approx(passing(cut), rel=1e-6)


@pytest.mark.usefixtures("macs_clock")
def test_milliseconds_in_a_runtime() -> None:
    """The table is scaled by what the others save together, of which a stream saves a part too."""
    for budget, widths, cut in drawn_cuts(vit, "latency", "compile"):
        assert budget.cost(widths) == pytest.approx(passing(cut) / 3, rel=1e-6)


@pytest.mark.usefixtures("macs_clock")
def test_a_latency_is_met_by_a_stream_too() -> None:
    model = rotated(vit)
    plan, _ = planned(model, ALL, {"latency": 0.6})
    assert any(isinstance(site, Stream) for site in plan.sites.values())
    cut = copy.deepcopy(model)
    tp_amp.apply_plan(cut, plan)
    assert 0.95 < passing(cut) / (0.6 * passing(model)) <= 1 + 1e-6
