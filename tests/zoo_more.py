"""Further model classes that users prune, at random and tiny: detectors, towers, dense prediction.

Entries are as in `zoo`. They are named without importing transformers, which may be missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from zoo import Entry, image

PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN |= {"image_size": 32, "patch_size": 8}
MLP = {**PLAIN, "intermediate_size": 80}


NAMES = [
    "hf_blip",
    "hf_internvl",
    "hf_internvl_norm",
    "hf_detr",
    "hf_mask2former",
    "hf_yolos",
    "hf_vit_mae",
    "hf_dinov2_registers",
    "hf_ijepa",
    "hf_deit_teacher",
    "hf_vit_msn",
    "hf_videomae",
    "hf_timesformer",
    "hf_vivit",
    "hf_pvt",
    "hf_glpn",
    "hf_convnext",
    "hf_swin2sr",
    "hf_donut_swin",
    "hf_focalnet",
    "hf_poolformer",
    "hf_levit",
    "hf_vitdet",
    "hf_sam_vision",
    "hf_owlvit_vision",
    "hf_owlv2_vision",
    "hf_chinese_clip_vision",
    "hf_altclip_vision",
    "hf_clipseg_vision",
    "hf_git_vision",
    "hf_instructblip_vision",
    "hf_blip2_vision",
    "hf_idefics_vision",
    "hf_aimv2_vision",
    "hf_siglip_classifier",
    "hf_clip_classifier",
    "hf_data2vec",
    "hf_beit_masked",
    "hf_flava_image",
    "hf_hiera",
    "hf_dinov3_convnext",
    "hf_pixtral",
    "hf_mlcd",
    "hf_vjepa2",
    "hf_upernet",
    "hf_rt_detr",
]


def more_models() -> dict[str, Entry]:
    """Model classes of transformers; at random."""
    hf = pytest.importorskip("transformers")
    pixels = {"pixel_values": image(32)}

    def entry(
        model: str, config: str, count: int, inputs: Any = pixels, **arguments: Any
    ) -> tuple[Callable[[], nn.Module], Any, int]:
        return lambda: getattr(hf, model)(getattr(hf, config)(**arguments)).eval(), inputs, count

    def resnet() -> Any:
        return hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
        )

    def swin() -> Any:
        return hf.SwinConfig(
            image_size=64,
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 2, 4],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )

    wide = {"pixel_values": image(64)}
    detr = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
    detr |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    detr |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    square = {**MLP, "image_size": [32, 32], "patch_size": [8, 8]}
    video = torch.randn(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return {
        "hf_blip": entry("BlipVisionModel", "BlipVisionConfig", 2, **MLP),
        "hf_internvl": entry("InternVLVisionModel", "InternVLVisionConfig", 2, **square),
        "hf_internvl_norm": entry(
            "InternVLVisionModel", "InternVLVisionConfig", 2, use_qk_norm=True, **square
        ),
        "hf_detr": (
            lambda: hf.DetrForObjectDetection(
                hf.DetrConfig(
                    use_timm_backbone=False,
                    use_pretrained_backbone=False,
                    backbone_config=resnet(),
                    **detr,
                )
            ).eval(),
            wide,
            4,
        ),
        "hf_mask2former": (
            lambda: hf.Mask2FormerForUniversalSegmentation(
                hf.Mask2FormerConfig(
                    backbone_config=swin(),
                    feature_size=32,
                    mask_feature_size=32,
                    hidden_dim=32,
                    encoder_feedforward_dim=48,
                    encoder_layers=1,
                    decoder_layers=2,
                    num_attention_heads=4,
                    dim_feedforward=48,
                    num_queries=5,
                )
            ).eval(),
            wide,
            8,
        ),
        "hf_yolos": entry(
            "YolosForObjectDetection",
            "YolosConfig",
            6,
            num_detection_tokens=5,
            **{**MLP, "image_size": [32, 32]},
        ),
        "hf_vit_mae": entry(
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            3,
            {**pixels, "noise": torch.linspace(0, 1, 16)[None]},
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=40,
            **MLP,
        ),
        "hf_dinov2_registers": entry(
            "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", 2, **PLAIN
        ),
        "hf_ijepa": entry("IJepaModel", "IJepaConfig", 2, **MLP),
        "hf_deit_teacher": entry("DeiTForImageClassificationWithTeacher", "DeiTConfig", 2, **MLP),
        "hf_vit_msn": entry("ViTMSNModel", "ViTMSNConfig", 2, **MLP),
        "hf_videomae": entry(
            "VideoMAEModel",
            "VideoMAEConfig",
            2,
            {"pixel_values": video},
            num_frames=2,
            tubelet_size=2,
            **MLP,
        ),
        "hf_timesformer": entry(
            "TimesformerModel",
            "TimesformerConfig",
            4,
            {"pixel_values": video},
            num_frames=2,
            **MLP,
        ),
        "hf_vivit": entry(
            "VivitModel",
            "VivitConfig",
            2,
            {"pixel_values": video},
            num_frames=2,
            tubelet_size=[2, 8, 8],
            **{k: v for k, v in MLP.items() if k != "patch_size"},
        ),
        "hf_pvt": entry(
            "PvtModel",
            "PvtConfig",
            4,
            wide,
            image_size=64,
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 16, 32],
            num_attention_heads=[1, 2, 2, 4],
        ),
        "hf_glpn": entry(
            "GLPNForDepthEstimation",
            "GLPNConfig",
            4,
            wide,
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 16, 32],
            num_attention_heads=[1, 2, 2, 4],
            decoder_hidden_size=16,
        ),
        "hf_convnext": entry(
            "ConvNextModel",
            "ConvNextConfig",
            4,
            wide,
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 16, 32],
        ),
        "hf_swin2sr": entry(
            "Swin2SRForImageSuperResolution",
            "Swin2SRConfig",
            4,
            image_size=32,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=4,
        ),
        "hf_donut_swin": entry(
            "DonutSwinModel",
            "DonutSwinConfig",
            4,
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[1, 4],
            window_size=4,
        ),
        "hf_focalnet": entry(
            "FocalNetModel",
            "FocalNetConfig",
            4,
            image_size=32,
            patch_size=2,
            embed_dim=16,
            hidden_sizes=[16, 32],
            depths=[2, 2],
            focal_levels=[1, 1],
            focal_windows=[3, 3],
        ),
        "hf_poolformer": entry(
            "PoolFormerModel",
            "PoolFormerConfig",
            4,
            wide,
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 16, 32],
        ),
        "hf_levit": entry(
            "LevitModel",
            "LevitConfig",
            8,
            {"pixel_values": image(224)},
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[2, 2, 2],
            key_dim=[8, 8, 8],
        ),
        "hf_vitdet": entry("VitDetModel", "VitDetConfig", 2, window_size=2, **PLAIN),
        "hf_sam_vision": entry(
            "SamVisionModel",
            "SamVisionConfig",
            2,
            output_channels=8,
            window_size=2,
            mlp_dim=64,
            global_attn_indexes=[1],
            **PLAIN,
        ),
        "hf_owlvit_vision": entry("OwlViTVisionModel", "OwlViTVisionConfig", 2, **MLP),
        "hf_owlv2_vision": entry("Owlv2VisionModel", "Owlv2VisionConfig", 2, **MLP),
        "hf_chinese_clip_vision": entry(
            "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", 2, **MLP
        ),
        "hf_altclip_vision": entry("AltCLIPVisionModel", "AltCLIPVisionConfig", 2, **MLP),
        "hf_clipseg_vision": entry("CLIPSegVisionModel", "CLIPSegVisionConfig", 2, **MLP),
        "hf_git_vision": entry("GitVisionModel", "GitVisionConfig", 2, **MLP),
        "hf_instructblip_vision": entry(
            "InstructBlipVisionModel", "InstructBlipVisionConfig", 2, **MLP
        ),
        "hf_blip2_vision": entry("Blip2VisionModel", "Blip2VisionConfig", 2, **MLP),
        "hf_idefics_vision": entry("Idefics3VisionTransformer", "Idefics3VisionConfig", 2, **MLP),
        "hf_aimv2_vision": entry("Aimv2VisionModel", "Aimv2VisionConfig", 2, **MLP),
        "hf_siglip_classifier": entry(
            "SiglipForImageClassification", "SiglipConfig", 2, vision_config=MLP
        ),
        "hf_clip_classifier": entry(
            "CLIPForImageClassification", "CLIPConfig", 2, vision_config=MLP
        ),
        "hf_data2vec": entry("Data2VecVisionModel", "Data2VecVisionConfig", 2, **MLP),
        "hf_beit_masked": entry("BeitForMaskedImageModeling", "BeitConfig", 2, **MLP),
        "hf_flava_image": entry("FlavaImageModel", "FlavaImageConfig", 2, **MLP),
        "hf_hiera": entry(
            "HieraModel",
            "HieraConfig",
            4,
            {"pixel_values": image(64)},
            image_size=[64, 64],
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 8],
        ),
        "hf_dinov3_convnext": entry(
            "DINOv3ConvNextModel",
            "DINOv3ConvNextConfig",
            4,
            wide,
            hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1],
        ),
        "hf_pixtral": entry("PixtralVisionModel", "PixtralVisionConfig", 2, **MLP),
        "hf_mlcd": entry("MLCDVisionModel", "MLCDVisionConfig", 2, **MLP),
        "hf_vjepa2": entry(
            "VJEPA2Model",
            "VJEPA2Config",
            3,
            {"pixel_values_videos": video},
            crop_size=32,
            frames_per_clip=2,
            tubelet_size=2,
            pred_hidden_size=32,
            pred_num_attention_heads=4,
            pred_num_hidden_layers=1,
            **{k: v for k, v in PLAIN.items() if k != "image_size"},
        ),
        "hf_upernet": (
            lambda: hf.UperNetForSemanticSegmentation(
                hf.UperNetConfig(backbone_config=swin(), hidden_size=16, pool_scales=[1])
            ).eval(),
            wide,
            4,
        ),
        "hf_rt_detr": (
            lambda: hf.RTDetrForObjectDetection(
                hf.RTDetrConfig(
                    backbone_config=hf.RTDetrResNetConfig(
                        embedding_size=8,
                        hidden_sizes=[8, 16, 16, 16],
                        depths=[1, 1, 1, 1],
                        layer_type="basic",
                        out_features=["stage2", "stage3", "stage4"],
                    ),
                    d_model=32,
                    encoder_hidden_dim=32,
                    encoder_ffn_dim=48,
                    encoder_attention_heads=4,
                    encoder_in_channels=[16, 16, 16],
                    decoder_in_channels=[32, 32, 32],
                    num_queries=5,
                    decoder_layers=1,
                    decoder_ffn_dim=48,
                    decoder_attention_heads=4,
                    num_feature_levels=3,
                    hidden_expansion=1.0,
                    num_denoising=0,
                )
            ).eval(),
            wide,
            6,
        ),
    }
