"""Models whose residual streams can be rotated, and what cutting one must give."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from toys import perturbed
from zoo import TINY, by_name, image, torchvision_models

import tp_amp

SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 2, 1)}
SWIN |= {"num_heads": (1, 2, 4)}


class Pooled(nn.Module):
    """Of a model's outputs, the one that a Linear has made."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.pick = model, pick

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.pick(self.model(pixel_values))


def classifying(name: str, size: int, **arguments: Any) -> Callable[[], tuple[nn.Module, Any]]:
    """A timm model with a classifier."""
    return lambda: (timm.create_model(name, num_classes=5, **arguments), image(size))


def hugging_face(kind: str, **arguments: Any) -> Callable[[], tuple[nn.Module, Any]]:
    """A model of transformers with a classifier."""

    def make() -> tuple[nn.Module, Any]:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"image_size": 32, "patch_size": 8}
        if kind == "Swin":
            sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}
            sizes |= {"depths": [2, 2], "num_heads": [1, 4]}
        config = getattr(transformers, f"{kind}Config")(**sizes, **arguments, num_labels=5)
        if kind == "Siglip":
            config = transformers.SiglipConfig(
                vision_config={**sizes, **arguments}, text_config={}, num_labels=5
            )
        model = getattr(transformers, f"{kind}ForImageClassification")(config)
        return Pooled(model, lambda output: output.logits), image(32)

    return make


def of_zoo(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    """A model of the zoo that ends in a Linear."""
    return lambda: by_name(name)


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "vit": of_zoo("vit"),
    "deit": of_zoo("deit_distilled"),
    "deit3": of_zoo("deit3"),
    "dinov2": classifying("vit_small_patch14_reg4_dinov2", 28, img_size=28, **TINY),
    "dinov2_giant": classifying(
        "vit_giant_patch14_dinov2", 28, img_size=28, embed_dim=96, num_heads=3, depth=2
    ),
    "dinov3": classifying("vit_small_patch16_dinov3", 32, img_size=32, **TINY),
    "dinov3_qkvb": classifying("vit_small_patch16_dinov3_qkvb", 32, img_size=32, **TINY),
    "eva02": classifying("eva02_tiny_patch14_224", 28, img_size=28, **TINY),
    "beit3": of_zoo("beit3"),
    "siglip": classifying("vit_base_patch16_siglip_224", 32, img_size=32, **TINY),
    "swin": classifying("swin_tiny_patch4_window7_224", 64, **SWIN),
    "hf_vit": hugging_face("ViT", intermediate_size=80),
    "hf_dinov2": hugging_face("Dinov2"),
    "hf_siglip": hugging_face("Siglip", intermediate_size=80),
    "hf_swin": hugging_face("Swin"),
    "open_clip_siglip": of_zoo("open_clip_siglip"),
}
FAMILIES["torchvision_vit"] = lambda: (torchvision_models()["torchvision_vit"][0](), image(32))


def dense_model(name: str) -> tuple[nn.Module, Tensor]:
    """A model in double precision with noise on all parameters, and images for it."""
    warnings.filterwarnings("ignore", category=UserWarning, module="(timm|transformers|open_clip)")
    torch.manual_seed(0)
    model, example = FAMILIES[name]()
    generator = torch.Generator().manual_seed(7)
    return perturbed(model).double().eval(), torch.randn(
        6, *example.shape[1:], generator=generator, dtype=torch.double
    )


def projected(
    model: nn.Module, rotated: list[tp_amp.RotatedStream], kept: dict[str, int]
) -> nn.Module:
    """The rotated model at full width, with all but the leading channels taken from each reader.

    Of what is left the mean is taken out before a LayerNorm, over the channels that are left: over
    all channels it is zero then, so that the norm takes nothing else out. In the other channels a
    norm that kept its bias gives that, which is taken from its readers too.
    """
    model = copy.deepcopy(model)
    for found in rotated:
        stream, width = found.stream, kept[found.stream.name]
        mask = torch.zeros(stream.width, dtype=torch.double)
        mask[:width] = 1

        def project(mask: Tensor, centred: bool) -> Callable[..., Any]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                own = mask.repeat(args[0].shape[-1] // len(mask))
                mean = (args[0] * own).sum(-1, keepdim=True) / own.sum()
                return ((args[0] - centred * mean) * own, *args[1:])

            return hook

        for path in stream.norms:
            norm: Any = model.get_submodule(path)
            norm.eps = norm.eps * width / stream.width
            norm.register_forward_pre_hook(project(mask, isinstance(norm, nn.LayerNorm)))
            own = mask.repeat(norm.weight.numel() // len(mask))
            norm.register_forward_hook(lambda _, args, out, own=own: out * own)
        for reading in stream.readings:
            if reading.norm is None:
                layer = model.get_submodule(reading.weight.rpartition(".")[0])
                layer.register_forward_pre_hook(project(mask, False))
    return model
