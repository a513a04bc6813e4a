"""What each attention variant is, written from its paper as a plain function of a cell.

`allowed(i, j, ...)` says whether query i sees key j. What else it asks for by name are sizes that
the variant's code sets, `h` the head, `q_len` and `kv_len`. `score(s, i, j, ...)` is what becomes
of a scaled score, where anything does. Nothing here asks attnkit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["DEFINED", "Definition"]


@dataclass(frozen=True)
class Definition:
    """A layer of a variant, and how many fused calls it may take; `full`: with a mask of cells."""

    allowed: Callable[..., bool]
    score: Callable[..., float] | None = None
    calls: int = 1
    full: bool = False


DEFINED: dict[str, list[Definition]] = {}


def defined(*names: str, **rest: Any) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Register a function as the next layer of variants."""

    def register(allowed: Callable[..., bool]) -> Callable[..., bool]:
        for name in names:
            DEFINED.setdefault(name, []).append(Definition(allowed, **rest))
        return allowed

    return register


def owner(lengths: list[int], position: int) -> int:
    """Return in which of several stretches, one after the other, a position is."""
    number = 0
    while position >= lengths[number]:
        position -= lengths[number]
        number += 1
    return number


def number_of(runs: list[tuple[Any, int]], position: int) -> Any:
    """Return the number that a token has, of runs (number, tokens)."""
    return runs[owner([count for _, count in runs], position)][0]


# -- whole texts ---------------------------------------------------------------------------------


@defined("Bidirectional", "Cross-attention")
def everything(i: int, j: int) -> bool:
    return True


@defined("Causal", "Grouped queries", "Multi-query")
def causal(i: int, j: int) -> bool:
    return j <= i


@defined("Prefix LM")
def prefix_lm(i: int, j: int, prefix: int) -> bool:
    return j <= i or j < prefix


@defined("Permuted order", calls=1, full=True)
def permuted(i: int, j: int, order: list[int]) -> bool:
    return order.index(j) <= order.index(i)


# -- windows -------------------------------------------------------------------------------------


@defined("Sliding window")
def window_back(i: int, j: int, window: int) -> bool:
    return 0 <= i - j < window


@defined("Window both ways")
def both_ways(i: int, j: int, side: int) -> bool:
    return abs(i - j) <= side


@defined("Dilated window")
def dilated_window(i: int, j: int, window: int, step: int) -> bool:
    return 0 <= i - j < window and (i - j) % step == 0


defined("Local and global layers")(window_back)
defined("Local and global layers")(causal)


@defined("Sink and window")
def sink_and_window(i: int, j: int, window: int, sinks: int) -> bool:
    return j <= i and (i - j < window or j < sinks)


@defined("Chunked")
def chunked(i: int, j: int, chunk: int) -> bool:
    return j <= i and i // chunk == j // chunk


@defined("Streaming chunks")
def streaming(i: int, j: int, chunk: int, left: int) -> bool:
    return 0 <= i // chunk - j // chunk <= left


@defined("Shifted sparse attention", calls=2)
def shifted(i: int, j: int, group: int, h: int) -> bool:
    moved = 0 if h < 4 else group // 2
    return j <= i and (i - moved) // group == (j - moved) // group


@defined("Retrieval and streaming heads", calls=2)
def duo(i: int, j: int, recent: int, sinks: int, h: int) -> bool:
    return j <= i and (h < 2 or i - j < recent or j < sinks)


@defined("Segment and memory", "Perceiver AR")
def with_memory(i: int, j: int, q_len: int, kv_len: int) -> bool:
    return j <= i + (kv_len - q_len)


# -- fixed sparse patterns -----------------------------------------------------------------------


@defined("Longformer", calls=2)
def longformer(i: int, j: int, side: int, tokens: int) -> bool:
    return abs(i - j) <= side or i < tokens or j < tokens


@defined("ETC", calls=2)
def etc(i: int, j: int, extra: int, side: int) -> bool:
    if i < extra or j < extra:  # global to global, global to long, long to global
        return True
    return abs((i - extra) - (j - extra)) <= side


@defined("BigBird")
def bigbird(i: int, j: int, block: int, blocks: int, table: list[list[bool]]) -> bool:
    a, b = i // block, j // block
    drawn = table[a][b]  # at random, three for each row of blocks
    return drawn or abs(a - b) <= 1 or a == 0 or b == 0


