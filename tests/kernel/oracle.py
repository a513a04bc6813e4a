"""The kernel's contract a second time, from its documents, sharing no code with the package.

`broken` says which rules a call breaks, `attention` what a legal call computes, in float64 and
over whole matrices. Both read a plain dictionary of the op's own arguments. Rules are named by
their codes, so that the two statements can be compared name by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = [
    "CAUSAL",
    "PREFIX",
    "Sizes",
    "attention",
    "broken",
    "decisions",
    "defaults",
    "sizes_of",
    "structure",
]

Call = dict[str, Any]

LARGEST = float(np.finfo(np.float32).max)
UNBOUNDED = 2**31 - 1
FULL, COMPRESSED = (0, 1, 5), (2, 3, 4, 6, 7, 8)
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
PREFIX = torch.cat([CAUSAL, (torch.arange(2048) >= 1024).expand(1024, -1)])
AXES = {"BSH": "bsh", "SBH": "sbh", "BSND": "bsnd", "BNSD": "bnsd", "TND": "tnd"}


def defaults() -> Call:
    """The op's arguments at their defaults."""
    return {
        "pse": None,
        "padding_mask": None,
        "atten_mask": None,
        "scale": 1.0,
        "keep_prob": 1.0,
        "pre_tokens": UNBOUNDED,
        "next_tokens": UNBOUNDED,
        "inner_precise": 0,
        "prefix": None,
        "actual_seq_qlen": None,
        "actual_seq_kvlen": None,
        "sparse_mode": 0,
        "pse_type": 1,
        "q_start_idx": None,
        "kv_start_idx": None,
        "softmax_layout": "",
        "sink": None,
        "dropout_mask": None,
        "seed": 0,
        "offset": 0,
    }


# -- sizes -------------------------------------------------------------------------------


@dataclass
class Sizes:
    """What shapes and lists say. `pairs` are the lengths of every score matrix."""

    packed: bool
    heads: int
    kv_heads: int
    dims: tuple[int, int, int]
    batches: tuple[int, int, int]
    tokens: tuple[int, int, int]
    value_heads: int
    pairs: list[tuple[int, int]]

    @property
    def sq(self) -> int:
        return max((q for q, _ in self.pairs), default=0)

    @property
    def skv(self) -> int:
        return max((kv for _, kv in self.pairs), default=0)


def lengths(cumulative: Any) -> list[int]:
    """Lengths of a cumulative list, as the op takes differences: none is below 0."""
    return [max(0, now - before) for before, now in zip([0, *cumulative], cumulative)]  # noqa: B905


def _axes(call: Call, name: str) -> dict[str, int]:
    return dict(zip(AXES[call["input_layout"].upper()], call[name].shape, strict=True))


def sizes_of(call: Call) -> Sizes:
    """Read the sizes of a call whose structure is in order."""
    q, k, v = (_axes(call, name) for name in ("query", "key", "value"))
    heads = call["head_num"]
    dim = q["d"] if "d" in q else q["h"] // heads
    kv_heads = k["n"] if "n" in k else k["h"] // dim
    value_dim = v["d"] if "d" in v else v["h"] // kv_heads
    packed = "t" in q
    tokens = tuple(x["t"] if packed else x["s"] for x in (q, k, v))
    batches = tuple(x.get("b", 1) for x in (q, k, v))
    if packed:
        q_lens, kv_lens = (lengths(call[f"actual_seq_{x}len"]) for x in ("q", "kv"))
        pairs = list(zip(q_lens, kv_lens, strict=True))
    else:
        pairs = [(q["s"], k["s"])] * q["b"]
    dims = (dim, k.get("d", dim), value_dim)
    value_heads = v.get("n", kv_heads)
    return Sizes(packed, heads, kv_heads, dims, batches, tokens, value_heads, pairs)  # type: ignore[arg-type]


# -- rules -------------------------------------------------------------------------------


