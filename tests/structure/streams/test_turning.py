"""A turned toy computes the same, and its weights are those that the formulas give."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tp_amp.structure.streams.norm_kinds import kind_of, reflection
from tp_amp.structure.streams.residual_stream import Reading, Stream, Written
from tp_amp.structure.streams.turning import CannotTurn, turn

WIDTH = 6


class Toy(nn.Module):
    """A stream that is read in all ways: side by side, by a kernel, raw, and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.table = nn.Embedding(4, WIDTH)
        self.gamma, self.tau = (nn.Parameter(torch.rand(WIDTH) + 0.5) for _ in range(2))
        self.norm, self.other = nn.LayerNorm(WIDTH), nn.LayerNorm(2 * WIDTH)
        self.linear, self.plain = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 7, bias=False)
        self.pair, self.wide = nn.Linear(2 * WIDTH, 3), nn.Linear(2 * WIDTH, 3)
        self.conv, self.raw = nn.Conv1d(WIDTH, 3, 2), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        s = self.gamma * self.embed(x) + self.tau * self.table(torch.arange(4))
        z = self.norm(s)
        return [
            self.linear(z),
            self.plain(z),
            self.pair(self.other(s.unflatten(1, (2, 2)).flatten(2))),
            self.wide(z.unflatten(1, (2, 2)).flatten(2)),
            self.conv(z.transpose(1, 2)),
            self.raw(s),
        ]


READINGS = (
    Reading("linear.weight", "linear.bias", "norm"),
    Reading("plain.weight", None, "norm"),
    Reading("pair.weight", "pair.bias", "other"),
    Reading("wide.weight", "wide.bias", "norm"),
    Reading("conv.weight", None, "norm"),
    Reading("raw.weight", "raw.bias", None),
)
STREAM = Stream(
    "embed",
    WIDTH,
    True,
    (
        Written("embed.weight", 0, "gamma"),
        Written("embed.bias", 0, "gamma"),
        Written("table.weight", 1, "tau"),
    ),
    ("norm", "other"),
    READINGS,
)


def toy() -> tuple[Toy, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Toy().double()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    normal = torch.randn(WIDTH).double()
    other = torch.randn(WIDTH).double()
    rotation = reflection(normal - normal.mean()) @ reflection(other - other.mean())
    return model, torch.randn(3, 4, 5).double(), rotation


@torch.no_grad()
@pytest.mark.parametrize("keeps", [False, True])
def test_a_turned_model_is_the_same_function(keeps: bool) -> None:
    model, x, rotation = toy()
    dense = copy.deepcopy(model)
    turn(model, replace(STREAM, keeps_biases=keeps), rotation)
    for after, before in zip(model(x), dense(x), strict=True):
        assert torch.allclose(after, before, atol=1e-10)
    assert bool((model.norm.weight == 1).all())
    assert bool((model.gamma == 1).all() and (model.tau == 1).all())
    assert bool(model.other.bias.any()) == keeps  # all of its readers have biases
    assert bool(model.norm.bias.any())
    scaled = rotation @ (dense.gamma[:, None] * dense.embed.weight)
    assert torch.allclose(model.embed.weight, scaled)
    assert torch.allclose(model.raw.weight, dense.raw.weight @ rotation.mT)
    read = dense.linear.weight * dense.norm.weight @ rotation.mT
    assert torch.allclose(model.linear.weight, read)
    assert torch.equal(model.raw.bias, dense.raw.bias)
    assert torch.equal(model.linear.bias, dense.linear.bias) == keeps


@torch.no_grad()
def test_a_linear_is_turned_in_one_product() -> None:
    """And not in one for each of its outputs, which took forty times as long."""
    torch.manual_seed(0)
    width = 512
    model = nn.Linear(width, 2048).double()
    normal = torch.randn(width).double()
    rotation = reflection(normal - normal.mean())
    stream = Stream("x", width, True, (), (), (Reading("weight", "bias", None),))

    def seconds(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    once = seconds(lambda: model.weight @ rotation.mT)
    assert seconds(lambda: turn(model, stream, rotation)) < 10 * once


@torch.no_grad()
def test_a_bias_goes_into_the_readers_where_it_can() -> None:
    model, _, rotation = toy()
    before = model.linear.bias + model.linear.weight @ model.norm.bias
    readings = tuple(r for r in READINGS if r.weight not in ("plain.weight", "conv.weight"))
    turn(model, replace(STREAM, readings=readings), rotation)
    assert not model.norm.bias.any()
    assert torch.allclose(model.linear.bias, before)


@torch.no_grad()
def test_a_bias_that_finds_no_place_is_told() -> None:
    model, _, rotation = toy()
    model.norm.weight[2] = 0
    with pytest.raises(CannotTurn, match="the bias of norm finds no place"):
        turn(model, STREAM, rotation)


@torch.no_grad()
def test_some_rows_alone_may_read() -> None:
    """As of an attention whose queries come from elsewhere."""
    model, _, rotation = toy()
    dense = copy.deepcopy(model)
    reading = Reading("linear.weight", "linear.bias", "norm", rows=(1, 3))
    turn(model, replace(STREAM, readings=(reading,), norms=("norm",)), rotation)
    read = dense.linear.weight * dense.norm.weight @ rotation.mT
    assert torch.equal(model.linear.weight[:1], dense.linear.weight[:1])
    assert torch.allclose(model.linear.weight[1:], read[1:])
    assert torch.equal(model.linear.bias[:1], dense.linear.bias[:1])


class Root(nn.Module):
    """A norm of its own kind: by the mean of absolute values, which no rotation keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().mean(-1, keepdim=True) * self.weight


class Scale(Root):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (nn.LayerNorm(WIDTH), "centred"),
        (nn.LayerNorm(WIDTH, bias=False), "centred"),
        (nn.RMSNorm(WIDTH), "uncentred"),
        (Scale(), "scale"),
        (Root(), None),
        (nn.BatchNorm1d(WIDTH), None),
        (nn.GroupNorm(2, WIDTH), None),
    ],
)
def test_norms_are_told_apart_by_values(norm: nn.Module, kind: str | None) -> None:
    for parameter in norm.parameters():
        parameter.data.normal_()
    before = [p.clone() for p in norm.parameters()]
    assert kind_of(norm, WIDTH) == kind
    assert all(map(torch.equal, before, norm.parameters()))
