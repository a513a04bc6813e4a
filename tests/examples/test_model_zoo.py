"""The models of examples/models against transformers' and diffusers', with one checkpoint."""

from __future__ import annotations

import doctest
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
import models.parts
from attnkit.rotary import YaRN
from models.parts import load, rotary, stretch

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**TEXT, "intermediate_size": 48, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32, "beta_slow": 1}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16}
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
MLA = {**TEXT, "intermediate_size": 48, "num_key_value_heads": 4, "moe_intermediate_size": 16}
MLA |= {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}
MLA |= {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
MLA |= {"v_head_dim": 6, "first_k_dense_replace": 1}
SOUND = {"vocab_size": 99, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2}
SOUND |= {
    f"{part}_{what}": n
    for part in ("encoder", "decoder")
    for what, n in (("attention_heads", 4), ("ffn_dim", 48))
}
SOUND |= {"decoder_layers": 2, "max_source_positions": 20, "max_target_positions": 32}
SOUND |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
IMAGE = {"num_labels": 5}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}

# name: (file, class, its configuration)
KNOWN: dict[str, tuple[str, str, Any]] = {
    "gpt2": (
        "gpt2",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 99, **ENDS},
    ),
    "llama": ("llama", "LlamaForCausalLM", {**GROUPED, "rope_parameters": LLAMA3}),
    "qwen3": (
        "llama",
        "Qwen3ForCausalLM",
        {**GROUPED, "head_dim": 16, "rope_parameters": YARN | {"mscale": None}},
    ),
    "gemma3": (
        "gemma3",
        "Gemma3ForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": LAYERS,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **GROUPED,
            "intermediate_size": 32,
            "head_dim": 16,
            "sliding_window": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "deepseek": ("deepseek", "DeepseekV3ForCausalLM", MLA),
    "deepseek yarn": (
        "deepseek",
        "DeepseekV3ForCausalLM",
        {**MLA, "q_lora_rank": None, "rope_parameters": YARN, "rope_interleave": False},
    ),
    "bert": (
        "bert",
        "BertForMaskedLM",
        {**TEXT, "intermediate_size": 48, "max_position_embeddings": 64},
    ),
    "t5": (
        "t5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
        },
    ),
    "whisper": ("whisper", "WhisperForConditionalGeneration", SOUND),
    "vit": (
        "vit",
        "ViTForImageClassification",
        {
            **{k: v for k, v in TEXT.items() if k != "vocab_size"},
            **IMAGE,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 4,
        },
    ),
    "swin": (
        "swin",
        "SwinForImageClassification",
        {
            **IMAGE,
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
}
DECODERS = ("gpt2", "llama", "qwen3", "gemma3", "gpt_oss", "deepseek", "deepseek yarn")
IDS = torch.arange(24).view(2, 12) * 7 % 96 + 3


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.manual_seed(3)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity_warning()
    logging.captureWarnings(False)


def pair(name: str, **changed: Any) -> tuple[nn.Module, nn.Module]:
    """Their model and ours in float64 with the same weights, which differ from what they were."""
    file, kind, config = KNOWN[name]
    cls = getattr(transformers, kind)
    theirs = cls(cls.config_class(**(config | changed)))
    theirs.set_attn_implementation("eager")
    if name in ("gpt_oss", "deepseek", "deepseek yarn"):
        theirs.set_experts_implementation("eager")
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.2)
    theirs = theirs.double().eval()
    module = importlib.import_module(f"models.{file}")
    ours = module.from_checkpoint(theirs.config, theirs.state_dict())
    return theirs, ours.double().eval()


