"""Decoding step by step is the full forward, or it is refused: every family, alone and mixed."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from attnkit import masks, memory, pse
from attnkit.cache import KVCache
from attnkit.decoding import rows_of_text, text_length
from attnkit.errors import BackendRefused, CompositionError
from attnkit.geometry import Region
from attnkit.masks import Enclosure, Mask, Rectangle
from attnkit.masks.composite import leaves
from attnkit.modules import MultiHeadAttention
from attnkit.pse import Pse
from attnkit.rotary import Dynamic, Rotary, YaRN

DIM = 8


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- random compositions, texts and steps ----------------------------------------------------


class Draw(random.Random):
    """What one seed stands for; `n` tokens, `b` texts, `h` heads."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.n, self.b, self.h = self.randint(1, 12), self.randint(1, 3), self.choice([1, 2, 4])

    def tensor(self, *shape: int) -> torch.Tensor:
        return noise(*shape, seed=self.getrandbits(32))

    def size(self) -> int:
        return self.randint(1, self.n + 1)

    def align(self) -> str:
        return self.choice(["bottom_right", "top_left"])

    def lengths(self) -> list[int]:
        """Lengths of documents that fill the text."""
        cuts = sorted(self.randint(0, self.n) for _ in range(self.randint(0, 2)))
        return [b - a for a, b in itertools.pairwise([0, *cuts, self.n]) if b > a]

    def per_text(self) -> list[int]:
        return [self.randint(0, self.n) for _ in range(self.b)]

    def atom(self) -> Mask:
        n, m = self.n, masks
        planes = self.choice([(), (self.h,), (self.b, 1), (self.b, self.h)])
        cells = self.tensor(*planes, n, n) > self.choice([-1.0, 0.0, 1.0])
        share = self.randint(2, 4)
        makers = [
            lambda: m.Full(),
            lambda: m.Causal(self.align()),
            lambda: m.SlidingWindow(self.size(), self.align()),
            lambda: m.Band(self.choice([None, 0, 2]), self.choice([None, 0, 1]), self.align()),
            lambda: m.Columns(self.randint(0, 2), self.randint(2, n + 2)),
            lambda: m.Rows(self.randint(0, 2), self.randint(2, n + 2)),
            lambda: m.Prefix(self.choice([self.size(), self.per_text()])),
            lambda: m.PrefixLM(self.size()),
            lambda: m.Documents(self.lengths()),
            lambda: m.Padding(self.per_text(), self.choice(["left", "right"])),
            lambda: m.Chunked(self.size(), self.align()),
            lambda: m.BlockCausal(self.size(), self.align()),
            lambda: m.Dilated(self.size(), self.align()),
            lambda: m.Dense.keep(cells),
            lambda: m.Dense.keep(cells.tril()),
            lambda: m.Predicate(lambda b, h, i, j: (i * 3 + j * 7) % share == 0),
            lambda: m.Predicate(lambda b, h, i, j: (j <= i) & ((i + j + h) % share > 0)),
            lambda: m.Predicate(
                lambda b, h, i, j: (i + b) % share >= j % 2, self.b, self.choice([None, self.h])
            ),
        ]
        return self.choice(makers)()

    def mask(self, depth: int = 2) -> Mask:
        kind = self.random()
        if depth == 0 or kind < 0.3:
            return self.atom()
        part = self.mask(depth - 1)
        if kind < 0.4:
            return ~part
        if kind < 0.5:
            return self.cut_mask(part)
        if kind < 0.55 and part.heads is None:
            others = (self.mask(depth - 1) for _ in range(self.h - 1))
            return masks.PerHead([part, *(o if o.heads is None else part for o in others)])
        other = self.mask(depth - 1)
        return self.choice([part & other, part | other, part - other])

    def cut_mask(self, part: Mask) -> Mask:
        a, b, n = self.randint(0, 2), self.randint(0, 2), self.n
        known = part.extent != (None, None)
        whole = {} if known else {"q_len": n + a, "kv_len": n + b}
        return self.choice(
            [
                lambda: part[:, :n],
                lambda: part[:n, :],
                lambda: part.cut((a, a + n), (b, b + n), **whole),
                lambda: part[a:, b:],
            ]
        )()

    def one_bias(self) -> Pse:
        n, h = self.n, self.h
        heads = self.choice([(), (h,)])
        texts = self.choice([(1, h), (self.b, 1), (self.b, h)])
        table = self.tensor(8, h)
        makers = [
            lambda: pse.ALiBi(h, align=self.align()),
            lambda: pse.ALiBi(h, learnable=True),
            lambda: pse.SqrtALiBi(h, align=self.align()),
            lambda: pse.T5Relative(h, 8, 9, align=self.align(), table=table),
            lambda: pse.T5Relative(h, 8, 9, bidirectional=False, table=table),
            lambda: pse.Dense(self.tensor(*heads, n, n), before_scale=self.random() < 0.3),
            lambda: pse.Dense(self.tensor(*texts, n, n)),
            lambda: pse.KeyBias(self.tensor(*heads, n)),
            lambda: pse.KeyBias(self.tensor(*texts, n)),
            lambda: Lengths(),
        ]
        return self.choice(makers)()

    def bias(self) -> Pse | None:
        parts = [self.one_bias() for _ in range(self.choice([0, 0, 1, 1, 1, 2, 2, 3]))]
        if parts and self.random() < 0.15 and parts[0].extent == (None, None):
            a, b, n = self.randint(0, 2), self.randint(0, 2), self.n
            parts[0] = parts[0].cut((a, a + n), (b, b + n), q_len=n + a, kv_len=n + b + 1)
        return pse.Sum(parts) if parts else None

    def cuts(self) -> list[int]:
        """Where steps end: single tokens, some tokens, or a prefill and then either."""
        inside = range(1, self.n)
        some = sorted(self.sample(inside, self.randint(0, len(inside))))
        prefill = self.randint(1, self.n)
        pattern = self.choice(["single", "chunks", "prefill"])
        return {
            "single": list(inside),
            "chunks": some,
            "prefill": list(range(prefill, self.n)),
        }[pattern]


