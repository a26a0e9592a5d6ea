"""Cut layers corrected before they are judged, and once the search is over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from searches import duplicated, pruner_of
from toys import images, toy

import tp_amp


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
