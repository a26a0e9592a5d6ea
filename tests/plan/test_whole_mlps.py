"""MLPs that go as a whole, against the dense model in which they give a constant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import constant_sublayers
import pytest
import timm
import torch
from constant_sublayers import giving, on_average, output
from distillations import distill
from packaging.version import Version
from small_models import packed
from torch import nn
from toys import images, perturbed, relative, toy
from zoo import CONVNEXT, SWIN_HEADS, TINY, hugging_face_models

import tp_amp
from tp_amp.running.inputs import example
from tp_amp.running.runtimes.building import build
from tp_amp.structure.constant_linear import ConstantLinear


def hf_vit() -> nn.Module:
    return hugging_face_models()["hf_vit"][0]()


def timm_model(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **arguments)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (timm_model("vit_tiny_patch16_224", img_size=32, **TINY), 32),
    "eva02": (timm_model("eva02_tiny_patch14_224", img_size=28, depth=2), 28),  # gate and value
    "packed": (packed, 16),
    "norm inside": (timm_model("eva02_base_patch16_clip_224", img_size=32, **TINY), 32),
    "swin": (timm_model("swin_tiny_patch4_window7_224", **SWIN_HEADS), 64),
    "hf_vit": (hf_vit, 32),
}


def made(name: str) -> tuple[nn.Module, list[Any]]:
    return constant_sublayers.made(*MODELS[name], wrapped=name.startswith("hf_"))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_dense_one_with_a_constant(name: str) -> None:
    """All MLPs go by the cut alone, of which the bias stays; and one with its mean."""
    model, batches = made(name)
    mlps = tp_amp.find_mlps(model, batches[0])
    biases = {mlp.down: model.get_submodule(mlp.down).bias.detach() for mlp in mlps}
    pruned = copy.deepcopy(model)
    plan = tp_amp.PruningPlan({down: [] for down in biases})
    tp_amp.apply_plan(pruned, plan, batches[0])
    expected = output(giving(model, biases), batches[1])
    assert relative(output(pruned, batches[1]), expected) < 1e-6
    assert relative(expected, output(model, batches[1])) > 1e-2

    down = mlps[-1].down
    mean = on_average(model, down, batches)
    fitted = tp_amp.compensate(
        model_ := copy.deepcopy(model),
        tp_amp.PruningPlan({down: []}, sites={down: plan.sites[down]}),
        batches,
        method="mean",
        progress=False,
    )
    assert relative(output(model_, batches[1]), output(giving(model, {down: mean}), batches[1])) < (
        1e-5
    )
    assert fitted[down].error < fitted[down].error_before


@pytest.mark.parametrize("name", ["vit", "packed", "swin"])
def test_no_multiplication_of_the_mlp_is_left(name: str) -> None:
    """Fewer than with one channel, by what this channel takes: a column, a row for each part."""
    model, batches = made(name)
    [mlp, *_] = tp_amp.find_mlps(model, batches[0])
    macs, sizes = {}, {}
    for width in (1, 0):
        pruned = copy.deepcopy(model)
        plan = tp_amp.PruningPlan({mlp.down: list(range(width))}, sites={mlp.down: mlp})
        tp_amp.apply_plan(pruned, plan)
        measured = tp_amp.measure(pruned, [batches[0]])
        macs[width], sizes[width] = measured.macs, measured.parameters
    up, down = (model.get_submodule(layer) for layer in (mlp.up[0], mlp.down))
    tokens = {"vit": 5, "packed": 5, "swin": 256}[name]
    inputs = mlp.packed * up.in_features
    assert macs[1] - macs[0] == pytest.approx(tokens * (inputs + down.out_features), rel=1e-6)
    assert sizes[1] - sizes[0] == inputs + mlp.packed + down.out_features


RECIPES = {
    "affine": {},
    "every_linear": {"every_linear": True},
    "refine": {"every_linear": True, "refine": 2},
    "sensitivity": {"token_weights": "sensitivity"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_what_stays(recipe: str) -> None:
    """Nothing of the MLP that went is fitted but the bias, and the model loses less."""
    dense, batches = toy(depth=3), [images(16, seed) for seed in range(4)]
    keep = {"blocks.0.mlp.second": list(range(8)), "blocks.1.mlp.second": []}
    sites = {mlp.down: mlp for mlp in tp_amp.find_mlps(dense, batches[0])}
    plan = tp_amp.PruningPlan(keep, sites={down: sites[down] for down in keep})
    cut, fitted = copy.deepcopy(dense), copy.deepcopy(dense)
    tp_amp.apply_plan(cut, plan)
    corrections = tp_amp.compensate(fitted, plan, batches, progress=False, **RECIPES[recipe])
    assert corrections["blocks.1.mlp.second"].weight.shape == (12, 0)
    assert "blocks.1.mlp.first" not in corrections
    wanted = output(dense, batches[0])
    assert (output(fitted, batches[0]) - wanted).norm() < (output(cut, batches[0]) - wanted).norm()


def test_without_a_bias_one_is_added_or_nothing_is_kept() -> None:
    dense, batches = toy(bias=False), [images(16, seed) for seed in range(4)]
    [mlp, *_] = tp_amp.find_mlps(dense, batches[0])
    plan = tp_amp.PruningPlan({mlp.down: []}, sites={mlp.down: mlp})
    outputs = {}
    for add_bias in (False, True):
        model = copy.deepcopy(dense)
        tp_amp.compensate(model, plan, batches, method="mean", add_bias=add_bias, progress=False)
        outputs[add_bias] = output(model, batches[0])
    zeros, mean = torch.zeros(12), on_average(dense, mlp.down, batches)
    for add_bias, value in ((False, zeros), (True, mean)):
        expected = output(giving(dense, {mlp.down: value}), batches[0])
        assert relative(outputs[add_bias], expected) < 1e-5


def whole(model: nn.Module, batch: Any) -> tuple[nn.Module, tp_amp.PruningPlan]:
    """A model whose first MLP went, and that lost half of the others."""
    keep = {m.down: list(range(m.width // 2)) for m in tp_amp.find_mlps(model, batch)}
    keep[next(iter(keep))] = []
    plan = tp_amp.PruningPlan(keep)
    pruned = copy.deepcopy(model)
    tp_amp.apply_plan(pruned, plan, batch)
    return perturbed(pruned), plan


@pytest.mark.parametrize("name", ["vit", "eva02"])
def test_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, batches = made(name)
    pruned, plan = whole(model, batches[0])
    assert tp_amp.PruningPlan.from_json(plan.to_json()) == plan
    tp_amp.save_pruned(pruned, tmp_path, plan)
    tp_amp.load_pruned(model, tmp_path)
    assert torch.equal(output(model, batches[1]), output(pruned, batches[1]))
    down = model.get_submodule(next(iter(plan.keep)))
    assert isinstance(down, ConstantLinear)


def test_it_is_built_again_from_its_folder(tmp_path: Path) -> None:
    model, batches = made("vit")
    pruned, plan = whole(model, batches[0])
    origin = {"name": "vit_tiny_patch16_224", "arguments": {"img_size": 32, **TINY}}
    tp_amp.save_pruned(pruned, tmp_path, plan, library="timm", **origin)
    again = tp_amp.create_model(tmp_path)
    assert torch.equal(output(again.eval(), batches[1]), output(pruned, batches[1]))


def test_transformers_opens_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, batches = made("hf_vit")
    pruned, plan = whole(model, batches[0])
    tp_amp.save_pruned(pruned, tmp_path, plan, library="transformers")
    again = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, trust_remote_code=True
    ).eval()
    assert torch.equal(output(again, batches[1]), output(pruned, batches[1]))
    names = [type(module).__name__ for module in again.modules()]
    assert names.count("ConstantLinear") == 1


@pytest.mark.skipif(Version(torch.__version__) < Version("2.6"), reason="exports otherwise")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["vit", "norm inside"])
def test_runtimes_run_it(name: str, runtime: str) -> None:
    """With empty products of matrices OpenVINO fails, and onnxruntime with empty norms."""
    pytest.importorskip(runtime)
    model, batches = made(name)
    pruned, _ = whole(model, batches[0])
    found = build(pruned.eval(), example(batches[1]), runtime).run(batches[1])[0]
    assert relative(torch.as_tensor(found), output(pruned, batches[1])) < 1e-4


def test_it_is_pruned_again() -> None:
    """What went is no MLP any more, and the plans of both rounds are one."""
    model, batches = made("vit")
    pruned, plan = whole(model, batches[0])
    gone, left = plan.keep
    structure = tp_amp.inspect(pruned, batches[0])
    assert [mlp.down for mlp in structure.mlps] == [left]
    assert f"{gone}: no channel is left of it" in str(structure)
    assert not {gone, gone.replace("fc2", "fc1")} & tp_amp.dimap_masks(pruned, 0.5).keys()
    second = tp_amp.PruningPlan({left: [1, 3]})
    again = copy.deepcopy(pruned)
    tp_amp.apply_plan(again, second, batches[0])
    both = plan.then(second)
    assert both.widths == {gone: 0, left: 2}
    tp_amp.apply_plan(model, both)
    shapes = {name: value.shape for name, value in again.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


def test_it_is_told_and_learns() -> None:
    teacher, batches = toy(depth=3), [images(16, seed) for seed in range(2)]
    student, plan = whole(teacher, batches[0])
    assert "0%" in str(plan.report(*tp_amp.measure_both(teacher, student, batches)))
    before = (output(student, batches[0]) - output(teacher, batches[0])).norm()
    distill(student, teacher, batches)
    assert (output(student.eval(), batches[0]) - output(teacher, batches[0])).norm() < before


def refused(name: str) -> tuple[nn.Module, Any, Any]:
    batch = images(1, 1, 64, 3)
    if name == "heads":
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, **TINY)
        return model, batch, tp_amp.find_attentions(model, batch)[0]
    if name == "depthwise":
        model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1))
    else:
        model = timm.create_model("convnext_tiny", conv_mlp=True, **CONVNEXT)
    return model, batch, tp_amp.find_mlps(model, batch)[0]


REFUSED = {
    "heads": "keeps no heads of blocks.0.attn.proj; .* no attention goes by its heads",
    "depthwise": "stages.0.blocks.0.mlp.dwconv is a convolution",
    "convolutions": "stages.0.blocks.0.mlp.fc1 is a convolution, and PyTorch has none of no",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("known", [False, True])
def test_what_cannot_go_is_refused(name: str, known: bool) -> None:
    model, batch, site = refused(name)
    before = {name: value.shape for name, value in model.state_dict().items()}
    plan = tp_amp.PruningPlan({site.down: []}, sites={site.down: site} if known else {})
    with pytest.raises(ValueError, match=REFUSED[name]):
        tp_amp.apply_plan(model, plan, batch)
    with pytest.raises(ValueError, match="can't keep no"):
        tp_amp.plan_from_importance(model, batch, tp_amp.DIMAPImportance(), {site.down: 0})
    assert {name: value.shape for name, value in model.state_dict().items()} == before
