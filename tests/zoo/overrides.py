"""What a model type needs besides tiny sizes: a line or a few for each."""

from __future__ import annotations

from typing import Any

from transformers import ViTConfig

from tests.zoo.shrink import DROP

__all__ = ["CLASSES", "OVERRIDES"]

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                              "mrope_section": [2, 3, 3]}}  # fmt: skip
_MROPE_HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                   "mrope_section": [1, 1, 2],
                                   "partial_rotary_factor": 0.5}}  # fmt: skip
_HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
_SERIES = {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2, 3],
           "num_time_features": 2}  # fmt: skip
_MIMI = {"num_filters": 8, "upsample_groups": 8, "codebook_dim": 16, "num_quantizers": 3,
         "vector_quantization_hidden_dimension": 16, "upsampling_ratios": [4, 2]}  # fmt: skip
_RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"],
}  # fmt: skip
_TIMMLESS = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
             "backbone_config": _RESNET, "dilation": False, "backbone_kwargs": None}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": 24, "linear_head_dim": 16, "linear_num_heads": 4,
                       "num_expert_group": 2, "n_group": 2},
    "bamba": {"attn_layer_indices": [1], "layer_types": DROP, "layers_block_type": DROP},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3],
            "encoder_config": {"hidden_size_global": 64}, "decoder_config": {
                "hidden_size_global": 64}},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGA": 101}, "image_token_id": 100,
                  "vq_config": {"base_channels": 32, "latent_channels": 32, "embed_dim": 16,
                                "num_embeddings": 8, "resolution": 32,
                                "channel_multiplier": [1, 2]}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {
        "rope_type": "default", "rope_theta": 1e4}, "sliding_attention": {
            "rope_type": "default", "rope_theta": 1e4}}},
    "conditional_detr": _TIMMLESS,
    "deformable_detr": _TIMMLESS,
    "detr": _TIMMLESS,
    "csm": {"codec_config": _MIMI},
    "mimi": _MIMI,
    "mimi_decoder": _MIMI,
    "mimi_encoder": _MIMI,
    "kyutai_speech_to_text": {"codec_config": _MIMI},
    "dbrx": {"attn_config": {"rope_theta": 1e4}, "num_key_value_heads": DROP},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2,
                                        "moe_intermediate_size": 32}, "canvas_length": 8},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 100}, "vq_config": {"base_channels": 32}},
    "esm": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 5},
    "falcon_h1": {"mamba_d_ssm": 64},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm5_next_text": {"index_kpool": 2, "linear_head_dim": 16, "linear_num_heads": 4},
    "glm5_next": {"text_config": {"index_kpool": 2, "linear_head_dim": 16,
                                  "linear_num_heads": 4}},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "granitemoehybrid": {**_HYBRID, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl_text": _MROPE,
    "hunyuan_vl": {"text_config": _MROPE},
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8,
              "layer_types": DROP, "layers_block_type": DROP},
    "kosmos-2": {"latent_query_num": 4, "text_config": {"layers": 2}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 64},
    "maskformer": {"backbone_config": {"embed_dim": 24, "depths": [1, 1, 1, 1],
                   "num_heads": [2, 2, 4, 4], "window_size": 2, "hidden_size": 192},
                   "fpn_feature_size": 64, "mask_feature_size": 64},
    "maskformer-swin": {"embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2,
                        "num_layers": 2, "hidden_size": 48, "out_features": ["stage2"]},
    "swin": {"embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2,
             "num_layers": 2, "hidden_size": 48, "out_features": ["stage2"]},
    "nemotron": {"num_key_value_heads": 2},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1]}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 3,
                        "layer_types": DROP, "layers_block_type": DROP},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64,
                 "shape_embed_dim": 8, "pronunciation_embed_dim": 8},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2], "num_key_value_attention_heads": 2,
                 "num_first_full_attention_layers": 1, "num_last_full_attention_layers": 0},
    "siglip": {"text_config": {"projection_size": 64}},
    "siglip2": {"text_config": {"projection_size": 64}},
    "vjepa2": {"crop_size": 32, "frames_per_clip": 4, "pred_hidden_size": 48,
               "pred_num_attention_heads": 4, "pred_num_hidden_layers": 2},
    "xclip": {"vision_config": {"mit_hidden_size": 64, "mit_intermediate_size": 64,
                                "mit_num_attention_heads": 4}, "prompt_num_attention_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
              "num_hidden_layers": 4, "attention_hidden_size": 128, "attention_head_dim": 32,
              "mamba_dt_rank": 8},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "kv_channels": 16,
               "hybrid_layer_ids": [1], "adapter_rank": 8, "num_query_groups": 4,
               "mamba_headdim": 16, "n_mamba_heads": 8},
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_5_omni_thinker": {"text_config": _MROPE},
    "paddleocr_vl": {"text_config": _MROPE},
    "glm4v_text": _MROPE,
    "glm4v": {"text_config": _MROPE},
    "glm_ocr_text": _MROPE,
    "glm_ocr": {"text_config": _MROPE},
    "glm_image_text": _MROPE,
    "glm_image": {"text_config": _MROPE},
    "glm4v_moe_text": _MROPE_HALF,
    "glm4v_moe": {"text_config": _MROPE_HALF},
}  # fmt: skip

