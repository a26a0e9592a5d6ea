"""Which additions are those of residual streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import images, toy

from tp_amp.structure.graph import build_graph
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
