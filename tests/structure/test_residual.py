"""Hidden layers of heads and embeddings are told from the MLPs of residual blocks."""

from __future__ import annotations

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
