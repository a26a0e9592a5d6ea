"""Transformer blocks, and which Linear is which in them, against what is read by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
from block_models import hugging_face, old_hugging_face, swin, vit
from torch import nn
from toys import toy

import tp_amp
from tp_amp.structure.attention.blocks import (
    AttentionBlock,
    auxiliary,
    find_attention_blocks,
    heads,
)


def test_bad_scopes_are_named() -> None:
    with pytest.raises(ValueError, match=r"mlp must be a share .* below 1, found 1"):
        tp_amp.dimap_scopes(vit(), 0.5, 1)
    with pytest.raises(ValueError, match=r"attention must be a share .*, found -0\.1"):
        tp_amp.dimap_scopes(vit(), -0.1, 0.5)
    with pytest.raises(ValueError, match=r"blocks\.0 tells its number of heads neither"):
        tp_amp.dimap_scopes(toy(), 0.5, 0.5)


def test_blocks_of_a_vit_are_those_of_its_source() -> None:
    blocks = find_attention_blocks(vit())
    assert blocks == [
        AttentionBlock(
            f"blocks.{i}",
            f"blocks.{i}.attn",
            (f"blocks.{i}.attn.qkv",),
            f"blocks.{i}.attn.proj",
            (f"blocks.{i}.mlp.fc1",),
            f"blocks.{i}.mlp.fc2",
        )
        for i in range(2)
    ]


def test_gated_and_packed_mlps_have_their_up_layers() -> None:
    gated = find_attention_blocks(vit(mlp_layer=timm.layers.SwiGLU))
    assert [block.up for block in gated] == [
        (f"blocks.{i}.mlp.fc1_g", f"blocks.{i}.mlp.fc1_x") for i in range(2)
    ]
    packed = find_attention_blocks(vit(mlp_layer=timm.layers.GluMlp))
    assert [(block.up, block.down) for block in packed] == [
        ((f"blocks.{i}.mlp.fc1",), f"blocks.{i}.mlp.fc2") for i in range(2)
    ]


@pytest.mark.parametrize("make", [lambda: vit(mlp_ratio=1), toy, old_hugging_face])
def test_square_layers_and_other_nestings(make: Callable[[], nn.Module]) -> None:
    """Where all Linears have one shape, or names differ, their order and place tell them apart."""
    model = make()
    for i, block in enumerate(find_attention_blocks(model)):
        holder = "layer" if hasattr(model, "layer") else "blocks"
        assert block.name == f"{holder}.{i}"
        parts = (*block.qkv, block.project, *block.up, block.down)
        inside = [
            f"{block.name}.{name}"
            for name, module in model.get_submodule(block.name).named_modules()
            if isinstance(module, nn.Linear)
        ]
        assert sorted(parts) == sorted(inside)
        ends = [name.removeprefix(block.name) for name in (block.project, block.up[0], block.down)]
        assert tuple(ends) in {
            (".attn.proj", ".mlp.fc1", ".mlp.fc2"),
            (".project", ".mlp.first", ".mlp.second"),
            (".attention.output.dense", ".intermediate.dense", ".output.dense"),
        }


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_blocks_of_hugging_face(kind: str) -> None:
    """One for each attention; each Linear of a layer has its part, and those between have none."""
    model = hugging_face(kind)
    blocks = find_attention_blocks(model)
    count = {"vit": 2, "swin": 5}[kind]
    parts = [(*block.qkv, block.project, *block.up, block.down) for block in blocks]
    outside = ("classifier", "pooler", "reduction")
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(outside)
    ]
    assert len(blocks) == count
    assert sorted(sum(parts, ())) == sorted(linears)
    for block in blocks:
        values, project = (model.get_submodule(n) for n in (block.qkv[2], block.project))
        up, down = (model.get_submodule(n) for n in (block.up[0], block.down))
        assert project.in_features == values.out_features
        assert (up.in_features, up.out_features) == (down.out_features, down.in_features)
        assert up.out_features > up.in_features


def test_heads_are_read_from_the_module() -> None:
    for model in (vit(), swin(), hugging_face("swin"), old_hugging_face()):
        for block in find_attention_blocks(model):
            attention = model.get_submodule(block.attention)
            expected = getattr(attention, "num_heads", None) or attention.num_attention_heads
            assert heads(model, block) == expected


def test_what_no_block_holds_is_auxiliary() -> None:
    """Every parameter is in a block's own layers or in what is auxiliary, and in one of them."""
    model = swin()
    blocks = find_attention_blocks(model)
    found = auxiliary(model, blocks)
    given: list[int] = []
    for part in found:
        given += [id(p) for p in (part.parameters() if isinstance(part, nn.Module) else [part])]
    tables = [name for name, _ in model.named_parameters() if name.endswith("bias_table")]
    assert len(tables) == len(blocks)
    inside = {
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(f"{block.name}.") for block in blocks) and name not in tables
    }
    assert len(given) == len(set(given))
    assert set(given) == {id(p) for name, p in model.named_parameters() if name not in inside}


def test_attention_without_a_block_around_is_told() -> None:
    with pytest.raises(ValueError, match=r"no attention with q, k and v as Linears was found in"):
        find_attention_blocks(nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2)))
    model = vit()
    model.blocks[0].attn.proj = nn.Identity()
    with pytest.raises(ValueError, match=r"around blocks\.0\.attn are no transformer block of wid"):
        find_attention_blocks(model)
