"""What a model is asked to do, each way once: a function from a model to the tensors it gave.

Every function runs a model as a user would and returns the numbers that attention decides: rows
of padding and rows that see no key are left out. It knows nothing of who computes attention, so
that eager's result and any other's come from the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from tests.zoo.build import Case, run
from tests.zoo.inputs import BATCH, LENGTH, find, names, text_ids
from tests.zoo.judge import tensors
from tests.zoo.shrink import MEDIA

__all__ = ["MODES", "applies", "modes_of"]

Found = dict[str, Tensor]
LONG = 64
NEW = 5  # tokens that generate adds


def rows(found: Found, mask: Tensor) -> Found:
    """Return what was computed for tokens that exist; what has no axis of tokens is left out."""
    return {
        name: tensor[mask.bool()]
        for name, tensor in found.items()
        if tensor.ndim >= 2 and tensor.shape[:2] == mask.shape
    }


def padding(side: str) -> Tensor:
    """Return a 2-D mask, True where a token exists; its rows are of different lengths."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side == "right":
        mask[0, -4:] = 0
    elif side == "left":
        mask[0, :4] = 0
    else:
        mask[0, 3:5] = 0
        mask[1, 7] = 0
    return mask


def plain(case: Case, model: nn.Module) -> Found:
    """A batch without padding."""
    return tensors(run(model, case.inputs))


def padded(side: str) -> Callable[[Case, nn.Module], Found]:
    """A batch with padding on one side, or in the middle."""

    def mode(case: Case, model: nn.Module) -> Found:
        mask = padding(side)
        return rows(tensors(run(model, {**case.inputs, "attention_mask": mask})), mask)

    return mode


def long(case: Case, model: nn.Module) -> Found:
    """Rows longer than those of the other modes, twice, with another padding each time."""
    words = text_ids(21, length=LONG) % min(int(find(model.config, "vocab_size")), MEDIA)
    found: Found = {}
    for turn, (first, last) in enumerate(((0, 11), (9, 0) if case.kind == "decoder" else (0, 30))):
        mask = torch.ones(BATCH, LONG, dtype=torch.long)
        mask[0, :first] = 0
        mask[0, LONG - last :] = 0
        given = {**case.inputs, "input_ids": words, "attention_mask": mask}
        found |= {f"{n}@{turn}": t for n, t in rows(tensors(run(model, given)), mask).items()}
    return found


def packed(case: Case, model: nn.Module) -> Found:
    """Documents behind one another in a row, told by position ids that start again."""
    at = torch.stack([torch.cat([torch.arange(n), torch.arange(LENGTH - n)]) for n in (5, 8)])
    given = {**case.inputs, "position_ids": at, "use_cache": False}
    return tensors(run(model, given))


def custom4d(case: Case, model: nn.Module) -> Found:
    """A mask of the user's, additive and of four axes."""
    random = torch.Generator().manual_seed(5)
    keep = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=random) < 0.6
    keep = keep.tril() | torch.eye(LENGTH, dtype=torch.bool)
    mask = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    dtype = next(model.parameters()).dtype
    return tensors(run(model, {**case.inputs, "attention_mask": mask.to(dtype)}))


def cached(case: Case, model: nn.Module, cuts: list[int], cache: Any, side: bool = True) -> Found:
    """Feed a row in pieces through a cache, with left padding."""
    mask = padding("left") if side else torch.ones(BATCH, LENGTH, dtype=torch.long)
    at = (mask.cumsum(-1) - 1).clamp_min(0)
    found: Found = {}
    begin = 0
    for end in cuts:
        given: dict[str, Any] = {
            "input_ids": case.inputs["input_ids"][:, begin:end],
            "attention_mask": mask[:, :end],
            "past_key_values": cache,
            "use_cache": True,
        }
        if "position_ids" in names(model):
            given["position_ids"] = at[:, begin:end]
        out = run(model, given)
        cache = getattr(out, "past_key_values", cache)
        found |= {
            f"{name}@{begin}": tensor
            for name, tensor in rows(tensors(out), mask[:, begin:end]).items()
        }
        begin = end
    return found


