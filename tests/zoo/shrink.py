"""Small configurations: the default one of a model type, with every size made tiny.

``tiny("mistral")`` is a dictionary that the configuration's class reads back. Sizes are known by
their names (`SIZES`), lists per layer are sampled so that every kind of layer stays, and what a
type needs besides is in `tests.zoo.overrides`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

__all__ = ["DROP", "HEADS", "HIDDEN", "MEDIA", "VOCAB", "WINDOW", "merged", "shrunk"]

HIDDEN, HEADS, VOCAB, WINDOW = 64, 4, 128, 5
MEDIA = 100  # token ids from here on mean images and the like: random text stays below

# The largest value that a name may have.
_SIZES = """\
0: num_kv_shared_layers
1: n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace
1: max_window_layers
2: num_key_value_heads num_kv_heads encoder_num_key_value_heads linear_num_key_heads
2: decoder_num_key_value_heads swa_num_key_value_heads n_kv_heads num_global_key_value_heads
2: num_hidden_layers encoder_layers decoder_layers num_layers depth n_layer n_layers
2: num_encoder_layers num_decoder_layers decoder_num_hidden_layers speech_encoder_layers
2: encoder_num_hidden_layers num_encoder_blocks num_blocks_per_stage text_layers
2: t2u_encoder_layers t2u_decoder_layers num_local_layers cross_attention_layers
2: vision_layers num_experts_per_tok num_experts_per_token moe_topk moe_top_k top_k_experts
2: moe_k num_codebooks num_conv_pos_embedding_groups
4: num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads
4: n_heads attention_heads decoder_num_attention_heads encoder_num_attention_heads
4: speech_encoder_attention_heads num_text_attention_heads swa_num_attention_heads
4: index_n_heads num_cross_attention_heads linear_num_value_heads decoder_attention_heads_num
4: vision_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts
4: num_routed_experts num_experts_per_layer index_topk num_query_tokens
6: num_queries
8: qk_rope_head_dim patch_size mamba_n_heads laurel_rank
16: head_dim attention_head_dim d_kv global_head_dim index_head_dim linear_key_head_dim
16: linear_value_head_dim swa_head_dim v_head_dim attention_head_size mamba_head_dim
16: mamba_headdim head_dim_qk qk_nope_head_dim query_pre_attn_scalar num_conv_pos_embeddings
16: mamba_d_state mamba_d_head state_size hidden_size_per_layer_input
32: kv_lora_rank image_size pretrain_image_size codebook_size classifier_proj_size
64: hidden_size d_model n_embd embed_dim dim encoder_hidden_dim decoder_hidden_size
64: encoder_hidden_size hidden_dim text_hidden_size vision_hidden_size mm_hidden_size
64: decoder_hidden_dim projection_dim projector_hidden_size out_hidden_size output_hidden_size
64: output_dim embedding_dim kv_dim text_dim attention_dim q_lora_rank embedding_size
64: fpn_hidden_size encoder_embed_dim decoder_embed_dim speech_encoder_hidden_size
64: text_embed_dim vision_embed_dim mlp_hidden_size pooler_output_size qformer_hidden_size
64: cross_attention_hidden_size lru_width attention_hidden_size proj_dim backbone_hidden_size
64: audio_hidden_size pooler_hidden_size text_projection_dim audio_embed_dim output_proj_dims
64: n_state text_config_hidden_size intermediate_size ffn_dim d_ff encoder_ffn_dim
64: decoder_ffn_dim mlp_dim n_inner moe_intermediate_size shared_expert_intermediate_size
64: expert_ffn_dim ffn_hidden_size decoder_intermediate_size inner_dim intermediate_size_mlp
64: expert_intermediate_size moe_shared_expert_intermediate_size dim_feedforward
64: encoder_intermediate_size dense_intermediate_size decoder_ffn_hidden_size
64: mlp_intermediate_size swiglu_intermediate_size vision_intermediate_size
64: speech_encoder_intermediate_size shared_intermediate_size feed_forward_hidden_size
64: ffn_intermediate_size text_intermediate_size num_position_embeddings
128: max_position_embeddings n_positions max_target_positions max_seq_len n_ctx
128: max_source_positions vocab_size_per_layer_input
"""
SIZES: dict[str, int] = {
    name: int(size)
    for size, _, names in (line.partition(":") for line in _SIZES.splitlines())
    for name in names.split()
}
WINDOWS = {
    "sliding_window", "attention_window_size", "local_window", "local_attention",
    "attention_chunk_size", "sliding_window_size", "attention_chunk", "chunk_attention_size",
}  # fmt: skip
VOCABULARIES = {"vocab_size", "text_vocab_size", "audio_vocab_size", "n_words", "padded_vocab_size"}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
          "sep_token_id": 3, "cls_token_id": 4, "mask_token_id": 5, "forced_eos_token_id": 2,
          "forced_bos_token_id": 1, "blank_token_id": 6, "image_token_id": MEDIA,
          "image_token_index": MEDIA, "video_token_id": MEDIA + 1, "video_token_index": MEDIA + 1,
          "audio_token_id": MEDIA + 2, "audio_token_index": MEDIA + 2}  # fmt: skip
STAGES = {"depths", "stage_num_blocks"}  # of backbones whose stages stay as many as they are
DERIVED = {"qk_head_dim", "stage_names", "out_features", "out_indices", "_out_features",
           "_out_indices", "transformers_version", "architectures", "id2label", "label2id",
           "torch_dtype", "dtype"}  # fmt: skip


COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
CHOSEN_LAYERS = {"global_attn_indexes": [1], "deepstack_visual_indexes": [0],
                 "fullatt_block_indexes": [1]}  # fmt: skip


def merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid over it, dictionaries within as well; DROP takes away."""
    for name, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), dict):
            merged(base[name], value)
        elif value is DROP:
            base.pop(name, None)
        else:
            base[name] = dict(value) if isinstance(value, Mapping) else value
    return base


