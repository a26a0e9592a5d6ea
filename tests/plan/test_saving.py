"""Saved and loaded without tracing: the same model to the last bit, for every kind of layer."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from toys import fingerprint, images, perturbed, toy
from zoo import SWIN_HEADS, TIMM, TINY, hugging_face_models, open_clip_models, torchvision_models
from zoo_checks import run

import tp_amp

FAMILIES = (
    *("vit", "swin", "swinv2", "dinov2_giant", "eva02", "eva02_clip", "beit", "dinov3", "siglip"),
    *("convnextv2", "convnext_conv_mlp", "pvt_v2", "pwee", "pwee_fused_out", "dpwee"),
    *("open_clip", "open_clip_full", "torchvision_vit", "torchvision_swin"),
    *("hf_vit", "hf_swin", "hf_dinov2_swiglu", "hf_clip"),
)


def entries() -> dict[str, Any]:
    return {**TIMM, **open_clip_models(), **torchvision_models(), **hugging_face_models()}


def planned(model: nn.Module, inputs: Any) -> tp_amp.PruningPlan:
    """Half of every MLP, and one head less in every attention that can lose one."""
    inspected = tp_amp.inspect(model, inputs)
    widths = {mlp.down: max(1, mlp.width // 2) for mlp in inspected.mlps}
    widths |= {attention.down: attention.width - 1 for attention in inspected.attentions}
    return tp_amp.plan_from_importance(model, inputs, tp_amp.DIMAPImportance(), widths)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dense_model_is_cut_and_filled_without_tracing(name: str, tmp_path: Path) -> None:
    make, inputs, _ = entries()[name]
    torch.manual_seed(0)
    dense = perturbed(make())
    model = copy.deepcopy(dense)
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, inputs, plan)
    model = perturbed(model)  # trained since, say
    tp_amp.save_pruned(model, tmp_path, plan)
    assert tp_amp.load_pruned(dense, tmp_path) == plan
    with torch.no_grad():
        assert torch.equal(run(dense.eval(), inputs), run(model.eval(), inputs))
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.01 * size + 100_000
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "plan.json", "source.json"]


def test_a_new_process_builds_the_model_by_itself(tmp_path: Path) -> None:
    arguments = {**SWIN_HEADS, "num_classes": 5}
    model = timm.create_model("swin_tiny_patch4_window7_224", **arguments)
    inputs = images(2, size=64, channels=3)
    plan = planned(model, inputs[:1])
    tp_amp.compensate(model, plan, [images(8, seed=3, size=64, channels=3)], progress=False)
    tp_amp.save_pruned(
        model,
        tmp_path,
        plan,
        library="timm",
        name="swin_tiny_patch4_window7_224",
        arguments=arguments,
    )
    safetensors.torch.save_file({"images": inputs}, tmp_path / "images.safetensors")
    code = (
        "import sys, torch, safetensors.torch, tp_amp\n"
        "folder = sys.argv[1]\n"
        "images = safetensors.torch.load_file(folder + '/images.safetensors')['images']\n"
        "with torch.no_grad():\n"
        "    output = tp_amp.create_model(folder).eval()(images)\n"
        "safetensors.torch.save_file({'output': output}, folder + '/output.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    output = safetensors.torch.load_file(tmp_path / "output.safetensors")["output"]
    with torch.no_grad():
        assert torch.equal(output, model.eval()(inputs))


def test_transformers_models_build_themselves(tmp_path: Path) -> None:
    make, inputs, _ = hugging_face_models()["hf_vit"]
    model = make()
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, inputs, plan)
    kind = type(model).__name__
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers", name=kind)
    again = tp_amp.create_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(run(again.eval(), inputs), run(model.eval(), inputs))


@pytest.mark.parametrize("every_linear", [False, True])
def test_a_bias_that_compensation_added_comes_back(every_linear: bool, tmp_path: Path) -> None:
    model = toy(bias=False)
    dense = copy.deepcopy(model)
    plan = tp_amp.plan_from_importance(model, images(1), tp_amp.DIMAPImportance(), 0.5)
    options = {"add_bias": True, "every_linear": every_linear}
    tp_amp.compensate(model, plan, [images(40)], progress=False, **options)
    tp_amp.save_pruned(model, tmp_path, plan)
    tp_amp.load_pruned(dense, tmp_path)
    assert torch.equal(dense(images()), model(images()))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY)
    inputs = images(1, size=32, channels=3)
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, inputs, plan)
    tp_amp.save_pruned(model, tmp_path, plan)
    return tmp_path


def vit(**arguments: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, **{**TINY, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 1}, r"has no layer blocks\.1\.mlp\.fc2; build the same dense model"),
        ({"mlp_ratio": 2}, "has 128 input channels, the dense model had 256"),
    ],
)
def test_another_architecture_is_refused(
    saved: Path, arguments: dict[str, Any], message: str
) -> None:
    model = vit(**arguments)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        tp_amp.load_pruned(model, saved)
    assert fingerprint(model) == before


def test_other_classes_are_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="does not fit the model or is damaged"):
        tp_amp.load_pruned(vit(num_classes=7), saved)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
@pytest.mark.parametrize("length", [0, 0.5])
def test_truncated_files_are_refused(saved: Path, name: str, length: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * length)])
    with pytest.raises(ValueError, match=r"damaged|not JSON"):
        tp_amp.load_pruned(vit(), saved)


def test_a_newer_format_and_missing_files_are_told(saved: Path) -> None:
    record = json.loads((saved / "plan.json").read_text())
    (saved / "plan.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(ValueError, match="format 99, this tp_amp reads 1; upgrade"):
        tp_amp.load_pruned(vit(), saved)
    (saved / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"holds no plan\.json"):
        tp_amp.load_pruned(vit(), saved)


def test_a_damaged_plan_is_refused(saved: Path) -> None:
    record = json.loads((saved / "plan.json").read_text())
    record["keep"]["blocks.0.mlp.fc2"][0] = 9999
    (saved / "plan.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="must be distinct and within"):
        tp_amp.load_pruned(vit(), saved)


def test_a_failed_save_leaves_the_earlier_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    plan = tp_amp.PruningPlan.from_json((saved / "plan.json").read_text())
    model = vit()
    tp_amp.load_pruned(model, saved)

    def fails(_: nn.Module, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("tp_amp.plan.saving.save_model", fails)
    with pytest.raises(OSError, match="No space left"):
        tp_amp.save_pruned(model, saved, plan)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    model = toy()
    by_hand = tp_amp.PruningPlan({"blocks.0.mlp.second": [0, 1]})
    with pytest.raises(ValueError, match="was made by hand"):
        tp_amp.save_pruned(model, tmp_path, by_hand)
    plan = tp_amp.plan_from_importance(model, images(1), tp_amp.DIMAPImportance(), 0.5)
    with pytest.raises(ValueError, match="has 20 input channels, the plan keeps 10"):
        tp_amp.save_pruned(model, tmp_path, plan)
    tp_amp.apply_plan(model, images(1), plan)
    with pytest.raises(ValueError, match="library must be one of"):
        tp_amp.save_pruned(model, tmp_path, plan, library="torchvision", name="x")
    with pytest.raises(ValueError, match="needs its name"):
        tp_amp.save_pruned(model, tmp_path, plan, library="timm")
    assert not list(tmp_path.iterdir())
    tp_amp.save_pruned(model, tmp_path, plan)
    with pytest.raises(ValueError, match="does not say where its model came from"):
        tp_amp.create_model(tmp_path)


def test_precision_and_timm_arguments_come_back(tmp_path: Path) -> None:
    model = vit().bfloat16()
    inputs = images(1, size=32, channels=3).bfloat16()
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, inputs, plan)
    arguments = {**TINY, "img_size": 32, "pretrained": True}
    name = "vit_tiny_patch16_224"
    tp_amp.save_pruned(model, tmp_path, plan, library="timm", name=name, arguments=arguments)
    again = tp_amp.create_model(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(again.eval()(inputs), model.eval()(inputs))


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no source\.json; it is no folder of save_pruned"):
        tp_amp.create_model(tmp_path)


def test_a_plan_with_a_list_for_a_number_is_refused(saved: Path) -> None:
    """Found by damaging folders at random."""
    path = saved / "plan.json"
    text = path.read_text()
    assert '"first": 0' in text
    path.write_text(text.replace('"first": 0', '"first": [0]', 1))
    with pytest.raises(ValueError, match=r"expected <class 'int'>, found \[0\]"):
        tp_amp.load_pruned(vit(), saved)


@pytest.mark.parametrize("kind", ["MLP", "Attention"])
def test_each_value_of_a_damaged_site_is_refused_or_harmless(kind: str, saved: Path) -> None:
    """Found by damaging folders at random: layers of None or another kind raised anything."""
    whole = json.loads((saved / "plan.json").read_text())
    (down, *_) = (name for name, record in whole["sites"].items() if record["kind"] == kind)
    inputs = images(1, size=32, channels=3)
    pruned = vit().eval()
    tp_amp.load_pruned(pruned, saved)
    expected = pruned(inputs)
    model, refused = vit().eval(), 0

    def state() -> Any:
        return str(model), [(p.requires_grad, p._version, p.data_ptr()) for p in model.parameters()]

    for name in whole["sites"][down]:
        for value in (None, "", "x", [], ["x"], {}, -1, 0, 3, "norm", ["norm"]):
            damaged = copy.deepcopy(whole)
            damaged["sites"][down][name] = value
            (saved / "plan.json").write_text(json.dumps(damaged))
            before = state()
            try:
                tp_amp.load_pruned(model, saved)
            except ValueError:
                assert state() == before
                refused += 1
            else:
                torch.testing.assert_close(model(inputs), expected)
                model = vit().eval()
    assert refused > 80
