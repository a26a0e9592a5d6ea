"""Sizes of models in which one MLP's last layer is the next one's first, as in heads for boxes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from toys import perturbed

import tp_amp
from tp_amp.budget.budget import Budget
from tp_amp.structure.model_structure import ModelStructure

WIDTHS = (6, 9, 7, 5, 4)  # of a chain of four Linears: three MLPs, two shared layers
TOKENS = 3


def chain() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(*sizes) for sizes in itertools.pairwise(WIDTHS)]
    return perturbed(nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1]))


def by_hand(kind: str, hidden: tuple[int, ...]) -> int:
    sizes = (WIDTHS[0], *hidden, WIDTHS[-1])
    products = sum(a * b for a, b in itertools.pairwise(sizes))
    return TOKENS * products if kind == "macs" else products + sum(sizes[1:])


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_costs_of_all_widths_are_those_counted_by_hand(kind: str) -> None:
    structure = ModelStructure(chain(), torch.randn(1, TOKENS, WIDTHS[0]))
    budget = Budget({kind: 0.5}, structure, structure.mlps)
    assert list(budget.widths.values()) == list(WIDTHS[1:-1])
    for hidden in itertools.product((1, 2, 4), (3, 7), (1, 5)):
        widths = dict(zip(budget.widths, hidden, strict=True))
        assert budget.cost(widths) == by_hand(kind, hidden)


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("amount", [0.2, 0.35, 0.5, 0.8, 1.0])
def test_a_target_is_met_and_hardly_missed(kind: str, amount: float) -> None:
    model, x = chain(), torch.randn(1, TOKENS, WIDTHS[0])
    data = [torch.randn(8, TOKENS, WIDTHS[0]) for _ in range(2)]
    importance = tp_amp.ReconstructionImportance(data=data, objective=None)
    plan = tp_amp.plan_for_target(model, x, importance, {kind: amount})
    hidden = tuple(plan.widths.values())
    limit = amount * by_hand(kind, WIDTHS[1:-1])
    cut = copy.deepcopy(model)
    tp_amp.apply_plan(cut, plan)
    if kind == "params":
        assert sum(p.numel() for p in cut.parameters()) == by_hand(kind, hidden)
    assert by_hand(kind, hidden) <= limit
    wider = [(*hidden[:i], hidden[i] + 1, *hidden[i + 1 :]) for i in range(3)]
    others = [by_hand(kind, w) for w in wider if max(map(int.__sub__, w, WIDTHS[1:-1])) <= 0]
    assert not others or max(others) > limit  # one of the layers could not be a channel wider
