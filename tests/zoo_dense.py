"""Models whose output is not `(images, classes)`: dense maps, boxes, pictures, images and texts.

All are of transformers, at random and tiny, beside those of `zoo_more`.
"""

from __future__ import annotations

import torch
from zoo import Entry
from zoo_more import (
    DETR,
    FRAMES,
    MLP,
    MODELS,
    PLAIN,
    PYRAMID,
    RESNET,
    RT_DETR,
    SAM,
    SWIN,
    WINDOWS,
    Config,
    Tiny,
    tiny,
    without,
)


def words(count: int) -> dict[str, torch.Tensor]:
    """Texts of eight tokens."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 50, (count, 8), generator=generator)
    ids[:, -1] = 49  # the end of a text, which CLIP looks for
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


TEXT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT |= {"intermediate_size": 48, "max_position_embeddings": 8, "bos_token_id": 1}
TEXT |= {"eos_token_id": 49, "pad_token_id": 0}
BOTH = {"text_config": TEXT, "vision_config": MLP}
PROJECTED = {**BOTH, "projection_dim": 16}
OWL = {**BOTH, "projection_dim": 32}
FOUR = {**PLAIN, "num_hidden_layers": 4}
TAPS = {"out_indices": [1, 2, 3, 4]}
NECK = {"neck_hidden_sizes": [4, 8, 8, 8], "fusion_hidden_size": 8}
DPT = {**FOUR, **NECK, "intermediate_size": 64, "backbone_out_indices": [0, 1, 2, 3]}
DPT |= {"is_hybrid": False, "readout_type": "ignore", "reassemble_factors": [4, 2, 1, 0.5]}
DINO_TAPS = Config("Dinov2Config", {**FOUR, **TAPS, "reshape_hidden_states": False})
DEPTH = {"backbone_config": DINO_TAPS, "patch_size": 8, "reassemble_hidden_size": 32, **NECK}
RESNET_BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": False}
RESNET_BACKBONE |= {"backbone_config": Config("ResNetConfig", RESNET)}
DEEP = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
LEVELS = {**RESNET_BACKBONE, "num_feature_levels": 2}
LEVELS |= {
    "backbone_config": Config("ResNetConfig", {**DEEP, "out_features": ["stage3", "stage4"]})
}
TWO = {**DETR, "decoder_layers": 2}
FFN = without(DETR, "num_queries")

DENSE = {
    "hf_dpt": tiny("DPTForDepthEstimation", 4, DPT, positive="head.head.4.bias"),
    "hf_segformer": tiny(
        "SegformerForSemanticSegmentation", 5, {**PYRAMID, "decoder_hidden_size": 16}, size=64
    ),
    "hf_maskformer": tiny(
        "MaskFormerForInstanceSegmentation",
        7,
        {
            "backbone_config": Config("SwinConfig", SWIN),
            "decoder_config": Config("DetrConfig", DETR),
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
        },
        size=64,
    ),
    "hf_oneformer": tiny(
        "OneFormerForUniversalSegmentation",
        11,
        {
            "backbone_config": Config("SwinConfig", SWIN),
            "num_queries": 5,
            "hidden_dim": 32,
            "mask_dim": 32,
            "conv_dim": 32,
            "dim_feedforward": 48,
            "encoder_feedforward_dim": 48,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 4,
            "text_encoder_width": 32,
            "text_encoder_num_layers": 1,
            "text_encoder_vocab_size": 50,
            "text_encoder_context_length": 8,
            "text_encoder_n_ctx": 2,
            "task_seq_len": 8,
            "use_auxiliary_loss": False,
            "is_training": False,
        },
        size=64,
        task_inputs=words(1)["input_ids"],
    ),
    "hf_sam": tiny(
        "SamModel",
        14,
        {
            "vision_config": Config(
                "SamVisionConfig", {**PLAIN, **SAM, "output_channels": 32, "num_pos_feats": 16}
            ),
            "prompt_encoder_config": Config(
                "SamPromptEncoderConfig",
                {"hidden_size": 32, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
            ),
            "mask_decoder_config": Config(
                "SamMaskDecoderConfig",
                {
                    "hidden_size": 32,
                    "mlp_dim": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "iou_head_hidden_dim": 32,
                },
            ),
        },
        input_points=torch.tensor([[[[8.0, 8.0]]]]),
    ),
    "hf_sam2_hiera": tiny(
        "Sam2HieraDetModel",
        5,
        {
            "hidden_size": 16,
            "num_attention_heads": 1,
            "image_size": [256, 256],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [16, 32, 64, 128],
            "num_attention_heads_per_stage": [1, 2, 4, 8],
            "window_size_per_stage": [8, 4, 4, 4],
            "global_attention_blocks": [3],
            "window_positional_embedding_background_size": [7, 7],
        },
        size=256,
    ),
    "hf_clip_both": tiny("CLIPModel", 3, PROJECTED, **words(1)),
    "hf_siglip_both": tiny("SiglipModel", 4, BOTH, **words(1)),
    "hf_siglip2": Tiny(
        "Siglip2VisionModel",
        3,
        {**without(MLP, "image_size"), "num_patches": 16},
        {
            "pixel_values": torch.randn(1, 16, 192, generator=torch.Generator().manual_seed(3)),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]]),
        },
    ),
    "hf_depth_anything": tiny(
        "DepthAnythingForDepthEstimation", 4, DEPTH, positive="head.conv3.bias"
    ),
    "hf_dinov2_taps": tiny("Dinov2Backbone", 4, {**FOUR, **TAPS}),
    "hf_dinov2_registers_taps": tiny("Dinov2WithRegistersBackbone", 4, {**FOUR, **TAPS}),
    "hf_dinov3_taps": tiny(
        "DINOv3ViTBackbone", 4, {**FOUR, **TAPS, "intermediate_size": 48, "num_register_tokens": 1}
    ),
    "hf_conditional_detr": tiny(
        "ConditionalDetrForObjectDetection", 4, {**RESNET_BACKBONE, **DETR}, size=64
    ),
    "hf_deformable_detr": tiny("DeformableDetrForObjectDetection", 3, {**LEVELS, **TWO}, size=64),
    "hf_deformable_detr_refined": tiny(
        "DeformableDetrForObjectDetection",
        3,
        {**LEVELS, **TWO, "with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 5},
        size=64,
    ),
    "hf_dab_detr": tiny(
        "DabDetrForObjectDetection",
        6,
        {
            **without(RESNET_BACKBONE, "use_timm_backbone"),
            **without(TWO, "d_model"),
            "hidden_size": 32,
        },
        size=64,
    ),
    "hf_table_transformer": tiny(
        "TableTransformerForObjectDetection", 4, {**RESNET_BACKBONE, **DETR}, size=64
    ),
    "hf_rt_detr_v2": tiny(
        "RTDetrV2ForObjectDetection",
        5,
        {**RT_DETR, "decoder_layers": 2, "decoder_n_levels": 3},
        size=64,
    ),
    "hf_grounding_dino": tiny(
        "GroundingDinoForObjectDetection",
        12,
        {
            "backbone_config": Config("SwinConfig", {**SWIN, "out_features": ["stage3", "stage4"]}),
            "text_config": Config(
                "BertConfig",
                {
                    **without(without(TEXT, "bos_token_id"), "eos_token_id"),
                    "max_position_embeddings": 32,
                },
            ),
            **TWO,
            "num_feature_levels": 2,
            "max_text_len": 8,
        },
        size=64,
        **words(1),
        token_type_ids=torch.zeros(1, 8, dtype=torch.long),
    ),
    "hf_owlvit": tiny("OwlViTForObjectDetection", 5, OWL, **words(1)),
    "hf_owlv2": tiny("Owlv2ForObjectDetection", 7, OWL, **words(1)),
    "hf_qwen25_vision": Tiny(
        "Qwen2_5_VisionTransformerPretrainedModel",
        3,
        {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 8,
            "window_size": 32,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "temporal_patch_size": 1,
        },
        {
            "hidden_states": torch.randn(16, 192, generator=torch.Generator().manual_seed(3)),
            "grid_thw": torch.tensor([[1, 4, 4]]),
        },
    ),
    "hf_mobilevit": tiny(
        "MobileViTModel",
        16,
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": 4,
            "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32],
        },
        size=64,
    ),
    "hf_pvt_v2": tiny(
        "PvtV2Model", 4, {**PYRAMID, "image_size": 64, "mlp_ratios": [4, 4, 4, 4]}, size=64
    ),
    "hf_cvt": tiny(
        "CvtModel",
        6,
        {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "num_labels": 5},
        size=64,
    ),
    "hf_groupvit": tiny(
        "GroupViTVisionModel",
        10,
        {
            **MLP,
            "num_hidden_layers": 3,
            "depths": [1, 1, 1],
            "num_group_tokens": [4, 2, 0],
            "num_output_groups": [4, 2, 0],
        },
    ),
    "hf_x_clip": Tiny(
        "XCLIPModel",
        5,
        {
            "text_config": TEXT,
            "vision_config": {
                **MLP,
                "num_frames": 2,
                "mit_hidden_size": 16,
                "mit_intermediate_size": 48,
                "mit_num_attention_heads": 4,
                "mit_num_hidden_layers": 1,
            },
            "projection_dim": 16,
            "prompt_layers": 1,
            "prompt_num_attention_heads": 4,
        },
        {**words(1), **FRAMES},
    ),
    "hf_zoedepth": tiny(
        "ZoeDepthForDepthEstimation",
        19,
        {
            "backbone_config": Config(
                "Dinov2Config", {**FOUR, **TAPS, "reshape_hidden_states": False}
            ),
            **NECK,
            "bottleneck_features": 8,
            "num_relative_features": 8,
            "bin_embedding_dim": 8,
            "num_attractors": [4, 2, 2, 1],
            "patch_transformer_hidden_size": 8,
            "patch_transformer_intermediate_size": 16,
            "patch_transformer_num_attention_heads": 4,
            "bin_configurations": [
                {"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}
            ],
        },
        size=64,
    ),
    "hf_segmentation_beit": tiny(
        "BeitForSemanticSegmentation",
        3,
        {**FOUR, "intermediate_size": 48, "out_indices": [1, 2, 3, 4], "use_auxiliary_head": False},
    ),
    "hf_videomae_pretraining": Tiny(
        "VideoMAEForPreTraining",
        3,
        {
            **MLP,
            "num_frames": 2,
            "tubelet_size": 2,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 48,
        },
        {
            "pixel_values": FRAMES["pixel_values"],
            "bool_masked_pos": torch.arange(16)[None] % 2 == 0,
        },
    ),
    "hf_simmim": tiny(
        "SwinForMaskedImageModeling",
        4,
        {**WINDOWS, "num_heads": [2, 2], "window_size": 4, "encoder_stride": 8},
    ),
    "hf_eomt": tiny(
        "EomtForUniversalSegmentation",
        4,
        {**PLAIN, "num_blocks": 1, "num_queries": 5, "intermediate_size": 64},
    ),
    "hf_vitpose": tiny(
        "VitPoseForPoseEstimation",
        2,
        {
            "backbone_config": Config(
                "VitPoseBackboneConfig",
                {**PLAIN, "image_size": [32, 32], "patch_size": [8, 8], "out_indices": [2]},
            ),
        },
    ),
    "hf_blip_both": tiny("BlipModel", 3, PROJECTED, **words(1)),
    "hf_altclip": tiny(
        "AltCLIPModel",
        3,
        {**PROJECTED, "text_config": {**TEXT, "max_position_embeddings": 16}},
        **words(1),
    ),
    "hf_chinese_clip": tiny("ChineseCLIPModel", 3, PROJECTED, **words(1)),
    "hf_clipseg": tiny(
        "CLIPSegForImageSegmentation",
        2,
        {
            **PROJECTED,
            "extract_layers": [0, 1],
            "reduce_dim": 16,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 40,
        },
        **words(1),
    ),
    "hf_aimv2_both": tiny("Aimv2Model", 3, PROJECTED, **words(1)),
    "hf_seggpt": Tiny(
        "SegGptForImageSegmentation",
        2,
        {
            **MLP,
            "image_size": [64, 32],
            "patch_size": 8,
            "merge_index": 0,
            "intermediate_hidden_state_indices": [0, 1],
            "decoder_hidden_size": 8,
            "pretrain_image_size": 32,
            "mlp_dim": 48,
        },
        {
            "pixel_values": FRAMES["pixel_values"][:, 0],
            "prompt_pixel_values": FRAMES["pixel_values"][:, 1],
            "prompt_masks": FRAMES["pixel_values"][:, 1],
        },
    ),
    "hf_lw_detr": tiny(
        "LwDetrForObjectDetection",
        7,
        {
            **DETR,
            "backbone_config": Config(
                "LwDetrViTConfig",
                {**PLAIN, "out_indices": [1, 2], "num_windows": 4, "window_block_indices": [0]},
            ),
            "projector_scale_factors": [1.0],
        },
        size=32,
    ),
    "hf_d_fine": tiny(
        "DFineForObjectDetection",
        7,
        {
            **without(RT_DETR, "backbone_config"),
            "decoder_layers": 2,
            "backbone_config": Config(
                "RTDetrResNetConfig",
                {
                    "embedding_size": 8,
                    "hidden_sizes": [8, 16, 16, 16],
                    "depths": [1, 1, 1, 1],
                    "layer_type": "basic",
                    "out_features": ["stage2", "stage3", "stage4"],
                },
            ),
        },
        size=64,
    ),
}


def further_models() -> dict[str, Entry]:
    """All of both files, as the zoo has them."""
    return {n: (entry.make, entry.inputs, entry.count) for n, entry in (MODELS | DENSE).items()}
