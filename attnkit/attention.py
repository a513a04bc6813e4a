"""`Attention`, the core module."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from attnkit.arguments import check_bool, check_int
from attnkit.attend import (
    Asked,
    attend,
    is_tracing,
    plan_again,
    sharded_plan_again,
)
from attnkit.backends import BACKENDS, AttentionOutput, Operands, run_plan
from attnkit.display import Text
from attnkit.errors import (
    BackendRefused,
    CompositionError,
    CompositionTypeError,
    reasons_told,
    shown,
)
from attnkit.kept_plans import KeptPlans
from attnkit.layouts import SeqLens
from attnkit.masks import Full, Mask
from attnkit.masks.parse import as_mask
from attnkit.masks.predicate import function_name
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.shards import Shards, as_shards, telling
from attnkit.planner import Composition, Plan
from attnkit.planner.scoring import ScoreFunction
from attnkit.pse import Pse
from attnkit.pse.base import rebound
from attnkit.pse.parse import as_pse

__all__ = ["Attention", "check_backend_name"]

# Of a module, which makes tensors of its sizes.
_LARGEST_SIZE = 1 << 20


class Attention(nn.Module):
    """Scaled dot-product attention as composed: ``softmax(scale * q.k + bias) @ v`` on the mask.

    Query ``[b s n d]`` (layout BSND; also BSH, SBH, BNSD, and TND ``[t n d]`` with `seqlens`),
    key and value alike with `num_kv_heads` heads, any of float64, float32, float16, bfloat16.
    The output has the query's layout and dtype, and the value's head size. Tensors of torch's
    `scaled_dot_product_attention` are ``[b n s d]``: say ``layout="BNSD"``. A wrong layout is told
    wherever sizes differ from `num_heads` and `head_dim`; `attention` reads these off the shapes,
    and can only doubt them, in `explain`.

    - `mask`: which cells take part (`attnkit.masks`); default all.
    - `pse`: what is added to the scores (`attnkit.pse`); default nothing. Its tensors belong
      to the module: an `nn.Parameter` trains with it and is part of its state, another tensor
      is a buffer that moves with it (and is not part of its state). They are named by kind,
      ``pse_table`` of T5Relative, ``pse_slopes`` of a learnable ALiBi, in a sum after the part's
      number: ``pse_0_slopes``. One bias given to several layers is shared by them; ``bias.copy()``
      is another one.
    - `scale`: default ``head_dim ** -0.5``. `softcap`: ``c * tanh(scale * q.k / c)``
      in place of ``scale * q.k``; the bias is added after it, as in flash-attention.
    - `score_fn`: FlexAttention's `score_mod`, ``fn(score, b, h, q_idx, kv_idx)``, on what
      scale, soft-cap and bias have made of a score, before the mask: ``softmax(fn(scale * q.k +
      bias, ...))`` over the allowed keys. It is asked for one cell: five tensors without axes,
      the score in float32 (float64), the batch element or packed sequence, the query head, and
      the positions in this call's tensors, of a packed batch inside of the own sequence. Many
      cells are asked for at once by `torch.vmap`, so write it with torch operators, without `if`
      and `.item()`. It may return -inf, for a cell that takes no part; plans know masks only, so
      what is masked belongs there. Plans and graphs are kept by the function object: make it
      once. Backends reference, tiled and flex call it. Where it reads a tensor that trains, that
      is recorded by reference and, on CUDA, flex; a bias that trains does so on every backend.
    - `dropout`: on the softmax weights, in training mode, from torch's generator.
    - `sink`: a learnable logit per head that joins the softmax's denominator, initially 0.
      It is computed with in float32 (float64), whatever dtype the module is cast to.
    - `deterministic`: the same bits from the same call, gradients too, every time on one machine.
      On the CPU that is all; elsewhere kernels follow torch.use_deterministic_algorithms, which
      must be on. Where that is on, it is asked for without the argument.
    - `memory_limit`: bytes beyond the inputs that a fused call may take: its output, gathered
      keys, masks (`Plan.price.peak_bytes`). Work is split over rows and heads to stay below it.
      Backends that gather nothing have no use for it.
    - `backend`: "auto", or a name that must be able to run the composition.

    A row without any allowed key gives 0. A key that no query of its sequence may see counts
    for nothing, whatever it and its value hold, NaN included. Autocast does not reach inside:
    the dtype of the tensors is the dtype of the computation. Raises `CompositionError` when the
    parts contradict each other or the tensors, `BackendRefused` when the named backend cannot
    run them.

    >>> import torch
    >>> from attnkit import masks
    >>> layer = Attention(num_heads=4, head_dim=8, mask=masks.Causal() & masks.SlidingWindow(16))
    >>> x = torch.randn(2, 32, 4, 8)
    >>> layer(x, x, x).shape
    torch.Size([2, 32, 4, 8])
    """

    sink: nn.Parameter | None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        mask: Mask | None = None,
        pse: Pse | None = None,
        layout: str = "BSND",
        scale: float | None = None,
        dropout: float = 0.0,
        sink: bool = False,
        softcap: float | None = None,
        score_fn: ScoreFunction | None = None,
        deterministic: bool = False,
        memory_limit: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads = _check_size("num_heads", num_heads)
        self.head_dim = _check_size("head_dim", head_dim)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_heads = _check_size("num_kv_heads", kv_heads)
        if num_heads % self.num_kv_heads:
            raise CompositionError(
                f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}; each key "
                "head serves an equal group of query heads"
            )
        note = "True for a learnable logit per head; ak.attention takes the logits themselves"
        check_bool("sink", sink, note)
        if scale is None:
            scale = head_dim**-0.5
        whole = Full() if mask is None else as_mask(mask)
        rest = (softcap, score_fn, deterministic, memory_limit)
        self._composition = Composition(whole, pse, layout, scale, dropout, *rest)
        _check_heads(self._composition, num_heads)
        _check_backend(backend, self._composition)
        self.backend = backend
        self.register_parameter("sink", nn.Parameter(torch.zeros(num_heads)) if sink else None)
        self._pse_names = _register_tensors(self, self._composition.pse)
        self._plans = KeptPlans()

    @property
    def composition(self) -> Composition:
        """What it was built to compute, the bias with the tensors that the module has now.

        Moving or casting a module, loading into it and `torch.func.functional_call` put other
        tensors in the place of those that it was built with.
        """
        bias = self._composition.pse
        if bias is None or not self._pse_names:
            return self._composition
        now = tuple(getattr(self, name) for name in self._pse_names)
        if any(a is not b for a, b in zip(now, bias.tensors, strict=True)):
            self._composition = replace(self._composition, pse=rebound(bias, now))
        return self._composition

    @property
    def mask(self) -> Mask:
        """The mask it was built with."""
        return self.composition.mask

    @property
    def pse(self) -> Pse | None:
        """The bias it was built with."""
        return self.composition.pse

    @property
    def layout(self) -> str:
        """The name of the layout of its tensors."""
        return self.composition.layout

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = ...,
        pse: Pse | None = ...,
        seqlens: SeqLens | None = ...,
        shards: Shards | None = ...,
        return_stats: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = ...,
        pse: Pse | None = ...,
        seqlens: SeqLens | None = ...,
        shards: Shards | None = ...,
        return_stats: Literal[True],
    ) -> AttentionOutput: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
        shards: Shards | None = None,
        return_stats: bool = False,
    ) -> Tensor | AttentionOutput:
        """Attend; a call-time `mask` is intersected with the module's, a `pse` is added.

        With `shards` (`attnkit.parallel`), tensors have the tokens of this process, and mask,
        bias and lengths are of the whole text.

        With `return_stats`, returns `AttentionOutput(output, stats)`; gradients flow through
        ``stats.lse``, too.
        """
        with telling(as_shards(shards)):
            asked = self._asked(mask, pse)
            result = self._attend(asked, query, key, value, seqlens, return_stats, shards)
        return result if return_stats else result.output

    if TYPE_CHECKING:
        __call__ = forward

    @overload
    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = ...,
        pse: Pse | None = ...,
        seqlens: SeqLens | None = ...,
        shards: None = ...,
    ) -> Plan: ...

    @overload
    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = ...,
        pse: Pse | None = ...,
        seqlens: SeqLens | None = ...,
        shards: Shards,
    ) -> ParallelPlan: ...

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
        shards: Shards | None = None,
    ) -> Plan | ParallelPlan:
        """Return the plan that `forward` would run for these tensors; meta tensors will do.

        With `shards` it is that of all ranks; nothing is exchanged.
        """
        asked, shards = self._asked(mask, pse), as_shards(shards)
        if shards is not None:
            return self._sharded_plan(asked, query, key, value, seqlens, shards)
        return self._plan(asked, query, key, value, self.sink, seqlens)

    def explain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
        shards: Shards | None = None,
    ) -> Text:
        """Return the report of the plan: what runs, on what, at what price, and why."""
        asked, shards = self._asked(mask, pse), as_shards(shards)
        if shards is not None:
            return self._sharded_plan(asked, query, key, value, seqlens, shards).explain()
        return self._plan(asked, query, key, value, self.sink, seqlens).explain()

    def _asked(self, mask: Mask | None, pse: Pse | None) -> Asked:
        """Return what a call with this mask and bias asks for."""
        own = self._composition if is_tracing() else self.composition
        return Asked(
            (own.mask, None if mask is None else as_mask(mask)),
            (own.pse, None if pse is None else as_pse(pse)),
            own.layout,
            own.scale,
            own.dropout,
            own.softcap,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.training,
            self.backend,
            own.score_fn,
            own.deterministic,
            own.memory_limit,
        )

    def _plan(
        self,
        asked: Asked,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        seqlens: SeqLens | None,
    ) -> Plan:
        return plan_again(self._plans, asked, query, key, value, sink, seqlens)

    def _run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        self._plans.count(plan)
        return run_plan(plan, operands)

    def _sharded_plan(
        self,
        asked: Asked,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seqlens: SeqLens | None,
        shards: Shards,
    ) -> ParallelPlan:
        shards.lengths(seqlens)
        return sharded_plan_again(self._plans, asked, query, key, value, self.sink, shards)

    def _attend(
        self,
        asked: Asked,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seqlens: SeqLens | None,
        return_stats: bool,
        shards: Shards | None = None,
    ) -> AttentionOutput:
        sink = self.sink
        if not is_tracing():
            given = Operands(query, key, value, asked.pse, sink, given=asked.given)
            if shards is not None:
                shared = self._sharded_plan(asked, query, key, value, seqlens, shards)
                self._plans.count(shared)
                return shards.attend(shared, given)
            return self._run(self._plan(asked, query, key, value, sink, seqlens), given)
        own, added = [getattr(self, name) for name in self._pse_names], asked.biases[1]
        now = [*own, *(added.tensors if added is not None else ())]
        return attend(asked, query, key, value, sink, seqlens, now, return_stats, shards)

    def __getstate__(self) -> dict[str, Any]:
        # Plans are found again; they need not travel with a copy or a checkpoint.
        return {**self.__dict__, "_plans": KeptPlans()}

    def extra_repr(self) -> str:
        """Describe the composition, defaults left out."""
        return ", ".join(f"{name}={text}" for name, text in self._said().items())

    def _repr_html_(self) -> str:
        """Return the composition for a notebook, with pictures of mask and bias."""
        from attnkit.shown import page

        return page(self, self._said(), self.mask, self.pse)

    def _said(self) -> dict[str, str]:
        """Return the arguments that say the composition, defaults left out."""
        composed = self.composition
        scale, score_fn = composed.scale, composed.score_fn
        said = {
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "num_kv_heads": None if self.num_kv_heads == self.num_heads else self.num_kv_heads,
            "mask": repr(self.mask),
            "pse": None if self.pse is None else repr(self.pse),
            "layout": repr(self.layout),
            "scale": None if scale == self.head_dim**-0.5 else scale,
            "dropout": composed.dropout or None,
            "softcap": composed.softcap or None,
            "score_fn": None if score_fn is None else function_name(score_fn),
            "deterministic": composed.deterministic or None,
            "memory_limit": composed.memory_limit,
            "sink": None if self.sink is None else True,
            "backend": repr(self.backend),
        }
        return {name: str(value) for name, value in said.items() if value is not None}


def check_backend_name(name: object) -> None:
    """Raise unless it is a name that a backend could have."""
    if not isinstance(name, str):
        raise CompositionTypeError(
            f"backend={shown(name)}; it is 'auto' or one of {', '.join(BACKENDS)}"
        )


def _check_size(name: str, value: object) -> int:
    return check_int(name, value, 1, _LARGEST_SIZE)


def _register_tensors(module: nn.Module, pse: Pse | None) -> tuple[str, ...]:
    """Make the tensors of a bias the module's own, and return their names there."""
    names = [] if pse is None else [f"pse_{name}" for name in pse.tensor_names]
    for name, tensor in zip(names, pse.tensors if pse is not None else (), strict=True):
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor, persistent=False)
    module.register_load_state_dict_pre_hook(_name_numbered)  # type: ignore[no-untyped-call]
    return tuple(names)


def _name_numbered(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Load the tensors of a bias from a state that has them by number, as it once did."""
    for k, name in enumerate(module._pse_names):  # type: ignore[arg-type]
        if f"{prefix}pse_{k}" in state:
            state[prefix + name] = state.pop(f"{prefix}pse_{k}")


def _check_heads(composition: Composition, num_heads: int) -> None:
    if composition.mask.comes_with_call:
        raise CompositionError(
            f"mask={composition.mask!r} comes with each call; give it to forward, "
            "layer(query, key, value, mask=...)"
        )
    for what, part in (("mask", composition.mask), ("pse", composition.pse)):
        heads = part.heads if part is not None else None
        if heads is not None and heads != num_heads:
            raise CompositionError(
                f"{what}={part!r} was made for {heads} heads, but num_heads={num_heads}; give it "
                "one entry per query head"
            )


def _check_backend(name: str, composition: Composition) -> None:
    """Fail when the module is built, not at its first batch, where that much is certain."""
    check_backend_name(name)
    if name == "auto":
        return
    reasons = BACKENDS[name].composition_refusals(composition)
    if reasons:
        told = reasons_told(reasons)
        raise BackendRefused(f"backend {name!r} cannot run this composition:\n{told}", reasons)