@defined("Sparse Transformer, strided", calls=2)
def strided(i: int, j: int, stride: int) -> bool:
    return j in range(max(0, i - stride), i + 1) or (j <= i and (i - j) % stride == 0)


@defined("Sparse Transformer, fixed")
def fixed(i: int, j: int, stride: int, last: int) -> bool:
    return j <= i and (j // stride == i // stride or j % stride in range(stride - last, stride))


@defined("LogSparse", calls=12)
def log_sparse(i: int, j: int) -> bool:
    return j == i or any(j == i - 2**k for k in range(20))


@defined("Blockwise")
def blockwise(i: int, j: int, block: int, shifts: list[int], h: int) -> bool:
    return j // block == (i // block + shifts[h]) % 4


# -- chosen by content ---------------------------------------------------------------------------


@defined("Buckets")
def same_bucket(i: int, j: int, buckets: list[tuple[Any, int]]) -> bool:
    mine, other = number_of(buckets, i), number_of(buckets, j)
    return j <= i and mine is not None and mine == other


@defined("Vertical and slash lines", calls=4)
def lines(i: int, j: int, vertical: list[tuple[int, int]], slash: list[tuple[int, int]]) -> bool:
    seen = any(a <= j < b for a, b in vertical) or any(a <= i - j < b for a, b in slash)
    return j <= i and seen


@defined("Sparse blocks, causal")
def block_table(i: int, j: int, block: int, table: list[list[bool]]) -> bool:
    return j <= i and table[i // block][j // block]


@defined("Mixture of block attention", calls=2)
def best_blocks(i: int, j: int, block: int, top: int, scores: Any, h: int) -> bool:
    own = i // block
    before = sorted(range(own), key=lambda b: -scores[0][h][i][b])
    return j <= i and (j // block == own or j // block in before[:top])


@defined("Native sparse attention, selected branch", calls=2)
def best_of_group(i: int, j: int, block: int, top: int, scores: Any, h: int) -> bool:
    return best_blocks(i, j, block, top, scores, h // 4)


@defined("Keys with holes")
def with_holes(i: int, j: int, prompt: int, kept: list[tuple[int, int | None]]) -> bool:
    kept_key = any(a <= j < (math.inf if b is None else b) for a, b in kept)
    return j <= i and (i < prompt or kept_key)


# -- several texts in one ------------------------------------------------------------------------


@defined("Packed documents, causal")
def packed(i: int, j: int, lengths: list[int]) -> bool:
    return j <= i and owner(lengths, i) == owner(lengths, j)


@defined("Packed documents, windowed")
def packed_windows(i: int, j: int, lengths: list[int], window: int) -> bool:
    return packed(i, j, lengths) and i - j < window


@defined("Packed documents, prefix LM")
def packed_prefixes(i: int, j: int, lengths: list[int], prefixes: list[tuple[int, int]]) -> bool:
    both = any(a <= i < b and a <= j < b for a, b in prefixes)
    return owner(lengths, i) == owner(lengths, j) and (j <= i or both)


@defined("Shared prefix")
def shared_prefix(i: int, j: int, prompt: int, lengths: list[int]) -> bool:
    return j <= i and (j < prompt or owner(lengths, i) == owner(lengths, j))


@defined("Parallel context windows")
def parallel_windows(i: int, j: int, windows: list[int], task: int) -> bool:
    in_task = i >= sum(windows)
    return j <= i and (in_task or owner(windows, i) == owner(windows, j))


@defined("Tree of drafts", calls=2)
def tree(i: int, j: int, text: int, parents: list[int]) -> bool:
    at = i
    while at != -1 and at != j - text:
        at = parents[at]
    return j < text or at != -1


@defined("Gist tokens")
def gist_tokens(i: int, j: int, prompt: int, gist: int) -> bool:
    return j <= i and not (i >= prompt + gist and j < prompt)


@defined("Parallel thoughts", calls=8)
def thoughts(i: int, j: int, text: int) -> bool:
    step, place = divmod(i, text)
    key_step, key_place = divmod(j, text)
    if key_step == 0:
        return key_place <= place
    return key_place == place and key_step <= step


@defined("Prior-fitted networks", calls=2)
def in_context(i: int, j: int, examples: int) -> bool:
    return j < examples or i == j


# -- block by block ------------------------------------------------------------------------------


@defined("Block causal")
def block_causal(i: int, j: int, block: int) -> bool:
    return j // block <= i // block


@defined("Scale by scale")
def scales(i: int, j: int, sides: list[int]) -> bool:
    tokens = [side**2 for side in sides]
    return owner(tokens, j) <= owner(tokens, i)


@defined("Block diffusion")
def block_diffusion(i: int, j: int, half: int, block: int) -> bool:
    noisy_query, noisy_key = i < half, j < half
    a, b = i % half // block, j % half // block
    if noisy_key:
        return noisy_query and a == b
    return b < a if noisy_query else b <= a


@defined("Bidirectional spans")
def image_spans(i: int, j: int, images: list[tuple[int, int]]) -> bool:
    return j <= i or any(a <= i < b and a <= j < b for a, b in images)


# -- queries of one text, keys of another --------------------------------------------------------


@defined("Wait-k")
def wait_k(i: int, j: int, wait: int) -> bool:
    read = wait + (i + 1) - 1  # g(t) = k + t - 1 source tokens for target t, from 1
    return j < read


@defined("Chunked cross-attention")
def retro(i: int, j: int, chunk: int, neighbours: int) -> bool:
    of = (i + 1) // chunk - 1  # token i is the last of chunk `of`, or stands before the next's last
    return of >= 0 and j // neighbours == of


@defined("Latest image")
def flamingo(i: int, j: int, text: list[tuple[Any, int]], images: list[tuple[int, int]]) -> bool:
    begun = [number for number, _ in text[1:]]
    starts = [sum(count for _, count in text[: n + 1]) for n in range(len(begun))]
    latest = [n for n, start in zip(begun, starts, strict=True) if start <= i]
    return bool(latest) and j // images[0][1] == latest[-1]


# -- images and video ----------------------------------------------------------------------------


def places(shape: tuple[int, ...], i: int) -> list[int]:
    """Return where a token is on each axis of a grid, the last axis fastest."""
    found = []
    for size in reversed(shape):
        i, at = divmod(i, size)
        found.insert(0, at)
    return found


def near(size: int, kernel: int, step: int, u: int, v: int) -> bool:
    """Whether v is among the `kernel` nearest positions of u's residue; borders shift these."""
    line = list(range(u % step, size, step))
    middle = line.index(u)
    first = min(max(middle - kernel // 2, 0), len(line) - kernel)
    return v in line[first : first + kernel]


def neighbours(shape: tuple[int, ...], kernel: Any, step: int, i: int, j: int) -> bool:
    kernels = (kernel,) * len(shape) if isinstance(kernel, int) else kernel
    each = zip(shape, kernels, places(shape, i), places(shape, j), strict=True)
    return all(near(size, k, step, u, v) for size, k, u, v in each)


@defined("Neighborhood", "Neighborhood of a video", calls=2)
def neighborhood(i: int, j: int, shape: tuple[int, ...], kernel: Any) -> bool:
    return neighbours(shape, kernel, 1, i, j)


@defined("Dilated neighborhood", calls=2)
def dilated_neighborhood(i: int, j: int, shape: tuple[int, ...], kernel: int, step: int) -> bool:
    return neighbours(shape, kernel, step, i, j)


@defined("Sliding tiles")
def sliding_tiles(
    i: int, j: int, shape: tuple[int, ...], tile: tuple[int, ...], window: Any
) -> bool:
    windows = (window,) * len(shape) if isinstance(window, int) else window
    each = zip(shape, tile, windows, places(shape, i), places(shape, j), strict=True)
    return all(near(size // t, w, 1, u // t, v // t) for size, t, w, u, v in each)


@defined("Shifted windows")
def swin(i: int, j: int, shape: tuple[int, int], window: int) -> bool:
    shift = window // 2
    for size, u, v in zip(shape, places(shape, i), places(shape, j), strict=True):
        a, b = (u - shift) % size, (v - shift) % size  # the image rolled by -shift
        if a // window != b // window:
            return False  # not in one window
        if (a >= size - shift) != (b >= size - shift):
            return False  # together only because the border was rolled round
    return True


@defined("Grid attention")
def grid_attention(i: int, j: int, shape: tuple[int, int], grid: int) -> bool:
    each = zip(shape, places(shape, i), places(shape, j), strict=True)
    return all(u % (size // grid) == v % (size // grid) for size, u, v in each)


@defined("Cross-shaped windows", calls=2)
def cross_shaped(i: int, j: int, shape: tuple[int, int], stripe: int, h: int) -> bool:
    axis = 0 if h < 4 else 1
    return places(shape, i)[axis] // stripe == places(shape, j)[axis] // stripe


@defined("Criss-cross", calls=2)
def criss_cross(i: int, j: int, width: int) -> bool:
    return i // width == j // width or i % width == j % width


@defined("Axial")
def own_row(i: int, j: int, width: int) -> bool:
    return i // width == j // width


@defined("Axial")
def own_column(i: int, j: int, width: int) -> bool:
    return i % width == j % width


@defined("Divided space and time")
def own_place(i: int, j: int, frame: int) -> bool:
    return i % frame == j % frame


@defined("Divided space and time")
def own_frame(i: int, j: int, frame: int) -> bool:
    return i // frame == j // frame


@defined("Registers", calls=3)
def registers(i: int, j: int, shape: tuple[int, int], kernel: int, extra: int) -> bool:
    if i < extra or j < extra:
        return True
    return neighbours(shape, kernel, 1, i - extra, j - extra)


@defined("Masked attention", full=True)
def masked_attention(i: int, j: int, found: list[list[bool]]) -> bool:
    return found[i][j]


# -- biases --------------------------------------------------------------------------------------

defined("ALiBi", score=lambda s, i, j, h: s - abs(i - j) / 2 ** (h + 1))(causal)


def t5(s: float, i: int, j: int, h: int, buckets: int, far: int, table: Any) -> float:
    """T5's buckets: half for each direction, half of these exact, the others by logarithm."""
    half = buckets // 2
    exact, distance = half // 2, abs(j - i)
    if distance < exact:
        bucket = distance
    else:
        share = math.log(distance / exact) / math.log(far / exact)
        bucket = min(exact + int(share * (half - exact)), half - 1)
    return s + table[bucket + half * (j > i)][h]


defined("T5's relative bias", score=t5, calls=3)(everything)


def kerple(s: float, i: int, j: int, h: int, a: list[float], b: list[float]) -> float:
    return s - a[h] * math.log(1 + b[h] * abs(i - j))


def forgetting(s: float, i: int, j: int, h: int, gates: Any) -> float:
    return s + sum(gates[0][h][j + 1 : i + 1])


defined("Bias by kernel", score=kerple)(causal)
defined("Forget gate", score=forgetting)(causal)


def swin_bias(
    s: float, i: int, j: int, h: int, shape: tuple[int, int], window: int, table: Any
) -> float:
    (y, x), (v, u) = places(shape, i), places(shape, j)
    return s + table[(y - v + window - 1) * (2 * window - 1) + x - u + window - 1][h]


@defined("Swin's bias table", score=swin_bias)
def own_window(i: int, j: int, shape: tuple[int, int], window: int) -> bool:
    each = zip(places(shape, i), places(shape, j), strict=True)
    return all(u // window == v // window for u, v in each)


def graphormer(s: float, i: int, j: int, h: int, nodes: int, far: int, table: Any) -> float:
    """The length of the shortest path on a ring, found by walking it."""
    steps, here, there = 0, i, i
    while j not in (here, there):
        steps, here, there = steps + 1, (here + 1) % nodes, (there - 1) % nodes
    return s + table[min(steps, far)][h]


def moirai(s: float, i: int, j: int, h: int, lengths: list[int], table: Any) -> float:
    return s + table[0 if owner(lengths, i) == owner(lengths, j) else 1][h]


def pair_bias(s: float, i: int, j: int, h: int, pairs: Any) -> float:
    return s + pairs[0][h][i][j]


defined("Bias by steps in a graph", score=graphormer)(everything)
defined("Any-variate bias", score=moirai)(everything)
defined("Pair bias", score=pair_bias)(everything)

# -- heads and scores ----------------------------------------------------------------------------

defined("Learned sink")(window_back)


def bent(s: float, i: int, j: int, h: int, cap: float) -> float:
    return cap * math.tanh(s / cap)


def scaled_by_count(score: float, i: int, j: int, h: int, s: float) -> float:
    return s * math.log(i + 1) * score  # n of the paper is the number of keys, i + 1 here


defined("Soft-cap", score=bent, calls=0)(causal)
defined("Scalable softmax", score=scaled_by_count, calls=0)(causal)
