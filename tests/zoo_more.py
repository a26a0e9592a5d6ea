"""Further model classes that users prune, at random and tiny: detectors, towers, dense prediction.

All are of transformers, which may be missing and is imported when one is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from zoo import image


class Config(NamedTuple):
    """A configuration of transformers, by its name."""

    kind: str
    arguments: dict[str, Any]


class Tiny(NamedTuple):
    """A model.

    Attributes:
        kind: name of its class.
        count: how many MLPs a reader of its source counts.
        arguments: of its configuration, which may hold others.
        inputs: it is called with.
        positive: path of a bias that is made large, where a ReLU ends the model: depth is all zero
            else.
        states: whether it takes `output_hidden_states`.
    """

    kind: str
    count: int
    arguments: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    positive: str = ""
    states: bool = True

    def batch(self, images: int, seed: int) -> dict[str, torch.Tensor]:
        """Other images, and the same texts and masks for each of them."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(images * len(value), *value.shape[1:], generator=generator)
            if value.is_floating_point() and name != "noise"
            else torch.cat([value] * images)
            for name, value in self.inputs.items()
        }

    def make(self) -> nn.Module:
        hf = pytest.importorskip("transformers")
        kind = getattr(hf, self.kind)
        model = kind(kind.config_class(**_made(self.arguments, hf))).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.numel():  # as large as what comes in, at any width
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        if self.positive:
            nn.init.constant_(model.get_parameter(self.positive), 3.0)
        return model


def _made(arguments: dict[str, Any], hf: Any) -> dict[str, Any]:
    return {
        name: getattr(hf, value.kind)(**_made(value.arguments, hf))
        if isinstance(value, Config)
        else value
        for name, value in arguments.items()
    }


def tiny(
    kind: str,
    count: int,
    arguments: Any,
    size: int = 32,
    positive: str = "",
    **further: torch.Tensor,
) -> Tiny:
    return Tiny(kind, count, arguments, {"pixel_values": image(size), **further}, positive)


def without(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != name}


PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN |= {"image_size": 32, "patch_size": 8}
MLP = {**PLAIN, "intermediate_size": 80}
SQUARE = {**MLP, "image_size": [32, 32], "patch_size": [8, 8]}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]}
PYRAMID = {**STAGES, "num_attention_heads": [1, 2, 2, 4]}
WINDOWS = {"image_size": 32, "embed_dim": 16, "depths": [2, 2]}
FRAMES = {"pixel_values": torch.randn(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(3))}
VIDEO = {**MLP, "num_frames": 2}

SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
SWIN |= {"window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
RESNET |= {"out_features": ["stage2"]}
DEEP_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
DEEP_RESNET |= {"layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}

DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
DETR |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
DETR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
RT_DETR = {**DETR, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 16, 16]}
RT_DETR |= {"decoder_in_channels": [32, 32, 32], "num_feature_levels": 3}
RT_DETR |= {"hidden_expansion": 1.0, "num_denoising": 0}
RT_DETR |= {"backbone_config": Config("RTDetrResNetConfig", DEEP_RESNET)}
MASKS = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_queries": 5}
MASKS |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4}
MASKS |= {"encoder_feedforward_dim": 48, "dim_feedforward": 48}
MAE = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
MAE |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 40}
LEVIT = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [2, 2, 2]}
FOCAL = {"hidden_sizes": [16, 32], "focal_levels": [1, 1], "focal_windows": [3, 3]}
SAM = {"output_channels": 8, "window_size": 2, "mlp_dim": 64, "global_attn_indexes": [1]}
HIERA = {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
PREDICTOR = {"pred_hidden_size": 32, "pred_num_attention_heads": 4, "pred_num_hidden_layers": 1}
VJEPA = {"crop_size": 32, "frames_per_clip": 2, "tubelet_size": 2, **PREDICTOR}

MODELS = {
    "hf_blip": tiny("BlipVisionModel", 2, MLP),
    "hf_internvl": tiny("InternVLVisionModel", 2, SQUARE),
    "hf_internvl_norm": tiny("InternVLVisionModel", 2, {**SQUARE, "use_qk_norm": True}),
    "hf_detr": tiny(
        "DetrForObjectDetection",
        4,
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone_config": Config("ResNetConfig", RESNET),
            **DETR,
        },
        size=64,
    ),
    "hf_mask2former": tiny(
        "Mask2FormerForUniversalSegmentation",
        8,
        {"backbone_config": Config("SwinConfig", SWIN), **MASKS},
        size=64,
    ),
    "hf_yolos": tiny(
        "YolosForObjectDetection", 6, {**MLP, "image_size": [32, 32], "num_detection_tokens": 5}
    ),
    "hf_vit_mae": tiny(
        "ViTMAEForPreTraining", 3, {**MLP, **MAE}, noise=torch.linspace(0, 1, 16)[None]
    ),
    "hf_dinov2_registers": tiny("Dinov2WithRegistersModel", 2, PLAIN),
    "hf_ijepa": tiny("IJepaModel", 2, MLP),
    "hf_deit_teacher": tiny("DeiTForImageClassificationWithTeacher", 2, MLP),
    "hf_vit_msn": tiny("ViTMSNModel", 2, MLP),
    "hf_videomae": tiny("VideoMAEModel", 2, {**VIDEO, "tubelet_size": 2}, **FRAMES),
    "hf_timesformer": tiny("TimesformerModel", 4, VIDEO, **FRAMES),
    "hf_vivit": tiny(
        "VivitModel", 2, {**without(VIDEO, "patch_size"), "tubelet_size": [2, 8, 8]}, **FRAMES
    ),
    "hf_pvt": tiny("PvtModel", 4, {**PYRAMID, "image_size": 64}, size=64),
    "hf_glpn": tiny("GLPNForDepthEstimation", 4, {**PYRAMID, "decoder_hidden_size": 16}, size=64),
    "hf_convnext": tiny("ConvNextModel", 4, STAGES, size=64),
    "hf_swin2sr": tiny(
        "Swin2SRForImageSuperResolution", 4, {**WINDOWS, "num_heads": [2, 2], "window_size": 4}
    ),
    "hf_donut_swin": tiny(
        "DonutSwinModel", 4, {**WINDOWS, "num_heads": [1, 4], "window_size": 4, "patch_size": 2}
    ),
    "hf_focalnet": tiny("FocalNetModel", 4, {**WINDOWS, **FOCAL, "patch_size": 2}),
    "hf_poolformer": tiny("PoolFormerModel", 4, STAGES, size=64),
    "hf_levit": tiny("LevitModel", 8, {**LEVIT, "key_dim": [8, 8, 8]}, size=224),
    "hf_vitdet": tiny("VitDetModel", 2, {**PLAIN, "window_size": 2}),
    "hf_sam_vision": tiny("SamVisionModel", 2, {**PLAIN, **SAM}),
    "hf_owlvit_vision": tiny("OwlViTVisionModel", 2, MLP),
    "hf_owlv2_vision": tiny("Owlv2VisionModel", 2, MLP),
    "hf_chinese_clip_vision": tiny("ChineseCLIPVisionModel", 2, MLP),
    "hf_altclip_vision": tiny("AltCLIPVisionModel", 2, MLP),
    "hf_clipseg_vision": tiny("CLIPSegVisionModel", 2, MLP),
    "hf_git_vision": tiny("GitVisionModel", 2, MLP),
    "hf_instructblip_vision": tiny("InstructBlipVisionModel", 2, MLP),
    "hf_blip2_vision": tiny("Blip2VisionModel", 2, MLP),
    "hf_idefics_vision": tiny("Idefics3VisionTransformer", 2, MLP),
    "hf_aimv2_vision": tiny("Aimv2VisionModel", 2, MLP),
    "hf_siglip_classifier": tiny("SiglipForImageClassification", 2, {"vision_config": MLP}),
    "hf_clip_classifier": tiny("CLIPForImageClassification", 2, {"vision_config": MLP}),
    "hf_data2vec": tiny("Data2VecVisionModel", 2, MLP),
    "hf_beit_masked": tiny("BeitForMaskedImageModeling", 2, MLP),
    "hf_flava_image": tiny("FlavaImageModel", 2, MLP),
    "hf_hiera": tiny("HieraModel", 4, HIERA, size=64),
    "hf_dinov3_convnext": tiny("DINOv3ConvNextModel", 4, STAGES, size=64),
    "hf_pixtral": tiny("PixtralVisionModel", 2, MLP),
    "hf_mlcd": tiny("MLCDVisionModel", 2, MLP),
    "hf_vjepa2": Tiny(
        "VJEPA2Model",
        3,
        {**without(PLAIN, "image_size"), **VJEPA},
        {"pixel_values_videos": FRAMES["pixel_values"]},
    ),
    "hf_upernet": tiny(
        "UperNetForSemanticSegmentation",
        4,
        {"backbone_config": Config("SwinConfig", SWIN), "hidden_size": 16, "pool_scales": [1]},
        size=64,
    ),
    "hf_rt_detr": tiny("RTDetrForObjectDetection", 6, RT_DETR, size=64),
}