@dataclass(frozen=True)
class Lengths(pse.Pse):
    """A bias that changes with the text: no step can know what the whole will hold."""

    def _values(self, at, dtype, device):
        i, j = torch.arange(*at.rows)[:, None], torch.arange(*at.keys)
        return torch.where(j <= i, 0.1 * at.kv_len, 0.0).to(dtype)


def settled(mask: Mask, n: int, stops: list[int]) -> bool:
    """Say by cells whether rows see the same in every text, and nothing that comes later."""
    if mask.extent != (None, None):
        whole = mask.materialize(n, n, mask.batches or 1, mask.heads or 1)
        texts = [whole] * len(stops)
    else:
        try:
            texts = [mask.materialize(s, s, mask.batches or 1, mask.heads or 1) for s in stops]
        except CompositionError:  # it has no meaning for a text so short
            return False
    for (start, old), (stop, new) in itertools.pairwise(
        [(0, texts[0]), *zip(stops, texts, strict=True)]
    ):
        if new[..., start:stop, stop:].any() or new[..., :start, start:stop].any():
            return False
        if not torch.equal(old[..., :start, :start], new[..., :start, :start]):
            return False
    return True


def one_decoding(seed: int, backend: str = "auto", rolling: bool = False) -> str:
    """Decode what the seed stands for; return what came of it, raise if it is a difference."""
    draw = Draw(seed)
    try:
        mask = draw.mask()
        if draw.random() < 0.7:
            mask = mask & masks.Causal(draw.align())
        bias = draw.bias()
        torch.manual_seed(seed)
        kv_heads = draw.choice([k for k in (1, 2, 4) if draw.h % k == 0])
        terms = {
            "rotary": draw.choice([False, True, Rotary(100.0, 2, "interleaved")]),
            "sink": draw.random() < 0.3,
            "softcap": draw.choice([None, None, 2.0]) if backend == "auto" else None,
            "scale": draw.choice([None, 0.7]),
            "num_kv_heads": kv_heads,
        }
        at_call = draw.random() < 0.3
        own = {} if at_call else {"mask": mask, "pse": bias}
        given = {"mask": mask, "pse": bias} if at_call else {}
        layer = MultiHeadAttention(
            DIM, draw.h, head_dim=4, dtype=torch.float64, backend=backend, **own, **terms
        )
        if layer.attention.sink is not None:
            torch.nn.init.normal_(layer.attention.sink)
        x = draw.tensor(draw.b, draw.n, DIM)
        with torch.no_grad():
            whole = layer(x, **given)
    except (CompositionError, BackendRefused):
        return "no forward"
    cuts, capacity = draw.cuts(), draw.choice([None, draw.n])
    cache = KVCache(rolling=True) if rolling else KVCache(capacity)
    try:
        with torch.no_grad():
            steps = [layer(part, cache=cache, **given) for part in x.tensor_split(cuts, dim=1)]
    except BackendRefused:
        return "no backend"
    except CompositionError as error:
        if rolling and "forgotten" in str(error):
            return "forgot"
        stops = [*cuts, draw.n]
        if bias is None and settled(mask, draw.n, stops):
            raise AssertionError(f"seed {seed}: {mask!r} could be decoded, but {error}") from error
        return "refused"
    difference = (torch.cat(steps, dim=1) - whole).abs().max().item()
    if not difference <= 1e-10:
        raise AssertionError(f"seed {seed}: {mask!r}, {bias!r}, cuts {cuts}: {difference}")
    return "equal"


