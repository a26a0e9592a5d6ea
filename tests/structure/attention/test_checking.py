"""Cuts of heads that would be wrong are caught by values."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from attention_models import PerHead, small
from torch import nn
from toys import perturbed
from zoo import image, open_clip_models

import tp_amp.structure.attention.heads
from tp_amp.structure.attention.finding import find_attentions, read_attentions

WRONG = "it does not give what it gives with the others' channels zeroed"


def reason(model: nn.Module) -> str:
    """Why the one attention of a model can lose no heads."""
    found, reasons = read_attentions(model, image(32))
    assert found == []
    [text] = reasons.values()
    return text


@pytest.mark.parametrize(
    ("name", "arguments", "path"),
    [
        ("beit_base_patch16_224", {}, "q_bias"),
        ("beit_base_patch16_224", {}, "relative_position_bias_table"),
        ("eva02_base_patch16_clip_224", {}, "norm.bias"),
        ("swinv2_tiny_window8_256", {"depths": (1,)}, "logit_scale"),
        ("swinv2_tiny_window8_256", {"depths": (1,)}, "cpb_mlp.2.weight"),
    ],
)
def test_a_tensor_cut_at_another_head_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any], path: str
) -> None:
    torch.manual_seed(0)
    if arguments:
        sizes = {"img_size": 32, "window_size": 4, "embed_dim": 32, "num_heads": (4,)}
        model = perturbed(timm.create_model(name, **sizes, **arguments))
    else:
        model = small(name)
    assert len(find_attentions(model, image(32))) == 1
    own = tp_amp.structure.attention.heads.HeadPruner._cut

    def shifted(self: Any, layer: nn.Module, tensor: Any, kept: list[int]) -> None:
        other = [(head + 1) % 4 for head in kept]
        own(self, layer, tensor, other if tensor.path == path else kept)

    monkeypatch.setattr(tp_amp.structure.attention.heads.HeadPruner, "_cut", shifted)
    assert WRONG in reason(model)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_projection_cut_at_another_head_is_caught(
    monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    model, own = small(), tp_amp.structure.attention.heads.rows

    def shifted(heads: list[int], width: int, block: int, packed: int = 1) -> list[int]:
        return own([(h + (packed == parts)) % width for h in heads], width, block, packed)

    monkeypatch.setattr(tp_amp.structure.attention.heads, "rows", shifted)
    assert WRONG in reason(model)


def test_the_number_of_heads_left_behind_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then only changing the sizes where it reshapes is right."""
    monkeypatch.setattr(tp_amp.structure.attention.heads, "_recount", lambda *_: None)
    [attention] = find_attentions(small(), image(32))
    assert attention.forward == "literal"


def test_another_layout_is_left_out_and_other_attentions_are_not_called() -> None:
    torch.manual_seed(0)
    found, reasons = read_attentions(nn.Sequential(PerHead()), torch.randn(2, 5, 8))
    assert not found
    assert "it does not give what it gives" in reasons["0"]
    _, inputs, _ = open_clip_models()["open_clip_full"]
    model = open_clip_models()["open_clip_full"][0]()
    found, reasons = read_attentions(model, {"image": inputs[0]})
    assert [attention.name for attention in found] == [
        "visual.transformer.resblocks.0.attn",
        "visual.transformer.resblocks.1.attn",
    ]
    assert reasons == {"transformer.resblocks.0.attn": "it is not called on the example inputs"}
