"""Vision models of every family, real classes at reduced depth, width and resolution.

Each entry gives the model, its example inputs, and how many MLPs a reader of its source counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models import vision_transformer
from torch import nn

Entry = tuple[Callable[[], nn.Module], Any, int]


def image(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))


def timm_model(name: str, size: int, count: int, **arguments: Any) -> Entry:
    return lambda: timm.create_model(name, pretrained=False, **arguments), image(size), count


fused_out = partial(vision_transformer.ParallelScalingBlock, fuse_out_proj=True)
TINY = {"embed_dim": 64, "num_heads": 4, "depth": 2}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (2, 2, 2, 2)}
SWIN_HEADS = {**SWIN, "num_heads": (1, 2, 4, 8)}
# Windows are shifted and patches merged in three blocks; and one block for each stage.
SHORT_SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 32}
SHORT_SWIN |= {"depths": (2, 1), "num_heads": (2, 4), "num_classes": 5}
SHORT_PVT = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}
TIMM: dict[str, Entry] = {
    "vit": timm_model("vit_tiny_patch16_224", 32, 2, img_size=32, **TINY),
    "vit_qk_norm": timm_model("vit_tiny_patch16_224", 32, 2, img_size=32, qk_norm=True, **TINY),
    "deit_distilled": timm_model("deit_tiny_distilled_patch16_224", 32, 2, img_size=32, **TINY),
    "deit3": timm_model("deit3_small_patch16_224", 32, 2, img_size=32, **TINY),
    "beit": timm_model("beit_base_patch16_224", 32, 2, img_size=32, **TINY),
    "beitv2": timm_model("beitv2_base_patch16_224", 32, 2, img_size=32, **TINY),
    "beit3": timm_model("beit3_base_patch16_224", 32, 2, img_size=32, **TINY),
    "dinov2": timm_model("vit_small_patch14_dinov2", 28, 2, img_size=28, **TINY),
    "dinov2_reg4": timm_model("vit_small_patch14_reg4_dinov2", 28, 2, img_size=28, **TINY),
    "dinov2_giant": timm_model(
        "vit_giant_patch14_dinov2", 28, 2, img_size=28, embed_dim=96, num_heads=3, depth=2
    ),
    "dinov3": timm_model("vit_small_patch16_dinov3", 32, 2, img_size=32, depth=2),
    "dinov3_plus": timm_model("vit_small_plus_patch16_dinov3", 32, 2, img_size=32, depth=2),
    "dinov3_qkvb": timm_model("vit_small_patch16_dinov3_qkvb", 32, 2, img_size=32, depth=2),
    "eva02": timm_model("eva02_tiny_patch14_224", 28, 2, img_size=28, depth=2),
    "eva02_clip": timm_model("eva02_base_patch16_clip_224", 32, 2, img_size=32, **TINY),
    "eva_giant": timm_model("eva_giant_patch14_224", 28, 2, img_size=28, **TINY),
    "vit_rope_mixed": timm_model("vit_small_patch16_rope_mixed_224", 32, 2, img_size=32, depth=2),
    "pe_core": timm_model("vit_pe_core_tiny_patch16_384", 32, 3, img_size=32, depth=2),
    "swin": timm_model("swin_tiny_patch4_window7_224", 64, 8, **SWIN_HEADS),
    "swinv2": timm_model("swinv2_tiny_window8_256", 64, 8, **SWIN_HEADS),
    "swinv2_cr": timm_model(
        "swinv2_cr_tiny_224", 224, 4, depths=(1, 1, 1, 1), embed_dim=32, num_heads=(1, 2, 4, 8)
    ),
    "swin_s3": timm_model(
        "swin_s3_tiny_224", 224, 4, depths=(1, 1, 1, 1), embed_dim=32, num_heads=(1, 2, 4, 8)
    ),
    "cait": timm_model("cait_xxs24_224", 32, 4, img_size=32, depth=2),
    "pvt_v2": timm_model("pvt_v2_b0", 64, 8),
    "maxvit": timm_model(
        "maxvit_tiny_tf_224", 224, 13, depths=(1, 1, 1, 1), embed_dim=(32, 32, 64, 64)
    ),
    "maxvit_rmlp": timm_model("maxvit_rmlp_pico_rw_256", 256, 12, depths=(1, 1, 1, 1)),
    "hiera": timm_model("hiera_tiny_224", 224, 12, embed_dim=24, num_heads=1),
    "sam2_hiera": timm_model("sam2_hiera_tiny", 128, 12),
    "mvitv2": timm_model("mvitv2_tiny", 224, 10),
    "xcit": timm_model("xcit_nano_12_p16_224", 32, 4, img_size=32, depth=2),
    "convnext": timm_model("convnext_tiny", 64, 5, **CONVNEXT),
    "convnext_conv_mlp": timm_model("convnext_tiny", 64, 5, conv_mlp=True, **CONVNEXT),
    "convnextv2": timm_model("convnextv2_atto", 64, 5, depths=(1, 1, 2, 1)),
    "siglip": timm_model("vit_base_patch16_siglip_224", 32, 3, img_size=32, **TINY),
    "so150m_map": timm_model("vit_so150m_patch16_reg4_map_256", 32, 3, img_size=32, depth=2),
    "so150m2": timm_model("vit_so150m2_patch16_reg1_gap_256", 32, 2, img_size=32, depth=2),
    "dwee": timm_model("vit_dwee_patch16_reg1_gap_256", 32, 2, img_size=32, depth=2),
    "pwee": timm_model("vit_pwee_patch16_reg1_gap_256", 32, 2, img_size=32, depth=2),
    "pwee_fused_out": timm_model(
        "vit_pwee_patch16_reg1_gap_256", 32, 2, img_size=32, depth=2, block_fn=fused_out
    ),
    "dpwee": timm_model("vit_dpwee_patch16_reg1_gap_256", 32, 2, img_size=32, depth=2),
    "naflex_parallel": timm_model("naflexvit_base_patch16_parfac_gap", 384, 1, depth=1),
    "naflex": timm_model("naflexvit_base_patch16_gap", 384, 1, depth=1),
    "davit": timm_model("davit_tiny", 64, 8, depths=(1, 1, 1, 1)),
    "tiny_vit": timm_model("tiny_vit_5m_224", 224, 11, depths=(2, 2, 2, 2)),
    "levit": timm_model("levit_128s", 224, 11),
    "mobilevit": timm_model("mobilevit_xxs", 64, 16),
    "mobilevitv2": timm_model("mobilevitv2_050", 64, 21),
    "efficientformer": timm_model("efficientformer_l1", 224, 15),
    "efficientformerv2": timm_model("efficientformerv2_s0", 224, 14),
    "samvit": timm_model("samvit_base_patch16", 64, 2, img_size=64, **TINY),
    "aimv2": timm_model("aimv2_large_patch14_224", 28, 2, img_size=28, depth=2),
    "twins": timm_model("twins_svt_small", 224, 4, depths=(1, 1, 1, 1)),
    "coat_lite": timm_model("coat_lite_tiny", 224, 8),
    "crossvit": timm_model("crossvit_tiny_240", 240, 15),
    "volo": timm_model("volo_d1_224", 224, 20),
    "nest": timm_model("nest_tiny", 224, 12),
    "pit": timm_model("pit_ti_224", 224, 12),
    "convit": timm_model("convit_tiny", 224, 2, depth=2),
    "gcvit": timm_model("gcvit_xxtiny", 224, 23),
}

# Of the same structure as those above, for what takes long on them.
SHORT = {
    "pvt_v2": timm_model("pvt_v2_b0", 64, 4, **SHORT_PVT),
    "swin": timm_model("swin_tiny_patch4_window7_224", 32, 3, **SHORT_SWIN),
    "swinv2": timm_model("swinv2_tiny_window8_256", 32, 3, **SHORT_SWIN),
}


def initialised(model: nn.Module) -> nn.Module:
    """CoCa leaves its text projection as the memory was."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def open_clip_models() -> dict[str, Entry]:
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    tower = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 16, "image_size": 32}
    text = {"layers": 1, "width": 32, "heads": 2, "vocab_size": 50, "context_length": 8}
    wrapped = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map"}
    wrapped |= {"timm_proj": "none", "image_size": 224}
    tokens = torch.randint(1, 50, (1, 8), generator=torch.Generator().manual_seed(4))
    pooled = {**tower, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    captions = {**text, "embed_cls": True, "output_tokens": True, "context_length": 7}
    decoder = {**text, "attn_pooler_heads": 2, "context_length": 7}

    def timm_tower(name: str, pool: str, projection: str | None, size: int) -> nn.Module:
        vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": projection}
        return CustomTextCLIP(64, {**vision, "image_size": size}, text).visual

    def shallow(visual: Any) -> nn.Module:
        """A tower as wide as the real one, of one block."""
        visual.trunk.blocks = visual.trunk.blocks[:1]
        return visual

    return {
        "open_clip": (lambda: CLIP(32, tower, text).visual, image(32), 2),
        "open_clip_quick_gelu": (
            lambda: CLIP(32, tower, text, quick_gelu=True).visual,
            image(32),
            2,
        ),
        "open_clip_full": (lambda: CLIP(32, tower, text), (image(32), tokens), 3),
        "open_clip_siglip": (lambda: shallow(CLIP(768, wrapped, text).visual), image(224), 2),
        "open_clip_siglip_full": (
            lambda: CustomTextCLIP(768, wrapped, {**text, "no_causal_mask": True}),
            (image(224), tokens),
            14,
        ),
        "open_clip_coca": (lambda: CoCa(32, decoder, captions, pooled).visual, image(32), 2),
        "open_clip_coca_full": (
            lambda: initialised(CoCa(32, decoder, captions, pooled)),
            (image(32), tokens[:, :7]),
            5,
        ),
        "open_clip_eva02": (
            lambda: shallow(timm_tower("eva02_base_patch16_clip_224", "token", None, 224)),
            image(224),
            1,
        ),
        "open_clip_mobileclip": (
            lambda: timm_tower("fastvit_mci1", "avg", None, 64),
            image(64),
            43,
        ),
        "open_clip_vitamin": (
            lambda: timm_tower("vitamin_small_224", "", "linear", 224),
            image(224),
            20,
        ),
    }


def torchvision_models() -> dict[str, Entry]:
    import torchvision.models as models
    from torchvision.models import swin_transformer as swin

    v2 = {
        "block": swin.SwinTransformerBlockV2,
        "downsample_layer": swin.PatchMergingV2,
    }
    sizes = ([4, 4], 16, [2, 2], [1, 4], [4, 4])
    return {
        "torchvision_vit": (lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64), image(32), 2),
        "torchvision_swin": (lambda: models.SwinTransformer(*sizes), image(32), 4),
        "torchvision_swinv2": (lambda: models.SwinTransformer(*sizes, **v2), image(32), 4),
    }


