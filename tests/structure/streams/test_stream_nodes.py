"""Which additions are those of residual streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import images, toy

from tp_amp.structure.graph import build_graph
from tp_amp.structure.streams import stream_nodes
from tp_amp.structure.streams.graph_weights import is_product
from tp_amp.structure.streams.stream_nodes import gate_of, residual_additions


class Nothing(nn.Module):
    """Additions that no layer stands between: of biases, of branches, of two images."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x) + self.bias, self.two(x)
        logits = (one @ two.transpose(-2, -1)).flatten(1)[:, :8] + self.bias
        return 0.5 * one.mean((1, 2)) + 0.1 * one.mean((1, 2)) ** 3 + logits


def test_other_additions_are_no_streams() -> None:
    model = Nothing()
    assert not list(residual_additions(build_graph(model, torch.randn(2, 3, 8, 8))))


@pytest.mark.parametrize("depth", [1, 3])
def test_each_block_adds_twice(depth: int) -> None:
    assert len(list(residual_additions(build_graph(toy(depth=depth), images(1))))) == 2 * depth


class Recurrent(nn.Module):
    """Adds at every step, to what the step before made."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(steps))
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        given = self.first(x)
        for layer in self.layers:
            given = layer(given).sigmoid() + given.tanh()
        return given


def test_long_graphs_take_no_longer_for_each_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    monkeypatch.setattr(
        stream_nodes, "is_product", lambda node: looks.append(node) or is_product(node)
    )
    counts = []
    for steps in (10, 20):
        looks.clear()
        list(residual_additions(build_graph(Recurrent(steps), torch.randn(2, 8))))
        counts.append(len(looks))
    assert counts[1] < 2.5 * counts[0]


def test_a_module_that_is_called_twice_hides_no_addition() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range(2):
                x = x + self.layer(x)
            return x

    assert list(residual_additions(build_graph(Twice(), torch.randn(2, 8))))


def test_a_gate_is_a_parameter_of_several_entries() -> None:
    class Gated(nn.Module):
        def __init__(self, entries: int) -> None:
            super().__init__()
            self.linear, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.gate = nn.Parameter(torch.rand(entries))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.linear(x) * self.gate[None])

    for entries, count in ((4, 1), (1, 0)):
        nodes = build_graph(Gated(entries), torch.randn(2, 4)).graph.module2node.values()
        assert len([node for node in nodes if gate_of(node) is not None]) == count
