"""Cut layers corrected before they are judged, and once the search is over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from compensations import compensated
from mixtures import DENSE, EXPERTS, mixture
from searches import duplicated, pruner_of
from torch import Tensor
from toys import ToyViT, images, perturbed, relative, toy

import tp_amp
from tp_amp.search import compensated_probes
from tp_amp.search.compensated_probes import Compensator
from tp_amp.structure.model_structure import ModelStructure


def test_widths_are_judged_after_compensation() -> None:
    """Neurons in pairs: with compensation half of them cost nothing, without they do."""
    found = {}
    for method in ("none", "affine"):
        pruner = pruner_of(
            duplicated(),
            importance=lambda group: torch.arange(20.0, 0, -1),
            max_increase=1e-5,
            compensation=method,
            compensation_data=[images(40, seed=5)],
        )
        pruner.step()
        found[method] = pruner.plan
    last = found["affine"].probes["blocks.1.mlp.second"]
    assert [probe.accepted for probe in last if probe.width >= 10] == [True] * len(
        [probe for probe in last if probe.width >= 10]
    )
    assert last[0].entropy == pytest.approx(found["affine"].dense_entropy, abs=1e-5)
    assert found["none"].probes["blocks.1.mlp.second"][0].entropy != pytest.approx(
        found["none"].dense_entropy, abs=1e-5
    )


@pytest.mark.parametrize("step", ["step", "interactive"])
def test_compensation_is_that_of_compensate(step: str) -> None:
    """What comes out is the plan applied and compensated by hand."""
    model, fitting = duplicated(), [images(40, seed=5)]
    dense = copy.deepcopy(model)
    pruner = pruner_of(model, max_increase=0.05, compensation="affine", compensation_data=fitting)
    if step == "step":
        pruner.step()
    else:
        for group in pruner.step(interactive=True):
            group.prune()
    assert any(len(kept) < 20 for kept in pruner.plan.keep.values())
    assert pruner.corrections.keys() == {
        name for name, kept in pruner.plan.keep.items() if len(kept) < 20
    }
    expected = copy.deepcopy(dense)
    tp_amp.compensate(expected, pruner.plan, fitting, progress=False)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("token_weights", [None, "sensitivity"])
def test_the_recipe_reaches_layers_that_are_not_cut(token_weights: Any) -> None:
    """What comes out is the plan applied and compensated by hand, every Linear included."""
    model, fitting = toy(), [images(40, seed=5)]
    expected = copy.deepcopy(model)
    recipe = tp_amp.Recipe("affine", every_linear=True, token_weights=token_weights)
    pruner = pruner_of(model, max_increase=1.0, compensation=recipe, compensation_data=fitting)
    pruner.step()
    further = pruner.corrections.keys() - pruner.plan.keep.keys()
    assert further
    options = {"every_linear": True, "token_weights": token_weights}
    tp_amp.compensate(expected, pruner.plan, fitting, progress=False, **options)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_no_compensation_leaves_the_kept_weights_alone() -> None:
    model = toy()
    dense = copy.deepcopy(model)
    pruner = pruner_of(model, max_increase=10.0)
    pruner.step()
    assert pruner.corrections == {}
    tp_amp.apply_plan(dense, images(1), pruner.plan)
    for one, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_one_compensator_serves_all_layers_and_returns_to_them() -> None:
    """What it remembers of one layer is not taken for another's."""
    structure, fitting = ModelStructure(toy(), images(1)), [images(40, seed=5)]
    graph, sites, kept = structure.graph, structure.mlps, list(range(10))
    recipe = tp_amp.Recipe()
    shared = Compensator(graph, fitting, recipe, [site.down for site in sites])
    for site in (*sites, sites[0]):
        alone = Compensator(graph, fitting, recipe, [site.down]).correction(site, kept)
        found = shared.correction(site, kept)
        assert found is not None
        assert alone is not None
        assert torch.equal(found.weight, alone.weight)


class Twice(ToyViT):
    """Calls its blocks a second time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.head(self.norm(self.blocks(self.embedded(x))).mean(1))

    def embedded(self, x: Tensor) -> Tensor:
        return self.embed(x).flatten(2).transpose(1, 2)


@torch.no_grad()
def test_layers_that_are_called_several_times_are_not_corrected() -> None:
    structure = ModelStructure(perturbed(Twice()), images(1))
    graph, sites = structure.graph, structure.mlps
    assert sites
    names = [site.down for site in sites]
    compensator = Compensator(graph, [images(8)], tp_amp.Recipe(), names)
    assert [compensator.correction(site, [0, 1]) for site in sites] == [None] * len(sites)


@torch.no_grad()
def test_layers_that_a_router_feeds_are_not_corrected() -> None:
    structure = ModelStructure(mixture(), images(8))
    sites = {site.down: site for site in structure.mlps}
    compensator = Compensator(structure.graph, [images(8)], tp_amp.Recipe(), list(sites))
    found = {name: compensator.correction(site, [0, 1]) for name, site in sites.items()}
    assert [found[name] for name in EXPERTS] == [None] * len(EXPERTS)
    assert found[DENSE] is not None


def loud(batch: Tensor) -> Tensor:
    """Tokens of an image count the more, the later they come."""
    return torch.arange(1.0, 18.0).repeat(len(batch), 1)


@pytest.mark.parametrize("weights", [None, loud, "sensitivity"])
@pytest.mark.parametrize("heads", [False, True])
def test_a_layer_cut_alone_is_corrected_as_compensate_does(weights: Any, heads: bool) -> None:
    """Each in turn: what is remembered of one, its targets too, is not taken for another's."""
    model, batches = tiny_models.vit(), tiny_models.pictures(48)
    structure = ModelStructure(model, batches[0][:1])
    sites = tp_amp.find_attentions(model, batches[0][:1]) if heads else structure.mlps
    recipe = tp_amp.Recipe(token_weights=weights)
    judge = Compensator(structure.graph, batches, recipe, [site.down for site in sites])
    for site in sites:
        kept = list(range(site.width // 2))
        plan = tp_amp.PruningPlan({site.down: kept})
        _, fitted = compensated(model, plan, batches, token_weights=weights)
        with torch.no_grad():
            found = judge.correction(site, kept)
        assert found is not None
        assert relative(found.weight, fitted[site.down].weight) < 1e-4
        assert found.error == pytest.approx(fitted[site.down].error, rel=1e-4)


@torch.no_grad()
def test_seconds_are_those_of_the_probes_and_of_what_is_collected_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    structure = ModelStructure(toy(), images(1))
    first, second = structure.mlps
    fitting, names = [images(8)], [site.down for site in structure.mlps]
    compensator = Compensator(structure.graph, fitting, tp_amp.Recipe(), names)
    ticks = iter([0.0, 10.0, 20.0, 24.0])  # 10 s, of which 6 s collect, then 4 s
    monkeypatch.setattr(compensated_probes, "clock", lambda: next(ticks))
    assert compensator.seconds([first], [3]) == 6 + (3 + 1) * 4
    assert compensator.seconds([first, second], [0, 1]) == 6 + (1 + 1) * 4  # of the same kind
    nothing = Compensator(structure.graph, fitting, tp_amp.Recipe("none"), names)
    assert nothing.seconds([first], [3]) == 0
