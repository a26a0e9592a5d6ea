"""Hidden layers of heads and embeddings are told from the MLPs of residual blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from toys import PlainMLP, images, toy
from zoo import TIMM

import tp_amp
from tp_amp.structure.model_structure import ModelStructure
from tp_amp.structure.residual import outside_blocks


def outside(model: nn.Module, inputs: object) -> list[str]:
    structure = ModelStructure(model, inputs)
    return outside_blocks(model, structure.mlps, structure.traced)


class Detector(nn.Module):
    """Blocks, a classifier and a head for boxes of three layers, as detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes = toy(classes=0), nn.Linear(12, 5)
        self.boxes = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        boxes = self.boxes[1](self.boxes[0](x).relu()).relu()
        return self.classes(x), self.boxes[2](boxes).sigmoid()


def test_the_box_head_of_a_detector_is_named_with_how_to_leave_it_out() -> None:
    model = Detector()
    found = tp_amp.inspect(model, images(1))
    assert found.outside_blocks == ["boxes.1", "boxes.2"]
    report = str(found)
    assert "ignored_layers=['boxes.1'] leaves it out" in report
    # Both are listed, though one module holds them.
    assert "boxes: 12 channels, 0 -> 1" in report
    assert "boxes: 12 channels, 1 -> 2" in report


def test_what_an_objective_does_not_see_is_refused_with_how_to_leave_it_out() -> None:
    model, data = Detector(), [images(4)]

    def objective(output: tuple[Tensor, Tensor]) -> Tensor:
        return output[0].softmax(-1).square().mean()

    importance = tp_amp.ReconstructionImportance(objective, data=data)
    with pytest.raises(
        ValueError, match=r"does not depend on \['boxes.1', 'boxes.2'\].*ignored_la"
    ):
        tp_amp.plan_for_target(model, images(1), importance, {"params": 0.8})
    heads = [model.boxes]
    plan = tp_amp.plan_for_target(
        model, images(1), importance, {"params": 0.8}, ignored_layers=heads
    )
    assert plan.keep.keys() == {"body.blocks.0.mlp.second", "body.blocks.1.mlp.second"}


@pytest.mark.parametrize("name", ["vit", "beit", "swinv2", "convnext", "dinov2", "cait"])
def test_mlps_of_blocks_are_in_blocks(name: str) -> None:
    """Before the norm or after it, scaled or not."""
    make, inputs, _ = TIMM[name]
    torch.manual_seed(0)
    assert outside(make(), inputs) == []


def test_post_norm_and_projections() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert outside(nn.Sequential(layer), torch.randn(1, 3, 8)) == []
    assert outside(nn.Sequential(PlainMLP(8, 16)), torch.randn(1, 3, 8)) == ["0.second"]


def test_parallel_blocks_are_blocks() -> None:
    name = "vit_pwee_patch16_reg1_gap_256"
    model = timm.create_model(name, depth=1, img_size=32, embed_dim=16, num_heads=2)
    assert outside(model, torch.randn(1, 3, 32, 32)) == []


class Tokens(nn.Module):
    """Blocks whose last sum is the output, or one of them."""

    def __init__(self, *, states: bool) -> None:
        super().__init__()
        self.body, self.states = toy(classes=0), states

    def forward(self, x: Tensor) -> Any:
        states = [self.body.embed(x).flatten(2).transpose(1, 2)]
        for block in self.body.blocks:
            states.append(block(states[-1]))
        return states if self.states else states[-1]


@pytest.mark.parametrize("states", [False, True])
def test_a_sum_that_is_given_out_is_a_residual(states: bool) -> None:
    model = Tokens(states=states)
    assert len(tp_amp.find_mlps(model, images(1))) == 2
    assert outside(model, images(1)) == []


def test_maps_and_tokens_that_are_given_out() -> None:
    torch.manual_seed(0)
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    maps = timm.create_model("convnext_atto", features_only=True, **sizes)
    assert outside(maps, torch.randn(1, 3, 64, 64)) == []
    sizes = {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 2, "init_values": 0.1}
    tokens = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, global_pool="", final_norm=False, **sizes
    )
    assert outside(tokens, torch.randn(1, 3, 32, 32)) == []


class Residual(nn.Module):
    """Adds what a module gives to what it reads, or takes what it gives."""

    def __init__(self, inner: nn.Module, *, add: bool = True) -> None:
        super().__init__()
        self.norm, self.inner, self.add = nn.LayerNorm(8), inner, add

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.norm(x))
        return x + y if self.add else y


@pytest.mark.parametrize("behind", [nn.Identity(), nn.Linear(8, 3)])
def test_three_layers_in_a_residual_are_two_mlps_of_a_block(behind: nn.Module) -> None:
    layers = [nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 12), nn.GELU(), nn.Linear(12, 8)]
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), Residual(nn.Sequential(*layers)), behind)
    assert len(tp_amp.find_mlps(block, torch.randn(2, 4, 8))) == 2
    assert outside(block, torch.randn(2, 4, 8)) == []
    head = Residual(nn.Sequential(*copy.deepcopy(layers)), add=False)
    alone = nn.Sequential(nn.Linear(8, 8), head, behind)
    found = [mlp.down for mlp in tp_amp.find_mlps(alone, torch.randn(2, 4, 8))]
    assert {"1.inner.2", "1.inner.4"} <= set(found)
    assert outside(alone, torch.randn(2, 4, 8)) == found
