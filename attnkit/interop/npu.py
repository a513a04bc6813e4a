"""Call sites of the fused kernel: ``torch_npu.npu_fusion_attention`` and its v2.

    from attnkit.interop.npu import npu_fusion_attention      # was: torch_npu.npu_fusion_attention

The arguments are read as what they compute, a mask, a bias, a scale, and that is planned: on an
NPU as the call it was or a cheaper one, anywhere else on torch's kernels, and with the gradient
of a bias. `read_call` in the place of the function tells what its integers mean. What the op
computes without a word, where something else was meant, is told in a warning. The op itself, bad
parts included, is `attnkit.fusion_attention`.

Rows without a key are 0, where the op gives some of them the mean of all values.

Source: op-plugin's schemas of releases 5.0.0 to 26.1.0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame

from attnkit.eager import untraced
from attnkit.errors import KernelContractError, KernelContractTypeError, shown
from attnkit.interop.host import ints_on_host
from attnkit.interop.npu_reading import CallReading, read
from attnkit.kernel.scores import MASKED
from attnkit.kernel.sizes import UNBOUNDED
from attnkit.kernel.stats import pack_stats

__all__ = [
    "CallReading",
    "FusedResult",
    "npu_fusion_attention",
    "npu_fusion_attention_v2",
    "read_call",
    "run_call",
]

Ints = Sequence[int] | Tensor


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNBOUNDED,
    next_tockens: int = UNBOUNDED,
    inner_precise: int = 0,
    prefix: Ints | None = None,
    actual_seq_qlen: Ints | None = None,
    actual_seq_kvlen: Ints | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> FusedResult:
    """Attend as ``torch_npu.npu_fusion_attention`` does; its positional order, that of 5.0 too.

    Returns what the op returns: (attention_out, softmax_max, softmax_sum, softmax_out, seed,
    offset, numels), the statistics made when they are looked at. Arguments are those of
    `attnkit.fusion_attention`, with ``pse_type=1``: pse is added before the scale.

    Raises `KernelContractError` for what the op rejects or leaves undefined.

    >>> x = torch.randn(1, 6, 2, 16)
    >>> npu_fusion_attention(x, x, x, 2, "BSND", scale=0.25)[0].shape
    torch.Size([1, 6, 2, 16])
    """
    return run_call(locals(), "v1")


def npu_fusion_attention_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    inner_precise: int = 0,
    prefix: Ints | None = None,
    actual_seq_qlen: Ints | None = None,
    actual_seq_kvlen: Ints | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Ints | None = None,
    kv_start_idx: Ints | None = None,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> FusedResult:
    """Attend as ``torch_npu.npu_fusion_attention_v2`` does.

    `query_rope` and `key_rope` are more channels of each head: they are joined to the others.

    >>> x = torch.randn(1, 6, 2, 16)
    >>> slopes = torch.tensor([0.5, 0.25])
    >>> npu_fusion_attention_v2(x, x, x, 2, "BSND", scale=0.25, pse=slopes, pse_type=2)[0].shape
    torch.Size([1, 6, 2, 16])
    """
    return run_call(locals(), "v2")


def read_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int | None = None,
    next_tockens: int | None = None,
    inner_precise: int = 0,
    prefix: Ints | None = None,
    actual_seq_qlen: Ints | None = None,
    actual_seq_kvlen: Ints | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
    *,
    pre_tokens: int | None = None,
    next_tokens: int | None = None,
    pse_type: int = 1,
    q_start_idx: Ints | None = None,
    kv_start_idx: Ints | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    version: str = "v2",
) -> CallReading:
    """Return what a call means: write this in the place of any of the op's functions.

    It takes the arguments of each of them, v1's by position. Meta tensors will do, but for a
    mask of which the content counts. `version` is "v1", "v2" or "mindspeed", for what only one of
    them does.

    >>> x = torch.empty(1, 4096, 8, 128, dtype=torch.bfloat16, device="meta")
    >>> mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    >>> print(read_call(x, x, x, 8, "BSND", atten_mask=mask.to("meta"), scale=0.088,
    ...                 sparse_mode=4, pre_tokens=1024, next_tokens=0))
    SlidingWindow(1025), scale=0.088, BSND
    sparse_mode=4: from 1024 behind the query's place to 0 ahead of it, both included, from the
    bottom-right corner (the last query stands on the last key): 1025 keys
    pre_tokens=1024 keeps 1025 keys, the query's own included; pass pre_tokens=1023 for a window of
    1024 keys [window-keeps-one-more]
    """
    given = dict(locals())
    for old, new in _SPELLING.items():
        if given[new] is not None and given[old] is not None:
            raise KernelContractTypeError(
                f"{new}={shown(given[new])} and {old}={shown(given[old])} are one argument; give "
                "one of them",
                ["given-twice"],
            )
        given[old] = next((n for n in (given.pop(new), given[old]) if n is not None), UNBOUNDED)
    return read(_as_ours(given), given["version"])


class FusedResult(Sequence[Any]):
    """The op's seven outputs, by index, by name, or unpacked; statistics are made when asked for.

    >>> x = torch.randn(1, 6, 2, 16)
    >>> out, softmax_max, softmax_sum, *_ = npu_fusion_attention(x, x, x, 2, "BSND", scale=0.25)
    >>> softmax_max.shape
    torch.Size([1, 2, 6, 8])
    """

    names = (
        "attention_out",
        "softmax_max",
        "softmax_sum",
        "softmax_out",
        "seed",
        "offset",
        "numels",
    )

    def __init__(self, reading: CallReading, attention_out: Tensor, stats: Any) -> None:
        self.reading, self.attention_out, self._stats = reading, attention_out, stats
        self.softmax_out = attention_out.new_empty(0)
        self.seed = self.offset = 0
        self.numels = reading.call.numels

    @cached_property
    def softmax_max(self) -> Tensor:
        """The largest score of each row, eight equal copies; -FLT_MAX where there is no key."""
        peak = self._stats.max
        return self._packed(peak.masked_fill(peak == -torch.inf, MASKED))

    @cached_property
    def softmax_sum(self) -> Tensor:
        """The softmax denominator over ``exp(softmax_max)``; FLT_MAX where there is no key."""
        total = self._stats.sum
        return self._packed(total.masked_fill(total == 0, -MASKED))

    def _packed(self, rows: Tensor) -> Tensor:
        call = self.reading.call
        unused = call.sizes[0].length - len(rows) if call.is_packed else 0
        if unused:
            rows = torch.cat((rows, rows.new_zeros((unused, *rows.shape[1:]))))
        return pack_stats(call, rows.detach())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(getattr(self, name) for name in self.names[index])
        return getattr(self, self.names[index])

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self.names)


_READ_IN_GRAPH = (
    "a call of the fused kernel is read and planned between compiled graphs; inside of one, write "
    "what attnkit.interop.npu.read_call tells of it with ak.attention"
)


@untraced(_READ_IN_GRAPH)
def run_call(given: dict[str, Any], version: str) -> FusedResult:
    """Read a call that was given by name, and run it as planned."""
    outer = set_eval_frame(None)  # no graph begins within, after one has broken off here
    try:
        return _run(given, version)
    finally:
        set_eval_frame(outer)


def _run(given: dict[str, Any], version: str) -> FusedResult:
    ours = _as_ours(given)
    reading = read(ours, version)
    for found in reading.findings:
        if found.code not in _HINTS:
            warnings.warn(f"npu_fusion_attention: {found}", UserWarning, stacklevel=4)
    if version == "v2" and reading.sink is None and reading.call.softmax_layout:
        reading = replace(reading, call=replace(reading.call, softmax_layout=""))
    output, stats = reading.attend(ours["query"], ours["key"], ours["value"])
    return FusedResult(reading, output, stats)


# What a call may well mean: `read_call` tells, and who runs the call is not told each time.
_HINTS = frozenset(
    {
        "scale-is-one",
        "pse-is-scaled",
        "window-keeps-one-more",
        "tokens-ignored",
        "pse-learnable",
    }
)

_LISTS = ("prefix", "actual_seq_qlen", "actual_seq_kvlen", "q_start_idx", "kv_start_idx")
_SPELLING = {"pre_tockens": "pre_tokens", "next_tockens": "next_tokens"}
_DEFAULTS: dict[str, Any] = {
    "softmax_layout": "",
    "sink": None,
    "dropout_mask": None,
    "seed": 0,
    "offset": 0,
    "pse_type": 1,
    "q_start_idx": None,
    "kv_start_idx": None,
}


def _as_ours(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by the names of `attnkit.fusion_attention`."""
    named = {_SPELLING.get(name, name): value for name, value in given.items()}
    named = {**_DEFAULTS, **_in_order(named)}
    for name in _LISTS:
        if isinstance(named[name], Tensor):  # op version 3 takes them so
            named[name] = ints_on_host(name, named[name])
    ropes = named.pop("query_rope", None), named.pop("key_rope", None)
    if ropes != (None, None):
        named |= _joined(named, *ropes)
    named.pop("version", None)
    return named