def near(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.1  # there is something to be unequal to
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def caches(model: Any) -> list[ak.KVCache]:
    return [ak.KVCache() for _ in range(model.config.num_hidden_layers)]


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_at_once_and_step_by_step(name: str) -> None:
    theirs, ours = pair(name)
    meant = theirs(IDS).logits
    near(ours(IDS), meant)
    kept = caches(theirs)
    near(torch.cat([ours(part, caches=kept) for part in IDS.split([5] + [1] * 7, 1)], 1), meant)


def test_gpt2_on_packed_texts() -> None:
    theirs, ours = pair("gpt2")
    documents = torch.tensor([[0] * 5 + [1] * 7, [4] * 12])
    apart = [theirs(IDS[:1, :5]).logits, theirs(IDS[:1, 5:]).logits]
    near(ours(IDS, documents), torch.cat([torch.cat(apart, 1), theirs(IDS[1:]).logits]))


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(name: str, side: str) -> None:
    theirs, ours = pair(name)
    exists, own = torch.ones(2, 12, dtype=torch.long), slice(4, 12) if side == "left" else slice(8)
    exists[1] = 0
    exists[1, own] = 1
    there = exists.bool()
    meant = torch.cat([theirs(IDS[:1]).logits[0], theirs(IDS[1:, own]).logits[0]])
    near(ours(IDS, exists)[there], meant)
    if side == "left":  # and on, where the mask of a prompt stays what it was
        kept, prompt = caches(theirs), exists[:, :6]
        steps = [ours(part, prompt, kept) for part in IDS.split([6] + [1] * 6, 1)]
        near(torch.cat(steps, 1)[there], meant)


def test_gemma3_with_images() -> None:
    theirs, ours = pair("gemma3")
    images = torch.tensor([[0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2], [0] * 12])
    i, j = torch.arange(12)[:, None], torch.arange(12)
    spans = (images[:, :, None] == images[:, None]) & (images > 0)[:, None]
    full, local = (j <= i) | spans, ((j <= i) & (j > i - 5)) | spans
    given = {"full_attention": full[:, None], "sliding_attention": local[:, None]}
    added = {k: torch.where(m, 0.0, -torch.inf).double() for k, m in given.items()}
    near(ours(IDS, images), theirs(IDS, attention_mask=added).logits)


def test_bert_with_padding_and_two_sentences() -> None:
    theirs, ours = pair("bert")
    exists = torch.ones(2, 12, dtype=torch.long)
    exists[1, 7:] = 0
    types = (torch.arange(12) > 4).long().expand(2, -1)
    meant = theirs(IDS, attention_mask=exists, token_type_ids=types).logits
    near(ours(IDS, exists, types)[exists.bool()], meant[exists.bool()])


@pytest.mark.parametrize("tied", [True, False])
def test_t5(tied: bool) -> None:
    theirs, ours = pair("t5", tie_word_embeddings=tied)
    exists, targets = torch.ones(2, 12, dtype=torch.long), IDS.flip(1)[:, :9]
    exists[1, 7:] = 0
    meant = theirs(IDS, attention_mask=exists, decoder_input_ids=targets).logits
    near(ours(IDS, targets, exists), meant)
    padding = ak.masks.Padding.of(exists)
    text, kept = ours.encoder(IDS, padding), [(ak.KVCache(), ak.KVCache()) for _ in range(2)]
    steps = [ours.decode(part, text, padding, kept) for part in targets.split(1, 1)]
    near(torch.cat(steps, 1), meant)


def test_whisper() -> None:
    theirs, ours = pair("whisper")
    sound = torch.randn(2, 8, 40, dtype=torch.float64)
    meant = theirs(sound, decoder_input_ids=IDS).logits
    near(ours(sound, IDS), meant)
    heard, kept = ours.encoder(sound), [(ak.KVCache(), ak.KVCache()) for _ in range(2)]
    near(torch.cat([ours.decode(part, heard, kept) for part in IDS.split(1, 1)], 1), meant)


@pytest.mark.parametrize(("name", "side"), [("vit", 16), ("swin", 32)])
def test_images(name: str, side: int) -> None:
    theirs, ours = pair(name)
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    near(ours(images), theirs(images).logits)


def test_a_video_with_padded_text() -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "text_dim": 10}
    theirs = diffusers.WanTransformer3DModel(
        in_channels=4, out_channels=4, freq_dim=16, ffn_dim=32, **sizes
    )
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.2)
    theirs = theirs.double().eval()
    module = importlib.import_module("models.video_dit")
    ours = module.from_checkpoint(theirs.config, theirs.state_dict()).double()
    video, text = torch.randn(2, 4, 3, 4, 6).double(), torch.randn(2, 7, 10).double()
    time, exists = torch.tensor([3, 700]), torch.arange(7) < torch.tensor([[7], [4]])

    def one(k: int, n: int) -> Tensor:
        return theirs(video[k : k + 1], time[k : k + 1], text[k : k + 1, :n], return_dict=False)[0]

    near(ours(video, time, text), torch.cat([one(0, 7), one(1, 7)]))
    near(ours(video, time, text, exists), torch.cat([one(0, 7), one(1, 4)]))