def one_context(seed: int) -> str:
    """Answer queries step by step from a sealed context; as `one_decoding`."""
    draw = Draw(seed)
    try:
        mask, bias = draw.mask(), draw.bias()
        torch.manual_seed(seed)
        layer = MultiHeadAttention(
            DIM, draw.h, head_dim=4, kv_dim=5, mask=mask, pse=bias, dtype=torch.float64
        )
        x, context = draw.tensor(draw.b, draw.n, DIM), draw.tensor(draw.b, draw.n, 5)
        if draw.random() < 0.4:
            context = draw.tensor(draw.b, draw.size(), 5)
        with torch.no_grad():
            whole = layer(x, context)
    except (CompositionError, BackendRefused):
        return "no forward"
    cache = KVCache()
    try:
        with torch.no_grad():
            steps = [layer(t, context, cache=cache) for t in x.tensor_split(draw.cuts(), dim=1)]
    except CompositionError:
        return "refused"
    difference = (torch.cat(steps, dim=1) - whole).abs().max().item()
    if not difference <= 1e-10:
        raise AssertionError(f"seed {seed}: {mask!r}, {bias!r}: {difference}")
    return "equal"


@pytest.mark.parametrize(
    ("first", "backend"),
    [(0, "auto"), (1000, "auto"), (2000, "auto"), (0, "emulated"), (1000, "emulated")],
)
def test_random_steps_are_the_whole_or_refused(first: int, backend: str):
    found = Counter(one_decoding(seed, backend) for seed in range(first, first + 60))
    assert found["equal"] > 20
    assert found["refused"] > 2


def test_random_steps_of_a_rolling_cache_are_the_whole_or_refused(monkeypatch):
    monkeypatch.setattr(memory, "_FIRST_ROOM", 1)
    found = Counter(one_decoding(seed, rolling=True) for seed in range(3000, 3050))
    assert found["equal"] > 20
    assert found["forgot"] < 10


def test_random_queries_of_a_context_are_the_whole_or_refused():
    found = Counter(one_context(seed) for seed in range(120))
    assert found["equal"] > 20
    assert found["refused"] > 10


# -- what went wrong once --------------------------------------------------------------------


