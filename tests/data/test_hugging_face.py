"""Models of transformers by name or folder, with their image processors."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from command_line import SAMPLE
from PIL import Image
from saved_models import save
from toys import perturbed

import tp_amp
from tp_amp.cli.main import main
from tp_amp.data.hugging_face import _image_class
from tp_amp.data.sources import load


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    plain = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(
        **plain, intermediate_size=80, image_size=32, patch_size=8, num_labels=4
    )
    torch.manual_seed(0)
    perturbed(transformers.ViTForImageClassification(config)).save_pretrained(tmp_path / "vit")
    size = {"height": 32, "width": 32}
    processor = transformers.ViTImageProcessor(size=size, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_hugging_face(hugging_face: Path, tmp_path: Path) -> None:
    loaded = load(f"hf:{hugging_face}", pretrained=True)
    stored = safetensors.torch.load_file(hugging_face / "model.safetensors")
    assert torch.equal(loaded.model.state_dict()["classifier.weight"], stored["classifier.weight"])
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    expected = torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(loaded.transform(red)[:, 5, 5], expected)
    plan = save(loaded, tmp_path / "small")
    again = load(str(tmp_path / "small"))
    assert again.plan == plan
    torch.testing.assert_close(again.transform(red)[:, 5, 5], expected)
    with torch.no_grad():
        outputs = [each.model.eval()(loaded.blank()).logits for each in (loaded, again)]
    weights = again.model.state_dict()
    assert all(torch.equal(value, weights[n]) for n, value in loaded.model.state_dict().items())
    # Kernels round by where their tensors lie.
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


def test_hugging_face_with_random_weights(hugging_face: Path) -> None:
    loaded = load(f"hf:{hugging_face}", arguments={"num_hidden_layers": 1, "image_size": 48})
    assert len(tp_amp.find_mlps(loaded.model, loaded.blank())) == 1
    assert loaded.blank().shape == (1, 3, 48, 48)
    with pytest.raises(ValueError, match=r"has no arguments \['widht'\]"):
        load(f"hf:{hugging_face}", arguments={"widht": 1})


def test_hugging_face_without_a_processor(
    hugging_face: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (hugging_face / "preprocessor_config.json").unlink()
    white = load(f"hf:{hugging_face}").transform(Image.new("RGB", (64, 64), (255, 255, 255)))
    torch.testing.assert_close(white, torch.ones(3, 32, 32))
    assert "has no image processor" in caplog.text


def test_hugging_face_clip_is_its_image_tower(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 50},
        vision_config={**small, "image_size": 32, "patch_size": 8, "intermediate_size": 80},
    )
    model = transformers.CLIPModel(config)
    model.save_pretrained(tmp_path)
    for pretrained in (True, False):
        loaded = load(f"hf:{tmp_path}", pretrained=pretrained)
        assert type(loaded.model).__name__ == "CLIPVisionModel"
        assert len(tp_amp.find_mlps(loaded.model, loaded.blank())) == 1
        name = "vision_model.encoder.layers.0.mlp.fc1.weight"
        weights = {k: v for k, v in loaded.model.state_dict().items() if name.endswith(k)}
        assert [torch.equal(v, model.state_dict()[name]) for v in weights.values()] == [pretrained]


class Config:
    architectures: ClassVar[list[str]] = []


def test_a_checkpoint_without_a_known_image_class_is_told() -> None:
    with pytest.raises(ValueError, match="hf:x does not say its class"):
        _image_class("x", Config())
    config = Config()
    config.architectures = ["LlamaThing"]
    with pytest.raises(
        ValueError, match="hf:x is a LlamaThing, of which transformers has no image"
    ):
        _image_class("x", config)


@pytest.mark.usefixtures("code_of_folders")
def test_what_the_command_line_prunes_opens_in_transformers(
    hugging_face: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    small, smaller = tmp_path / "small", tmp_path / "smaller"
    options = [*SAMPLE, "--importance", "magnitude", "--compensation", "none"]
    for model, target, output in ((f"hf:{hugging_face}", 0.8, small), (str(small), 0.9, smaller)):
        pretrained = ["--pretrained"] if output is small else []
        command = ["prune", model, *pretrained, *options, "--target", f"params={target}"]
        assert main([*command, "--output", str(output)]) == 0, capsys.readouterr().err
    blank = load(str(smaller)).blank()
    for folder in (small, smaller):
        opened = transformers.AutoModelForImageClassification.from_pretrained(
            folder, trust_remote_code=True
        )
        ours = tp_amp.create_model(folder)
        for name, values in ours.state_dict().items():
            assert torch.equal(opened.state_dict()[name], values)
        torch.testing.assert_close(opened.eval()(blank).logits, ours.eval()(blank).logits)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        assert list(processor.image_std) == [1.0] * 3
        card = (folder / "README.md").read_text()
        assert "AutoModelForImageClassification.from_pretrained" in card
        assert "| Parameters |" in card


def test_a_pruned_folder_without_a_processor_asks_nothing(
    hugging_face: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = save(load(f"hf:{hugging_face}", pretrained=True), tmp_path / "small")
    (tmp_path / "small" / "preprocessor_config.json").unlink()
    again = load(str(tmp_path / "small"))
    assert again.plan == plan
    assert "has no image processor" in caplog.text
