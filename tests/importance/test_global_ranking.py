"""Torch-Pruning's global ranking: by losses where they are foreseen, and told where ranks are."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn
from toys import images, toy

import tp_amp


def uneven() -> Any:
    """The second MLP gives less than the first does."""
    torch.manual_seed(0)
    model = toy()
    with torch.no_grad():
        model.blocks[1].mlp.second.weight.mul_(0.4)
    return model


def pruned(model: Any, importance: Any, **arguments: Any) -> list[int]:
    kept = [model.embed, model.head]
    kept += [getattr(block, n) for block in model.blocks for n in ("query", "key", "value")]
    kept += [block.project for block in model.blocks]
    pruner = tp.pruner.MetaPruner(
        model,
        images(1),
        importance=importance,
        pruning_ratio=0.5,
        ignored_layers=kept,
        root_module_types=[nn.Linear],
        **arguments,
    )
    pruner.step()
    return [block.mlp.first.out_features for block in model.blocks]


@pytest.mark.parametrize("objective", ["auto", None])
def test_the_global_ranking_leaves_the_smallest_foreseen_loss(objective: str | None) -> None:
    data = [images(16) for _ in range(4)]
    importance = tp_amp.ReconstructionImportance(objective, data=data)
    widths = pruned(uneven(), importance, global_pruning=True)
    assert widths[0] > widths[1]
    errors = [importance.errors[f"blocks.{i}.mlp.second"] for i in range(2)]
    total = sum(widths)
    assert abs(total - 20) <= 1
    best = min(
        float(errors[0][a] + errors[1][b])
        for a, b in itertools.product(range(1, 21), repeat=2)
        if a + b == total
    )
    found = float(errors[0][widths[0]] + errors[1][widths[1]])
    # Widths between the corners of a hull may be a little better.
    assert found <= best + 0.02 * float(errors[0][0] + errors[1][0])


def test_the_order_within_a_layer_is_that_of_the_pivots() -> None:
    model, data = uneven(), [images(16) for _ in range(4)]
    importance = tp_amp.ReconstructionImportance(data=data)
    plan = tp_amp.plan_from_importance(model, images(1), importance, 0.35)
    for name, kept in plan.keep.items():
        assert kept == sorted(importance.orders[name][: len(kept)].tolist())
    assert pruned(uneven(), tp_amp.ReconstructionImportance(data=data)) == [10, 10]


@pytest.mark.parametrize("global_pruning", [False, True])
def test_ranks_that_are_compared_between_layers_are_told_once(
    global_pruning: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tp_amp"):
        widths = pruned(uneven(), tp_amp.GramSchmidtImportance(), global_pruning=global_pruning)
    told = [m for m in caplog.messages if "takes the same share of every layer" in m]
    assert len(told) == int(global_pruning)
    assert max(widths) - min(widths) <= 1


def test_nothing_is_said_without_a_pruner(caplog: pytest.LogCaptureFixture) -> None:
    tp_amp.plan_from_importance(toy(), images(1), tp_amp.GramSchmidtImportance(), 0.5)
    assert not [m for m in caplog.messages if "global_pruning" in m]