N = 7
IN_STEPS = {
    "a bias of distances beside one per key": (
        masks.Causal(),
        pse.T5Relative(2, 8, 9, bidirectional=False, table=noise(8, 2)) + pse.KeyBias(noise(N)),
    ),
    "with its roots": (masks.Causal(), pse.SqrtALiBi(2) + pse.KeyBias(noise(2, N, seed=1))),
    "a mask of which one length is known": (masks.Causal() & masks.Full()[:, :N], None),
    "a mask whose length only the bias knows": (
        masks.Causal() & masks.Padding([3], side="left"),
        pse.KeyBias(noise(N)),
    ),
    "every second key": (masks.Dilated(2) & masks.Causal(), pse.ALiBi(2)),
    "a function": (masks.Predicate(lambda b, h, i, j: (j <= i) & ((i + j) % 3 > 0)), None),
    "a matrix": (masks.Dense.keep((noise(N, N) > -0.5).tril()), None),
    "a matrix and a diagonal": (
        masks.Dense.keep(noise(2, N, N) > 0) & masks.Causal("top_left"),
        pse.Dense(noise(N, N)),
    ),
}


@torch.no_grad()
def in_steps(mask: Mask, bias: Pse | None, n: int = N) -> tuple[MultiHeadAttention, torch.Tensor]:
    """Return the layer, and what it makes of a text token by token."""
    torch.manual_seed(0)
    layer = MultiHeadAttention(DIM, 2, mask=mask, pse=bias, dtype=torch.float64)
    x, cache = noise(1, n, DIM), KVCache()
    return layer, torch.cat([layer(token, cache=cache) for token in x.split(1, dim=1)], dim=1)


