"""The papers' parameter counts, without their weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from packaging.version import Version
from torch import nn
from toys import judges_shapes, put

import tp_amp


def open_clip_tower(name: str, **changes: Any) -> nn.Module:
    config = open_clip.get_model_config(name)
    vision = CLIPVisionCfg(**{**config["vision_cfg"], **changes})
    return _build_vision_tower(config["embed_dim"], vision)


def vision_transformer(**arguments: Any) -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        patch_size=14, num_classes=0, qkv_bias=False, **arguments
    )


@dataclass(frozen=True)
class Tower:
    """A vision tower of the paper, and how its parts are called.

    `down` is the end of the module path of each MLP's last layer; the first one is its neighbour.
    """

    build: Callable[[], nn.Module]
    dense: float
    ratio_1: float
    up: str = "mlp.fc1"
    down: str = "mlp.fc2"


# Billions of parameters: dense as the model's authors count, and at MLP ratio 1 as DGMR has them.
TOWERS = {
    "OpenCLIP ViT-g/14": Tower(
        lambda: open_clip_tower("ViT-g-14"), 1.01, 0.477, "mlp.c_fc", "mlp.c_proj"
    ),
    "OpenCLIP ViT-bigG/14": Tower(
        lambda: open_clip_tower("ViT-bigG-14"), 1.84, 0.797, "mlp.c_fc", "mlp.c_proj"
    ),
    "EVA02-CLIP-E/14+": Tower(lambda: open_clip_tower("EVA02-E-14-plus"), 4.35, 1.238),
    "like EVA-CLIP-8B": Tower(
        lambda: vision_transformer(embed_dim=4096, depth=32, num_heads=32, mlp_ratio=5),
        7.53,
        3.235,
    ),
    "like InternViT-6B": Tower(
        lambda: vision_transformer(
            embed_dim=3200, depth=48, num_heads=25, mlp_ratio=4, init_values=0.1, qk_norm=True
        ),
        5.90,
        2.95,
    ),
    "DINOv2-g": Tower(lambda: timm.create_model("vit_giant_patch14_dinov2"), 1.136, 0.664),
}


def narrow_by_hand(model: nn.Module, tower: Tower, ratio: float) -> None:
    """Put narrower Linears in the place of each MLP's, packed gate and value included."""
    for name, down in list(model.named_modules()):
        if not name.endswith(tower.down):
            continue
        assert isinstance(down, nn.Linear)
        up_name = name.removesuffix(tower.down) + tower.up
        up = model.get_submodule(up_name)
        assert isinstance(up, nn.Linear)
        hidden = int(ratio * up.in_features)
        packed = up.out_features // down.in_features
        bias = up.bias is not None, down.bias is not None
        put(model, up_name, nn.Linear(up.in_features, packed * hidden, bias[0]))
        put(model, name, nn.Linear(hidden, down.out_features, bias[1]))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", TOWERS)
def test_mlp_ratio_1_gives_the_papers_parameter_counts(name: str) -> None:
    tower = TOWERS[name]
    with torch.device("meta"):
        try:
            model = tower.build()
        except RuntimeError:
            if Version(timm.__version__) >= Version("1.0.25"):
                raise
            pytest.skip("timm 1.0.17 reads values as it builds a model")
        assert count(model) / 1e9 == pytest.approx(tower.dense, rel=0.01)
        narrow_by_hand(model, tower, 1)
    assert count(model) / 1e9 == pytest.approx(tower.ratio_1, rel=0.01)


# Mean hidden channels of AMP's MLPs, and billions of parameters then.
AMP_WIDTH, AMP = 7295, 2.50
PLAN = """
import json, resource, sys, time
from pathlib import Path
start = time.process_time()
sys.path[:0] = sys.argv[1:]
import torch, tp_amp
from test_paper_sizes import AMP_WIDTH, TOWERS, count, first_channels
torch.set_num_threads(1)
counts = {}
for paper in ("DGMR", "AMP"):
    with torch.device("meta"):
        model, image = TOWERS["EVA02-CLIP-E/14+"].build(), torch.randn(1, 3, 224, 224)
    widths = tp_amp.mlp_ratio_widths(model, image, 1)
    if paper == "AMP":
        widths = dict.fromkeys(widths, AMP_WIDTH)
    plan = tp_amp.plan_from_importance(model, image, first_channels, widths)
    tp_amp.apply_plan(model, image, tp_amp.PruningPlan.from_json(plan.to_json()))
    counts[paper] = count(model)
    assert all(parameter.is_meta for parameter in model.parameters())
seconds = time.process_time() - start
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = Path("/proc/self/status")
if status.is_file():  # Linux hands ru_maxrss down from the process that started this one
    memory = 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
print(json.dumps([counts, seconds, memory]))
"""


