"""Every example of the drop-in kind, with small models and random weights, through its `main`."""

from __future__ import annotations

import copy
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from toys import narrow_heads

pytest.importorskip("sklearn")
import drop_in

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
EXAMPLES = sorted(Path(drop_in.EXAMPLES).glob("prune_*.py"))
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@timm.models.register_model
def tp_amp_test_vit(pretrained: bool = False, **arguments: Any) -> nn.Module:
    assert not pretrained
    cfg = {"input_size": (3, 32, 32)}
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained_cfg_overlay=cfg, num_classes=5, **SMALL_VIT
    )


@timm.models.register_model
def tp_amp_test_swin(pretrained: bool = False, **arguments: Any) -> nn.Module:
    assert not pretrained
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": 8}
    sizes |= {"depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "num_classes": 5}
    return timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained_cfg_overlay={"input_size": (3, 32, 32)}, **sizes
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of each of two classes."""
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            picture = to_pil_image(torch.rand(3, 40, 40, generator=generator))
            picture.save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def run(name: str, *arguments: str) -> nn.Module:
    return importlib.import_module(name).main([*map(str, arguments)])


def check_vit(model: Any, hidden: int) -> None:
    """The MLPs are cut, the residual stream and the head are not, and the forward pass runs."""
    assert [block.mlp.fc1.out_features for block in model.blocks] == [hidden] * 2
    assert {block.mlp.fc2.out_features for block in model.blocks} == {24}
    assert {block.attn.proj.out_features for block in model.blocks} == {24}
    assert model.head.out_features == 5
    assert model(image()).shape == (2, 5)


@narrow_heads
def test_timm_vit(folder: Path) -> None:
    model = run("prune_timm_vit", "--data", folder, "--model", "tp_amp_test_vit",
                "--no-pretrained", "--batch_size", 3)  # fmt: skip
    check_vit(model, 48)
    for block in model.blocks:
        assert block.attn.num_heads == 2  # a quarter of three, rounded up, is gone
        assert block.attn.qkv.out_features == 3 * 2 * 8
        assert block.attn.proj.in_features == 2 * 8


def test_residual_stream(folder: Path) -> None:
    model: Any = run("prune_residual_stream", "--data", folder, "--model", "tp_amp_test_vit",
                     "--no-pretrained", "--batch_size", 3, "--pruning_ratio", 0.5)  # fmt: skip
    for block in model.blocks:  # the stream is cut, all else stays
        assert block.attn.qkv.weight.shape == (3 * 24, 12)
        assert block.attn.proj.weight.shape == (12, 24)
        assert block.mlp.fc1.weight.shape == (4 * 24, 12)
        assert block.mlp.fc2.weight.shape == (12, 4 * 24)
        assert block.norm1.weight.tolist() == pytest.approx([2**0.5] * 12)
    assert model.head.weight.shape == (5, 12)
    assert model(image()).shape == (2, 5)


def test_every_width(folder: Path) -> None:
    dense = sum(parameter.numel() for parameter in tp_amp_test_vit().parameters())
    model: Any = run("every_width", "--data", folder, "--model", "tp_amp_test_vit",
                     "--no-pretrained", "--batch_size", 3, "--share", 0.5)  # fmt: skip
    assert 0.45 * dense <= sum(parameter.numel() for parameter in model.parameters()) <= 0.5 * dense
    assert model(image()).shape == (2, 5)


def test_timm_swin() -> None:
    model = run("prune_timm_swin", "--model", "tp_amp_test_swin", "--no-pretrained")
    dense = tp_amp_test_swin()

    def widths(model: nn.Module, *names: str) -> list[int]:
        found = model.named_modules()
        return [m.out_features for name, m in found if name.endswith(names) and "patch" not in name]

    stays = ("proj", "fc2", "reduction", "head.fc")
    assert widths(model, *stays) == widths(dense, *stays)
    assert sum(widths(model, "fc1")) == int(0.7 * sum(widths(dense, "fc1")))
    assert sum(widths(model, "qkv")) < sum(widths(dense, "qkv"))
    assert model(image()).shape == (2, 5)


@pytest.fixture
def hf_vit(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        num_labels=5,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_hf_vit(folder: Path, hf_vit: Path) -> None:
    model: Any = run("prune_hf_vit", "--data", folder, "--model", hf_vit, "--pruning_ratio", 0.5)
    for layer in model.vit.layers:
        assert layer.mlp.fc1.out_features == 20
        assert layer.attention.q_proj.out_features == 12
        assert layer.attention.head_dim == 4
        assert layer.attention.o_proj.out_features == 24
    assert model(image()).logits.shape == (2, 5)


def test_hf_swin(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=2
    )
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path)
    model: Any = run("prune_hf_swin", "--model", tmp_path, "--pruning_ratio", 0.5)
    for stage, width in zip(model.swin.encoder.layers, (8, 16), strict=True):
        for block in stage.blocks:
            assert block.mlp.fc1.out_features == 2 * width
            assert block.attention.v_proj.out_features == width // 2
            assert block.attention.o_proj.out_features == width
    assert model(image()).logits.shape == (2, 2)


@pytest.fixture
def clip_config(tmp_path: Path) -> str:
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
    text = {"layers": 1, "width": 16, "heads": 2, "context_length": 16, "vocab_size": 49408}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tp-amp-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tp-amp-test.json")
    return "tp-amp-test"


def test_open_clip(folder: Path, clip_config: str, monkeypatch: Any, capsys: Any) -> None:
    example = importlib.import_module("prune_open_clip")
    dense = []
    prune = example.prune

    def recorded(model: nn.Module, *arguments: Any) -> None:
        dense.append(copy.deepcopy(model))
        prune(model, *arguments)

    monkeypatch.setattr(example, "prune", recorded)
    model = example.main(
        ["--data", str(folder), "--model", clip_config, "--pretrained", "", "--images", "4"]
    )
    before, after = dense[0].state_dict(), model.state_dict()
    untouched = [name for name in before if not name.startswith("visual.")]
    assert len(untouched) > 10  # the text tower and the scale, bit for bit
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    sizes = [drop_in.parameters(each.visual) for each in (dense[0], model)]
    assert sizes[1] / sizes[0] == pytest.approx(0.7, abs=0.01)
    features = model.encode_image(image())
    assert features.shape == (2, 16)
    accuracies = re.search(r"Zero-shot accuracy: (\S+) => (\S+)", capsys.readouterr().out)
    assert accuracies is not None
    assert all(float(value) in (0.0, 0.5, 1.0) for value in accuracies.groups())  # of two images


def test_zero_shot_accuracy_counts() -> None:
    example = importlib.import_module("prune_open_clip")

    class Told(nn.Module):
        """Features of images and texts are one-hot."""

        def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
            return torch.eye(4)[tokens]

        encode_image = encode_text

    data = torch.utils.data.TensorDataset(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0]))
    loader = torch.utils.data.DataLoader(data, 3)
    assert example.zero_shot_accuracy(Told(), torch.arange(4), loader) == 0.75


def test_resnet(folder: Path) -> None:
    model: Any = run("prune_resnet", "--data", folder, "--no-pretrained", "--pruning_ratio", 0.5)
    assert model.conv1.out_channels == 32
    assert [stage[0].conv1.out_channels for stage in (model.layer1, model.layer4)] == [32, 256]
    assert model.fc.out_features == 1000
    assert model(image()).shape == (2, 1000)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_iteratively(folder: Path, monkeypatch: Any) -> None:
    example = importlib.import_module("prune_iteratively")
    widths = []
    fine_tune = example.fine_tune

    def recorded(model: Any, *arguments: Any) -> None:
        before = model.head.weight.detach().clone()
        fine_tune(model, *arguments)
        assert not torch.equal(before, model.head.weight)  # it trains what pruning left
        widths.append(model.blocks[0].mlp.fc1.out_features)

    monkeypatch.setattr(example, "fine_tune", recorded)
    model = example.main(
        ["--data", str(folder), "--model", "tp_amp_test_vit", "--no-pretrained", "--images", "4",
         "--iterative_steps", "2"]
    )  # fmt: skip
    assert widths == [72, 48]
    check_vit(model, 48)


@pytest.mark.parametrize("pruner", ["group_norm", "growing_reg"])
def test_with_regularizer(folder: Path, pruner: str) -> None:
    model = run("prune_with_regularizer", "--data", folder, "--model", "tp_amp_test_vit",
                "--no-pretrained", "--pruner", pruner, "--batch_size", 2)  # fmt: skip
    check_vit(model, 48)
    assert all(block.attn.qkv.out_features == 72 for block in model.blocks)


@pytest.mark.parametrize(
    ("pruner", "importance"),
    [("group_norm", "DIMAPImportance"), ("growing_reg", "GramSchmidtImportance")],
)
def test_regularizer_shrinks_what_scores_low(pruner: str, importance: str) -> None:
    example = importlib.import_module("prune_with_regularizer")
    model: Any = tp_amp_test_vit()
    batch = [(image(), torch.tensor([0, 1]))]

    def cut_norms(reg: float) -> Tensor:
        trained: Any = copy.deepcopy(model)
        torch.manual_seed(0)
        example.prune(trained, batch * 3, pruner, pruning_ratio=0.0, reg=reg, lr=1e-2)
        return trained.blocks[0].mlp.fc1.weight.detach().norm()

    assert cut_norms(10.0) < cut_norms(0.0)


@narrow_heads
@pytest.mark.parametrize("isomorphic", [False, True])
def test_globally(folder: Path, isomorphic: bool) -> None:
    arguments = ["--isomorphic"] if isomorphic else []
    model: Any = run("prune_globally", "--data", folder, "--model", "tp_amp_test_vit",
                     "--no-pretrained", "--pruning_ratio", 0.4, *arguments)  # fmt: skip
    hidden = [block.mlp.fc1.out_features for block in model.blocks]
    dims = [block.attn.head_dim for block in model.blocks]
    # Channels and head dimensions together, or each kind on its own.
    if isomorphic:
        assert sum(hidden) == 192 - round(0.4 * 192 + 0.5)
        assert sum(dims) == 16 - round(0.4 * 16 + 0.5)
    else:
        assert sum(hidden) + sum(dims) == 208 - round(0.4 * 208 + 0.5)
    assert model.head.out_features == 5
    assert {block.attn.proj.out_features for block in model.blocks} == {24}
    assert model(image()).shape == (2, 5)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_changed_lines_are_few_and_the_rest_is_torch_pruning(path: Path) -> None:
    source = path.read_text()
    theirs = drop_in.original(source)
    assert 2 <= drop_in.changed_lines(source) <= 5
    assert "tp_amp" not in theirs.split('"""')[2]
    compile(theirs, path.name, "exec")
    assert "tp.importance." in theirs
    assert len(source.splitlines()) <= 120


def test_every_example_is_measured() -> None:
    assert {case.script for case in drop_in.CASES} == {path.stem for path in EXAMPLES}
