"""Models whose attention is written by hand, switched by `enable`, against themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from attnkit.interop.transformers import enable, report
from attnkit.interop.transformers.byhand import LEFT, WRITTEN, stands

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**SMALL, "intermediate_size": 37}
GPT = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}
SWIN_DEPTHS: dict[str, Any] = {"depths": [2, 2], "num_heads": [2, 4]}
XLM = {"vocab_size": 60, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
XLNET = {"vocab_size": 60, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 37}
DEBERTA: dict[str, Any] = {
    **BERT,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 8,
}

MODELS: dict[str, dict[str, Any]] = {
    "Bloom": {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 60, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "Falcon": {**SMALL, "alibi": True, "new_decoder_architecture": False},
    "Deberta": DEBERTA,
    "DebertaV2": DEBERTA,
    "GPTJ": {**GPT, "rotary_dim": 4},
    "CodeGen": {**GPT, "rotary_dim": 4},
    "MPNet": BERT,
    "Tapas": BERT,
    "XLM": XLM,
    "XLNet": XLNET,
    "Swinv2": {**SWIN, **SWIN_DEPTHS},
}


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    if name == "Swinv2":
        return model.eval(), {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids = torch.randint(5, 50, (2, 12), generator=generator)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return model.eval(), {"input_ids": ids, "attention_mask": mask}


def ran(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(**given).last_hidden_state
    rows = given["attention_mask"].bool() if "attention_mask" in given else ...
    cotangent = torch.linspace(-1, 1, output.shape[-1])
    model.zero_grad()
    (output[rows] * cotangent).sum().backward()
    return output[rows], {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_by_one_call_per_layer(name: str) -> None:
    model, given = made(name)
    output, grads = ran(model, given)
    switched = enable(model)
    assert not switched.left
    found, found_grads = ran(model, given)
    torch.testing.assert_close(found, output, atol=3e-5, rtol=3e-5)
    assert grads.keys() == found_grads.keys()
    floor = 1e-2 * max(float(grad.abs().max()) for grad in grads.values())
    for each, grad in grads.items():
        scale = max(float(grad.abs().max()), floor)
        torch.testing.assert_close(found_grads[each] / scale, grad / scale, atol=3e-4, rtol=0)
    known = dict(stands(model))
    assert {told.partition(" in ")[0] for told in known.values()} == {"compared with itself"}
    assert {one.name: one.calls for one in report(model).layers if one.calls} == dict.fromkeys(
        known, 1
    )


def written() -> Iterator[str]:
    """Yield ``file.Class`` of attention in transformers that has a softmax and a product."""
    softmax = re.compile(r"\b(softmax|Softmax|scaled_dot_product_attention)\(")
    product = re.compile(r"matmul\(|bmm\(|einsum\(| @ |scaled_dot_product_attention\(")
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if not softmax.search(text):
            continue
        for one in re.finditer(r"^class (\w+).*?(?=^[^\s)]|\Z)", text, re.M | re.S):
            name, body = one[1], one[0]
            if not re.search("attention|attn", name, re.I) or "ALL_ATTENTION_FUNCTIONS" in body:
                continue
            if softmax.search(body) and product.search(body):
                yield f"{path.stem.removeprefix('modeling_')}.{name}"


def test_every_class_of_the_installed_version_is_in_a_table() -> None:
    known = {f"{file}.{name}" for file, names in WRITTEN.items() for name in names} | set(LEFT)
    model = re.compile(r"Model|PreTrained|Indexer|Connection")
    assert {one for one in written() if not model.search(one)} <= known
    assert len(WRITTEN) >= 60
    assert not {f"{file}.{name}" for file, names in WRITTEN.items() for name in names} & set(LEFT)


@pytest.mark.parametrize("name", ["Bloom", "Mpt", "Falcon", "GPTJ"])
def test_generation_with_a_cache_is_the_same(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**MODELS[name], bos_token_id=1, eos_token_id=2)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation="eager"
    )
    ids = torch.randint(5, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given = {"input_ids": ids, "attention_mask": mask}
    wanted = model.eval().generate(**given, **asked)
    enable(model)
    assert torch.equal(model.generate(**given, **asked), wanted)
    assert sum(layer.calls for layer in report(model).layers) == 2 * 4
