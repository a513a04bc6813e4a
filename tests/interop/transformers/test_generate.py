"""`generate` gives eager's tokens and logits, with every cache, and decoding plans nothing anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from attnkit.backends import make_plan
from attnkit.interop.transformers import enable
from tests.interop.transformers.models import _T5, _WHISPER, CASES, _eager, _of, padded

DECODERS = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "llama4")
CAUSED = ("decoder_start_token_id", "encoder")


def _generated(model: Any, cache: str | None, **inputs: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        cache_implementation=cache,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
    )


def _agree(eager: Any, model: Any, cache: str | None, **inputs: Any) -> None:
    enable(model)
    wanted, found = (_generated(one, cache, **inputs) for one in (eager, model))
    assert torch.equal(found.sequences, wanted.sequences)
    for step, logits in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(step, logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str, cache: str | None) -> None:
    torch.manual_seed(0)
    eager: Any = CASES[name].build().eval()
    _eager(eager)
    _agree(eager, copy.deepcopy(eager), cache, **padded("left"))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["T5", "UMT5", "Whisper"])
def test_encoder_decoders(name: str, cache: str | None) -> None:
    torch.manual_seed(0)
    more = _WHISPER if name == "Whisper" else {**_T5, "decoder_start_token_id": 0}
    eager: Any = _of(f"{name}ForConditionalGeneration", f"{name}Config", **more)().eval()
    _eager(eager)
    inputs = padded("right")
    if name == "Whisper":
        inputs = {"input_features": torch.randn(2, 8, 24)}
        eager.generation_config = transformers.GenerationConfig(
            decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
    _agree(eager, copy.deepcopy(eager), cache, **inputs)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_decoding_steps_plan_nothing(name: str) -> None:
    """The first step plans; those after it are the same plan with other keys."""
    torch.manual_seed(0)
    model: Any = CASES[name].build().eval()
    enable(model)
    inputs = padded("left")
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
        mask, made = inputs["attention_mask"], []
        for _ in range(6):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            step = torch.full((2, 1), 5)
            model(input_ids=step, attention_mask=mask, past_key_values=past, use_cache=True)
            made.append(make_plan.cache_info().misses)
    assert made[1:] == made[:1] * 5
