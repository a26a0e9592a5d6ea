"""The reference models as Hugging Face models, with the same weights and the same outputs."""

from __future__ import annotations

import re

from reference import load_reference
from torch import Tensor, nn
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

# timm's names -> those of transformers 5
_NAMES = {
    "vit": {
        r"^cls_token": "vit.embeddings.cls_token",
        r"^pos_embed": "vit.embeddings.position_embeddings",
        r"^patch_embed\.proj": "vit.embeddings.patch_embeddings.projection",
        r"^blocks": "vit.layers",
        r"^norm": "vit.layernorm",
        r"^head": "classifier",
    },
    "swin": {
        r"^patch_embed\.proj": "swin.embeddings.patch_embeddings.projection",
        r"^patch_embed\.norm": "swin.embeddings.norm",
        r"^layers": "swin.encoder.layers",
        r"^norm": "swin.layernorm",
        r"^head\.fc": "classifier",
        r"relative_position": "relative_position_bias.relative_position",
    },
}
_BLOCK = {
    r"attn\.proj": "attention.o_proj",
    r"attn\.": "attention.",
    r"\.norm1": ".layernorm_before",
    r"\.norm2": ".layernorm_after",
}


def load_hugging_face(model: str) -> nn.Module:
    """Build `"vit"` or `"swin"` of the reference models in transformers, in eval mode."""
    if model == "vit":
        config = ViTConfig(
            image_size=32,
            patch_size=4,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            layer_norm_eps=1e-6,
            num_labels=10,
        )
        module = ViTForImageClassification(config)
    else:
        config = SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=48,
            depths=[2, 4, 2],
            num_heads=[2, 4, 8],
            window_size=4,
            drop_path_rate=0.0,
            num_labels=10,
        )
        module = SwinForImageClassification(config)
    weights: dict[str, Tensor] = {}
    for name, value in load_reference(model).state_dict().items():
        weights |= _renamed(name, value, model)
    module.load_state_dict(weights)
    return module.eval()


def _renamed(name: str, value: Tensor, model: str) -> dict[str, Tensor]:
    # timm merges patches before a stage, transformers after the one before.
    name = re.sub(
        r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
    )
    for pattern, new in (_NAMES[model] | _BLOCK).items():
        name = re.sub(pattern, new, name)
    if "qkv" not in name:
        return {name: value}
    parts = zip("qkv", value.chunk(3), strict=True)
    return {name.replace("qkv", f"{part}_proj"): chunk for part, chunk in parts}
