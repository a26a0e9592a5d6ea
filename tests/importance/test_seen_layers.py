"""Layers that are seen in as few passes as memory allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import images, toy

import tp_amp
from tp_amp.importance import seen_layers as layers_module
from tp_amp.importance.objectives import Objective
from tp_amp.importance.seen_layers import (
    SeenLayer,
    cost_bytes,
    in_turns,
    moment_bytes,
    seen_layers,
)

DOWN = ["blocks.0.mlp.second", "blocks.1.mlp.second"]


def test_layers_beyond_the_memory_are_collected_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy(), images(30)
    once = tp_amp.ReconstructionImportance(None).collect(model, [batch], progress=False)
    monkeypatch.setattr(layers_module, "_BYTES", 8 * 20**2)
    turns = tp_amp.ReconstructionImportance(None).collect(model, [batch], progress=False)
    assert once.orders.keys() == turns.orders.keys() >= set(DOWN)
    for name in DOWN:
        assert torch.equal(once.orders[name], turns.orders[name])
    with pytest.raises(TypeError, match="one-shot"):
        tp_amp.ReconstructionImportance(None).collect(model, iter([batch]), progress=False)


def test_turns_hold_no_more_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one part are held together: both halves of what they read, or what errors cost."""
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(4, 4))
    monkeypatch.setattr(layers_module, "_BYTES", 2 * 8 * (16**2 + 4**2))
    assert in_turns(moment_bytes(model, ["0", "1", "2"])) == [["0", "1"], ["2"]]
    monkeypatch.setattr(layers_module, "_BYTES", 8 * (16**2 + 4**2))
    assert in_turns(cost_bytes(model, ["0", "2", "1"], {})) == [["0", "2"], ["1"]]
    assert in_turns(cost_bytes(model, ["2"], {"1": slice(2), "2": slice(2)})) == [["2", "1"]]
    monkeypatch.setattr(layers_module, "_BYTES", 8 * 2 * 4**2 - 1)
    assert in_turns(cost_bytes(model, ["2"], {"1": slice(2), "2": slice(2)})) == [["2"], ["1"]]


def test_backward_passes_are_not_repeated_for_what_layers_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Widths make what layers read large, while what errors cost is as small as the outputs."""
    model, passes = toy(), []
    model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    monkeypatch.setattr(layers_module, "_BYTES", 2 * 8 * 20**2)
    objective: Any = Objective("prediction")
    names = [name for name, _ in seen_layers(model, DOWN, [images(6)] * 3, objective)]
    assert names == DOWN
    assert (passes.count(True), passes.count(False)) == (3, 6)


def test_a_squared_error_counts_what_it_costs() -> None:
    """Against the gradients themselves; of a batch of one image no mean is drawn together."""
    model, batch = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).double(), torch.randn(1, 3)

    def square(output: Tensor) -> Tensor:
        return output.square().sum()

    objective: Any = Objective(square)
    [(name, seen)] = seen_layers(model, ["0"], [batch.double()], objective)
    assert isinstance(seen, SeenLayer)
    hidden = model[0](batch.double()).detach().requires_grad_()
    [gradient] = torch.autograd.grad(square(model[1](hidden)), hidden)
    expected = (gradient.square().T * model[0].weight.square()).sum(0)
    assert (name, seen.share) == ("0", 0.5)
    torch.testing.assert_close(seen.weight.square().sum(0), expected.detach())
    [(_, alike)] = seen_layers(model, ["0"], [batch.double()], None)
    assert torch.equal(alike.weight, model[0].weight.detach())
