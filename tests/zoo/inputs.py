"""Inputs for a model, made by hand from its configuration and the names its `forward` asks for.

No processor, no tokenizer, no hub. Where a name does not say the shape (a spectrogram may be
``batch mel time`` or ``batch time mel``), several candidates are made, and the first that the
eager model accepts is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.shrink import MEDIA

__all__ = ["BATCH", "LENGTH", "candidates", "find", "ids", "names", "text_ids"]

BATCH, LENGTH = 2, 12
Inputs = dict[str, Any]


def names(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Return what `forward` asks for, by name."""
    return dict(inspect.signature(type(model).forward).parameters)


def find(config: Any, *wanted: str, default: Any = None, depth: int = 3) -> Any:
    """Return the first value under one of these names, in the configuration or those within."""
    for name in wanted:
        if (value := getattr(config, name, None)) is not None:
            return value
    if depth:
        for name in getattr(config, "sub_configs", {}):
            within = getattr(config, name, None)
            if within is not None:
                value = find(within, *wanted, depth=depth - 1)
                if value is not None:
                    return value
    return default


def vision(config: Any) -> Any:
    """Return the configuration of the part that sees images."""
    for name in ("vision_config", "image_config", "vision_encoder_config", "backbone_config"):
        if (part := getattr(config, name, None)) is not None:
            return vision(part)
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None and (v := vision(part)) is not part:
            return v
    return config