def test_block_diffusion_is_the_mask_of_the_paper() -> None:
    module = importlib.import_module("models.bd3lm")
    config = SimpleNamespace(vocab_size=31, hidden_size=16, cond_dim=8, n_heads=2, n_blocks=2)
    config.block_size = 3
    ours = module.BD3LM(config)
    for weight in ours.parameters():
        nn.init.normal_(weight, std=0.2)
    state = {f"backbone.{name}": tensor for name, tensor in ours.state_dict().items()}
    state["backbone.vocab_embed.embedding"] = state.pop("backbone.vocab_embed.weight")
    state["backbone.rotary_emb.inv_freq"] = torch.zeros(4)
    ours, twin = (module.from_checkpoint(config, state).double() for _ in range(2))

    def attend(block: Any, x: Tensor) -> Tensor:
        i, n = torch.arange(x.shape[1]), x.shape[1] // 2
        (clean_q, clean_k), part = ((i >= n)[:, None], i >= n), i % n // 3
        same = (part[:, None] == part) & (clean_q == clean_k)
        seen = same | (part[:, None] > part) & clean_k
        q, k, v = (t.unflatten(-1, (2, -1)) for t in block.attn_qkv(x).chunk(3, -1))
        q, k = (block.rotary.rotate(t, i % n).movedim(1, 2) for t in (q, k))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v.movedim(1, 2)).movedim(1, 2)

    noisy, clean, sigma = IDS % 31, IDS.flip(1) % 31, torch.tensor([0.3, 2.0])
    meant = ours(noisy, clean, sigma)
    for block in twin.blocks:
        block.attend = lambda x, block=block: attend(block, x)
    near(meant, twin(noisy, clean, sigma))
    with pytest.raises(ValueError, match="10 tokens are not blocks of 3"):
        ours(noisy[:, :10], clean[:, :10], sigma)


@pytest.mark.parametrize("name", [*KNOWN])
def test_every_gradient_reaches_its_weight(name: str) -> None:
    ours = pair(name)[1]
    sound, image = torch.randn(2, 8, 40).double(), torch.randn(1, 3, 32, 32).double()
    given: dict[str, Callable[[], Tensor]] = {
        "whisper": lambda: ours(sound, IDS),
        "t5": lambda: ours(IDS, IDS, torch.ones_like(IDS)),
        "vit": lambda: ours(image[..., :16, :16]),
        "swin": lambda: ours(image),
    }
    with torch.enable_grad():
        given.get(name, lambda: ours(IDS))().square().sum().backward()
    without = {n for n, w in ours.named_parameters() if w.grad is None}
    assert not without


def test_a_checkpoint_that_does_not_fit_is_told() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"without a tensor: \['bias'\].*place: \['x'\]"):
        load(layer, {"w": torch.zeros(2, 2), "x": torch.zeros(2)}, {"w": "weight"})


def test_rotary_of_a_configuration() -> None:
    assert doctest.testmod(models.parts).failed == 0
    assert rotary(LLAMA3).scaling == ak.rotary.Llama3(8.0, 1.0, 4.0, 32)
    scaling = rotary(YARN | {"mscale": 0.5}).scaling
    assert isinstance(scaling, YaRN)
    assert scaling.attention_factor == stretch({"factor": 4.0, "m": 0.5}, "m") / stretch(
        YARN, "mscale"
    )
    with pytest.raises(KeyError, match="longrope"):
        rotary({"rope_type": "longrope", "rope_theta": 1e4})
