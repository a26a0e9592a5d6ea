"""Saved and loaded without tracing: the same model to the last bit, for every kind of layer."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from saved_models import planned, saved_vit, vit
from torch import nn
from toys import images, perturbed, toy
from zoo import SWIN_HEADS, TIMM, TINY, hugging_face_models, open_clip_models, torchvision_models
from zoo_checks import run

import tp_amp


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return saved_vit(tmp_path)


FAMILIES = (
    *("vit", "swin", "swinv2", "dinov2_giant", "eva02", "eva02_clip", "beit", "dinov3", "siglip"),
    *("convnextv2", "convnext_conv_mlp", "pvt_v2", "pwee", "pwee_fused_out", "dpwee"),
    *("open_clip", "open_clip_full", "torchvision_vit", "torchvision_swin"),
    *("hf_vit", "hf_swin", "hf_dinov2_swiglu", "hf_clip"),
)


def entries() -> dict[str, Any]:
    return {**TIMM, **open_clip_models(), **torchvision_models(), **hugging_face_models()}


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


def test_a_failed_save_leaves_the_earlier_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    plan = tp_amp.PruningPlan.from_json((saved / "plan.json").read_text())
    model = vit()
    tp_amp.load_pruned(model, saved)

    def fails(_: nn.Module, path: str, metadata: dict[str, str]) -> None:
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


@pytest.mark.parametrize("file", ["README.md", "model.safetensors", "plan.json"])
def test_files_of_no_earlier_save_are_not_replaced(file: str, tmp_path: Path) -> None:
    """As in a clone of a repository, or beside the dense model's weights."""
    (tmp_path / file).write_text("mine")
    model, inputs = vit(), images(1, size=32, channels=3)
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, inputs, plan)

    def save() -> None:
        arguments = {"img_size": 32, **TINY}
        origin: Any = {"library": "timm", "name": "vit_tiny_patch16_224", "arguments": arguments}
        tp_amp.save_pruned(model, tmp_path, plan, **origin)

    with pytest.raises(ValueError, match=rf"holds {file}, which save_pruned did not write"):
        save()
    assert (tmp_path / file).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / file).unlink()
    save()
    save()  # an earlier one is replaced


def test_files_of_ones_own_stay_where_a_model_is_saved_again(tmp_path: Path) -> None:
    """Only what an earlier save noted is replaced, or removed where it is no longer written."""
    own = {"README.md": "mine", "config.json": "{}", "preprocessor_config.json": "{}"}
    for name, text in own.items():
        (tmp_path / name).write_text(text)
    model, inputs = vit(), images(1, size=32, channels=3)
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    origin: Any = {"name": "vit_tiny_patch16_224", "arguments": {"img_size": 32, **TINY}}
    for _ in range(2):
        tp_amp.save_pruned(model, tmp_path, plan)
        with pytest.raises(ValueError, match=r"holds README\.md, which save_pruned did not write"):
            tp_amp.save_pruned(model, tmp_path, plan, library="timm", **origin)
        assert {name: (tmp_path / name).read_text() for name in own} == own
    (tmp_path / "README.md").unlink()
    tp_amp.save_pruned(model, tmp_path, plan, library="timm", **origin)
    assert (tmp_path / "README.md").is_file()
    tp_amp.save_pruned(model, tmp_path, plan)
    assert not (tmp_path / "README.md").exists()
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_note_of_files_that_are_none_of_a_save_removes_nothing(tmp_path: Path) -> None:
    """As one that was damaged, or written by someone else."""
    folder = tmp_path / "small"
    folder.mkdir()
    mine = [tmp_path / "mine", folder / "notes.txt"]
    for path in mine:
        path.write_text("mine")
    (folder / "source.json").write_text('{"files": ["../mine", "notes.txt", "plan.json"]}')
    model, inputs = vit(), images(1, size=32, channels=3)
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    tp_amp.save_pruned(model, folder, plan)
    assert [path.read_text() for path in mine] == ["mine", "mine"]