_SAM_VISION = {"output_channels": 64, "num_pos_feats": 32, "window_size": 2}
_HIERA = {"hidden_size": 16, "embed_dim_per_stage": [16, 32, 64, 128],
          "num_attention_heads_per_stage": [1, 2, 4, 8], "blocks_per_stage": [1, 1, 2, 1],
          "global_attention_blocks": [3], "window_size_per_stage": [8, 4, 8, 4],
          "image_size": [64, 64]}  # fmt: skip
_SAM2 = {"backbone_config": _HIERA, "backbone_channel_list": [128, 64, 32, 16],
         "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}  # fmt: skip
_HGNET = {"embedding_size": 8, "stem_channels": [3, 8, 8], "hidden_sizes": [16, 16, 32, 32],
          "stage_in_channels": [8, 16, 16, 32], "stage_mid_channels": [8, 8, 8, 8],
          "stage_out_channels": [16, 16, 32, 32], "stage_num_blocks": [1, 1, 1, 1],
          "stage_numb_of_layers": [1, 1, 1, 1], "depths": [1, 1, 1, 1],
          "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip
_HGNET4 = {**_HGNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
_DETECTOR = {"encoder_in_channels": [16, 32, 32], "decoder_in_channels": [64, 64, 64],
             "num_denoising": 0, "backbone_config": _HGNET}  # fmt: skip
_RT_DETR = {**_DETECTOR, "backbone_config": {
    "embedding_size": 8, "hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}}  # fmt: skip
_DAC = {"encoder_hidden_size": 8, "decoder_hidden_size": 64, "downsampling_ratios": [2, 4],
        "upsampling_ratios": [4, 2], "n_codebooks": 2, "codebook_dim": 8, "hop_length": 8,
        "hidden_size": 16}  # fmt: skip
_W2V_BERT = {"feature_projection_input_dim": 160, "layerdrop": 0.0}
_VIT = ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
                 image_size=32, patch_size=8, num_labels=64)  # fmt: skip
_T5 = {"dropout_rate": 0.0, "classifier_dropout_rate": 0.0}

_MEMORY = {"image_size": 64, "memory_attention_hidden_size": 128,
           "memory_attention_feed_forward_hidden_size": 64, "memory_attention_num_layers": 1,
           "memory_attention_rope_feat_sizes": [4, 4], "memory_encoder_hidden_size": 128,
           "memory_encoder_output_channels": 64, "mask_downsampler_embed_dim": 128,
           "memory_fuser_embed_dim": 128, "memory_fuser_intermediate_dim": 64,
           "prompt_encoder_config": {"hidden_size": 128, "image_size": 64, "patch_size": 16},
           "mask_decoder_config": {"hidden_size": 128}}  # fmt: skip
_TRACKER = {**_MEMORY, "vision_config": {**_SAM2, "fpn_hidden_size": 128}}
_DOTS3 = {"per_layer_config": {2: {"head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}}}

OVERRIDES |= {
    "dots3_note_text": _DOTS3,
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"adapter_in_dim": 64,
                                                            "adapter_out_dim": 64},
                   "audio_config": {"adapter_out_dim": 64, "adapter_input_size": 64}},
    "align": {"vision_config": {"width_coefficient": 0.25, "depth_coefficient": 0.25,
                                "hidden_dim": 80}, "projection_dim": 80},
    "clap": {"audio_config": {"spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 16,
                              "depths": [2, 1], "num_attention_heads": [2, 4], "window_size": 4,
                              "hidden_size": 32}},
    "dia": {"decoder_config": {"cross_hidden_size": 64, "cross_num_attention_heads": 4,
                               "cross_head_dim": 16, "cross_num_key_value_heads": 4,
                               "num_channels": 2}, "delay_pattern": [0, 1]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1],
                        "downsample_rate": "1/2"},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": DROP},
    "blip-2": {"image_token_index": 100, "text_config": {"word_embed_proj_dim": 64}},
    "instructblip": {"image_token_index": 100, "text_config": {"word_embed_proj_dim": 64}},
    "instructblipvideo": {"video_token_index": 101, "text_config": {"word_embed_proj_dim": 64}},
    "lw_detr": {"backbone_config": {"num_windows": 4, "num_windows_side": 2,
                                    "window_block_indices": [0],
                                    "image_size": 64, "pretrain_image_size": 64,
                                    "out_features": ["stage1", "stage2"]},
                "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4,
                "projector_out_channels": 64, "projector_scale_factors": [1.0],
                "projector_in_channels": DROP, "num_feature_levels": DROP, "group_detr": 1},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 32, 32]},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 32, 32]}},
    "pe_audio": {"audio_config": {"dac_config": _DAC}},
    "pe_audio_encoder": {"dac_config": _DAC},
    "pe_video": {"video_config": {"vision_config": _VIT}},
    "pe_video_encoder": {"vision_config": _VIT},
    "pe_audio_video": {"audio_video_config": {"audio_config": {"dac_config": _DAC},
                                              "video_config": {"vision_config": _VIT}}},
    "pe_audio_video_encoder": {"audio_config": {"dac_config": _DAC},
                               "video_config": {"vision_config": _VIT}},
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "d_fine": _DETECTOR,
    "deimv2": _DETECTOR,
    "pp_doclayout_v3": {**_DETECTOR, "backbone_config": _HGNET4, "x4_feat_dim": 16},
    "pp_doclayout_v4": _DETECTOR,
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                       "indexer_budget": 4, "indexer_compress_ratio": 2},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 4, "indexer_kv_heads": 1,
                                  "indexer_head_dim": 16, "indexer_budget": 4,
                                  "indexer_compress_ratio": 2}},
    "pocket_tts_audio_tokenizer": {"num_filters": 8, "upsample_groups": 8},
    "pocket_tts_audio_tokenizer_decoder": {"num_filters": 8, "upsample_groups": 8},
    "sam": {"vision_config": _SAM_VISION, "prompt_encoder_config": {"image_embedding_size": 4}},
    "sam_hq": {"vision_config": _SAM_VISION, "prompt_encoder_config": {"image_embedding_size": 4},
               "mask_decoder_config": {"vit_dim": 64}},
    "sam_vision_model": _SAM_VISION,
    "sam_hq_vision_model": _SAM_VISION,
    "sam2": {"vision_config": _SAM2, "prompt_encoder_config": {"image_size": 64, "patch_size": 16}},
    "sam2_video": _TRACKER,
    "edgetam_video": {**_TRACKER, "memory_attention_rope_k_sizes": [2, 2],
                      "memory_attention_mlp_hidden_size": 64,
                      "perceiver_resampler_num_latents": 4,
                      "perceiver_resampler_num_latents_2d": 4,
                      "perceiver_resampler_hidden_size": 64,
                      "perceiver_resampler_attention_head_dim": 64,
                      "perceiver_resampler_mlp_intermediate_size": 32},
    "sam2_vision_model": _SAM2,
    "sam2_hiera_det_model": _HIERA,
    "sam3_tracker": {"vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}},
    "sam3_tracker_video": {**_MEMORY, "vision_config": {
        "fpn_hidden_size": 128, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "backbone_config": {"image_size": 64, "patch_size": 16}}},
    "neucodec": {"semantic_model_config": _W2V_BERT, "quantization_dim": 128},
    "xcodec2": {"semantic_model_config": _W2V_BERT, "quantization_dim": 128},
    "informer": {**_SERIES, "feature_size": DROP},
    "time_series_transformer": {**_SERIES, "feature_size": DROP},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    "efficientloftr": {"hidden_size": 256, "num_attention_heads": 8,
                       "num_key_value_heads": 8, "num_attention_layers": 1},
    "evolla": {"aligner_num_add_layers": 1, "resampler_depth": 1, "resampler_heads": 2,
               "resampler_dim_head": 16, "resampler_num_latents": 4},
    "t5gemma2_encoder": {"text_config": _T5, **_T5},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "n_group": 1,
                                      "topk_group": 1, "num_experts_per_tok": 2}},
    "step3p7": {"text_config": {"sliding_window": 5}},
    "janus": {"vq_config": {"base_channels": 32, "num_embeddings": 32, "latent_channels": 32}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "num_key_value_heads": DROP},
    "cohere_compass": {"text_config": OVERRIDES["cohere_compass_text"]},
}  # fmt: skip

