"""Layers that are cut and not fitted: fed by a router, or called several times."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from mixtures import DENSE, EXPERTS, ChoosingExperts, Experts, mixture
from torch import Tensor, nn
from toys import PlainMLP, fingerprint, images, masked, perturbed, relative

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


class Stages(nn.Module):
    """Two blocks and a head that each of them is read by, as a detector's for boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlainMLP(6, 12) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.box = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        boxes = []
        for block in self.blocks:
            x = x + block(x)
            boxes.append(self.box(self.head(x)))
        return torch.stack(boxes)


def stages() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return perturbed(Stages()), [torch.randn(24, 5, 6) for _ in range(2)]


def test_a_layer_called_several_times_is_cut_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batches = stages()
    importance = tp_amp.ReconstructionImportance(data=batches, objective=None)
    plan = tp_amp.plan_for_target(model, batches[0][:1], importance, {"params": 0.6})
    again = {name for name in plan.keep if name.startswith(("head", "box"))}
    assert again == {"head.2", "box"}
    plain = copy.deepcopy(model)
    tp_amp.apply_plan(plain, plan)
    with caplog.at_level(logging.WARNING):
        fitted = tp_amp.compensate(
            model, plan, batches, every_linear=True, refine=2, objective=None, progress=False
        )
    told = [message for message in caplog.messages if "called several times" in message]
    assert [m.partition(":")[0] for m in told] == [
        "2 layers are cut and not corrected (head.2 3 times, box 3 times)",
        "1 layers are called several times and are not fitted",
    ]
    assert {name for name in plan.keep if name not in again} <= fitted.keys()
    for name in ("head.0", "head.2", "box"):
        layer, other = model.get_submodule(name), plain.get_submodule(name)
        assert torch.equal(layer.weight, other.weight)
        assert torch.equal(layer.bias, other.bias)
    assert all(found.error <= found.error_before for found in fitted.values())
    assert all(fitted[n].error < fitted[n].error_before for n in plan.keep if n not in again)


def test_where_all_that_is_cut_is_called_again_nothing_is_read() -> None:
    model, batches = stages()
    before = fingerprint(model)
    keep = {"head.2": [0, 1, 2], "box": [1, 2]}
    with pytest.raises(ValueError, match=r"head.2 is called 3 times, box is called 3 times"):
        tp_amp.compensate(model, tp_amp.PruningPlan(keep), batches, every_linear=True)
    read: list[int] = []

    def score(group: object) -> None:
        read.append(1)

    blocks = [block.second for block in model.blocks]
    with pytest.raises(ValueError, match="ignored_layers leaves it whole"):
        tp_amp.AdaptiveMLPPruner(
            model, batches[0][:1], score, batches, compensation="affine", ignored_layers=blocks
        )
    assert not read
    assert fingerprint(model) == before


def test_the_search_leaves_them_uncorrected() -> None:
    model, batches = stages()
    importance = tp_amp.ReconstructionImportance(data=batches, objective=None)
    pruner = tp_amp.AdaptiveMLPPruner(
        model,
        batches[0][:1],
        importance,
        [batch + 0.1 for batch in batches],
        objective=lambda output: output.square().mean(),
        max_increase=0.1,
        compensation=tp_amp.Recipe("affine", every_linear=True),
        progress=False,
    )
    pruner.step()
    assert any(len(kept) < 12 for name, kept in pruner.plan.keep.items() if "blocks" in name)
    assert not pruner.corrections.keys() & {"head.0", "head.2", "box"}
