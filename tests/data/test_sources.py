"""Models by name, with the transforms and weights that go with them."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from saved_models import save
from torch import nn
from toys import fingerprint, perturbed, toy

from tp_amp.data.sources import load
from tp_amp.data.weights import load_weights

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}
VIT = "timm:vit_tiny_patch16_224"
TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2, "vocab_size": 50, "context_length": 8},
}


def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_timm_has_its_transform() -> None:
    loaded = load(VIT, arguments=SMALL)
    assert loaded.model.blocks[1].mlp.fc1.in_features == 24
    # vit_tiny_patch16_224: mean and deviation 0.5, crop 0.9.
    found = loaded.transform(Image.new("RGB", (64, 64), (255, 0, 51)))
    assert found.shape == (3, 32, 32)
    torch.testing.assert_close(found[:, 16, 16], torch.tensor([1, -1, -0.6]))
    config = {**timm.data.resolve_data_config({}, model=loaded.model), "input_size": (3, 32, 32)}
    expected = timm.data.create_transform(**config, is_training=False)
    assert torch.equal(loaded.transform(photo()), expected(photo()))
    assert loaded.blank().shape == (1, 3, 32, 32)


def test_timm_with_one_channel() -> None:
    loaded = load(VIT, arguments={**SMALL, "in_chans": 1})
    assert loaded.mode == "L"
    assert loaded.blank().shape == (1, 1, 32, 32)
    with torch.no_grad():
        assert loaded.model(loaded.blank()).shape == (1, 4)
    with pytest.raises(ValueError, match="in_chans=5 is neither"):
        load(VIT, arguments={**SMALL, "in_chans": 5})


def test_open_clip_is_its_image_tower() -> None:
    loaded = load("open_clip:ViT-B-32/laion2b_s34b_b79k", arguments=TOWERS)
    assert not hasattr(loaded.model, "token_embedding")
    white = loaded.transform(Image.new("RGB", (64, 64), (255, 255, 255)))
    mean, deviation = (torch.tensor(open_clip.OPENAI_DATASET_MEAN), open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(white[:, 5, 5], (1 - mean) / torch.tensor(deviation))
    with torch.no_grad():
        assert loaded.model(loaded.blank()).shape == (1, 16)


def test_open_clip_prepares_images_as_the_weights_need_it(tmp_path: Path) -> None:
    # SigLIP's weights have mean and deviation 0.5; the architecture's name alone has CLIP's.
    loaded = load("open_clip:ViT-B-32/laion400m_e31", arguments=TOWERS)
    assert loaded.arguments["force_preprocess_cfg"]["mean"] == open_clip.OPENAI_DATASET_MEAN
    arguments = {**TOWERS, "force_preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    loaded = load("open_clip:ViT-B-32", arguments=arguments)
    save(loaded, tmp_path)
    for each in (loaded, load(str(tmp_path))):
        white = each.transform(Image.new("RGB", (64, 64), (255, 255, 255)))
        torch.testing.assert_close(white, torch.ones(3, 32, 32))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:vit_tinny_patch16_224", r"timm has no model .*did you mean vit_tiny_patch16_224"),
        ("timm:zzzzzzzz", r"see timm\.list_models"),
        ("vit_tiny_patch16_224", r"did you mean timm:vit_tiny_patch16_224\?"),
        ("torchvision:vit_b_16", "names the library 'torchvision', which is not known"),
        ("nothing/here", "is no folder and names no library"),
        ("open_clip:ViT-B-23", r"open_clip has no model 'ViT-B-23'; did you mean"),
        ("open_clip:ViT-B-32/none", r"no weights 'none': write open_clip:ViT-B-32/TAG.* openai"),
        ("hf:./nothing", r"hf:\./nothing can't be loaded"),
    ],
)
def test_wrong_names_are_told(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(spec)


def test_other_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="pass one of them"):
        load(VIT, pretrained=True, weights="x.pt")
    with pytest.raises(ValueError, match=r"can't be built with .*widht.*check --model-args"):
        load(VIT, arguments={"widht": 3})
    with pytest.raises(ValueError, match="write open_clip:ViT-B-32/TAG"):
        load("open_clip:ViT-B-32", pretrained=True)
    with pytest.raises(ValueError, match=r"holds no source\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="for a folder of transformers write hf:"):
        load(str(tmp_path))
    loaded = load(VIT, arguments=SMALL)
    save(loaded, tmp_path / "small")
    with pytest.raises(ValueError, match="leave out --pretrained"):
        load(str(tmp_path / "small"), arguments={"depth": 1})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"install tp-amp\[huggingface\]"):
        load("hf:x")


def test_no_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> nn.Module:
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(timm, "create_model", fails)
    message = r"can't be loaded \(Name or service not known\); check the name, .* the network"
    with pytest.raises(ValueError, match=message):
        load(VIT, pretrained=True)


@pytest.mark.parametrize("kind", ["safetensors", "plain", "wrapped", "parallel", "clip"])
def test_weights(tmp_path: Path, kind: str) -> None:
    state = perturbed(toy(), 3).state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "plain":
        torch.save(state, path)
    elif kind == "wrapped":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif kind == "parallel":
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        tower = {f"visual.{k}": v for k, v in state.items()}
        torch.save({**tower, "logit_scale": torch.ones(())}, path)
    model = toy()
    load_weights(model, str(path))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


class Surprise:
    def __reduce__(self) -> Any:
        return (sys.exit, (1,))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pt", None, "no such file"),
        ("w.pt", b"nothing", "can't be read as weights"),
        ("w.safetensors", b"nothing", "can't be read as weights"),
        ("w.pt", pickle.dumps({"a": Surprise()}), "can't be read as weights"),
        ("w.pt", {"state_dict": {"epoch": 3}}, "holds other than tensors"),
        ("w.pt", {"head.weight": torch.ones(5, 12)}, r"\d+ missing \(embed"),
        ("w.pt", {**toy().state_dict(), "more": torch.ones(1)}, r"1 unknown \(more\)"),
        ("w.pt", toy(classes=7).state_dict(), r"2 of another shape \(head.weight \(7, 12\), not"),
    ],
)
def test_wrong_weights_are_told(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path, model = tmp_path / name, toy()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        load_weights(model, str(path))
    assert fingerprint(model) == before