_SWIN = {"embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2,
         "num_layers": 2, "hidden_size": 48, "out_features": ["stage2"]}  # fmt: skip
_SWIN4 = {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4], "window_size": 2,
          "hidden_size": 192}  # fmt: skip

# Types with attention of their own.
OVERRIDES |= {
    "autoformer": {**_SERIES, "feature_size": DROP},
    "dab-detr": _TIMMLESS,
    "table-transformer": _TIMMLESS,
    "omdet-turbo": _TIMMLESS,
    "donut-swin": _SWIN,
    "swinv2": _SWIN,
    "mask2former": {"backbone_config": _SWIN4, "feature_size": 64, "mask_feature_size": 64},
    "grounding-dino": {"backbone_config": _SWIN4},
    "mm-grounding-dino": {"backbone_config": _SWIN4},
    "flaubert": {"emb_dim": 64, "n_words": 128, "n_heads": 4, "n_layers": 2},
    "xlm": {"emb_dim": 64, "n_words": 128, "n_heads": 4, "n_layers": 2},
    "luke": {"entity_vocab_size": 64, "entity_emb_size": 32},
    "gptj": {"rotary_dim": 8},
    "xlnet": {"d_head": 16},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "d_head": 16, "d_inner": 64},
    "pvt": {"image_size": 64, "hidden_sizes": [8, 16, 32, 64]},
}  # fmt: skip

# Where the class that an Auto class would take is not the one to test.
CLASSES: dict[str, str] = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "evolla": "EvollaForProteinText2Text",
}
