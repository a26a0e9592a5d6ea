"""Who writes and who reads a stream, against lists made by hand; what stands against a rotation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tp_amp.structure.graph import build_graph
from tp_amp.structure.streams.graph_weights import GraphWeights
from tp_amp.structure.streams.residual_stream import Reading, Written
from tp_amp.structure.streams.stream_nodes import residual_additions
from tp_amp.structure.streams.walking import Walk, Walked

WIDTH = 8


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RMS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Net(nn.Module):
    """One residual block between an embedding and a head, with a part that tests replace."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.change = change
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Embedding(5, WIDTH)
        self.norm, self.last = nn.LayerNorm(WIDTH), RMS()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH, bias=False)
        self.scale = Scale()
        self.gate = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.batch = nn.BatchNorm1d(WIDTH)
        self.merge, self.head = nn.Linear(2 * WIDTH, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.places(torch.arange(5))
        if self.change == "gated stream":
            x = x * self.gate
        if self.change == "depthwise":
            x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        if self.change == "batch norm":
            x = x + self.up(self.batch(x.transpose(1, 2)).transpose(1, 2)) @ self.down.weight.T
        y = self.norm(x)
        if self.change == "combined":
            y = y + self.gate
        hidden = functional.linear(y, self.up.weight, self.up.bias).relu()
        y = self.down(hidden)
        if self.change == "post-norm":
            y = self.norm(y)
        if self.change == "scaled by a parameter":
            y = self.gate * y
        elif self.change != "unscaled":
            y = self.scale(y)
        if self.change == "used twice":
            x = x + y + self.down(hidden + 1)
        x = x + y
        if self.change == "token product":
            x = x + x @ x.transpose(1, 2) @ x
        if self.change == "stream":
            return 2 * x
        x = self.last(x)
        if self.change == "norm":
            return x
        x = x[:, 1:].unflatten(1, (2, 2)).flatten(2)  # two places side by side
        return self.head(self.merge(x).relu().mean(1))


def walked(change: str = "", make: Callable[..., nn.Module] = Net) -> Walked:
    torch.manual_seed(0)
    model = make(change).eval()
    traced = build_graph(model, torch.randn(2, 3, 8, 8))
    names = {module: name for name, module in model.named_modules()}
    walk = Walk(traced, names, GraphWeights(model, traced.real))
    found = [walk.follow(addition) for addition in residual_additions(traced)]
    for one in found:  # wherever one starts
        assert bool(one.problems) == bool(found[0].problems)
        assert one.problems or set(one.written) == set(found[0].written)
    return found[0]


@pytest.mark.parametrize(
    ("change", "scale"),
    [("", "scale.gamma"), ("scaled by a parameter", "gate"), ("unscaled", None)],
)
def test_all_that_writes_and_reads_is_found(change: str, scale: str | None) -> None:
    found = walked(change)
    assert not found.problems
    assert set(found.written) == {
        Written("embed.weight", 0),
        Written("embed.bias", 0),
        Written("token", 2),
        Written("places.weight", 1),
        Written("down.weight", 0, scale),
    }
    assert set(found.readings) == {
        Reading("up.weight", "up.bias", "norm"),
        Reading("merge.weight", "merge.bias", "last"),
    }
    assert found.norms == {"norm": "centred", "last": "uncentred"}


@pytest.mark.parametrize(
    ("change", "where", "reason"),
    [
        ("stream", "the output", "the stream itself"),
        ("norm", "last", "the model's output is what this norm gives"),
        ("gated stream", "gate", "it scales something else than what a layer writes"),
        ("depthwise", "mix", "in 8 groups keeps channels apart"),
        ("batch norm", "batch", "a BatchNorm1d reads the stream channel by channel"),
        ("combined", "norm", "combined with something else"),
        ("post-norm", "norm", "writes the stream|the stream and something else"),
        ("token product", "", "a product"),
        ("used twice", "", "in two ways|something else"),
    ],
)
def test_what_stands_against_it_is_told(change: str, where: str, reason: str) -> None:
    problems = walked(change).problems
    assert any(where in name and re.search(reason, told) for name, told in problems.items()), (
        problems
    )