DROP = object()


def shrunk(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with tiny sizes, those within it as well."""
    small: dict[str, Any] = {}
    layers = kept_layers(given)
    for name, value in given.items():
        if name in DERIVED and not (name == "out_features" and STAGES & given.keys()):
            continue
        small[name] = of(name, value, given, layers)
    heads = given.get("num_attention_heads")
    if heads and heads == given.get("num_key_value_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    if given.get("qk_rope_head_dim") and "head_dim" in given:
        small["head_dim"] = small["qk_rope_head_dim"]
    if "head_dim" in given and given["head_dim"] is None and isinstance(heads, int):
        small["head_dim"] = HIDDEN // HEADS
    for name in COUNTS:
        if layers and isinstance(given.get(name), int) and given[name] == layers[0]:
            small[name] = len(layers[1])
    return small


def kept_layers(given: Mapping[str, Any]) -> tuple[int, list[int]] | None:
    """Return the number of layers, and one of each kind: at least two."""
    kinds = (
        given.get("layer_types") or given.get("layers_block_type") or given.get("mlp_layer_types")
    )
    if not isinstance(kinds, (list, tuple)) or not kinds:
        count = next((n for name in COUNTS if isinstance(n := given.get(name), int)), 0)
        return (count, [0, 1]) if count > 2 else None
    all_kinds = (
        list(zip(kinds, given["mlp_layer_types"], strict=True))
        if (
            isinstance(given.get("mlp_layer_types"), (list, tuple))
            and len(given["mlp_layer_types"]) == len(kinds)
        )
        else list(kinds)
    )
    kept = sorted({all_kinds.index(kind) for kind in all_kinds})
    if len(kept) < 2 <= len(kinds):
        kept = sorted({*kept, 1 if kept[0] == 0 else 0})
    return len(kinds), kept


def of(name: str, value: Any, given: Mapping[str, Any], layers: Any) -> Any:
    """Return the small value of one entry."""
    if not isinstance(name, str):
        return value
    if name in TOKENS or name.endswith(("token_id", "token_index")):
        return token(name, value)
    if name == "per_layer_config" and layers and value:
        return {
            n: shrunk(value[k]) for n, at in enumerate(layers[1]) for k in value if int(k) == at
        }
    if isinstance(value, Mapping):
        if name.startswith("rope_") or "rope" in name:
            return rope(value, given)
        return shrunk(value)
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return of_list(name, list(value), given, layers)
    if name in VOCABULARIES and isinstance(value, int):
        return min(value, VOCAB)
    if name in WINDOWS and value and value > 0:
        return WINDOW
    if name in SIZES and isinstance(value, (int, float)) and value > 0:
        return min(int(value), SIZES[name]) if name not in ("head_dim",) else SIZES[name]
    return value


def token(name: str, value: Any) -> Any:
    """Return the number of a special token: the same for the same name everywhere."""
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value < 0):
        return value
    if name in TOKENS:
        return TOKENS[name]
    return MEDIA + 4 + zlib.crc32(name.replace("index", "id").encode()) % 22


def of_list(name: str, value: list[Any], given: Mapping[str, Any], layers: Any) -> Any:
    """Return a list per layer cut to the layers kept, sizes of stages scaled down."""
    if name in CHOSEN_LAYERS:
        return CHOSEN_LAYERS[name]
    if layers and len(value) == layers[0] and len(value) > 4:
        return [of(name, value[at], given, layers) for at in layers[1]]
    if name in ("image_size", "patch_size") and all(isinstance(v, int) for v in value):
        return [min(v, SIZES[name]) for v in value]
    if name in SIZES and all(isinstance(v, int) for v in value) and value and min(value) > 0:
        ratio = max(1, math.ceil(min(value) / max(4, SIZES[name] // 4)))
        return [max(1, v // ratio) for v in value]
    return value


def rope(value: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters, sections of the heads scaled with the heads."""
    small = {}
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            small[name] = rope(entry, given)
        elif name == "mrope_section" and entry:
            small[name] = sections(list(entry), 8)
        elif name == "original_max_position_embeddings":
            small[name] = 32
        else:
            small[name] = entry
    return small


def sections(given: list[int], total: int) -> list[int]:
    """Return the sections scaled to a sum of `total`, none empty."""
    scale = total / sum(given)
    small = [max(1, int(part * scale)) for part in given]
    small[-1] += total - sum(small)
    if small[-1] < 1:
        small[0], small[-1] = small[0] + small[-1] - 1, 1
    return small
