"""What the adapter of transformers costs: a layer's call, a new padding, a step of decoding.

Microseconds of one thread beside the operators: sizes are tiny, so that the operators cost next to
nothing. Beside it what transformers' own `sdpa` takes for the same.

    python benchmarks/switching.py
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask

import attnkit as ak
from attnkit import masks
from attnkit.interop.transformers import enable
from attnkit.interop.transformers.interface import attend

RESULTS = Path(__file__).parent / "results" / "switching.md"
ROUNDS = 200


def microseconds(*calls: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Medians of calls that take turns."""
    for call in calls:
        for _ in range(10):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for spent, call in zip(times, calls, strict=True):
            start = perf_counter()
            call()
            spent.append(perf_counter() - start)
    return [statistics.median(spent) * 1e6 for spent in times]


class Layer(nn.Module):
    """What an attention function is told of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = True, 1


def calls() -> list[tuple[str, list[float]]]:
    core = ak.Attention(4, 16, mask=masks.Causal(), layout="BNSD")
    module = Layer()

    def one(given: Tensor) -> list[float]:
        mask = _made(given)
        return microseconds(
            lambda: attend(module, given, given, given, mask, scaling=0.25),
            lambda: core(given, given, given),
            lambda: sdpa_attention_forward(module, given, given, given, None, scaling=0.25),
        )

    query = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        found = [("a layer's call, inference", one(query))]
    return [*found, ("a layer's call, training", one(query.requires_grad_()))]


def _made(query: Tensor) -> Tensor:
    model = _llama()
    enable(model)
    config, size = model.config, query.shape[2]
    made: Tensor = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(query.shape[0], size, config.hidden_size),
        attention_mask=None,
        past_key_values=None,
    )
    return made


def _llama(implementation: str = "eager") -> nn.Module:
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4)
    config._attn_implementation = implementation
    return transformers.LlamaForCausalLM(config).eval()


def paddings() -> list[tuple[str, list[float]]]:
    """A new padding in each round: the mask of the model call, and the plan of its first layer."""
    models = [_llama(), _llama("sdpa")]
    enable(models[0])
    batch, size = 32, 2048
    inputs = torch.zeros(batch, size, 64)
    here = torch.empty(batch, size, 4, 16)
    cores = [
        (ak.Attention(4, 16, backend="tiled"), here),
        (ak.Attention(4, 16, backend="emulated"), here.to("meta", torch.bfloat16)),
    ]

    def exists() -> Tensor:
        lengths = torch.tensor([[random.randint(size // 4, size)] for _ in range(batch)])
        return (torch.arange(size) < lengths).long()

    def lift(model: nn.Module) -> Tensor:
        made: Tensor = create_causal_mask(
            config=model.config, inputs_embeds=inputs, attention_mask=exists(), past_key_values=None
        )
        return made

    def plan(core: ak.Attention, heads: Tensor) -> object:
        return core.plan(heads, heads, heads, mask=lift(models[0]).lifted.mask)  # type: ignore[attr-defined]

    spent = microseconds(
        exists,
        lambda: lift(models[0]),
        lambda: lift(models[1]),
        *(partial(plan, *one) for one in cores),
        rounds=30,
    )
    none, lifted, theirs, *planned = (one - spent[0] for one in spent)
    found = [(f"a new padding of {batch} x {size:,}: its mask", [lifted, none, theirs])]
    for name, one in zip(("tiled", "the fused kernel"), planned, strict=True):
        found.append((f"the same, and its plan for {name}", [one]))
    return found


def steps() -> list[tuple[str, list[float]]]:
    """One step of decoding of a model of two layers, beside `sdpa`."""
    ids, exists = torch.ones(8, 64, dtype=torch.long), torch.ones(8, 64, dtype=torch.long)
    exists[:, :5] = 0
    times = []
    for name in ("eager", "sdpa"):
        model = _llama(name)
        if name == "eager":
            enable(model)
        with torch.no_grad():
            spent = []
            for count in (33, 1):
                given = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
                call = partial(model.generate, input_ids=ids, attention_mask=exists, **given)
                spent += microseconds(call, rounds=9)
        times.append((spent[0] - spent[1]) / 32)
    return [
        ("a step of `generate`, 8 texts padded on the left, two layers", [times[0], 0, times[1]])
    ]


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    lines = [
        "# The adapter of transformers",
        "",
        f"Microseconds, medians, one thread; transformers {transformers.__version__}, torch "
        f"{torch.__version__}. `python benchmarks/switching.py`.",
        "",
        "| | attnkit by the adapter | a kept `ak.Attention` | transformers' `sdpa` |",
        "|---|---:|---:|---:|",
    ]
    for name, some in (*calls(), *paddings(), *steps()):
        cells = [f"{one:,.0f}" if one else "" for one in some]
        lines.append(f"| {name} | " + " | ".join([*cells, *[""] * (3 - len(cells))]) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
