"""`Case`: one random composition as plain data, and the numbers that belong to it.

Nothing here knows attnkit. Masks and biases are nested tuples, such as
``("&", ("Causal", "top_left"), ("Columns", 2, None))``; `text` writes them as code, which is
what the judge runs and what a report prints. The oracle reads the tuples.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

Spec = tuple[Any, ...]
Plane = np.ndarray[Any, np.dtype[np.bool_]]

DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float64, torch.float32, torch.bfloat16, torch.float16
)}  # fmt: skip
GARBAGE = {"nan": float("nan"), "inf": float("inf"), "big": 3e38}


@dataclass(frozen=True)
class Case:
    """A composition, its sizes, and the seed of its numbers.

    Dense layouts have `batch` score matrices of ``q_len x kv_len`` per head; packed ones
    (TND) take the lengths of every sequence from `q_lens` and `kv_lens`.
    """

    mask: Spec = ("Full",)
    bias: tuple[Spec, ...] = ()
    layout: str = "BSND"
    batch: int = 1
    q_len: int = 1
    kv_len: int = 1
    q_lens: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None
    heads: int = 1
    kv_heads: int = 1
    dim: int = 2
    value_dim: int = 2
    dtype: str = "float64"
    scale: float | None = None
    softcap: float | None = None
    sink: bool = False
    garbage: str = ""
    module: bool = False
    strided: bool = False
    lse: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        parts = (
            f"{item.name}={getattr(self, item.name)!r}"
            for item in fields(self)
            if getattr(self, item.name) != item.default
        )
        return f"Case({', '.join(parts)})"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of statistics and sinks."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def packed(self) -> bool:
        return self.q_lens is not None

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """``(q_len, kv_len)`` of every batch element."""
        if self.q_lens is None or self.kv_lens is None:
            return ((self.q_len, self.kv_len),) * self.batch
        return tuple(zip(self.q_lens, self.kv_lens, strict=True))

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return self.dim**-0.5 if self.scale is None else self.scale


# -- numbers ------------------------------------------------------------------------------


def numbers(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype | str = torch.float64, grad: bool = False
) -> Tensor:
    """Standard normal numbers, rounded to a dtype."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, dtype=torch.float64, generator=generator)
    return made.to(DTYPES[dtype] if isinstance(dtype, str) else dtype).requires_grad_(grad)


def lowest_rows(
    seed: int, shape: tuple[int, ...], dtype: str = "float64", grad: bool = False
) -> Tensor:
    """Numbers as additive masks hold them: 0 or the lowest float32, some rows all lowest."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.finfo(DTYPES[dtype]).min if dtype != "float64" else -1e30
    cells = torch.rand(shape, generator=generator) < 0.4
    cells |= (torch.rand(shape[:-1], generator=generator) < 0.3)[..., None]
    made = torch.zeros(shape, dtype=DTYPES[dtype]).masked_fill(cells, low)
    return made.requires_grad_(grad)


def cells(seed: int, shape: tuple[int, ...], share: float = 0.5, kind: str = "noise") -> Tensor:
    """Boolean cells: noise, or something that is a small union of slices, or almost."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.rand(shape, generator=generator) < share
    if kind == "noise":
        return made
    causal = torch.ones(shape, dtype=torch.bool).tril()
    if kind == "causal":
        return causal
    return causal & (made | (torch.rand(shape, generator=generator) < 0.8))


def weighted(bias: Any, seed: int) -> Any:
    """A learnable bias with random weights."""
    with torch.no_grad():
        bias.weight.copy_(numbers(seed, tuple(bias.weight.shape)).abs() * 0.3)
    return bias


# -- functions of cells, in FlexAttention's form -------------------------------------------


def _feature(length: int, width: int = 3) -> Tensor:
    return numbers(length, (length, width))


FEATURES = _feature(4096)
IDS = torch.randint(0, 3, (4096,), generator=torch.Generator().manual_seed(5))


def even(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i + j) % 2 == 0


def thirds(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i + 2 * j) % 3 != 0


def told_apart(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i * 2 + j + b + 2 * h) % 3 != 0


