"""An input that says another width keeps saying it while its channels stay last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from head_cuts import prune, random_keep, zeroed
from torch import Tensor, nn
from toys import perturbed, relative

from tp_amp.structure.attention.finding import find_attentions
from tp_amp.structure.attention.head_forward import _SaysWidth
from tp_amp.structure.graph import build_graph


class TokensFirst(nn.Module):
    """Turns its input round before it reads the width off it, as mask decoders do."""

    def __init__(self, turn: Callable[[Any], Any]) -> None:
        super().__init__()
        self.turn, self.num_heads = turn, 4
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Any) -> Tensor:
        x = self.turn(x)
        tokens, images, width = x.size()
        sizes = tokens, images * self.num_heads, width // self.num_heads
        parts = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part(x).reshape(sizes).transpose(0, 1) for part in parts)
        hidden = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.out_proj(hidden.transpose(0, 1).reshape(tokens, images, width)).transpose(0, 1)


TURNS = {
    "permute": lambda x: x.permute(1, 0, 2),
    "permute a list": lambda x: x.permute([1, 0, 2]),
    "transpose": lambda x: x.transpose(0, 1),
    "transpose from the end": lambda x: x.transpose(-2, -3),
}


@pytest.mark.parametrize("name", TURNS)
def test_heads_of_a_turned_input_are_cut(name: str) -> None:
    torch.manual_seed(0)
    model, x = perturbed(nn.Sequential(TokensFirst(TURNS[name]))), torch.randn(3, 5, 8)
    found = find_attentions(model, x)
    assert [attention.forward for attention in found] == ["narrow"]
    keep = random_keep(found)
    with torch.no_grad():
        expected = zeroed(model, found, keep)(x)
        prune(build_graph(model, x).graph, found, keep)
        assert relative(model(x), expected) < 1e-5


def test_a_width_that_is_no_longer_last_is_the_truth() -> None:
    said = _SaysWidth(torch.zeros(2, 3, 8), 6)
    assert said.transpose(0, 1).size() == (3, 2, 6)
    for turned in (said.transpose(1, 2), said.transpose(-1, 0), said.permute(2, 0, 1)):
        assert isinstance(turned, Tensor)
        assert 8 in turned.shape