def broken(call: Call, training: bool) -> set[str]:
    """Name the rules that a call breaks: of structure; if none, all others but those about what
    a mask holds; if none, those."""
    found = structure(call)
    if not found:
        sizes = sizes_of(call)
        found = _shapes(call, sizes) | _masks(call, sizes, training)
        found |= _biases(call, sizes, training) | _others(call, sizes, training)
    return found or _content(call, sizes)


def structure(call: Call) -> set[str]:
    """Name the rules of structure that a call breaks; without one, its sizes can be read."""
    layout, found = call["input_layout"], set()
    upper, tensors = layout.upper(), [call[name] for name in ("query", "key", "value")]
    if upper == "TND":
        q_lens, kv_lens = call["actual_seq_qlen"], call["actual_seq_kvlen"]
        if not q_lens or not kv_lens or len(q_lens) != len(kv_lens):
            found.add("varlen-lists")
    modes = {0, 1, 2, 3, 4, 5, 6}
    if upper == "TND":
        modes = {0, 1, 2, 3, 4, 6} | ({7, 8} if layout == "TND" else set())
    if call["sparse_mode"] not in modes:
        found.add("sparse-mode-range")
    if upper not in AXES:
        return found | {"layout-unknown"}
    if any(t.dim() != len(AXES[upper]) for t in tensors):
        return found | {"rank"}
    q, k, v = (_axes(call, name) for name in ("query", "key", "value"))
    heads = call["head_num"]
    if heads <= 0 or q.get("h", 0) % heads or q.get("n", heads) != heads:
        return found | {"head-num"}
    if "h" in q:
        dim = q["h"] // heads
        if dim == 0 or k["h"] % dim:
            return found | {"kv-heads"}
        kv_heads = k["h"] // dim
        wrong = kv_heads == 0 or heads % kv_heads or v["h"] % kv_heads
    else:
        wrong = k["n"] == 0 or heads % k["n"]
    return found | ({"kv-heads"} if wrong else set())


def _shapes(call: Call, s: Sizes) -> set[str]:
    dtypes = [call[name].dtype for name in ("query", "key", "value")]
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    q_list, kv_list = call["actual_seq_qlen"], call["actual_seq_kvlen"]
    rules = {
        "varlen-dense": not s.packed and (q_list is not None or kv_list is not None),
        "dtype-mixed": len(set(dtypes)) > 1,
        "dtype": dtypes[0] not in floats,
        "batch-mismatch": len(set(s.batches)) > 1,
        "key-value-shape": s.tokens[1] != s.tokens[2] or s.kv_heads != s.value_heads,
        "head-dim-equal": s.dims[0] != s.dims[1],
        "value-dim": s.dims[2] > s.dims[0],
        "head-dim-limit": not (1 <= s.dims[0] <= 768 and 1 <= s.dims[2] <= 768),
        "heads-limit": s.heads > 256,
        "batch-limit": not 1 <= len(s.pairs) <= (2048 if s.packed else 2_000_000),
        "length-limit": max(s.tokens[:2]) > 1_000_000,
    }
    if s.packed:
        used_q, used_kv = sum(q for q, _ in s.pairs), sum(kv for _, kv in s.pairs)
        rules["varlen-total"] = used_q > s.tokens[0] or used_kv > s.tokens[1]
        open_kv = used_kv < s.tokens[1] and kv_list[-1] != 0
        rules["varlen-tail"] = used_q < s.tokens[0] and (q_list[-1] != 0 or open_kv)
        rules["varlen-decreasing"] = any(_falls(given) for given in (q_list, kv_list))
    return {code for code, is_broken in rules.items() if is_broken}


def _falls(cumulative: Any) -> bool:
    kept = list(cumulative)
    while kept and kept[-1] == 0:
        kept.pop()
    return kept != sorted(kept) or any(n < 0 for n in kept)


