from importlib.metadata import version

import open_clip
import pytest
import timm
import torch
import transformers
from packaging.version import Version
from torch import nn
from toys import images, toy

from tp_amp.distillation.features import Features, losses, read_features
from tp_amp.running.inputs import Inputs

SIZE = {"img_size": 32, "num_classes": 3}


def read(model: nn.Module, names: set[str], pictures: torch.Tensor) -> tuple[Features, dict]:
    inputs = Inputs((pictures,))
    features, shapes = read_features(model.eval(), inputs, names)
    with torch.no_grad():
        found = features(pictures)
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    return features, found


TIMM = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}),
    "mean pooled": (
        "vit_tiny_patch16_224",
        {
            "patch_size": 8,
            "depth": 2,
            "embed_dim": 24,
            "num_heads": 2,
            "global_pool": "avg",
            "class_token": False,
        },
    ),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
    ),
    "eva": (
        "eva02_tiny_patch14_224",
        {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)},
    ),
}


@pytest.mark.parametrize("case", TIMM)
def test_timm_models_give_the_tokens_before_their_final_norm(case: str) -> None:
    name, arguments = TIMM[case]
    model = timm.create_model(name, **SIZE, **arguments).eval()
    pictures = images(2, size=32, channels=3)
    features, found = read(model, {"cls", "tokens"}, pictures)
    assert features.place == "the input of norm"
    options = {} if case == "swin" else {"return_prefix_tokens": True}
    with torch.no_grad():
        last = model.forward_intermediates(
            pictures, indices=1, norm=False, intermediates_only=True, **options
        )[-1]
    patches, prefix = last if isinstance(last, tuple) else (last, None)
    patches = patches.flatten(2).transpose(1, 2)
    if prefix is None or prefix.shape[1] == 0:
        expected = {"cls": patches.mean(1), "tokens": patches}
    else:
        others = torch.cat([prefix[:, 1:], patches], 1)
        expected = {"cls": prefix[:, 0], "tokens": others}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def hugging_face(kind: str) -> nn.Module:
    size = {"image_size": 32, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    if kind == "swin":
        config = transformers.SwinConfig(
            image_size=32, embed_dim=12, depths=[1, 1], num_heads=[1, 2], window_size=4
        )
        return transformers.SwinModel(config)
    name = {"vit": "ViT", "dinov2": "Dinov2", "clip": "CLIPVision"}[kind]
    config = getattr(transformers, f"{name}Config")(**size, patch_size=8, num_attention_heads=2)
    return getattr(transformers, f"{name}Model")(config)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "swin"])
def test_hugging_face_models_give_their_last_hidden_state(kind: str) -> None:
    if kind == "vit" and Version(version("transformers")) < Version("5"):
        pytest.skip("transformers 4.57: a ViT's hidden states end before its norm")
    model = hugging_face(kind)
    pictures = images(2, size=32, channels=3)
    features, found = read(model, {"cls", "tokens"}, pictures)
    with torch.no_grad():
        last = model(pictures, output_hidden_states=True).hidden_states[-1]
    # CLIP's norm sees CLS only, so the tokens are read after its last block.
    assert ("layers.1" in features.place) == (kind == "clip")
    if kind == "swin":
        torch.testing.assert_close(found["tokens"], last)
        torch.testing.assert_close(found["cls"], last.mean(1))
    else:
        torch.testing.assert_close(found["cls"], last[:, 0])
        torch.testing.assert_close(found["tokens"], last[:, 1:])


def test_open_clip_gives_the_tokens_before_its_final_norm() -> None:
    torch.manual_seed(0)
    config = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 8, "width": 64, "heads": 2, "layers": 1}
    model = open_clip.CLIP(64, config, text).visual
    pictures = images(2, size=32, channels=3)
    features, found = read(model, {"cls", "tokens"}, pictures)
    assert features.place == "the input of ln_post"
    seen = []
    handle = model.transformer.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        model(pictures)
    handle.remove()
    torch.testing.assert_close(found["cls"], seen[0][:, 0])
    torch.testing.assert_close(found["tokens"], seen[0][:, 1:])


def test_convnext_gives_its_last_maps() -> None:
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 40))
    pictures = images(2, size=64, channels=3)
    _, found = read(model, {"cls", "tokens"}, pictures)
    with torch.no_grad():
        maps = model.forward_features(pictures)
    torch.testing.assert_close(found["cls"], model.head.global_pool(maps).flatten(1))
    assert found["tokens"].shape == (2, 4, 40)


def test_hooks_are_taken_off() -> None:
    model = toy()
    features, _ = read(model, {"tokens"}, images())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in features.modules())


def test_logits_alone_need_no_tokens() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    features, found = read(model, {"logits"}, images())
    assert features.place == "its output"
    torch.testing.assert_close(found["logits"], model(images()))
    with pytest.raises(ValueError, match="does not end in a classifier"):
        read_features(toy(classes=0), Inputs((images(),)), {"logits"})
    with pytest.raises(ValueError, match="no block of Sequential"):
        read_features(model, Inputs((images(),)), {"cls"})


def test_losses_are_those_of_the_formulas() -> None:
    torch.manual_seed(0)
    pair = [
        {"cls": torch.randn(4, 3), "tokens": torch.randn(4, 5, 3), "logits": torch.randn(4, 6)}
        for _ in range(2)
    ]
    names = dict.fromkeys(("cls", "tokens", "logits", "similarity"), 1.0)
    found = losses(*pair, names, temperature=0.5)
    student, teacher = pair
    for name in ("cls", "tokens"):
        squares = (student[name] - teacher[name]) ** 2
        assert float(found[name]) == pytest.approx(float(squares.sum()) / squares.numel())
    probabilities = {
        "logits": [side["logits"].softmax(-1) for side in pair],
        "similarity": [
            (nn.functional.cosine_similarity(f[:, None], f[None], dim=-1) / 0.5).softmax(-1)
            for f in (student["cls"], teacher["cls"])
        ],
    }
    q, p = probabilities["logits"]
    assert float(found["logits"]) == pytest.approx(float((p * (p / q).log()).sum() / 4), rel=1e-5)
    q, p = probabilities["similarity"]
    both = (p * (p / q).log() + q * (q / p).log()).sum() / 4
    assert float(found["similarity"]) == pytest.approx(float(both), rel=1e-5)
