"""attnkit on a GPU beside what else runs there: ``python benchmarks/gpu.py``.

Rows are shapes of models, in bfloat16. Beside a layer of attnkit (``backend="auto"``): compiled
FlexAttention with a mask function written by hand, each of the kernels behind
`scaled_dot_product_attention` by its name, and flash-attn where it is installed. Medians of
alternating rounds, by the device's own events. Writes benchmarks/results/gpu.md.

Without a CUDA device it says so and is done. ``--device cpu`` runs the same code on small shapes,
which shows that it runs; it writes a file only with ``--out``.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attnkit as ak
from attnkit import masks, pse
from attnkit.doctor.clock import Clock, alternate
from attnkit.doctor.screen import NoDevice
from attnkit.masks import Mask

RESULTS = Path(__file__).parent / "results" / "gpu.md"
KERNELS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
COLUMNS = ("FlexAttention", *KERNELS, "flash-attn")
# Outputs are of size one; bfloat16 keeps three digits, and each kernel rounds elsewhere.
FAR = 0.1

Cells = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Note = tuple[str, str]
"""Who did not run, and why."""


@dataclass(frozen=True)
class Row:
    """A shape of a model: its mask as attnkit says it and as a function of indices by hand.

    `flag` is ``is_causal`` where SDPA's flag is the whole mask; None where it takes a matrix.
    `flash` are the arguments with which flash-attn says it; None where it cannot.
    """

    name: str
    mask: Mask
    cells: Cells | None
    flag: bool | None
    flash: dict[str, Any] | None
    q_len: int
    kv_len: int
    batch: int
    heads: int
    kv_heads: int
    dim: int
    alibi: bool = False
    softcap: float | None = None
    trains: bool = True


@dataclass(frozen=True)
class Scale:
    """How large the rows are, and where their index tensors lie."""

    small: bool
    device: torch.device

    def n(self, length: int) -> int:
        """A length; on small shapes a sixteenth of it."""
        return max(length // 16, 8) if self.small else length

    @property
    def bert(self) -> tuple[int, int, int, int]:
        """Batch, heads, key heads and their size, of an encoder."""
        return (2, 2, 2, 32) if self.small else (16, 12, 12, 64)

    @property
    def llama(self) -> tuple[int, int, int, int]:
        """The same of a decoder."""
        return (1, 4, 2, 32) if self.small else (2, 32, 8, 128)


def behind(start: int) -> Cells:
    """Return causal cells of queries that begin at a key."""
    return lambda b, h, i, j: j <= i + start


def encoders(scale: Scale) -> list[Row]:
    """Return what sees both ways."""
    n, bert = scale.n, scale.bert
    double = (2 * bert[0], *bert[1:])
    kept = n(512) // 2 + torch.arange(bert[0], device=scale.device) * n(512) // (2 * bert[0])
    return [
        Row(
            "BERT, padding", masks.Padding(tuple(kept.tolist())),
            lambda b, h, i, j: j < kept[b], None, None, n(512), n(512), *bert,
        ),
        Row("ViT, 197 tokens", masks.Full(), None, False, {}, 197, 197, *double),
        Row("32 x 128 tokens", masks.Full(), None, False, {}, n(128), n(128), *double),
        Row("cross-attention, 100 on 1,500", masks.Full(), None, False, {}, 100, n(1500), *bert),
    ]  # fmt: skip


def decoders(scale: Scale) -> list[Row]:
    """Return what trains and reads prompts, causally."""
    n, llama = scale.n, scale.llama
    one = (1, *llama[1:])
    causal, window, start = masks.Causal(), n(1024), behind(0)
    parts = [n(1024), n(2048), n(1024), n(4096)]
    ids = torch.repeat_interleave(torch.tensor(parts)).to(scale.device)
    flash = {"causal": True}
    return [
        Row("causal 4k", causal, start, True, flash, n(4096), n(4096), *llama),
        Row("causal 16k", causal, start, True, flash, n(16384), n(16384), *one),
        Row(
            "window 1,024 of 8k", causal & masks.SlidingWindow(window),
            lambda b, h, i, j: (j <= i) & (i - j < window), None,
            flash | {"window_size": (window - 1, 0)}, n(8192), n(8192), *llama,
        ),
        Row(
            "the same and 4 sinks", causal & (masks.SlidingWindow(window) | masks.Prefix(4)),
            lambda b, h, i, j: (j <= i) & ((i - j < window) | (j < 4)), None, None,
            n(8192), n(8192), *llama,
        ),
        Row(
            "4 documents of 8k", causal & masks.Documents(parts),
            lambda b, h, i, j: (j <= i) & (ids[i] == ids[j]), None, None, n(8192), n(8192), *one,
        ),
        Row(
            "prefix 1,024 of 4k", masks.PrefixLM(window),
            lambda b, h, i, j: (j <= i) | (j < window), None, None, n(4096), n(4096), *llama,
        ),
        Row("ALiBi 4k", causal, start, None, flash, n(4096), n(4096), *llama, alibi=True),
        Row(
            "soft-cap 4k", causal, start, None, flash | {"softcap": 30.0},
            n(4096), n(4096), *llama, softcap=30.0,
        ),
    ]  # fmt: skip


def decoding(scale: Scale) -> list[Row]:
    """Return what only infers."""
    n, one = scale.n, (1, *scale.llama[1:])
    eight, causal = (8, *one[1:]), masks.Causal()
    chunk = behind(n(8192) - n(512))
    return [
        Row("decode, 1 on 32k", causal, None, False, {}, 1, n(32768), *one, trains=False),
        Row("decode, 8 x 1 on 8k", causal, None, False, {}, 1, n(8192), *eight, trains=False),
        Row(
            "chunk of 512 on 8k", causal, chunk, None, {"causal": True},
            n(512), n(8192), *one, trains=False,
        ),
    ]  # fmt: skip


def ours(row: Row, device: torch.device) -> Attend:
    """Return attnkit's layer."""
    bias = pse.ALiBi(row.heads) if row.alibi else None
    layer = ak.Attention(
        row.heads, row.dim, num_kv_heads=row.kv_heads, mask=row.mask, pse=bias,
        layout="BNSD", softcap=row.softcap,
    )  # fmt: skip
    return layer.to(device)