def test_what_a_library_builds_is_compared_with_the_plan(tmp_path: Path) -> None:
    model, inputs = vit(), images(1, size=32, channels=3)
    first, dimap = planned(model, inputs), tp_amp.DIMAPImportance()
    tp_amp.apply_plan(model, first)
    later = tp_amp.plan_from_importance(model, inputs, dimap, 0.5)
    tp_amp.apply_plan(model, later)
    name, arguments = "vit_tiny_patch16_224", {"img_size": 32, **TINY}
    wrong: list[tuple[tp_amp.PruningPlan, dict[str, Any], str]] = [
        (later, {"name": name, "arguments": arguments}, r"first\.then\(later\)"),
        (first.then(later), {"name": name, "arguments": {"img_size": 32}}, "not for the vit_tiny"),
        (first.then(later), {"name": "no_model"}, "timm builds no 'no_model'"),
        (first.then(later), {"name": name, "arguments": {"size": 3}}, "timm builds no 'vit_tiny"),
    ]
    for plan, origin, told in wrong:
        with pytest.raises(ValueError, match=told):
            tp_amp.save_pruned(model, tmp_path, plan, library="timm", **origin)
    assert not list(tmp_path.iterdir())
    tp_amp.save_pruned(
        model, tmp_path, first.then(later), library="timm", name=name, arguments=arguments
    )
    with torch.no_grad():
        assert torch.equal(tp_amp.create_model(tmp_path).eval()(inputs), model.eval()(inputs))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"img_size": 32, **TINY},
            r"head.bias is \(5,\) in the model and \(1000,\) in the vit_tiny",
        ),
        ({"img_size": 48, "num_classes": 5, **TINY}, r"pos_embed is \(1, 5, 64\) in the model and"),
        (
            {"num_classes": 5, **TINY, "depth": 3},
            r"blocks.2.attn.proj.bias is missing in the model",
        ),
        ({"num_classes": 5, "img_size": 32, **TINY}, ""),
    ],
)
def test_what_would_not_come_back_is_not_saved(
    arguments: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """Whatever differs from the dense model besides the cut layers."""
    kind, inputs = "vit_tiny_patch16_224", images(1, size=32, channels=3)
    model = timm.create_model(kind, img_size=32, **{**TINY, "num_classes": 5}).eval()
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    model.blocks[0].attn.qkv.bias = nn.Parameter(torch.ones_like(model.blocks[0].attn.qkv.bias))
    origin: Any = {"library": "timm", "name": kind, "arguments": arguments}
    if not told:
        tp_amp.save_pruned(model, tmp_path / "small", plan, **origin)
        return
    with pytest.raises(ValueError, match=f"{told}.*pass the arguments that the dense model"):
        tp_amp.save_pruned(model, tmp_path / "small", plan, **origin)
    assert not (tmp_path / "small").exists()


def test_arguments_are_for_libraries_that_take_them(tmp_path: Path) -> None:
    model = vit()
    plan = tp_amp.PruningPlan({})
    with pytest.raises(
        ValueError, match=r"for models of timm and open_clip; .* found \{'depth': 1"
    ):
        tp_amp.save_pruned(model, tmp_path, plan, arguments={"depth": 1})


def test_a_plan_of_nothing_is_saved(tmp_path: Path) -> None:
    origin: Any = {"name": "vit_tiny_patch16_224", "arguments": {"img_size": 32, **TINY}}
    tp_amp.save_pruned(vit(), tmp_path, tp_amp.PruningPlan({}), library="timm", **origin)
    assert tp_amp.create_model(tmp_path).blocks[0].mlp.fc1.out_features == 256


def test_a_processor_that_cannot_be_saved_is_refused_first(tmp_path: Path) -> None:
    model, inputs = vit(), images(1, size=32, channels=3)
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    origin: Any = {"name": "vit_tiny_patch16_224", "arguments": {"img_size": 32, **TINY}}
    with pytest.raises(ValueError, match="processor is for models of transformers"):
        tp_amp.save_pruned(model, tmp_path, plan, library="timm", processor=object(), **origin)
    assert not list(tmp_path.iterdir())
