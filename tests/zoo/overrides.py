"""What a model type needs besides tiny sizes: a line or a few for each."""

from __future__ import annotations

from typing import Any

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
    "maskformer-swin": {"embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2,
                        "num_layers": 2, "hidden_size": 48},
    "swin": {"embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2,
             "num_layers": 2, "hidden_size": 48},
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

CLASSES: dict[str, str] = {}