def decode(case: Case, model: nn.Module) -> Found:
    """A prompt, then token by token."""
    return cached(case, model, [8, 9, 10, 11, 12], DynamicCache(config=text_config(model)))


def chunked(case: Case, model: nn.Module) -> Found:
    """A prompt in pieces."""
    return cached(case, model, [5, 9, 12], DynamicCache(config=text_config(model)))


def static(case: Case, model: nn.Module) -> Found:
    """Token by token in a cache of a fixed size."""
    cache = StaticCache(config=text_config(model), max_cache_len=LENGTH + 4)
    return cached(case, model, [8, 9, 10, 12], cache)


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the part that decodes text."""
    return model.config.get_text_config(decoder=True)


def seq2seq_decode(case: Case, model: nn.Module) -> Found:
    """The decoder token by token behind a padded encoder."""
    mask = padding("right") if "input_ids" in case.inputs else None
    words = case.inputs["decoder_input_ids"]
    cache: Any = EncoderDecoderCache(
        DynamicCache(config=text_config(model)), DynamicCache(config=text_config(model))
    )
    given = {n: v for n, v in case.inputs.items() if n != "decoder_input_ids"}
    if mask is not None:
        given["attention_mask"] = mask
    found: Found = {}
    memory = None
    for step in range(words.shape[1] - 2):
        step_words = words[:, :3] if step == 0 else words[:, step + 2 : step + 3]
        more = {} if memory is None else {"encoder_outputs": (memory,)}
        if memory is not None:
            given.pop("input_ids", None)
        out = run(
            model,
            {
                **given,
                **more,
                "decoder_input_ids": step_words,
                "past_key_values": cache,
                "use_cache": True,
            },
        )
        memory, cache = out.encoder_last_hidden_state, out.past_key_values
        found |= {f"{n}@{step}": t for n, t in tensors(out).items() if "encoder" not in n}
    return found


def seq2seq_padded(case: Case, model: nn.Module) -> Found:
    """An encoder behind right padding, and a decoder that sees it."""
    out = run(model, {**case.inputs, "attention_mask": padding("right")})
    return {n: t for n, t in tensors(out).items() if "encoder" not in n}


def generated(**more: Any) -> Callable[[Case, nn.Module], Found]:
    """Greedy text behind left padding, tokens and their logits."""

    def mode(case: Case, model: nn.Module) -> Found:
        given = {n: v for n, v in case.inputs.items() if n != "decoder_input_ids"}
        if "input_ids" in given:
            side = "right" if case.kind == "seq2seq" else "left"
            given["attention_mask"] = padding(side)
        torch.manual_seed(7)
        out = model.generate(
            **given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, num_beams=1,
            output_logits=True, return_dict_in_generate=True, **more,
        )  # fmt: skip
        found = {"tokens": out.sequences}
        return found | {f"logits@{n}": t for n, t in enumerate(out.logits)}

    return mode


def loss_of(found: Found) -> Tensor:
    """Return one number in which every output counts, each cell with its own weight."""
    random = torch.Generator().manual_seed(11)
    total: Any = 0.0
    for tensor in found.values():
        if tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=random).to(tensor.dtype)
            total = total + (tensor * weights).mean()
    return total


def gradients(case: Case, model: nn.Module, given: dict[str, Any], mask: Tensor | None) -> Found:
    """Return the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        found = tensors(run(model, given))
        loss_of(found if mask is None else rows(found, mask)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def grads(case: Case, model: nn.Module) -> Found:
    """Every gradient of a step; text is padded on the right."""
    given, mask = dict(case.inputs), None
    if case.kind in ("decoder", "encoder"):
        mask = padding("right")
        given["attention_mask"] = mask
    return gradients(case, model, given, mask)


def checkpoint(case: Case, model: nn.Module) -> Found:
    """The same with layers computed again in the backward pass."""
    if not model.supports_gradient_checkpointing:
        raise NotImplementedError("no gradient checkpointing")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        return grads(case, model)
    finally:
        model.eval()
        model.gradient_checkpointing_disable()


def half(case: Case, model: nn.Module) -> Found:
    """A batch in bfloat16."""
    model = model.bfloat16()
    given = {
        n: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in case.inputs.items()
    }
    return tensors(run(model, given))


DROPPED = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "attn_dropout",
           "attention_dropout_prob", "dropout_prob", "dropout_p")  # fmt: skip


