"""Whether channels at one layer come from the same channels of another."""

from __future__ import annotations

import logging

import pytest
import torch
from mixing_models import Between, Packed
from torch import nn
from toys import images, toy

import tp_amp


def test_single_head_attention_is_no_mlp(caplog: pytest.LogCaptureFixture) -> None:
    """TP calls the matrix products of attention element-wise."""
    with caplog.at_level(logging.DEBUG, logger="tp_amp"):
        found = tp_amp.find_mlps(toy(), images(1))
    assert [mlp.down for mlp in found] == ["blocks.0.mlp.second", "blocks.1.mlp.second"]
    assert "blocks.0.value starts no MLP" in caplog.text


class Mixing(nn.Module):
    """Two Linears of the same width with something in between that is not element-wise."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.matrix = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.embed(x).relu())
        if self.between == "matrix":
            h = h @ self.matrix.detach()
        elif self.between == "softmax":
            h = h.softmax(-1)
        elif self.between == "tokens":
            h = h + h.mean(1, keepdim=True)
        elif self.between == "roll":
            h = h.roll(1, -1)
        elif self.between == "two readers":
            return self.down(h) + self.down(h.relu()) + h.sum(-1, keepdim=True)
        return self.down(h)


@pytest.mark.parametrize("between", ["matrix", "softmax", "tokens", "roll", "two readers"])
def test_what_is_not_element_wise_is_left_out(between: str) -> None:
    found = tp_amp.find_mlps(Mixing(between), torch.randn(1, 5, 4))
    assert "down" not in [mlp.down for mlp in found]


def test_element_wise_between_is_found() -> None:
    found = tp_amp.find_mlps(Mixing("nothing"), torch.randn(1, 5, 4))
    assert [(mlp.up, mlp.down) for mlp in found] == [(("embed",), "up"), (("up",), "down")]


@pytest.mark.parametrize("kind", ["swapped", "shifted", "interleaved"])
def test_packed_halves_that_do_not_line_up_are_left_out(kind: str) -> None:
    assert tp_amp.find_mlps(Packed(kind), torch.randn(1, 5, 4)) == []


def test_saturated_attention_is_left_out() -> None:
    """With one token at a weight of exactly one, values pass through as if element by element."""

    class Saturated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 24), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.proj((1e6 * q @ k.transpose(1, 2)).softmax(-1) @ v)

    for seed in range(5):
        torch.manual_seed(seed)
        assert tp_amp.find_mlps(Saturated(), torch.randn(1, 5, 4)) == []


# Each keeps all sizes, so that shapes alone can't tell.
MIXING_2D = {
    "product": lambda h, table: h @ table,
    "product with bias": lambda h, table: nn.functional.linear(h, table, table[0]),
    "transposed": lambda h, table: h.t(),
    "outer product": lambda h, table: h.view(8, 8, 1) * table[0],
    "shuffled": lambda h, table: h.view(8, 2, 4).transpose(1, 2).reshape(8, 8),
    "two products": lambda h, table: (h @ table) @ table,
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", MIXING_2D)
def test_what_keeps_the_sizes_but_not_the_channels_is_left_out(name: str, device: str) -> None:
    model = Between(MIXING_2D[name]).to(device)
    assert tp_amp.find_mlps(model, torch.randn(8, 5, device=device)) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_two_dimensional_element_wise_is_found(device: str) -> None:
    model = Between(lambda h, table: torch.sigmoid(h) * h).to(device)
    assert [mlp.width for mlp in tp_amp.find_mlps(model, torch.randn(8, 5, device=device))] == [8]
