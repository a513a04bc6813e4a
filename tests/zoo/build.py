"""A tiny model of a type, with random weights that make attention matter."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)
from transformers.models.auto import modeling_auto as auto

from tests.zoo.inputs import candidates, media_candidates, names
from tests.zoo.overrides import CLASSES, OVERRIDES
from tests.zoo.shrink import merged, shrunk
from tests.zoo.special import SPECIAL

__all__ = ["Case", "NotBuilt", "case_of", "configuration", "model_of"]

MOST_PARAMETERS = 50_000_000
# Parameters whose numbers mean something: kept as the model makes them.
KEPT = ("A_log", "dt_", ".D", "freq", "logit_scale", "codebook", "log_a", "logit", "lambda")
HEADS_BY_MAPPING = (
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", AutoModelForSeq2SeqLM),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", AutoModelForSpeechSeq2Seq),
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", AutoModelForImageTextToText),
    ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", AutoModelForMultimodalLM),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", AutoModelForCausalLM),
)


class NotBuilt(Exception):
    """No tiny model of this type, or no input that it accepts: the message says which step."""


@dataclass
class Case:
    """A model with inputs that its eager attention accepts."""

    type: str
    kind: str
    model: nn.Module
    inputs: dict[str, Any]
    media: dict[str, Any] | None


def configuration(model_type: str) -> Any:
    """Return the tiny configuration of a type."""
    cls = CONFIG_MAPPING[model_type]
    over = OVERRIDES.get(model_type, {})
    try:
        given = cls().to_dict()
    except Exception:
        given = {}
    small = merged(shrunk(given), over)
    return cls.from_dict({**small, "attn_implementation": "eager"})


def class_of(model_type: str) -> Any:
    """Return the class (or Auto class) that the type is tested with."""
    if model_type in CLASSES:
        import transformers

        return getattr(transformers, CLASSES[model_type])
    masked = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    for mapping, head in HEADS_BY_MAPPING:
        if model_type in getattr(auto, mapping) and not (masked and head is AutoModelForCausalLM):
            return head
    return AutoModel


def model_of(model_type: str, seed: int = 1) -> nn.Module:
    """Return the model, float32, in eval mode, without dropout."""
    torch.manual_seed(0)
    config = configuration(model_type)
    cls = class_of(model_type)

    def make() -> nn.Module:
        if hasattr(cls, "from_config"):
            return cls.from_config(config, attn_implementation="eager")
        return cls._from_config(config, attn_implementation="eager")

    with torch.device("meta"):
        size = sum(p.numel() for p in make().parameters())
    if size > MOST_PARAMETERS:
        raise NotBuilt(f"{size / 1e6:.0f}M parameters")
    model = make().float().eval()
    calm(model)
    scatter(model, seed)
    if model.can_generate():
        settled(model.generation_config)
    return model


def settled(generation: Any) -> None:
    """Give generation the tokens that it asks for, and none that ends a text early."""
    for name, value in (("pad_token_id", 0), ("bos_token_id", 1), ("decoder_start_token_id", 1)):
        if getattr(generation, name, None) is None:
            setattr(generation, name, value)


def calm(model: nn.Module) -> None:
    """Switch every dropout off, in training too: two runs then compute the same.

    Of configurations as well: some models make modules of theirs in the first forward.
    """
    configs = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "__dict__")]
    for one in (*model.modules(), *configs):
        for name, value in list(vars(one).items()):
            if ("dropout" in name or "drop_path" in name or "layerdrop" in name) and isinstance(
                value, float
            ):
                setattr(one, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@torch.no_grad()
def scatter(model: nn.Module, seed: int) -> None:
    """Fill the weights so that scores differ: of an untrained model every key weighs alike."""
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if any(word in name for word in KEPT) or not weight.is_floating_point():
            continue
        noise = torch.randn(weight.shape, generator=random)
        if weight.ndim < 2:
            weight.add_(0.1 * noise if weight.std(unbiased=False) < 0.5 else 0.0)
            if "sink" in name:
                weight.copy_(noise)
        else:
            gain = 0.5 if weight.ndim > 3 else 1.0  # of convolutions, whose sums grow by stages
            weight.copy_(gain * noise / math.sqrt(max(1, weight[0].numel())))
            if any(word in name for word in ("q_proj", "query", "k_proj", "key.")):
                weight.mul_(1.5)


def kind_of(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Return decoder, encoder, seq2seq, vision, audio or other, by what the inputs are."""
    asked = names(model)
    if "decoder_input_ids" in inputs:
        return "seq2seq"
    if "input_ids" in inputs:
        if len({"pixel_values", "input_features", "bbox"} & set(inputs)):
            return "other"
        cached = "past_key_values" in asked and "attention_mask" in asked
        masked = model.config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        return "decoder" if cached and not masked else "encoder"
    first = next(iter(inputs))
    if first.startswith("pixel") or "grid_thw" in " ".join(inputs):
        return "vision"
    modal = model.input_modalities
    return "audio" if "audio" in modal or first.startswith(("input_", "audio")) else "other"


def run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Call the model as every mode does, with one seed."""
    torch.manual_seed(7)
    if any(hasattr(value, "point_inputs_per_obj") for value in inputs.values()):
        inputs = copy.deepcopy(inputs)  # a session of a video: each frame changes it
    return model(**inputs)


def first_that_runs(model: nn.Module, given: Iterator[dict[str, Any]]) -> tuple[Any, list[str]]:
    """Return the first inputs whose outputs are finite, and why the others were not taken."""
    from tests.zoo.judge import tensors

    why: list[str] = []
    for inputs in islice(given, 80):
        asked = names(model)
        anything = any(p.kind is p.VAR_KEYWORD for p in asked.values())
        if not anything and not all(n in asked for n in inputs):
            continue
        try:
            with torch.no_grad():
                out = tensors(run(model, inputs))
        except Exception as error:
            why.append(f"{'+'.join(inputs)}: {type(error).__name__}: {str(error)[:160]}")
            continue
        if out and all(bool(t.isfinite().all()) for t in out.values() if t.is_floating_point()):
            return inputs, why
        why.append(f"{'+'.join(inputs)}: no finite output")
    return None, why


def case_of(model_type: str, seed: int = 1) -> Case:
    """Return the model of a type with inputs; raise NotBuilt with the step that failed."""
    try:
        model = model_of(model_type, seed)
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"build: {type(error).__name__}: {str(error)[:300]}") from error
    made = SPECIAL[model_type](model) if model_type in SPECIAL else candidates(model, 3)
    inputs, why = first_that_runs(model, made)
    if inputs is None:
        raise NotBuilt(
            "inputs: " + ("; ".join(dict.fromkeys((why[0], why[-1]))) if why else "none")
        )
    case = Case(model_type, kind_of(model, inputs), model, inputs, None)
    if case.kind in ("decoder", "seq2seq", "encoder"):
        case.media, _ = first_that_runs(model, media_candidates(model, 3))
    return case