def first_channels(group: Any) -> torch.Tensor:
    """Scores for a model without weights: the first channels stay."""
    return -torch.arange(len(group[0].idxs), dtype=torch.float)


@pytest.mark.slow
@judges_shapes
@pytest.mark.skipif(sys.platform == "win32", reason="has no resource")
def test_the_largest_tower_is_planned_on_the_meta_device() -> None:
    """4.35 billion parameters, of which none is made: to both papers' sizes, imports included."""
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", PLAN, str(tests), str(tests / "project")]
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=tests.parent
    ).stdout
    counts, seconds, memory = json.loads(output)
    assert counts["DGMR"] / 1e9 == pytest.approx(TOWERS["EVA02-CLIP-E/14+"].ratio_1, rel=0.01)
    assert counts["AMP"] / 1e9 == pytest.approx(AMP, rel=0.01)
    assert seconds < 60
    assert memory < 2e9


SMALL = {
    "open_clip": Tower(
        lambda: open_clip_tower(
            "ViT-g-14", layers=2, width=64, head_width=16, mlp_ratio=4.3637, image_size=28
        ),
        0,
        0,
        "mlp.c_fc",
        "mlp.c_proj",
    ),
    "eva": Tower(
        lambda: timm.create_model(
            "eva02_enormous_patch14_clip_224",
            depth=2,
            embed_dim=64,
            num_heads=4,
            img_size=28,
            num_classes=0,
        ),
        0,
        0,
    ),
    "dinov2": Tower(
        lambda: timm.create_model(
            "vit_giant_patch14_dinov2", depth=2, embed_dim=48, num_heads=4, img_size=28
        ),
        0,
        0,
    ),
    "vit": Tower(
        lambda: vision_transformer(
            embed_dim=64, depth=2, num_heads=4, mlp_ratio=5, img_size=28, qk_norm=True
        ),
        0,
        0,
    ),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("ratio", [0.5, 1, 2])
def test_a_pruned_model_of_the_same_class_has_the_count_of_the_arithmetic(
    name: str, ratio: float
) -> None:
    tower, images = SMALL[name], torch.randn(1, 3, 28, 28)
    torch.manual_seed(0)
    model, by_hand = tower.build(), tower.build()
    widths = tp_amp.mlp_ratio_widths(model, images, ratio)
    assert len(widths) == 2
    plan = tp_amp.plan_from_importance(model, images, tp_amp.GramSchmidtImportance(), widths)
    tp_amp.apply_plan(model, images, plan)
    narrow_by_hand(by_hand, tower, ratio)
    assert count(model) == count(by_hand)
    assert model(images).isfinite().all()


# Millions of parameters that remain, and per cent removed, at sparsities 0.15, 0.35 and 0.55.
DIMAP = {
    "tiny": (28.3, [(24.4, 13.7), (19.2, 32.0), (14.0, 50.3)]),
    "small": (49.6, [(42.5, 14.2), (33.1, 33.2), (23.7, 52.2)]),
    "base": (87.8, [(75.2, 14.3), (58.4, 33.4), (41.7, 52.5)]),
}


@pytest.mark.parametrize("size", DIMAP)
def test_dimap_leaves_the_parameters_of_the_papers_table_1(size: str) -> None:
    """All nine percentages to the digit; two of the paper's counts are rounded down."""
    dense, rows = DIMAP[size]
    model = timm.create_model(f"swin_{size}_patch4_window7_224", pretrained=False)
    total = count(model)
    assert round(total / 1e6, 1) == dense
    for sparsity, (millions, percent) in zip((0.15, 0.35, 0.55), rows, strict=True):
        removed = sum(int((~mask).sum()) for mask in tp_amp.dimap_masks(model, sparsity).values())
        assert (total - removed) / 1e6 == pytest.approx(millions, abs=0.06)
        assert round(100 * removed / total, 1) == percent