def _masks(call: Call, s: Sizes, training: bool) -> set[str]:
    mask, mode = call["atten_mask"], call["sparse_mode"]
    pre, nxt = call["pre_tokens"], call["next_tokens"]
    rules = {"prefix-unused": bool(call["prefix"]) and mode not in (5, 6)}
    if mask is None:
        cut = any(pre < q - 1 or nxt < kv - 1 for q, kv in s.pairs if q and kv)
        rules["mode-without-mask"] = mode >= 2
        rules["window-without-mask"] = mode == 0 and cut
        return {code for code, is_broken in rules.items() if is_broken}
    shape, own = tuple(mask.shape), (s.sq, s.skv)
    totals = (sum(q for q, _ in s.pairs), sum(kv for _, kv in s.pairs))
    whole = [own, *((b, n, *own) for b, n in ((len(s.pairs), s.heads), (len(s.pairs), 1), (1, 1)))]
    rules["mask-dtype"] = mask.dtype not in (torch.bool, torch.uint8)
    if mode in FULL:
        by_total = s.packed and shape == totals
        rules["mask-shape"] = shape not in whole and not by_total
        rules["mask-total-lengths"] = by_total and shape != own
        rules["mask-4d-packed"] = s.packed and len(shape) == 4
    else:
        wanted = (3072, 2048) if mode == 6 else (2048, 2048)
        rules["mask-compressed-shape"] = shape != wanted and not (own == wanted and shape in whole)
    if mode in (5, 6):
        lengths_ = call["prefix"] or ()
        miscounted = len(lengths_) != len(s.pairs)
        outside = not miscounted and any(
            not max(0, kv - q) <= n <= kv for n, (q, kv) in zip(lengths_, s.pairs, strict=True)
        )
        suffix = "-mode-5" if mode == 5 else ""
        rules[f"prefix-count{suffix}"] = miscounted
        rules[f"prefix-range{suffix}"] = outside
        rules["prefix-batch"] = len(s.pairs) > 32
        each = len(shape) == 4 and shape[0] == len(s.pairs)
        usable = not (miscounted or outside)
        rules["mode-5-mask"] = mode == 5 and usable and len(s.pairs) != 1 and not each
    rules |= _packed_window(mode, pre, nxt, s, training) if s.packed else {}
    if not s.packed and mode in (0, 4):
        delta = s.skv - s.sq if mode == 4 else 0
        rules |= _dense_window(pre - delta, nxt + delta, s, training)
    return {code for code, is_broken in rules.items() if is_broken}


def _dense_window(pre: int, nxt: int, s: Sizes, training: bool) -> dict[str, bool]:
    """The window from the top-left corner."""
    if pre >= 0 and nxt >= 0:
        fits = True
    elif pre < 0 and nxt < 0:
        fits = False
    elif pre < 0:
        fits = nxt >= -pre and -pre < s.skv
    else:
        fits = -nxt <= pre and -nxt < s.sq
    trains = -pre <= s.skv and -nxt <= s.sq and pre + nxt >= 0
    return {"window-dense": not fits, "window-backward": training and not trains}


def _packed_window(mode: int, pre: int, nxt: int, s: Sizes, training: bool) -> dict[str, bool]:
    filled = [(q, kv) for q, kv in s.pairs if q and kv]
    rules = {}
    if mode == 0:
        short = any(kv + pre < q for q, kv in filled)
        rules["window-packed"] = nxt < 0 or (pre < 0 and nxt < -pre) or short
        trains = all(-pre <= kv and -nxt <= q for q, kv in s.pairs)
    elif mode == 3:
        rules["window-packed"] = any(q > kv for q, kv in s.pairs)
        trains = True
    elif mode == 4:
        short = any(q - nxt > kv for q, kv in filled)
        rules["window-packed"] = pre < 0 or (nxt < 0 and pre + nxt < 0) or short
        trains = all(-pre <= q and -nxt <= kv for q, kv in s.pairs)
    elif mode in (7, 8):
        trains = True
        cut = _cut(mode, s.pairs)
        if cut is not None:
            q, kv = s.pairs[cut]
            beyond = q - nxt > kv and not (mode == 7 and kv == 0)
            wrong = pre < kv or beyond or (mode == 7 and nxt > 0)
            rest = [p for b, p in enumerate(s.pairs) if b != cut and all(p)]
            rules["window-cut"] = wrong or (mode == 7 and any(a > b for a, b in [*rest]))
            if mode == 7 and q > kv > 0:
                rules["window-cut"] = True
    else:
        return rules
    if mode != 3:
        rules["window-backward"] = training and (pre + nxt <= 0 or not trains)
    return rules


