"""Attentions with a forward pass of this package's, against their own."""

from __future__ import annotations

import pytest
import torch
from attention_models import snapshot
from torch import nn
from toys import relative

from tp_amp.structure.attention.adapting import exposing


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "float", "bool", "heads"])
@pytest.mark.parametrize(
    "arguments", [{}, {"need_weights": False}, {"average_attn_weights": False}]
)
def test_exposed_attention_gives_the_same(
    batch_first: bool, mask: str, arguments: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    options = {"kdim": 6, "vdim": 10} if mask == "float" else {}
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).eval()
    sizes = [(5, 8), (7, options.get("kdim", 8)), (7, options.get("vdim", 8))]
    q, k, v = (torch.randn(3, tokens, width, requires_grad=True) for tokens, width in sizes)
    masks = {"float": torch.randn(5, 7), "bool": torch.rand(5, 7) < 0.3, "none": None}
    padding = torch.arange(7).expand(3, -1) >= torch.tensor([[7], [4], [5]])
    given = {**arguments, "attn_mask": masks.get(mask, torch.randn(6, 5, 7))}
    given["key_padding_mask"] = padding if mask in ("none", "bool") else None
    inputs = [x if batch_first else x.transpose(0, 1) for x in (q, k, v)]
    expected = attention(*inputs, **given)
    before = snapshot(attention)
    with exposing(attention):
        found = attention(*inputs, **given)
        single = attention(q[0], k[0], v[0])
    assert snapshot(attention) == before
    assert relative(found[0], expected[0]) < 1e-5
    assert relative(single[0], attention(q[0], k[0], v[0])[0]) < 1e-5
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        assert relative(found[1], expected[1]) < 1e-5


def test_multihead_attention_of_one_sequence_with_padding() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q, k = torch.randn(5, 8), torch.randn(7, 8)
    padding = torch.arange(7) >= 4
    expected = attention(q, k, k, key_padding_mask=padding)
    with exposing(attention):
        found = attention(q, k, k, key_padding_mask=padding)
        with pytest.raises(ValueError, match="pass the causal attn_mask too"):
            attention(q, q, q, is_causal=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
