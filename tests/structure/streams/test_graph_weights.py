"""Which parameters an operation takes, where weights are read without calling their layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tp_amp.structure.graph import build_graph
from tp_amp.structure.streams.graph_weights import Factor, GraphWeights, is_product


class Net(nn.Module):
    def __init__(self, run: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.linear, self.other = nn.Linear(4, 6), nn.Linear(6, 4)
        self.bias, self.table = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(4, 6))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def factors(run: Callable[[Net, Tensor], Tensor]) -> list[Factor | None]:
    model = Net(run)
    traced = build_graph(model, torch.randn(2, 3, 4))
    weights = GraphWeights(model, traced.real)
    return [weights.factor(n) for n in traced.graph.module2node.values() if is_product(n)]


WHOLE = Factor("linear.weight", "linear.bias")


@pytest.mark.parametrize(
    ("run", "factor"),
    [
        (lambda m, x: m.other(m.linear(x)), WHOLE),
        (lambda m, x: functional.linear(x, m.linear.weight, m.linear.bias).relu(), WHOLE),
        (lambda m, x: m.other(m.linear(x.transpose(1, 2).contiguous().transpose(1, 2))), WHOLE),
        (
            lambda m, x: functional.linear(x, m.linear.weight, m.bias).relu(),
            Factor("linear.weight", None),
        ),
        (lambda m, x: (x @ m.table).relu(), None),
        (lambda m, x: (x @ (m.other.weight @ m.linear.weight)).relu(), None),  # of two layers
        (lambda m, x: (m.linear(x) @ m.linear(x).transpose(1, 2)).relu(), None),
        (
            lambda m, x: m.attention(x, x, x, need_weights=False)[0].relu(),
            Factor("attention.in_proj_weight", "attention.in_proj_bias"),
        ),
        (  # queries from elsewhere: keys and values have rows of their own
            lambda m, x: m.attention(m.query.expand(len(x), -1, -1), x, x)[0].relu(),
            Factor("attention.in_proj_weight", "attention.in_proj_bias", (4, 12)),
        ),
    ],
)
def test_the_weight_of_a_product(
    run: Callable[[Net, Tensor], Tensor], factor: Factor | None
) -> None:
    assert factor in factors(run)


def test_layouts_alone_are_followed() -> None:
    """A table is known behind a reshape, and not behind a sum."""
    model = Net(lambda m, x: x.mean((1, 2), keepdim=True) + m.table.T.reshape(1, 6, 4))
    weights = GraphWeights(model, {})
    assert weights.behind(model.table.T.reshape(1, 6, 4).grad_fn) == ("table", None)
    assert weights.behind((model.table + 1).grad_fn) is None
    parts = model.linear.weight.split([2, 4])
    assert weights.behind(parts[1].T.grad_fn.next_functions[0][0], 1) == ("linear.weight", (2, 6))