def _cut(mode: int, pairs: list[tuple[int, int]]) -> int | None:
    """The sequence that modes 7 (the last with queries) and 8 (the first) treat apart."""
    with_queries = [b for b, (q, _) in enumerate(pairs) if q]
    return (with_queries[-1] if mode == 7 else with_queries[0]) if with_queries else None


def _biases(call: Call, s: Sizes, training: bool) -> set[str]:
    pse, kind = call["pse"], call["pse_type"]
    q_start, kv_start = call["q_start_idx"], call["kv_start_idx"]
    mode = None if call["atten_mask"] is None else call["sparse_mode"]
    query = call["query"].dtype
    starts = [given for given in (q_start, kv_start) if given is not None]
    rules = {
        "pse-type-range": kind not in (0, 1, 2, 3),
        "pse-missing": pse is None and kind in (0, 2, 3),
        "start-pair": bool(q_start) != bool(kv_start),
        "start-length": any(len(given) != 1 for given in starts),
        "start-unused": kind not in (2, 3) and bool(q_start or kv_start),
    }
    both = bool(q_start) and bool(kv_start)
    if mode == 8 and s.packed and both:
        rules["start-empty-first"] = _cut(8, s.pairs) not in (None, 0)
    if pse is not None:
        shape, b, n = tuple(pse.shape), len(s.pairs), s.heads
        slopes = kind in (2, 3)
        wanted = {torch.float32} if slopes else {query}
        wanted |= {query} if query == torch.float64 else set()
        rules["pse-dtype"] = pse.dtype not in wanted
        rules["pse-learnable"] = pse.requires_grad and torch.is_grad_enabled()
        if slopes:
            rules["slopes-shape"] = shape not in ((n,), (b, n))
            rules["slopes-square"] = not s.packed and s.sq != s.skv
        if kind in (0, 1):
            rows = set() if s.packed else {s.sq, 1}
            rows |= {1024} if s.packed or s.sq >= 1024 else set()
            rules["pse-shape"] = shape not in [(x, n, r, s.skv) for x in (1, b) for r in rows]
            last_rows = len(shape) == 4 and shape[2] == 1024 and (s.packed or s.sq > 1024)
            rules["pse-compressed"] = last_rows and not _causal(call, mode, s)
            one_row = len(shape) == 4 and shape[0] == 1 and shape[2] == 1 and not s.packed
            rules["pse-backward-shape"] = training and one_row and b != 1 and s.sq != 1
        unequal = [q != kv for q, kv in s.pairs]
        rules["pse-packed-square"] = s.packed and mode not in (7, 8) and any(unequal)
        rules["pse-empty-sequence"] = s.packed and any(0 in pair for pair in s.pairs)
        rules["pse-mode-7"] = mode == 7
        if mode == 8 and s.packed:
            moved = q_start[0] - kv_start[0] if both else 0
            rules["pse-mode-8"] = s.pairs[0][0] - s.pairs[0][1] + moved != 0 or any(unequal[1:])
    return {code for code, is_broken in rules.items() if is_broken}


def _causal(call: Call, mode: int | None, s: Sizes) -> bool:
    """Whether the tiling calls a masked call causal, with as many queries as keys."""
    pre, ends = call["pre_tokens"], call["next_tokens"] == 0
    if any(q != kv for q, kv in s.pairs):
        return False
    wide = (mode == 0 and pre >= s.sq) or (mode == 4 and s.packed and pre >= s.skv)
    return mode in (2, 3) or (wide and ends)


