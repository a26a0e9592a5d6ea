"""Layers that a router feeds are cut and not fitted: other tokens reach them in the cut model."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from mixtures import DENSE, EXPERTS, ChoosingExperts, Experts, mixture
from toys import fingerprint, images, masked, relative

import tp_amp

KINDS = pytest.mark.parametrize("experts", [Experts, ChoosingExperts])


@KINDS
def test_a_mixture_is_cut_exactly_and_what_is_not_routed_is_corrected(
    experts: type[Experts], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = mixture(experts), images(64)
    batches = list(x.split(32))
    importance = tp_amp.ReconstructionImportance(data=batches)
    plan = tp_amp.plan_for_target(model, x[:32], importance, {"params": 0.7})
    assert {*EXPERTS, DENSE} <= plan.keep.keys()
    expected = masked(model, plan.keep)(x)
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    tp_amp.apply_plan(plain, plan)
    assert relative(plain(x), expected) < 1e-5
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="tp_amp"):
        found = tp_amp.compensate(fitted, plan, batches, every_linear=True, progress=False)
    told = [text for text in caplog.messages if "a router sends them other tokens" in text]
    assert len(told) == 1
    assert "cut and not corrected" in told[0]
    assert DENSE in found
    assert not {name for name in found if ".experts." in name}
    # Experts are as cut alone, and what comes after them makes up for that too.
    for name in EXPERTS:
        layers = plain.get_submodule(name), fitted.get_submodule(name)
        assert torch.equal(*(layer.weight for layer in layers))
    errors = [(m(x) - model(x)).square().mean() for m in (plain, fitted)]
    assert errors[1] < 0.7 * errors[0]


@KINDS
def test_experts_alone_are_cut_without_correction(experts: type[Experts]) -> None:
    model, x = mixture(experts), images(16)
    expected, before = copy.deepcopy(model), fingerprint(model)["hooks"]
    plan = tp_amp.PruningPlan({EXPERTS[0]: list(range(10))})
    tp_amp.apply_plan(expected, plan, x)
    assert tp_amp.compensate(model, plan, [x], progress=False) == {}
    assert torch.equal(model(x), expected(x))
    assert fingerprint(model)["hooks"] == before


@KINDS
def test_the_search_judges_experts_without_correction(experts: type[Experts]) -> None:
    model, x = mixture(experts), images(64)
    pruner = tp_amp.AdaptiveMLPPruner(
        model,
        x[:32],
        tp_amp.DIMAPImportance(),
        [x[32:]],
        compensation="affine",
        compensation_data=[x[:32]],
        max_increase=1.0,
        progress=False,
    )
    pruner.step()
    assert DENSE in pruner.corrections
    assert not pruner.corrections.keys() & set(EXPERTS)
