"""Where a model came from: checked before anything is written, and built again as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import timm
import torch
from packaging.version import Version
from saved_models import planned, vit
from toys import images
from zoo import TINY, hugging_face_models
from zoo_checks import run

import tp_amp
from tp_amp.plan.origin import dense_for, origin

TOWERS: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
    "text_cfg": {"layers": 1, "width": 16, "heads": 1, "vocab_size": 20, "context_length": 4},
}


def cut_tower() -> tuple[torch.nn.Module, tp_amp.PruningPlan, torch.Tensor]:
    model = open_clip.create_model("ViT-B-32", **TOWERS).visual.eval()
    inputs = images(1, size=32, channels=3)
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    return model, plan, inputs


def test_a_tower_of_open_clip_is_compared_before_anything_is_written(tmp_path: Path) -> None:
    model, plan, inputs = cut_tower()
    wider = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "width": 64}}
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("ViT-B-23", TOWERS, "open_clip builds no 'ViT-B-23'"),
        ("ViT-B-32", {**TOWERS, "widht": 3}, "open_clip builds no 'ViT-B-32' with these arguments"),
        ("ViT-B-32", wider, "the plan is not for the ViT-B-32 that open_clip builds"),
        ("ViT-B-32", {}, "the plan is not for the ViT-B-32 that open_clip builds"),
    ]
    for name, arguments, told in wrong:
        source: Any = {"library": "open_clip", "name": name, "arguments": arguments}
        with pytest.raises(ValueError, match=told):
            tp_amp.save_pruned(model, tmp_path, plan, **source)
    assert not list(tmp_path.iterdir())
    tp_amp.save_pruned(
        model, tmp_path, plan, library="open_clip", name="ViT-B-32", arguments=TOWERS
    )
    with torch.no_grad():
        assert torch.equal(tp_amp.create_model(tmp_path).eval()(inputs), model(inputs))


def test_its_sizes_are_known_without_values() -> None:
    model, plan, _ = cut_tower()
    dense = dense_for(origin(model, "open_clip", "ViT-B-32", TOWERS), plan)
    assert dense is not None
    if Version(torch.__version__) < Version("2.6"):
        pytest.skip("torch 2.4 can't build it on the meta device")
    assert all(parameter.is_meta for parameter in dense.parameters())


def test_a_tower_whose_configuration_is_out_of_reach_is_saved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_reach(*_: Any, **__: Any) -> Any:
        raise huggingface_hub.errors.OfflineModeIsEnabled("no network\nand more")

    model, plan, _ = cut_tower()
    monkeypatch.setattr(open_clip, "create_model", out_of_reach)
    tp_amp.save_pruned(
        model, tmp_path, plan, library="open_clip", name="ViT-B-32", arguments=TOWERS
    )
    assert (tmp_path / "model.safetensors").is_file()
    assert "not compared with the ViT-B-32 that open_clip builds" in caplog.text
    assert "no network" in caplog.text
    assert "and more" not in caplog.text


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_dense_model_is_built_once(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: dict[str, Any] = {"library": library}
    if library == "timm":
        model, inputs = vit(), images(1, size=32, channels=3)
        source |= {"name": "vit_tiny_patch16_224", "arguments": {"img_size": 32, **TINY}}
    else:
        make, inputs, _ = hugging_face_models()["hf_vit"]
        model = make()
    plan = planned(model, inputs)  # with heads cut, which no arguments of timm build
    tp_amp.apply_plan(model, plan)
    kind = timm.models.VisionTransformer if library == "timm" else type(model)
    built: list[int] = []
    construct = kind.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        # Other ratios are tried for timm; none of them is the dense model again.
        # Nor is what an old release can't build on the meta device, and builds with values then.
        construct(self, *args, **kwargs)
        built.append(kwargs.get("mlp_ratio", 0))

    monkeypatch.setattr(kind, "__init__", counted)
    tp_amp.save_pruned(model, tmp_path, plan, **source)
    assert built.count(0) == 1


def test_each_tensor_comes_back_in_its_dtype(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, inputs, _ = hugging_face_models()["hf_vit"]
    model = make().eval()
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    model.to(torch.bfloat16)
    model.vit.layernorm.float()
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers")
    assert "transformers opens the folder in bfloat16 alone, and 2 tensors" in caplog.text
    again = tp_amp.create_model(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    caplog.clear()
    tp_amp.save_pruned(model.float(), tmp_path, plan, library="transformers")
    assert "alone" not in caplog.text


@pytest.mark.usefixtures("code_of_folders")
def test_attentions_in_plain_steps_stay_so(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    make, inputs, _ = hugging_face_models()["hf_vit"]
    config = make().config
    for folder, kind in (("eager", "eager"), ("sdpa", "sdpa")):
        config = copy.deepcopy(config)
        config._attn_implementation = kind
        model = transformers.ViTForImageClassification(config).eval()
        plan = planned(model, inputs)
        tp_amp.apply_plan(model, plan)
        tp_amp.save_pruned(model, tmp_path / folder, plan, library="transformers")
        opened = transformers.AutoModelForImageClassification.from_pretrained
        for again in (
            tp_amp.create_model(tmp_path / folder),
            opened(tmp_path / folder, trust_remote_code=True),
        ):
            assert again.config._attn_implementation == kind
            with torch.no_grad():
                assert torch.equal(run(copy.deepcopy(again).eval(), inputs), run(model, inputs))
        asked = opened(tmp_path / folder, trust_remote_code=True, attn_implementation="sdpa")
        assert asked.config._attn_implementation == "sdpa"