def looks_back(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j


def same_id(b: Any, h: Any, i: Any, j: Any) -> Any:
    return IDS[i] == IDS[j]


def by_keys_only(b: Any, h: Any, i: Any, j: Any) -> Any:
    return IDS[j] > 0


def last_axis(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (FEATURES[i] * FEATURES[j]).sum(-1) > 0


def whole_pair(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (FEATURES[i] * FEATURES[j]).sum() > 0


FUNCTIONS = (even, thirds, told_apart, looks_back, same_id, by_keys_only, last_axis, whole_pair)


# -- text ---------------------------------------------------------------------------------


def text(spec: Spec) -> str:
    """A mask as code over ``M = attnkit.masks``."""
    name, *args = spec
    match name:
        case "&" | "|" | "-":
            return f"({text(args[0])} {name} {text(args[1])})"
        case "~":
            return f"(~{text(args[0])})"
        case "Dense":
            seed, shape, share, how, kind = args
            return f"M.Dense.{how}(cells({seed}, {shape}, {share}, {kind!r}))"
        case "Predicate":
            function, batch, heads = args
            return f"M.Predicate({function}, batch={batch}, num_heads={heads})"
        case "PerHead":
            return f"M.PerHead([{', '.join(map(text, args[0]))}])"
        case "Cut":
            return _cut_text(*args)
        case "Slices":
            return f"M.Slices({args[0]}, {args[1]}, {args[2]})"
        case _:
            return f"M.{name}({', '.join(map(repr, args))})"


def _cut_text(
    part: Spec, rows: Spec, keys: Spec, whole: tuple[int | None, int | None], said: bool
) -> str:
    if said:
        return f"{text(part)}.cut({rows}, {keys}, q_len={whole[0]}, kv_len={whole[1]})"
    (i0, i1), (j0, j1) = rows, keys
    return f"{text(part)}[{i0}:{'' if i1 is None else i1}, {j0}:{'' if j1 is None else j1}]"


def bias_text(spec: Spec) -> str:
    """One addend of a bias as code over ``pse = attnkit.pse``."""
    name, *args = spec
    match name:
        case "ALiBi" | "SqrtALiBi":
            return f"pse.{name}({args[0]!r}, align={args[1]!r})"
        case "LearnableALiBi":
            heads, align, seed = args
            return f"weighted(pse.ALiBi({heads}, align={align!r}, learnable=True), {seed})"
        case "T5Relative":
            heads, buckets, far, both, align, seed, dtype, grad = args
            table = f"numbers({seed}, {(buckets, heads)}, {dtype!r}, {grad})"
            return (
                f"pse.T5Relative({heads}, {buckets}, {far}, bidirectional={both}, "
                f"align={align!r}, table={table})"
            )
        case "KeyBias":
            shape, seed, dtype, grad = args
            return f"pse.KeyBias(numbers({seed}, {shape}, {dtype!r}, {grad}))"
        case "Dense":
            shape, seed, dtype, grad, before, made = args
            before = ", before_scale=True" if before else ""
            return f"pse.Dense({made}({seed}, {shape}, {dtype!r}, {grad}){before})"
        case "Cut":
            part, rows, keys, (q_len, kv_len) = args
            return f"{bias_text(part)}.cut({rows}, {keys}, q_len={q_len}, kv_len={kv_len})"
    raise ValueError(name)


# -- what a spec tells apart ----------------------------------------------------------------


def tells(spec: Spec) -> tuple[bool, bool]:
    """Whether a mask tells batch elements and heads apart."""
    name, *args = spec
    match name:
        case "Prefix" | "PrefixLM":
            return isinstance(args[0], tuple), False
        case "Padding":
            return True, False
        case "Documents":
            return isinstance(args[0][0], tuple), False
        case "Slices":
            return bool(args[0]) and (not args[0][0] or isinstance(args[0][0][0], tuple)), False
        case "Dense":
            shape = (1,) * (4 - len(args[1])) + tuple(args[1])
            return shape[0] > 1, shape[1] > 1
        case "Predicate":
            return args[1] is not None, args[2] is not None
    if name == "PerHead":
        return any(tells(part)[0] for part in args[0]), True
    parts = [tells(part) for part in args if isinstance(part, tuple) and part and _is_spec(part)]
    return any(b for b, _ in parts), any(h for _, h in parts)


def _is_spec(part: Spec) -> bool:
    return isinstance(part[0], str)