def by_flex(row: Row, device: torch.device) -> Attend:
    """Return FlexAttention, compiled for this row alone, as its documentation writes it."""
    block = None
    if row.cells is not None:
        batch = row.batch if row.mask.batches else None
        block = create_block_mask(row.cells, batch, None, row.q_len, row.kv_len, device)
    slopes, cap = alibi_slopes(row, device), row.softcap

    def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score if slopes is None else score - slopes[h] * (i - j).abs()
        return score if cap is None else cap * torch.tanh(score / cap)

    own = score if row.alibi or cap else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, score_mod=own, block_mask=block, enable_gqa=row.heads != row.kv_heads)


def by_sdpa(row: Row, device: torch.device, kernel: SDPBackend) -> Attend:
    """Return SDPA on one of its kernels, with a flag or a matrix."""
    if row.softcap is not None:
        raise RuntimeError("it has no soft-cap")
    matrix = None
    if row.flag is None:
        batch = row.batch if row.mask.batches else 1
        matrix = row.mask.materialize(row.q_len, row.kv_len, batch=batch, device=device)
    slopes = alibi_slopes(row, device)
    if matrix is not None and slopes is not None:
        place = (torch.arange(length, device=device) for length in (row.q_len, row.kv_len))
        bias = -slopes[:, None, None] * (next(place)[:, None] - next(place)).abs()
        matrix = bias.masked_fill(~matrix, -torch.inf).to(torch.bfloat16)

    grouped, group = row.heads != row.kv_heads, row.heads // row.kv_heads
    repeats = grouped and kernel == SDPBackend.EFFICIENT_ATTENTION  # it shares no key heads

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if repeats:
            key, value = (t.repeat_interleave(group, 1) for t in (key, value))
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=matrix, is_causal=bool(row.flag),
                enable_gqa=grouped and not repeats,
            )  # fmt: skip

    return attend


def by_flash(row: Row, device: torch.device) -> Attend:
    """Return flash-attn, where it is installed and has words for the row."""
    try:
        flash = importlib.import_module("flash_attn").flash_attn_func
    except ImportError:
        raise RuntimeError("it is not installed") from None
    if row.flash is None:
        raise RuntimeError("it has no argument for this mask")
    given = row.flash | ({"alibi_slopes": alibi_slopes(row, device)} if row.alibi else {})

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = flash(*(t.transpose(1, 2) for t in (query, key, value)), **given)
        return output.transpose(1, 2)

    return attend


def alibi_slopes(row: Row, device: torch.device) -> Tensor | None:
    """Return the slope of each head; there are 2, 4, 8... heads here."""
    steps = torch.arange(1, row.heads + 1, device=device)
    return torch.exp2(-8.0 * steps / row.heads) if row.alibi else None


def contestants(row: Row, device: torch.device) -> Iterator[tuple[str, Callable[[], Attend]]]:
    """Yield each one's name and what makes it; making it may fail, and that is told."""
    yield "attnkit", partial(ours, row, device)
    yield "FlexAttention", partial(by_flex, row, device)
    for name, kernel in KERNELS.items():
        yield name, partial(by_sdpa, row, device, kernel)
    yield "flash-attn", partial(by_flash, row, device)


