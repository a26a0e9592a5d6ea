"""Attentions that take their width from the input, from the code, or from nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tp_amp.structure.model_structure import ModelStructure

WIDTH = 8


class Attention(nn.Module):
    def __init__(self, sizes: str) -> None:
        super().__init__()
        self.sizes = sizes
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(images, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
        hidden = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        shape = {"own": (images, tokens, -1), "input": (images, tokens, width)}
        return self.proj(hidden.reshape(shape.get(self.sizes, shape["own"])))


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return output


class Net(nn.Module):
    def __init__(self, sizes: str) -> None:
        super().__init__()
        self.sizes, self.embed = sizes, nn.Linear(3, WIDTH)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Multihead() if sizes == "multihead" else Attention(sizes)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        x = x + self.attn(self.norm(x))
        if self.sizes == "code":
            x = x.reshape(*x.shape[:2], 8)
        x = self.last(x)
        if self.sizes == "value":
            x = x * (x.shape[-1] / 8)  # another function of what is left
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("sizes", "told", "whole"),
    [
        ("own", (), ""),
        ("input", ("attn",), ""),
        ("multihead", ("attn.inner",), ""),
        ("code", (), "a copy that is cut fails: shape"),
        ("value", (), "a copy that is cut fails: it gives something else"),
    ],
)
def test_who_must_be_told(sizes: str, told: tuple[str, ...], whole: str) -> None:
    torch.manual_seed(0)
    model = Net(sizes).eval()
    [stream], reasons = ModelStructure(model, torch.randn(2, 4, 3)).streams
    assert not reasons
    assert stream.told == told
    assert stream.whole.startswith(whole)
    assert bool(stream.whole) == bool(whole)


def test_small_weights_are_no_reason_to_leave_a_stream_whole() -> None:
    """The number that a norm adds to the variance is then a part of what it divides by."""
    torch.manual_seed(0)
    model = Net("own").eval()
    with torch.no_grad():
        model.embed.weight.mul_(1e-3)
        model.embed.bias.mul_(1e-3)
    [stream], _ = ModelStructure(model, torch.randn(2, 5, 3)).streams
    assert stream.whole == ""
    assert model.norm.eps == 1e-5
