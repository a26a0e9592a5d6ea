"""A model that draws in its forward pass: no public call changes the caller's random state."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from drawing_model import Drawing
from torch import nn
from toys import images

import tp_amp

DOWN = "toy.blocks.0.mlp.second"
BATCHES = [images(8, seed) for seed in (1, 2)]
PLAN = tp_amp.PruningPlan({DOWN: [0, 1, 2, 7]})


def reconstruction() -> tp_amp.ReconstructionImportance:
    return tp_amp.ReconstructionImportance(data=BATCHES)


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "inspect": lambda m: tp_amp.inspect(m, BATCHES[0][:1]),
    "find_mlps": lambda m: tp_amp.find_mlps(m, BATCHES[0][:1]),
    "find_attentions": lambda m: tp_amp.find_attentions(m, BATCHES[0][:1]),
    "collect": lambda m: tp_amp.EntropyTaylorImportance().collect(m, BATCHES, progress=False),
    "plan_for_target": lambda m: tp_amp.plan_for_target(
        m, BATCHES[0][:1], reconstruction(), {"params": 0.9}
    ),
    "plan_from_importance": lambda m: tp_amp.plan_from_importance(
        m, BATCHES[0][:1], reconstruction(), 0.5
    ),
    "apply_plan": lambda m: tp_amp.apply_plan(m, PLAN, BATCHES[0][:1]),
    "compensate": lambda m: tp_amp.compensate(m, PLAN, BATCHES, progress=False),
    "search": lambda m: tp_amp.AdaptiveMLPPruner(
        m, BATCHES[0][:1], tp_amp.DIMAPImportance(), BATCHES, max_increase=1.0, progress=False
    ).step(),
    "measure": lambda m: tp_amp.measure(m, BATCHES),
    "rotate": lambda m: tp_amp.rotate(m, BATCHES[0][:1], BATCHES, progress=False),
}


@pytest.mark.parametrize("call", CALLS)
def test_random_state_is_given_back(call: str) -> None:
    model = copy.deepcopy(Drawing().eval())
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    CALLS[call](model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy.array_equal(numpy.random.get_state()[1], before[2])