def _others(call: Call, s: Sizes, training: bool) -> set[str]:
    keep, layout, sink = call["keep_prob"], call["softmax_layout"], call["sink"]
    drops, bits = 0 < keep < 1, call["dropout_mask"]
    count = decisions(call, s)
    rules = {
        "keep-prob-range": not 0 < keep <= 1,
        "scale-finite": not abs(call["scale"]) <= LARGEST,
        "padding-mask": call["padding_mask"] is not None,
        "inner-precise": call["inner_precise"] not in (0, 1, 2),
        "softmax-layout": layout not in (("", "TND") if s.packed else ("",)),
        "dropout-mask-unused": bits is not None and keep >= 1,
        "seed-overwritten": bool(call["seed"] or call["offset"]) and drops and bits is None,
        "dropout-mask-numels": bits is not None and not s.packed and training and drops,
    }
    # Version 1 of the op hands the layout on, version 2 only with a sink.
    second = call["pse_type"] != 1 or call["q_start_idx"] is not None
    second = second or call["kv_start_idx"] is not None
    rules["softmax-layout-ignored"] = bool(layout) and second and sink is None
    if sink is not None:
        rules["sink-shape"] = tuple(sink.shape) != (s.heads,)
        double = call["query"].dtype == torch.float64 and sink.dtype == torch.float64
        rules["sink-dtype"] = sink.dtype != torch.float32 and not double
    if bits is not None:
        size = (-(-count // 128) * 16,)
        rules["dropout-mask"] = bits.dtype != torch.uint8 or tuple(bits.shape) != size
    cells = s.heads * sum(q * kv for q, kv in s.pairs)
    rules["dropout-count"] = s.packed and drops and count < cells
    return {code for code, is_broken in rules.items() if is_broken}


def decisions(call: Call, s: Sizes) -> int:
    """The number of dropout decisions, as the op counts them."""
    if not s.packed:
        return s.heads * sum(q * kv for q, kv in s.pairs)
    q, kv = ([0, *call[f"actual_seq_{x}len"]] for x in ("q", "kv"))
    return s.heads * int(np.dot(np.diff(q), np.diff(kv)))


def _content(call: Call, s: Sizes) -> set[str]:
    mask, mode = call["atten_mask"], call["sparse_mode"]
    if mask is None:
        return set()
    found = set()
    if mask.dtype == torch.uint8 and mask.numel() and mask.max() > 1:
        found.add("mask-values")
    if mode in COMPRESSED:
        good = PREFIX if mode == 6 else CAUSAL
        return found | (set() if (mask.bool() == good).all() else {"mask-content"})
    outside, empty = False, False
    for q, kv in set(s.pairs):
        if not q or not kv:
            continue
        allowed = ~mask[..., :q, :kv].bool()
        ahead = torch.arange(kv) - torch.arange(q)[:, None]
        inside = (ahead >= -_near(call["pre_tokens"])) & (ahead <= _near(call["next_tokens"]))
        outside |= bool((allowed & ~inside).any())
        empty |= bool((~allowed.any(-1)).any())
    if outside and mode == 0:
        found.add("mask-outside-window")
    if empty and s.packed:
        found.add("rows-masked-packed")
    if empty and not s.packed and call["sink"] is None and not _zero_rows(call, s):
        found.add("rows-averaged")
    return found


def _near(tokens: int) -> int:
    """A window's end that int64 tensors can be compared with."""
    return max(-(2**40), min(2**40, tokens))


def _zero_rows(call: Call, s: Sizes) -> bool:
    """Whether the tiling makes rows without a key 0, in a dense call with a mask of cells."""
    mode, pre, nxt = call["sparse_mode"], call["pre_tokens"], call["next_tokens"]
    if call["inner_precise"] == 2:
        return True
    if mode == 5 and len(call["prefix"] or ()) == len(s.pairs):
        for n in call["prefix"]:
            if not max(0, s.skv - s.sq) <= n <= s.skv:
                return False
            if s.sq > s.skv and n == 0:
                return True
    narrow = pre < s.sq - s.skv or nxt < 0
    return mode == 0 and narrow and not (pre >= s.sq and nxt == 0)


# -- numbers -----------------------------------------------------------------------------


def _allowed(call: Call, s: Sizes, b: int) -> torch.Tensor:
    """The cells [1 or N, Sq, Skv] of one score matrix that take part."""
    (q, kv), mask, mode = s.pairs[b], call["atten_mask"], call["sparse_mode"]
    if mask is None:
        return torch.ones(1, q, kv, dtype=torch.bool)
    if mode in FULL:
        cells = ~mask.bool()
        if cells.dim() == 4:
            cells = cells[b if len(cells) > 1 else 0]
        return cells.reshape(-1, *cells.shape[-2:])[:, :q, :kv]
    i, j = torch.arange(q)[:, None], torch.arange(kv)
    pre, nxt = _near(call["pre_tokens"]), _near(call["next_tokens"])
    cut = mode in (7, 8) and b == _cut(mode, s.pairs)
    corner = kv - q
    if cut:
        cells = j <= i + corner + nxt
    elif mode in (2, 8):
        cells = j <= i
    elif mode in (3, 7):
        cells = j <= i + corner
    elif mode == 4:
        cells = (j <= i + corner + nxt) & (j >= i + corner - pre)
    else:
        cells = (j <= i + corner) | (j < call["prefix"][b])
    return cells[None]


def _bias(call: Call, s: Sizes, b: int) -> torch.Tensor | None:
    """The bias [N, Sq, Skv] of one score matrix, as far as its cells take part."""
    pse, kind, (q, kv) = call["pse"], call["pse_type"], s.pairs[b]
    if pse is None:
        return None
    pse = pse.detach().double()
    i, j = torch.arange(q)[:, None], torch.arange(kv)
    if kind in (2, 3):
        slopes = pse if pse.dim() == 1 else pse[b]
        moved = 0
        if call["q_start_idx"] and call["kv_start_idx"]:
            first_only = call["sparse_mode"] == 8 and call["atten_mask"] is not None
            moved = 0 if first_only and b else call["kv_start_idx"][0] - call["q_start_idx"][0]
        distance = (j - i + moved).abs().double()
        return -slopes[:, None, None] * (distance if kind == 2 else distance.sqrt())
    own = pse[b if len(pse) > 1 else 0]
    if own.shape[1] == 1024 and (s.packed or q > 1024):
        # Only distances count: row r, column c hold that of (r + Skv - 1024) - c.
        distance = (i - j).clamp(min=0)
        shift = s.skv - 1024
        row = (distance - shift).clamp(min=0)
        return own[:, row, row + shift - distance]
    return own.expand(-1, q, kv)


def _uniform(call: Call, s: Sizes, seed: int, offset: int) -> np.ndarray:
    """The high half of the hash of every cell's number (the finaliser of splitmix64)."""
    count = s.heads * sum(q * kv for q, kv in s.pairs)
    golden, mixed = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
    key = ((seed ^ (offset * mixed)) * golden + golden) % 2**64
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint64) * np.uint64(golden) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))) >> np.uint64(32)


