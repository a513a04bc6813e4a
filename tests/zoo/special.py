"""Inputs of models that the names of their arguments do not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn

from tests.zoo.inputs import BATCH, LENGTH, find, ids, normal

__all__ = ["SPECIAL"]

Inputs = dict[str, Any]
Maker = Callable[[nn.Module], Iterator[Inputs]]


def one(make: Callable[[Any], Inputs]) -> Maker:
    """Return a maker of the inputs that a function of the configuration gives."""
    return lambda model: iter([make(model.config)])


def picture(seed: int = 3, *more: int, size: int = 32) -> torch.Tensor:
    """Return pictures."""
    return normal(seed, BATCH, *more, 3, size, size)


def ones(*shape: int) -> torch.Tensor:
    """Return a mask of everything."""
    return torch.ones(shape, dtype=torch.long)


SPECIAL: dict[str, Maker] = {
    "decision_transformer": one(
        lambda c: {
            "states": normal(3, BATCH, 5, c.state_dim),
            "actions": normal(4, BATCH, 5, c.act_dim),
            "rewards": normal(5, BATCH, 5, 1),
            "returns_to_go": normal(6, BATCH, 5, 1),
            "timesteps": torch.arange(5).expand(BATCH, 5),
            "attention_mask": ones(BATCH, 5),
        }
    ),
    "blip_2_qformer": one(
        lambda c: {
            "query_embeds": normal(3, BATCH, 6, c.hidden_size),
            "encoder_hidden_states": normal(4, BATCH, 9, c.encoder_hidden_size),
        }
    ),
    "instructblip": one(
        lambda c: {
            "pixel_values": picture(),
            "qformer_input_ids": ids(c, 4),
            "input_ids": torch.cat(
                [torch.full((BATCH, c.num_query_tokens), c.image_token_index), ids(c, 3)], 1
            ),
        }
    ),
    "instructblipvideo": one(
        lambda c: {
            "pixel_values": picture(3, 4),
            "qformer_input_ids": ids(c, 4),
            "input_ids": torch.cat(
                [torch.full((BATCH, 4 * c.num_query_tokens), c.video_token_index), ids(c, 3)], 1
            ),
        }
    ),
    "blip-2": one(
        lambda c: {
            "pixel_values": picture(),
            "input_ids": torch.cat(
                [torch.full((BATCH, c.num_query_tokens), c.image_token_index), ids(c, 3)], 1
            ),
        }
    ),
    "kosmos-2": one(
        lambda c: {
            "pixel_values": picture(),
            "input_ids": ids(c, 3),
            "image_embeds_position_mask": (
                (torch.arange(LENGTH) >= 2) & (torch.arange(LENGTH) < 2 + c.latent_query_num)
            )
            .long()
            .expand(BATCH, LENGTH),
        }
    ),
    "patchtst": one(lambda c: {"past_values": normal(3, BATCH, c.context_length, 1)}),
    "patchtsmixer": one(
        lambda c: {"past_values": normal(3, BATCH, c.context_length, c.num_input_channels)}
    ),
    "timesfm": one(
        lambda c: {
            "past_values": normal(3, BATCH, 4 * c.patch_length),
            "past_values_padding": ones(BATCH, 4 * c.patch_length) * 0,
            "freq": torch.zeros(BATCH, 1, dtype=torch.long),
        }
    ),
    "timesfm2_5": one(
        lambda c: {
            "past_values": normal(3, BATCH, 4 * c.patch_length),
            "past_values_padding": ones(BATCH, 4 * c.patch_length) * 0,
        }
    ),
    "lightglue": one(lambda c: {"pixel_values": picture(3, 2)}),
    "efficientloftr": one(lambda c: {"pixel_values": picture(3, 2, size=64)}),
    "idefics": one(
        lambda c: {
            "input_ids": ids(c, 3),
            "attention_mask": ones(BATCH, LENGTH),
            "pixel_values": picture(3, 1),
            "image_attention_mask": ones(BATCH, LENGTH, 1),
        }
    ),
    "gemma3n_audio": one(
        lambda c: {
            "audio_mel": normal(3, BATCH, 64, c.input_feat_size),
            "audio_mel_mask": torch.zeros(BATCH, 64, dtype=torch.bool),
        }
    ),
    "muse_glimmer_assistant": one(
        lambda c: {
            "noise_embeds": normal(3, BATCH, c.block_size, c.hidden_size),
            "context_hidden_states": normal(4, BATCH, 8, 2 * c.hidden_size),
            "attention_mask": ones(BATCH, 8 + c.block_size),
        }
    ),
    "dia": one(
        lambda c: {
            "input_ids": ids(c, 3),
            "decoder_input_ids": ids(c, 4, 8 * c.decoder_config.num_channels).reshape(
                BATCH, 8, c.decoder_config.num_channels
            ),
        }
    ),
    "xclip": one(
        lambda c: {
            "input_ids": ids(c, 3),
            "pixel_values": picture(4, c.vision_config.num_frames),
        }
    ),
    "glm_image_vqmodel": one(lambda c: {"hidden_states": normal(3, 16, c.latent_channels)}),
    "voxtral_realtime": one(
        lambda c: {
            "input_ids": ids(c, 3),
            "input_features": normal(4, BATCH, c.audio_config.num_mel_bins, 8 * LENGTH),
        }
    ),
}


def sized(high: int, wide: int) -> Maker:
    """Return a maker of pictures of a size."""
    return lambda model: iter([{"pixel_values": normal(3, BATCH, 3, high, wide)}])


for _name in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4",
              "detr", "conditional_detr", "deformable_detr", "lw_detr"):  # fmt: skip
    SPECIAL[_name] = sized(64, 64)
SPECIAL["pp_ocrv5_mobile_rec"] = sized(96, 160)
SPECIAL["mobilevitv2"] = sized(128, 128)
SPECIAL["pvt"] = sized(64, 64)
for _name in ("dab-detr", "table-transformer", "mask2former"):
    SPECIAL[_name] = sized(64, 64)
SPECIAL["lxmert"] = one(
    lambda c: {
        "input_ids": ids(c, 3),
        "visual_feats": normal(4, BATCH, 5, c.visual_feat_dim),
        "visual_pos": normal(5, BATCH, 5, c.visual_pos_dim).abs(),
    }
)
for _name in ("pp_ocrv5_server_rec", "pp_ocrv6_small_rec", "pp_ocrv6_tiny_rec"):
    SPECIAL[_name] = sized(48, 160)
SPECIAL["align"] = one(lambda c: {"input_ids": ids(c, 3), "pixel_values": picture(size=64)})
SPECIAL["clap"] = one(
    lambda c: {
        "input_ids": ids(c, 3),
        "input_features": normal(4, BATCH, 1, 256, c.audio_config.num_mel_bins),
    }
)
SPECIAL["pe_audio"] = one(
    lambda c: {"input_ids": ids(c, 3), "input_values": normal(4, BATCH, 1, 1600)}
)
SPECIAL["blt"] = one(lambda c: {"input_ids": ids(c, 3), "use_cache": False})
SPECIAL["fun_asr_nano_encoder"] = one(
    lambda c: {
        "input_features": normal(3, BATCH, 16, c.num_mel_bins * c.num_stacked_frames),
        "input_features_mask": ones(BATCH, 16),
    }
)
for _name in ("granite_speech5_encoder", "granite_speech5_ctc"):
    SPECIAL[_name] = one(
        lambda c: {"input_features": normal(3, BATCH, 24, 4 * find(c, "num_mel_bins"))}
    )
SPECIAL["inkling2_vision"] = one(
    lambda c: {
        "pixel_values": normal(3, 12, *2 * (c.patch_size * c.spatial_merge_size,), c.num_channels),
        "image_grid_thw": torch.tensor([[1, 2, 3]] * BATCH),
    }
)
SPECIAL["muse_spark_audio"] = one(lambda c: {"input_values": normal(3, BATCH, 3840)})
SPECIAL["moonshine"] = one(
    lambda c: {"input_values": normal(3, BATCH, 4000), "decoder_input_ids": ids(c, 4, 8)}
)
SPECIAL["musicgen"] = one(
    lambda c: {
        "input_ids": ids(c, 3),
        "decoder_input_ids": ids(c, 4, 8).repeat(c.decoder.num_codebooks, 1) % 32,
    }
)
SPECIAL["musicgen_melody"] = SPECIAL["musicgen"]
for _name in ("mimi_decoder", "pocket_tts_audio_tokenizer_decoder"):
    SPECIAL[_name] = one(lambda c: {"latents": normal(3, BATCH, c.hidden_size, 6)})


def film(**more: torch.Tensor) -> Maker:
    """Return a maker of films, with text where the model is no encoder alone."""

    def make(model: nn.Module) -> Iterator[Inputs]:
        text = {} if "encoder" in model.config.model_type else {"input_ids": ids(model.config, 4)}
        yield {**text, "pixel_values_videos": picture(3, 4), **more}

    return make


for _name in ("pe_video", "pe_video_encoder"):
    SPECIAL[_name] = film()
for _name in ("pe_audio_video", "pe_audio_video_encoder"):
    SPECIAL[_name] = film(input_values=normal(5, BATCH, 1, 32))
for _name in ("neucodec", "xcodec2"):
    SPECIAL[_name] = one(
        lambda c: {
            "input_values": normal(3, BATCH, 1, 3200),
            "input_features": normal(4, BATCH, 10, 160),
        }
    )
for _name in ("informer", "time_series_transformer", "autoformer"):
    SPECIAL[_name] = one(
        lambda c: {
            "past_values": normal(3, BATCH, c.context_length + max(c.lags_sequence)),
            "past_time_features": normal(4, BATCH, c.context_length + max(c.lags_sequence), 2),
            "past_observed_mask": torch.ones(BATCH, c.context_length + max(c.lags_sequence)),
            "future_values": normal(5, BATCH, c.prediction_length),
            "future_time_features": normal(6, BATCH, c.prediction_length, 2),
        }
    )


def tracked(name: str) -> Maker:
    """Return a maker of a video's second frame, in which what a mask showed in the first moves."""

    def make(model: nn.Module) -> Iterator[Inputs]:
        size = find(model.config, "image_size", default=64)
        size = size if isinstance(size, int) else size[0]
        session = getattr(transformers, name)(
            video=normal(3, 2, 3, size, size),
            video_height=size,
            video_width=size,
            dtype=torch.float32,
        )
        at = session.obj_id_to_idx(1)
        mask = torch.zeros(1, 1, size, size)
        mask[..., 8:24, 8:24] = 1.0
        session.add_mask_inputs(at, 0, mask)
        session.obj_with_new_inputs = [1]
        with torch.no_grad():
            model(inference_session=session, frame_idx=0)
        yield {"inference_session": session, "frame_idx": 1}

    return make


SPECIAL["sam2_video"] = tracked("Sam2VideoInferenceSession")
SPECIAL["edgetam_video"] = tracked("EdgeTamVideoInferenceSession")
SPECIAL["sam3_tracker_video"] = tracked("Sam3TrackerVideoInferenceSession")