def _in_order(named: dict[str, Any]) -> dict[str, Any]:
    """Return arguments that came in the order of torch_npu 5.0, which had no actual_seq_*.

    There sparse_mode, gen_mask_parallel and sync stood where actual_seq_qlen, actual_seq_kvlen and
    sparse_mode stand now; an int is no list of lengths.
    """
    mode, parallel, sync = (
        named[name] for name in ("actual_seq_qlen", "actual_seq_kvlen", "sparse_mode")
    )
    if not isinstance(mode, int):
        return named
    if not isinstance(parallel, bool | None) or (sync is not True and sync != 0):
        raise KernelContractTypeError(
            f"actual_seq_qlen={shown(mode)}, actual_seq_kvlen={shown(parallel)}, "
            f"sparse_mode={shown(sync)}: by position, torch_npu 5.0 had sparse_mode, "
            "gen_mask_parallel and sync there, and these are not both; pass them by name",
            ["argument-type"],
        )
    return {
        **named,
        "sparse_mode": mode,
        "gen_mask_parallel": True if parallel is None else parallel,
        "sync": bool(sync),
        "actual_seq_qlen": None,
        "actual_seq_kvlen": None,
    }


def _joined(named: dict[str, Any], query_rope: Any, key_rope: Any) -> dict[str, Any]:
    """Return query and key with the channels of their rotary parts behind their own."""
    pairs = {"query": (named["query"], query_rope), "key": (named["key"], key_rope)}
    merged = str(named["input_layout"]).upper() in ("BSH", "SBH")
    if merged or not all(_alike(*pair) for pair in pairs.values()):
        raise KernelContractError(
            f"query_rope={shown(query_rope)}, key_rope={shown(key_rope)} beside query "
            f"{shown(named['query'])} and key {shown(named['key'])}: give both, with the same axes "
            "but the last, in a layout that keeps heads apart",
            ["rope-shape"],
        )
    return {name: torch.cat(list(pair), -1) for name, pair in pairs.items()}


def _alike(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and bool(one.shape[:-1] == other.shape[:-1])