def set_dropout(model: nn.Module, share: float) -> int:
    """Set the dropout of attention weights everywhere; return where."""
    found = 0
    for module in model.modules():
        if "ttention" not in type(module).__name__:
            continue
        for name in (*DROPPED, "dropout"):
            here = getattr(module, name, None)
            if isinstance(here, float):
                setattr(module, name, share)
                found += 1
            elif isinstance(here, nn.Dropout) and name != "dropout":
                here.p = share
                found += 1
        for part in (getattr(module, "config", None),):
            if isinstance(getattr(part, "attention_dropout", None), float):
                part.attention_dropout = share
    return found


def dropout(case: Case, model: nn.Module) -> Found:
    """A step of training with dropout of the weights, twice with one seed."""
    without = tensors(run(model, case.inputs))
    if not set_dropout(model, 0.4):
        raise NotImplementedError("no dropout of attention weights")
    model.train()
    try:
        first, again = (tensors(run(model, case.inputs)) for _ in range(2))
        grad = gradients(case, model, dict(case.inputs), None)
    finally:
        model.eval()
        set_dropout(model, 0.0)
    acts = any(not torch.equal(first[n], without[n]) for n in first if first[n].is_floating_point())
    same = all(torch.equal(first[n], again[n]) for n in first)
    finite = all(bool(g.isfinite().all()) for g in grad.values())
    return {
        "acts": torch.tensor(acts), "repeats": torch.tensor(same), "finite": torch.tensor(finite)
    }  # fmt: skip


def image(case: Case, model: nn.Module) -> Found:
    """Text with pictures or sounds in it."""
    return tensors(run(model, case.media or {}))


def image_grads(case: Case, model: nn.Module) -> Found:
    """Every gradient of a step with pictures or sounds."""
    return gradients(case, model, dict(case.media or {}), None)


MODES: dict[str, Callable[[Case, nn.Module], Found]] = {
    "plain": plain,
    "right": padded("right"),
    "left": padded("left"),
    "holes": padded("holes"),
    "long": long,
    "packed": packed,
    "custom4d": custom4d,
    "decode": decode,
    "chunked": chunked,
    "static": static,
    "seq2seq_right": seq2seq_padded,
    "seq2seq_decode": seq2seq_decode,
    "generate": generated(),
    "generate_static": generated(cache_implementation="static"),
    "grads": grads,
    "checkpoint": checkpoint,
    "bf16": half,
    "dropout": dropout,
    "image": image,
    "image_grads": image_grads,
}
DECODER = ("right", "left", "holes", "long", "packed", "custom4d", "decode", "chunked", "static")
ALWAYS = ("plain", "grads", "checkpoint", "bf16", "dropout")


def modes_of(case: Case) -> list[str]:
    """Return the modes that apply to this kind of model."""
    chosen = set(ALWAYS)
    if case.kind == "decoder":
        chosen |= set(DECODER)
    if case.kind == "encoder":
        chosen |= {"right", "holes", "long"}
    if case.kind == "seq2seq":
        chosen |= {"seq2seq_decode"}
        chosen |= {"seq2seq_right"} if "input_ids" in case.inputs else set()
    if case.kind in ("decoder", "seq2seq") and case.model.can_generate():
        chosen |= {"generate", "generate_static"}
    if case.media is not None:
        chosen |= {"image", "image_grads"}
    return [mode for mode in MODES if mode in chosen]


def applies(case: Case, mode: str) -> bool:
    """Return whether a mode applies."""
    return mode in modes_of(case)