def _kept(call: Call, s: Sizes, seed: int, offset: int) -> list[torch.Tensor]:
    """The dropout decisions [N, Sq, Skv] of every score matrix."""
    if call["dropout_mask"] is not None:
        flat = np.unpackbits(call["dropout_mask"].numpy(), bitorder="little").astype(bool)
    else:
        flat = _uniform(call, s, seed, offset) < round(call["keep_prob"] * 2**32)
    bits, kept = torch.from_numpy(flat), []
    for q, kv in s.pairs:
        size = s.heads * q * kv
        kept.append(bits[:size].view(s.heads, q, kv))
        bits = bits[size:]
    return kept


def _by_head(call: Call, s: Sizes, name: str, heads: int) -> list[torch.Tensor]:
    """The matrices [n, s, d] of an operand, one per batch element or packed sequence."""
    tensor = call[name]
    layout = call["input_layout"].upper()
    if layout in ("BSH", "SBH"):
        tensor = tensor.unflatten(-1, (heads, -1))
    if layout == "SBH":
        tensor = tensor.transpose(0, 1)
    if layout == "TND":
        side = 0 if name == "query" else 1
        parts = [pair[side] for pair in s.pairs]
        parts.append(len(tensor) - sum(parts))
        return [part.transpose(0, 1) for part in tensor.split(parts)[:-1]]
    return list(tensor if layout == "BNSD" else tensor.transpose(1, 2))


