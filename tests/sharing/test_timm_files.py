"""Folders that timm opens by itself, where its own arguments build the pruned model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from opened_elsewhere import outputs_elsewhere
from saved_models import planned
from torch import Tensor, nn
from toys import perturbed
from zoo import SWIN_HEADS, TIMM, TINY, image

import tp_amp

# Name, size of the images, arguments, and the share that is kept: of 256 channels 77, of which the
# ratio is no number with few digits, and of a packed gated MLP.
MODELS: dict[str, tuple[str, int, dict[str, Any], float]] = {
    "vit": ("vit_tiny_patch16_224", 32, {"img_size": 32, "num_classes": 7, **TINY}, 0.3),
    "swin": ("swin_tiny_patch4_window7_224", 64, SWIN_HEADS, 0.5),
    "giant": (
        "vit_giant_patch14_dinov2",
        28,
        {"img_size": 28, "embed_dim": 96, "num_heads": 3, "depth": 2},
        0.5,
    ),
    "eva02": ("eva02_tiny_patch14_224", 28, {"img_size": 28, "depth": 2}, 0.5),
    "siglip": ("vit_base_patch16_siglip_224", 32, {"img_size": 32, **TINY}, 0.5),
}


def cut(name: str, folder: Path) -> tuple[nn.Module, Tensor]:
    spec, size, arguments, share = MODELS[name]
    model = timm.create_model(spec, **arguments)
    inputs = image(size)
    plan = tp_amp.plan_from_importance(model, inputs, tp_amp.DIMAPImportance(), share)
    tp_amp.apply_plan(model, plan)
    model = perturbed(model).eval()
    tp_amp.save_pruned(model, folder, plan, library="timm", name=spec, arguments=arguments)
    return model, inputs


def test_timm_alone_gives_the_same(tmp_path: Path) -> None:
    folders, inputs, here = [], [], []
    for name in MODELS:
        model, given = cut(name, tmp_path / name)
        with torch.no_grad():
            here.append(model(given))
        folders.append((tmp_path / name, "timm"))
        inputs.append({"images": given})
    (tmp_path / "elsewhere").mkdir()
    there = outputs_elsewhere(folders, inputs, tmp_path / "elsewhere")
    same = [torch.equal(a.flatten(), b) for a, b in zip(here, there, strict=True)]
    assert dict(zip(MODELS, same, strict=True)) == dict.fromkeys(MODELS, True)


@pytest.mark.parametrize("mlps", [None, 50, 64])
@pytest.mark.parametrize("spec", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2"])
def test_a_narrower_stream_with_as_many_heads_less_opens_there(
    spec: str, mlps: int | None, tmp_path: Path
) -> None:
    """Whether MLPs are cut too or not; the ratio is another one in either case."""
    arguments = {"img_size": 28, "patch_size": 7, "embed_dim": 64, "num_heads": 4, "depth": 2}
    torch.manual_seed(0)
    model = perturbed(timm.create_model(spec, **arguments, num_classes=5)).eval()
    images = torch.randn(6, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    [rotated] = tp_amp.rotate(model, images[:1], [images], progress=False)
    kept = {site.down: [0, 2, 3] for site in tp_amp.find_attentions(model, images[:1])}
    if mlps:
        kept |= {mlp.down: list(range(mlps)) for mlp in tp_amp.find_mlps(model, images[:1])}
    plan = tp_amp.stream_plan([rotated], 0.75).then(tp_amp.PruningPlan(kept))
    tp_amp.apply_plan(model, images[:1], plan)
    origin = {"library": "timm", "name": spec, "arguments": {**arguments, "num_classes": 5}}
    tp_amp.save_pruned(model, tmp_path, plan, **origin)
    found = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert (found["embed_dim"], found["num_heads"]) == (48, 3)
    plain = timm.create_model(spec, **found)  # what anyone can write down
    assert type(plain.blocks[0].attn) is timm.layers.Attention
    plain.load_state_dict(model.state_dict())
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    ours = tp_amp.create_model(tmp_path)
    with torch.no_grad():
        for each in (plain, opened, ours):
            assert torch.equal(each.eval()(images), model(images))


def test_images_are_prepared_as_for_the_dense_model(tmp_path: Path) -> None:
    model, _ = cut("siglip", tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    found, expected = map(timm.data.resolve_model_data_config, (again, model))
    for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert json.dumps(found[name]) == json.dumps(expected[name])
    assert again.num_classes == model.num_classes
    assert 'timm.create_model("local-dir:FOLDER"' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("kind", ["uneven", "heads", "one MLP alone", "stream", "inside heads"])
def test_what_no_arguments_build_is_left_to_this_package(tmp_path: Path, kind: str) -> None:
    spec, size, arguments, _ = MODELS["vit"]
    model = timm.create_model(spec, **arguments).eval()
    inputs = image(size)
    importance = tp_amp.DIMAPImportance()
    if kind == "heads":
        plan = planned(model, inputs)
    elif kind == "stream":  # each head is as wide as before
        plan = tp_amp.stream_plan(tp_amp.rotate(model, inputs, [inputs], progress=False), 0.5)
    elif kind == "inside heads":
        rotated = tp_amp.rotate_heads(model, inputs, [inputs], progress=False)
        plan = tp_amp.rank_plan(rotated, {"qk": 0.5, "vo": 0.5})
    else:
        widths = {"blocks.0.mlp.fc2": 100, "blocks.1.mlp.fc2": 60}
        if kind == "one MLP alone":
            del widths["blocks.1.mlp.fc2"]
        plan = tp_amp.plan_from_importance(model, inputs, importance, widths)
    tp_amp.apply_plan(model, plan)
    origin = {"library": "timm", "name": spec, "arguments": arguments}
    tp_amp.save_pruned(model, tmp_path, plan, **origin)
    assert not (tmp_path / "config.json").exists()
    assert 'tp_amp.create_model("FOLDER")' in (tmp_path / "README.md").read_text()
    with torch.no_grad():
        assert torch.equal(tp_amp.create_model(tmp_path).eval()(inputs), model(inputs))


def test_the_configuration_says_what_was_cut(tmp_path: Path) -> None:
    cut("vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert int(config["model_args"]["mlp_ratio"] * 64) == 77
    assert config["num_classes"] == 7


# Families of the zoo whose MLPs are all made by one ratio, or by none.
OTHERS = {
    *("cait", "convnext", "convnext_conv_mlp", "convnextv2", "coat_lite", "crossvit", "dpwee"),
    *("efficientformer", "efficientformerv2", "gcvit", "levit", "maxvit", "maxvit_rmlp"),
    *("mobilevit", "mobilevitv2", "mvitv2", "pe_core", "pvt_v2", "sam2_hiera", "tiny_vit", "twins"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_families_of_timm_whose_mlps_are_alike_open_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, calls = timm.create_model, []
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **n: calls.append((*a, n)) or create(*a, **n)
    )
    alone, left_out = set(), OTHERS | {"pwee_fused_out"}  # that has a class among its arguments
    for name in TIMM.keys() - left_out:
        make, inputs, _ = TIMM[name]
        model = make()
        spec, arguments = calls[-1]
        plan = tp_amp.plan_from_importance(model, inputs, tp_amp.DIMAPImportance(), 0.5)
        tp_amp.apply_plan(model, plan)
        model = perturbed(model).eval()
        folder = tmp_path / name
        tp_amp.save_pruned(model, folder, plan, library="timm", name=spec, arguments=arguments)
        if (folder / "config.json").exists():
            alone.add(name)
            again = copy.deepcopy(create(f"local-dir:{folder}", pretrained=True)).eval()
            with torch.no_grad():
                assert torch.equal(again(inputs), model(inputs)), name
    assert alone == TIMM.keys() - left_out