def tensors(row: Row, device: torch.device, trains: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, ``[b n s d]``."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(row.batch, heads, length, row.dim, device=device, dtype=torch.bfloat16)
        for heads, length in ((row.heads, row.q_len), *[(row.kv_heads, row.kv_len)] * 2)
    )
    return query.requires_grad_(trains), key.requires_grad_(trains), value.requires_grad_(trains)


def run(attend: Attend, operands: tuple[Tensor, Tensor, Tensor], slope: Tensor | None) -> Tensor:
    """Attend, and go back where there is a gradient of the output."""
    if slope is None:
        with torch.no_grad():
            return attend(*operands)
    output = attend(*operands)
    torch.autograd.grad(output, operands, slope)
    return output.detach()


def measure(row: Row, device: torch.device, trains: bool, rounds: int) -> tuple[str, list[Note]]:
    """Return the line of a row's table, and who did not run there and why."""
    torch.compiler.reset()  # a form too many of one function would run uncompiled, silently
    operands = tensors(row, device, trains)
    slope = torch.ones_like(operands[0]) if trains else None
    forms: dict[str, Callable[[], object]] = {}
    notes: list[Note] = []
    first: Tensor | None = None
    for name, make in contestants(row, device):
        try:
            form = partial(run, make(), operands, slope)
            output = form().float()
        except Exception as error:  # each has its own way to say that it cannot
            notes.append((name, (str(error).strip().splitlines() or [repr(error)])[0]))
            continue
        first = output if first is None else first
        gap = float((output - first).abs().max())
        if gap <= FAR:  # a NaN is not
            forms[name] = form
        else:
            notes.append((name, f"its output differs by {gap:.2g}, and was not timed"))
    times, more = alternate(forms, Clock(device), rounds)
    notes += [("alternating", told) for told in more]
    base = times.get("attnkit")
    own = "-" if base is None else f"{base / 1e6:.3f}"
    others = [f"{times[n] / base:.2f}" if base and n in times else "-" for n in COLUMNS]
    return f"| {told_as(row, trains)} | {own} | {' | '.join(others)} |", notes


def told_as(row: Row, trains: bool) -> str:
    return f"{row.name}, {'both' if trains else 'forward'}"


def header(device: torch.device, rounds: int) -> list[str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return [
        "# attnkit on a GPU",
        "",
        f"Made by `python benchmarks/gpu.py`. bfloat16, medians of {rounds} alternating rounds. "
        "The first column is attnkit's time in milliseconds; the others say how many times as "
        "long the others take (below 1: they are faster). `both` is forward and backward.",
        "",
        f"{name}, torch {torch.__version__}, Python {platform.python_version()}",
        "",
        f"| shape | attnkit, ms | {' | '.join(COLUMNS)} |",
        f"|---|{'---:|' * (len(COLUMNS) + 1)}",
    ]


def compare(device: torch.device, rounds: int, minutes: float, out: Path | None) -> None:
    """Measure every row as long as there is time, and write what was found after each."""
    started, lines = time.monotonic(), header(device, rounds)
    notes: dict[Note, list[str]] = {}
    scale = Scale(device.type == "cpu", device)
    todo = [
        (row, trains)
        for row in (*encoders(scale), *decoders(scale), *decoding(scale))
        for trains in ((False, True) if row.trains else (False,))
    ]
    for row, trains in todo:
        if time.monotonic() - started > 60 * minutes:
            said = [("not measured", f"{minutes:g} minutes were spent")]
        else:
            line, said = measure(row, device, trains, rounds)
            lines.append(line)
            print(line, flush=True)
        for note in said:
            notes.setdefault(note, []).append(told_as(row, trains))
        if out is not None:
            text = [*lines, "", *absences(notes, len(todo)), ""]
            out.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(absences(notes, len(todo))))


def absences(notes: dict[Note, list[str]], every: int) -> Iterator[str]:
    """Yield a line per contestant and reason for which it did not run."""
    for (name, reason), where in sorted(notes.items()):
        yield f"- {name}: {reason} ({'everywhere' if len(where) == every else '; '.join(where)})"


def find_device(name: str) -> torch.device:
    """Return a device that is there."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise NoDevice(f"no CUDA device {name} (torch {torch.__version__}); nothing was measured")
    return device


def main(argv: list[str] | None = None) -> int:
    """Measure; without a device a line says so, and that is no failure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    try:
        device = find_device(given.device)
    except NoDevice as error:
        print(f"benchmarks/gpu.py: {error}")
        return 0
    out = given.out or (RESULTS if device.type == "cuda" else None)
    if device.type == "cpu":
        torch.set_num_threads(1)  # shapes so small that several threads only wait
    warnings.simplefilter("ignore")  # SDPA says at length why a kernel was not taken
    compare(device, given.rounds, given.minutes, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