def text_ids(seed: int, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Return random tokens, none of them special."""
    return torch.randint(7, MEDIA, (batch, length), generator=torch.Generator().manual_seed(seed))


def ids(config: Any, seed: int, length: int = LENGTH) -> Tensor:
    """Return tokens below the vocabulary of this model."""
    most = find(config, "vocab_size", default=MEDIA)
    return text_ids(seed, length=length) % min(most, MEDIA)


def normal(seed: int, *shape: int) -> Tensor:
    """Return normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(value: Any) -> tuple[int, int]:
    """Return height and width of a size given as one number, two, or a dictionary."""
    if isinstance(value, dict):
        return value["height"], value["width"]
    if isinstance(value, (list, tuple)):
        return int(value[-2]), int(value[-1])
    return int(value), int(value)


def images(model: nn.Module, seed: int) -> Iterator[Inputs]:
    """Yield what a picture may look like to this model."""
    config, asked = model.config, names(model)
    part = vision(config)
    channels = find(part, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels[0] if isinstance(channels, (list, tuple)) else channels
    high, wide = pair(
        find(part, "image_size", "img_size", "input_size", default=None)
        or find(config, "image_size", default=32)
    )
    patch = pair(find(part, "patch_size", default=8))[0]
    time = find(part, "temporal_patch_size", "patch_temporal", default=1)
    merge = find(part, "spatial_merge_size", "merge_size", default=1)
    merge = merge if isinstance(merge, int) else 1
    grid = [name for name in ("image_grid_thw", "grid_thw") if name in asked]
    if grid or find(part, "spatial_merge_size") or "grid_thw" in getattr(config, "model_type", ""):
        rows, columns = 4 * merge, 2 * merge
        each = torch.tensor([[1, rows, columns]] * BATCH)
        for width in {channels * time * patch * patch: 0, channels * patch * patch: 0}:
            flat = normal(seed, BATCH * rows * columns, width)
            for name in grid or ["image_grid_thw"]:
                yield {"pixel_values": flat, name: each}
                merges = torch.full((BATCH,), merge)
                if "hidden_states" in asked:
                    yield {"hidden_states": flat, name: each}
                    yield {"hidden_states": flat, name: each, "merge_sizes": merges}
                cut = flat.reshape(-1, channels, patch, width // channels // patch)
                yield {"pixel_values": cut, name: each}
                yield {"pixel_values": flat, name: each, "merge_sizes": merges}
                yield {"pixel_values": flat, name: each, "image_merge_sizes": merges}
    picture = normal(seed, BATCH, channels, high, wide)
    sizes = torch.tensor([[high, wide]] * BATCH)
    yield {"pixel_values": picture}
    yield {"pixel_values": picture, "image_sizes": sizes}
    yield {"pixel_values": picture.unsqueeze(1)}
    yield {"pixel_values": picture.unsqueeze(1), "image_sizes": sizes}
    yield {
        "pixel_values": picture.unsqueeze(1),
        "pixel_attention_mask": torch.ones(BATCH, 1, high, wide, dtype=torch.long),
    }
    yield {"pixel_values": picture, "pixel_mask": torch.ones(BATCH, high, wide, dtype=torch.long)}
    if "target_sizes" in asked:
        long = normal(seed, BATCH, channels, patch, 16 * patch)
        yield {"pixel_values": long, "target_sizes": torch.tensor([[4, 4]] * BATCH)}
        yield {"pixel_values": long[:1].repeat(1, 1, 1, BATCH),
               "target_sizes": torch.tensor([[4, 4]] * BATCH)}  # fmt: skip
    if "spatial_shapes" in asked or "pixel_attention_mask" in asked:
        shapes = torch.tensor([[4, 4], [2, 6]])
        there = torch.arange(16) < shapes.prod(-1)[:, None]
        yield {
            "pixel_values": normal(seed, BATCH, 16, channels * patch * patch),
            "pixel_attention_mask": there.long(),
            "spatial_shapes": shapes,
        }
    if "pixel_position_ids" in asked or "image_position_ids" in asked:
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1)
        at = at.reshape(1, 16, 2).expand(BATCH, -1, -1)
        for name in ("pixel_position_ids", "image_position_ids"):
            yield {"pixel_values": normal(seed, BATCH, 16, channels * patch * patch), name: at}
    frames = find(part, "num_frames", "frames_per_clip", "n_frames", default=4)
    film = normal(seed, BATCH, frames, channels, high, wide)
    for name in ("pixel_values", "pixel_values_videos", "pixel_values_videos_hf"):
        if name in asked:
            yield {name: film}


def sounds(model: nn.Module, seed: int) -> Iterator[Inputs]:
    """Yield what a sound may look like to this model."""
    config, asked = model.config, names(model)
    bins = ("num_mel_bins", "feature_size", "input_dim", "n_mels", "input_feat_per_channel",
            "feature_projection_input_dim", "spec_freq_bins")  # fmt: skip
    mel = find(config, *bins, default=80)
    most = find(config, "max_source_positions", default=64)
    name = next(
        (
            n
            for n in (
                "input_features",
                "input_values",
                "audio_values",
                "audio_features",
                "padding_features",
            )
            if n in asked
        ),
        "input_features",
    )
    for time in (2 * most, most, 64, 100, 128, 1024):
        for shape in ((BATCH, mel, time), (BATCH, time, mel)):
            spectrum = normal(seed, *shape)
            there = torch.ones(BATCH, time, dtype=torch.long)
            yield {name: spectrum}
            for mask in (
                "attention_mask",
                "input_features_mask",
                "feature_attention_mask",
                "audio_mask",
                "padding_mask",
            ):
                if mask in asked:
                    yield {name: spectrum, mask: there}
                    yield {name: spectrum, mask: there.bool()}
        yield {name: normal(seed, BATCH, 1, time, mel)}
    for time in (2000, 4000, 16000):
        yield {name: normal(seed, BATCH, time)}
        yield {name: normal(seed, BATCH, 1, time)}
        yield {
            name: normal(seed, BATCH, 1, time),
            "padding_mask": torch.ones(BATCH, 1, time).bool(),
        }


def candidates(model: nn.Module, seed: int) -> Iterator[Inputs]:
    """Yield inputs that this model may accept, the likeliest first."""
    asked, config = names(model), model.config
    text: Inputs = {}
    if "input_ids" in asked:
        text["input_ids"] = ids(config, seed)
    if "decoder_input_ids" in asked and config.is_encoder_decoder:
        text["decoder_input_ids"] = ids(config, seed + 1, LENGTH - 4)
    dual = "pixel_values" in asked and find(config, "image_token_id", "image_token_index") is None
    deaf = {"input_features", "input_values", "audio_values"} & set(asked)
    boxes = torch.tensor([1, 2, 20, 30]).expand(BATCH, LENGTH, 4).clone()
    if "input_ids" in asked and not dual:
        yield dict(text)
        if "bbox" in asked:
            yield {**text, "bbox": boxes}
    if "pixel_values" in asked or "pixel_values_videos" in asked or "hidden_states" in asked:
        for seen in images(model, seed):
            yield {**text, **seen}
            if "bbox" in asked:
                yield {**text, **seen, "bbox": boxes}
            if text:
                yield seen
    if deaf:
        for heard in sounds(model, seed):
            yield {**text, **heard}
            if "input_ids" in text:
                yield {n: v for n, v in {**text, **heard}.items() if n != "input_ids"}
                yield heard
    if "inputs_embeds" in asked:
        width = find(config, "hidden_size", "d_model", default=64)
        yield {"inputs_embeds": normal(seed, BATCH, LENGTH, width)}
    if "hidden_states" in asked:
        width = find(config, "hidden_size", "d_model", default=64)
        yield {"hidden_states": normal(seed, BATCH, LENGTH, width)}


def media_candidates(model: nn.Module, seed: int) -> Iterator[Inputs]:
    """Yield text with pictures or sounds in it: as many tokens as the model has features."""
    asked, config = names(model), model.config
    for what, tokens, makers in (
        ("image", ("image_token_id", "image_token_index"), images),
        ("audio", ("audio_token_id", "audio_token_index"), sounds),
    ):
        token = next((t for n in tokens if (t := getattr(config, n, None)) is not None), None)
        count = getattr(model, f"get_{what}_features", None)
        if (
            token is None
            or count is None
            or not ({"pixel_values", "input_features", "input_values", "audio_values"} & set(asked))
        ):
            continue
        for seen in makers(model, seed):
            if not all(name in asked for name in seen):
                continue
            try:
                with torch.no_grad():
                    features = count(**seen)
                number = rows_of(features)
            except Exception:
                continue
            if number % BATCH or not 0 < number // BATCH <= 96:
                continue
            text = ids(config, seed, LENGTH + number // BATCH)
            text[:, 3 : 3 + number // BATCH] = token
            both = {"input_ids": text, **seen}
            yield (
                {**both, "mm_token_type_ids": (text == token).long()}
                if ("mm_token_type_ids" in asked)
                else both
            )
            if "token_type_ids" in asked:
                yield {**both, "token_type_ids": (text == token).long()}
            yield both


def rows_of(features: Any) -> int:
    """Return how many tokens the features of a batch fill."""
    features = getattr(features, "pooler_output", None) if hasattr(features, "keys") else features
    if isinstance(features, (list, tuple)):
        return sum(rows_of(part) for part in features)
    return features.numel() // features.shape[-1]
