"""What an attention has a part of for each head."""

from __future__ import annotations

import pytest
import timm
import torch
from attention_models import small
from head_cuts import prune, zeroed
from torch import Tensor, nn
from toys import perturbed, relative
from zoo import image

import tp_amp.structure.attention.heads
from tp_amp.structure.attention.finding import find_attentions
from tp_amp.structure.attention.head_tensors import norms_over_heads
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.graph import build_graph


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_as_many_heads_as_channels_tokens_and_images(name: str) -> None:
    model = small(name, embed_dim=25, num_heads=5)
    images = image(32) * torch.arange(1, 6).view(5, 1, 1, 1)
    [attention] = find_attentions(model, images)
    assert (attention.width, attention.head_width) == (5, 5)
    keep = {attention.down: [1, 2]}
    expected = zeroed(model, [attention], keep)(images)
    prune(build_graph(model, images).graph, [attention], keep)
    assert relative(model(images), expected) < 1e-5
    assert model.blocks[0].attn.num_heads == 2


class SharedBias(nn.Module):
    """An attention whose caller may pass a bias: one for each head, or one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        heads = self.num_heads
        q, k, v = self.qkv(x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def test_an_argument_that_all_heads_share_is_left_whole() -> None:
    torch.manual_seed(0)
    model, x = SharedBias().eval(), torch.randn(2, 5, 16)
    each, shared = torch.randn(1, 4, 5, 5), torch.randn(1, 1, 5, 5)
    found = tp_amp.find_attentions(model, (x, each))
    keep = {found[0].down: [0, 2, 3]}
    reference = zeroed(model, found, keep)
    expected = [reference(x, bias) for bias in (each, shared)]
    tp_amp.apply_plan(model, (x, each), tp_amp.PruningPlan(keep, sites={s.down: s for s in found}))
    for bias, value in zip((each, shared), expected, strict=True):
        torch.testing.assert_close(model(x, bias), value)


BIASES = dict.fromkeys(("q_bias", "k_bias", "v_bias"), (0, 8))
# What a reader of each attention's source counts, by dimension and block.
OWNED = {
    "vit_tiny_patch16_224": {},
    "beit_base_patch16_224": {**BIASES, "relative_position_bias_table": (1, 1)},
    "eva02_base_patch16_clip_224": {"norm.weight": (0, 8), "norm.bias": (0, 8)},
    "swinv2_tiny_window8_256": {**BIASES, "logit_scale": (0, 1), "cpb_mlp.2.weight": (0, 1)},
}


@pytest.mark.parametrize("name", OWNED)
def test_tensors_of_heads_are_those_of_the_source(name: str) -> None:
    if name.startswith("swin"):
        torch.manual_seed(0)
        sizes = {"img_size": 32, "window_size": 4, "embed_dim": 32, "num_heads": (4,)}
        model = perturbed(timm.create_model(name, depths=(1,), **sizes))
    else:
        model = small(name)
    [attention] = find_attentions(model, image(32))
    found = {
        tensor.path.removeprefix(f"{attention.name}."): (tensor.dim, tensor.block)
        for tensor in attention.tensors
    }
    assert found == OWNED[name]


def test_norms_over_heads_are_those_of_all_their_channels() -> None:
    model = nn.ModuleDict(
        {
            "whole": nn.LayerNorm(32),
            "head": nn.LayerNorm(8),
            "plain": nn.LayerNorm(32, elementwise_affine=False),
            "linear": nn.Linear(3, 32),
            "root": nn.RMSNorm(32),
        }
    )
    attention = Attention("", ("qkv",), "proj", width=4, head_width=8)
    assert [name for name, _ in norms_over_heads(model, attention)] == ["whole", "root"]
