"""What is taken for a width inside heads is proven; what is none is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toys import fingerprint

import tp_amp
from tp_amp.structure.ranks.proving import read_head_ranks


class Attention(nn.Module):
    """Two heads of four channels, with what may act on channels one by one."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.num_heads, self.between = 2, between
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.gate = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, _ = x.shape
        called = self.between != "weights"  # which are read then without their layer
        linear = self.qkv.weight, self.qkv.bias
        made = self.qkv(x) if called else functional.linear(x, *linear)
        q, k, v = made.view(images, tokens, 3, 2, -1).permute(2, 0, 3, 1, 4)
        if self.between == "size":  # the width of a head, as the weight says it
            q = q * (len(self.qkv.weight) / (3 * self.num_heads))
        if self.between == "keys":
            k = k * self.gate
        if self.between == "cosine":
            q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        heads = functional.scaled_dot_product_attention(q, k, v)
        if self.between == "values":
            heads = heads.relu()
        return self.proj(heads.transpose(1, 2).reshape(images, tokens, -1))


@pytest.mark.parametrize(
    ("between", "found"),
    [("", {"qk", "vo"}), ("keys", {"vo"}), ("cosine", {"vo"}), ("values", {"qk"})],
)
def test_only_what_can_be_mixed_is_found(between: str, found: set[str]) -> None:
    torch.manual_seed(0)
    model, x = Attention(between), torch.randn(2, 5, 8)
    before = fingerprint(model)
    sites, reasons = read_head_ranks(model, tp_amp.find_attentions(model, x), x)
    assert fingerprint(model) == before
    assert {site.pair for site in sites} == found
    assert {name.rpartition(" ")[2] for name in reasons} == {"qk", "vo"} - found
    assert all("one by one" in reason for reason in reasons.values())
    for site in sites:
        assert (site.heads, site.width) == (2, 4)


@pytest.mark.parametrize(
    ("between", "reason"),
    [("weights", "it no longer runs"), ("size", "it gives another output than with zeros")],
)
def test_what_knows_its_weights_is_left_whole(between: str, reason: str) -> None:
    """Mixed channels are the same to it, and fewer of them are not."""
    torch.manual_seed(0)
    model, x = Attention(between), torch.randn(2, 5, 8)
    found = tp_amp.find_attentions(model, x)
    assert len(found) == 1
    before = fingerprint(model)
    sites, reasons = read_head_ranks(model, found, x)
    assert sites == []
    assert set(reasons) == {": qk", ": vo"}
    assert all(f"cut to half of the channels {reason}" in told for told in reasons.values())
    with pytest.raises(ValueError, match=f"can be rotated: .*{reason}"):
        tp_amp.rotate_heads(model, x, [x], progress=False)
    assert fingerprint(model) == before