@pytest.mark.parametrize(("mask", "bias"), IN_STEPS.values(), ids=IN_STEPS.keys())
def test_what_looks_back_decodes(mask: Mask, bias: Pse | None):
    layer, steps = in_steps(mask, bias)
    assert torch.allclose(steps, layer(noise(1, N, DIM)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mask", "bias", "words"),
    [
        (masks.Dilated(2), None, ["first 2 tokens", "masks.Causal()"]),
        (masks.Predicate(lambda b, h, i, j: (i + j) % 2 == 0), None, ["first 2 tokens"]),
        (masks.Dense.keep(noise(40, 40) > 0), None, ["tokens 0 to 0 see keys that come later"]),
        (
            masks.Causal() & masks.Padding([1], side="left") & masks.Dilated(2),
            None,
            ["moves as the text grows"],
        ),
        (masks.Causal(), Lengths(), ["other numbers", "text of 2", "built for the whole text"]),
        (masks.Causal() & masks.Full()[:, :5], None, ["5 x 5", "6 tokens"]),
        (masks.Causal(), pse.KeyBias(noise(5)), ["5 x 5", "6 tokens"]),
        (masks.Causal() & masks.Full()[:8, :9], None, ["8 queries and 9 keys"]),
        (
            masks.Documents([4, 5]) & masks.Causal(),
            pse.KeyBias(noise(8)),
            ["any number of queries and 8 keys", "beside it for 9"],
        ),
    ],
)
def test_what_steps_cannot_honour_is_refused(mask: Mask, bias: Pse | None, words: list[str]):
    with pytest.raises(CompositionError) as caught:
        in_steps(mask, bias, mask.extent[0] or 8)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# -- padded prompts --------------------------------------------------------------------------


LAYERS = {
    "plain": {},
    "rotary, grouped, a window": {
        "num_kv_heads": 2,
        "rotary": True,
        "mask": masks.Causal() & masks.SlidingWindow(3),
    },
    "norms, gate, sink": {"qk_norm": "rms", "gate": "head", "sink": True, "rotary": True},
    "yarn": {"rotary": Rotary(scaling=YaRN(4.0, 4)), "pse": pse.ALiBi(4)},
}


@pytest.mark.parametrize("again", [False, True], ids=["one mask", "the mask so far"])
@pytest.mark.parametrize("cuts", [[5], [5, 6, 7, 8], [5, 8]], ids=str)
@pytest.mark.parametrize("how", LAYERS.values(), ids=LAYERS.keys())
@torch.no_grad()
def test_left_padded_prompts_continue_as_each_text_alone(how, cuts, again):
    torch.manual_seed(0)
    layer = MultiHeadAttention(DIM, 4, dtype=torch.float64, **{"mask": masks.Causal(), **how})
    lengths, prompt, total = [2, 5, 1], 5, 9
    pads = [prompt - n for n in lengths]
    x, cache = noise(3, total, DIM), KVCache()
    exists = torch.arange(total) >= torch.tensor(pads)[:, None]
    where, mask = exists.cumsum(1) - 1, masks.Padding.of(exists[:, :prompt])
    steps = []
    for start, stop in itertools.pairwise([0, *cuts, total]):
        mask = masks.Padding.of(exists[:, :stop]) if again else mask
        places = {"positions": where[:, start:stop]} if layer.rotary else {}
        steps.append(layer(x[:, start:stop], mask=mask, cache=cache, **places))
    steps = torch.cat(steps, dim=1)
    for b, pad in enumerate(pads):
        alone = layer(x[b : b + 1, pad:])[0]
        assert torch.allclose(steps[b, pad:], alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_right_padding_keeps_its_keys():
    """Texts that end within the batch: what they see is settled when the mask is made."""
    torch.manual_seed(0)
    layer = MultiHeadAttention(DIM, 2, mask=masks.Causal(), dtype=torch.float64)
    x = noise(2, 6, DIM)
    whole = layer(x, mask=masks.Padding([3, 4]))
    cache = KVCache()
    for mask in (masks.Padding([3, 4]), masks.Prefix([3, 4])):
        cache.reset()
        steps = [layer(part, mask=mask, cache=cache) for part in x.split([4, 1, 1], dim=1)]
        assert torch.allclose(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-12)
    cache.reset()
    with pytest.raises(CompositionError, match=r"still growing: masks\.Prefix"):
        layer(x[:, :2], mask=masks.Padding([3, 4]), cache=cache)


def test_padding_counted_from_the_end_says_what_to_do():
    with pytest.raises(CompositionError, match=r"~masks\.Prefix\(its lengths\)"):
        rows_of_text(masks.Causal() & masks.Padding([3], "left"), None, 4, 5)


@torch.no_grad()
def test_dynamic_positions_decode_as_long_as_they_stay():
    layer = MultiHeadAttention(
        DIM, 2, rotary=Rotary(scaling=Dynamic(2.0, 4)), mask=masks.Causal(), dtype=torch.float64
    )
    x, cache = noise(1, 6, DIM), KVCache()
    steps = [layer(part, cache=cache) for part in x[:, :4].split([2, 2], dim=1)]
    assert torch.allclose(torch.cat(steps, 1), layer(x[:, :4]), rtol=0, atol=1e-12)
    with pytest.raises(CompositionError, match="more than 4 tokens"):
        layer(x[:, 4:5], cache=cache)
    assert cache.length == 4
    with pytest.raises(CompositionError, match="takes none"):
        layer(x[:, 4:5], cache=cache, positions=torch.tensor([2]))
    cache.reset()
    assert torch.allclose(layer(x, cache=cache), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("backend", ["auto", "emulated", "reference"])
def test_steps_in_float32_are_as_near_to_the_truth_as_the_whole(backend: str, trains: bool):
    n, kind = 40, torch.nn.Parameter if trains else torch.Tensor.clone
    bias = pse.SqrtALiBi(2) + pse.KeyBias(kind(noise(n).float()))
    torch.manual_seed(0)
    layer = MultiHeadAttention(DIM, 2, mask=masks.Causal(), pse=bias, backend=backend)
    x, cache = noise(1, n, DIM).float(), KVCache()
    with torch.no_grad():
        steps = torch.cat([layer(token, cache=cache) for token in x.split(1, dim=1)], dim=1)
        whole = layer(x)
        exact = layer.double()(x.double())
    # A float32 score of a few units, a softmax over n keys and two projections.
    for got in (steps, whole):
        assert (got - exact).abs().max() <= 16 * torch.finfo(torch.float32).eps


READ: Counter[str] = Counter()


@dataclass(frozen=True, repr=False, eq=False)
class Scattered(Mask):
    """A causal mask that is no region and counts what is read of it."""

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        return Enclosure(Region.empty(), Region.full(q_len, kv_len))

    def _cells(self, at: Rectangle, device: object) -> torch.Tensor:
        READ["cells"] += math.prod(at.shape)
        i, j = torch.arange(*at.rows)[:, None], torch.arange(*at.keys)
        return (j <= i) & ((i + j) % 3 > 0)

    @property
    def anchored(self) -> bool:
        return False


def test_a_step_reads_the_new_rows_and_keys_of_a_mask_that_is_no_region():
    mask = Scattered() & masks.Columns(0, 900) & ~masks.Dilated(7)
    for start, stop in [(0, 500), (500, 501), (501, 505)]:
        READ.clear()
        rows_of_text(mask, None, start, stop)[0].materialize(stop - start, stop)
        # The new keys of the old rows, and the new rows.
        assert 0 < READ["cells"] <= start * (stop - start) + (stop - start) * stop


def test_cells_of_a_rectangle_are_those_of_the_whole():
    for seed in range(150):
        draw = Draw(seed)
        try:
            mask = draw.mask()
            whole = mask.materialize(draw.n, draw.n, mask.batches or 1, mask.heads or 1)
        except CompositionError:
            continue
        i, j = (
            sorted(draw.choices(range(draw.n + 1), k=2)),
            sorted(draw.choices(range(draw.n), k=2)),
        )
        for b, h in itertools.product(range(whole.shape[0]), range(whole.shape[1])):
            at = Rectangle((i[0], i[1]), (j[0], j[1]), draw.n, draw.n, b, h)
            part = mask._read(at)
            assert torch.equal(part, whole[b, h, i[0] : i[1], j[0] : j[1]])


def test_the_length_of_a_text_is_what_its_parts_know():
    assert text_length(masks.Causal(), pse.ALiBi(2), 3) is None
    assert text_length(masks.Causal(), pse.KeyBias(noise(5)), 3) == 5
    assert text_length(masks.Documents([2, 3]), pse.KeyBias(noise(5)), 5) == 5
    assert text_length(masks.Full()[:5, :], None, 3) == 5


if __name__ == "__main__":  # python tests/test_decoding.py FIRST COUNT BACKEND|context
    import sys

    torch.set_num_threads(1)
    first, count, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    seeds = range(first, first + count)
    one = one_context if backend == "context" else lambda seed: one_decoding(seed, backend)
    print(Counter(one(seed) for seed in seeds))


@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal(),
        masks.SlidingWindow(3),
        masks.Band(2, 1),
        masks.Band(None, 2),
        masks.Causal() & (masks.SlidingWindow(2) | masks.Columns(0, 1)),
        ~masks.Causal(align="top_left"),
        masks.Dilated(2) & masks.Causal(),
        ~masks.Prefix(2) & masks.Causal(),
    ],
    ids=str,
)
def test_masks_that_say_so_only_grow_with_a_text(mask: masks.Mask) -> None:
    """Steps take their word for it, so it is compared here, cell by cell."""
    assert all(leaf._alike_on_squares for leaf in leaves(mask))
    for longer in range(1, 10):
        whole = mask.materialize(longer, longer)
        for shorter in range(longer):
            corner = whole[..., :shorter, :shorter]
            assert torch.equal(corner, mask.materialize(shorter, shorter))


def test_masks_that_move_do_not_say_so() -> None:
    """What is counted from the end of the keys, and what is cut out of something else, is asked."""
    for mask in (masks.Padding([2, 3], side="left"), masks.Causal()[1:, :]):
        assert not mask._alike_on_squares


def test_what_a_cache_asked_for_is_not_what_a_call_adds() -> None:
    """A step gives its mask and bias in place of the module's, a call beside them."""
    own = masks.Causal() & masks.SlidingWindow(9)
    x, more = torch.randn(1, 40, 32), {"mask": own, "pse": pse.ALiBi(4)}

    def made() -> MultiHeadAttention:
        torch.manual_seed(0)
        return MultiHeadAttention(32, 4, mask=own, pse=pse.ALiBi(4)).eval()

    layer, fresh = made(), made()
    with torch.no_grad():
        layer(x, cache=KVCache())
        torch.testing.assert_close(layer(x, **more), fresh(x, **more))