def _laid_out(call: Call, s: Sizes, parts: list[torch.Tensor]) -> torch.Tensor:
    layout = call["input_layout"].upper()
    if layout == "TND":
        used = torch.cat([part.transpose(0, 1) for part in parts])
        unused = used.new_zeros(s.tokens[0] - len(used), *used.shape[1:])
        return torch.cat([used, unused])
    whole = torch.stack(parts)
    if layout == "BNSD":
        return whole
    whole = whole.transpose(1, 2)
    if layout == "BSND":
        return whole
    whole = whole.flatten(2)
    return whole.transpose(0, 1) if layout == "SBH" else whole


def _stats_laid_out(call: Call, s: Sizes, parts: list[torch.Tensor]) -> torch.Tensor:
    """[N, Sq] statistics of every matrix in the op's order, without its eight copies."""
    if not s.packed:
        return torch.stack(parts)
    parts = [part.T if call["softmax_layout"] else part for part in parts]
    flat = torch.cat([part.flatten() for part in parts])
    unused = flat.new_zeros(s.tokens[0] * s.heads - len(flat))
    return torch.cat([flat, unused]).view(s.tokens[0], s.heads)


def attention(
    call: Call, seed: int = 0, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return attention_out, and one of the eight copies of softmax_max and softmax_sum.

    A legal call whose query, key, value and sink are float64; differentiable in these.
    """
    s = sizes_of(call)
    queries = _by_head(call, s, "query", s.heads)
    keys, values = (_by_head(call, s, name, s.kv_heads) for name in ("key", "value"))
    kept = _kept(call, s, seed, offset) if call["keep_prob"] < 1 else None
    outs, peaks, sums = [], [], []
    for b, (q_len, kv_len) in enumerate(s.pairs):
        if not q_len or not kv_len:
            outs.append(queries[b].new_zeros(s.heads, q_len, s.dims[2]))
            peaks.append(queries[b].new_zeros(s.heads, q_len))
            sums.append(peaks[-1])
            continue
        k, v = (t[b].repeat_interleave(s.heads // s.kv_heads, 0) for t in (keys, values))
        scores = queries[b] @ k.mT
        bias = _bias(call, s, b)
        if bias is not None and call["pse_type"] == 1:
            scores = call["scale"] * (scores + bias)
        else:
            scores = call["scale"] * scores + (0 if bias is None else bias)
        allowed = _allowed(call, s, b).expand(scores.shape)
        some = allowed.any(-1)
        scores = scores.masked_fill(~allowed, -LARGEST)
        peak = scores.detach().amax(-1)
        if call["sink"] is not None:
            sink = call["sink"][:, None]
            peak = torch.maximum(peak, sink.detach())
        weights = (scores - peak[..., None]).exp() * allowed
        total = weights.sum(-1)
        if call["sink"] is not None:
            total = total + (sink - peak).exp()
        else:
            total = total.masked_fill(~some, LARGEST)
        dropped = weights if kept is None else weights * kept[b] / call["keep_prob"]
        outs.append(dropped @ v / total[..., None])
        peaks.append(peak)
        sums.append(total.detach())
    # A batch without keys depends on no operand; its gradients are zeros all the same.
    out = _laid_out(call, s, outs) + 0 * call["query"].sum()
    return out, _stats_laid_out(call, s, peaks), _stats_laid_out(call, s, sums)
