"""Rules about windows (pre_tokens, next_tokens) and prefixes."""

from __future__ import annotations

from attnkit.errors import shown
from attnkit.kernel.call import KernelCall
from attnkit.kernel.legality import Found, Target, rule

__all__: list[str] = []


def _given(call: KernelCall) -> str:
    return f"pre_tokens={call.pre_tokens}, next_tokens={call.next_tokens}"


@rule(
    layer="tiling",
    remedy="Widen the window. Mode 4 is converted by pre + Sq - Skv, next + Skv - Sq.",
)
def window_dense(call: KernelCall, on: Target) -> Found:
    """A dense window must meet the score matrix.

    Anchored top-left, not (pre < 0 and next < 0); pre < 0 needs next >= |pre| and |pre| < Skv;
    next < 0 needs |next| <= pre and |next| < Sq.
    """
    if call.is_packed or call.atten_mask is None or call.sparse_mode not in (0, 4):
        return
    pre, next_ = call.top_left_tokens
    q_len, kv_len = call.q_len, call.kv_len
    bad = pre < 0 and (next_ < -pre or -pre >= kv_len)
    if bad or (next_ < 0 and (-next_ > pre or -next_ >= q_len)):
        yield f"{_given(call)} at {q_len} x {kv_len}, anchored top-left pre={pre}, next={next_}"


@rule(layer="tiling", remedy="Widen the window, or take the short sequences into another call.")
def window_packed(call: KernelCall, on: Target) -> Found:
    """A TND window leaves no sequence without keys.

    For every sequence mode 0 needs next >= 0, Skv + pre >= Sq; mode 3 Sq <= Skv; mode 4 pre >= 0,
    pre + next >= 0, Sq - next <= Skv.
    """
    mode, pre, next_ = call.effective_mode, call.pre_tokens, call.next_tokens
    if not call.is_packed or mode not in (0, 3, 4):
        return
    given = f"sparse_mode={mode}, {_given(call)}"
    if mode == 0 and (next_ < 0 or (pre < 0 and next_ < -pre)):
        yield given
    if mode == 4 and (pre < 0 or (next_ < 0 and pre + next_ < 0)):
        yield given
    reach = {0: pre, 3: 0, 4: next_}[mode]
    for q_len, kv_len in call.sequences:
        # An empty sequence is left alone, but not in mode 3.
        if q_len > kv_len + reach and (mode == 3 or (q_len and kv_len)):
            yield f"{given} with a sequence of {q_len} queries, {kv_len} keys"


@rule(
    layer="tiling",
    remedy="Leave pre_tokens at its default; next_tokens counts from the bottom-right corner.",
)
def window_cut(call: KernelCall, on: Target) -> Found:
    """Modes 7 and 8: the cut sequence needs pre >= Skv, Sq - next <= Skv.

    (In mode 7 only if it has keys.) Mode 7 also needs next <= 0, and Sq <= Skv elsewhere.
    """
    mode, cut, next_ = call.effective_mode, call.band_index, call.next_tokens
    if mode not in (7, 8) or not call.is_packed or cut is None:
        return
    q_len, kv_len = call.sequences[cut]
    bad = call.pre_tokens < kv_len or (mode == 7 and next_ > 0)
    # Mode 7 skips sequences without keys, the cut one as well.
    if bad or (q_len - next_ > kv_len and (mode == 8 or kv_len)):
        yield f"{_given(call)} for the cut sequence {q_len} x {kv_len}"
    for b, (q_len, kv_len) in enumerate(call.sequences):
        if mode == 7 and b != cut and q_len > kv_len > 0:
            yield f"a sequence of {q_len} queries and {kv_len} keys in sparse_mode=7"


@rule(
    layer="backward",
    remedy="Say the same set with another mode, or widen the window to at least two keys.",
)
def window_backward(call: KernelCall, on: Target) -> Found:
    """The grad op needs a window that meets the score matrix.

    In dense modes 0 and 4, anchored top-left: pre + next >= 0, -pre <= Skv, -next <= Sq. In TND
    modes 0, 4, 7 and 8: pre + next > 0, and for every sequence, empty ones too, in mode 0
    -pre <= Skv, -next <= Sq, in mode 4 -pre <= Sq, -next <= Skv.
    """
    mode, pre, next_ = call.effective_mode, call.pre_tokens, call.next_tokens
    if not on.training or mode not in ((0, 4, 7, 8) if call.is_packed else (0, 4)):
        return
    given = f"{_given(call)} in a call that is trained"
    if not call.is_packed:
        back, ahead = call.top_left_tokens
        if -back > call.kv_len or -ahead > call.q_len or back + ahead < 0:
            yield given
        return
    if pre + next_ <= 0:
        yield given
    for q_len, kv_len in call.sequences if mode in (0, 4) else ():
        back, ahead = (kv_len, q_len) if mode == 0 else (q_len, kv_len)
        if -pre > back or -next_ > ahead:
            yield f"{given}, with a sequence of {q_len} queries, {kv_len} keys"


# -- prefixes ----------------------------------------------------------------------------


def _prefix_fault(call: KernelCall, mode: int, *, of_count: bool) -> Found:
    """What is wrong with how many prefixes a mode is given, or with one of them."""
    if call.effective_mode == mode and call.prefix_fault and call.has_all_prefixes != of_count:
        yield call.prefix_fault


@rule(layer="tiling", remedy="Pass prefix=(...,), one integer for every batch element or sequence.")
def prefix_count(call: KernelCall, on: Target) -> Found:
    """Mode 6 needs one prefix length per score matrix."""
    yield from _prefix_fault(call, 6, of_count=True)


@rule(
    layer="silent",
    source="tiling",
    remedy="Pass prefix=(...,), one integer for every batch element; the mask decides in any case.",
)
def prefix_count_mode_5(call: KernelCall, on: Target) -> Found:
    """Mode 5 takes one prefix length per score matrix.

    Any other number silently turns tile skipping off.
    """
    yield from _prefix_fault(call, 5, of_count=True)


@rule(
    layer="tiling",
    remedy="A shorter prefix adds nothing to bottom-right causal: raise it to Skv - Sq.",
)
def prefix_range(call: KernelCall, on: Target) -> Found:
    """A prefix lies in [max(0, Skv - Sq), Skv]."""
    yield from _prefix_fault(call, 6, of_count=False)


@rule(layer="silent", source="tiling", remedy="Raise it to Skv - Sq; the mask decides in any case.")
def prefix_range_mode_5(call: KernelCall, on: Target) -> Found:
    """In mode 5 a prefix outside [max(0, Skv - Sq), Skv] silently turns tile skipping off."""
    yield from _prefix_fault(call, 5, of_count=False)


@rule(
    layer="silent", source="tiling", remedy="Leave it out, or use mode 6 and the 3072 x 2048 mask."
)
def prefix_unused(call: KernelCall, on: Target) -> Found:
    """A prefix is read in modes 5 and 6 only."""
    if call.prefix and call.sparse_mode not in (5, 6):
        yield f"prefix={shown(call.prefix)} in sparse_mode={call.sparse_mode}"


@rule(layer="documented", remedy="Split the batch.")
def prefix_batch(call: KernelCall, on: Target) -> Found:
    """Modes 5 and 6 take at most 32 batch elements."""
    if call.effective_mode in (5, 6) and call.batch > 32:
        yield f"{call.batch} score matrices in sparse_mode={call.sparse_mode}"