def hugging_face_models() -> dict[str, Entry]:
    transformers = pytest.importorskip("transformers")
    plain = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain |= {"image_size": 32, "patch_size": 8}
    mlp = {**plain, "intermediate_size": 80}
    stages = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    stages |= {"depths": [2, 2], "num_heads": [1, 4]}

    def entry(family: str, kind: str, count: int, **arguments: Any) -> Entry:
        config = getattr(transformers, f"{family}Config")
        model = getattr(transformers, f"{family}{kind}")
        return lambda: model(config(**arguments)), {"pixel_values": image(32)}, count

    return {
        "hf_vit": entry("ViT", "ForImageClassification", 2, **mlp),
        "hf_deit": entry("DeiT", "Model", 2, **mlp),
        "hf_dinov2": entry("Dinov2", "Model", 2, **plain),
        "hf_dinov2_swiglu": entry("Dinov2", "Model", 2, use_swiglu_ffn=True, **plain),
        "hf_dinov3": entry("DINOv3ViT", "Model", 2, **mlp),
        "hf_dinov3_gated": entry("DINOv3ViT", "Model", 2, use_gated_mlp=True, **mlp),
        "hf_swin": entry("Swin", "Model", 4, **stages),
        "hf_swinv2": entry("Swinv2", "Model", 4, **stages),
        "hf_beit": entry("Beit", "Model", 2, **mlp),
        "hf_clip": entry("CLIPVision", "Model", 2, **mlp),
        "hf_siglip": entry("SiglipVision", "Model", 3, **mlp),
    }


def by_name(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model of the zoo, the short one where there is one, and inputs for it."""
    others = {} if name in TIMM else {**open_clip_models(), **hugging_face_models()}
    make, inputs, _ = {**TIMM, **SHORT, **others}[name]
    return make(), inputs
