"""`Attention`, the core module, and its functional forms `attention` and `plan`."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from attnkit.backends import BACKENDS, AttentionOutput, Operands, make_plan
from attnkit.errors import BackendRefused, CompositionError
from attnkit.layouts import SeqLens
from attnkit.masks import Full, Mask
from attnkit.masks.base import check_int
from attnkit.planner import Composition, Plan, Request, read_request
from attnkit.pse import Pse

__all__ = ["Attention", "attention", "plan"]


class Attention(nn.Module):
    """Scaled dot-product attention as composed: ``softmax(scale * q.k + bias) @ v`` on the mask.

    Query ``[b s n d]`` (layout BSND; also BSH, SBH, BNSD, and TND ``[t n d]`` with `seqlens`),
    key and value alike with `num_kv_heads` heads, any of float64, float32, float16, bfloat16.
    The output has the query's layout and dtype, and the value's head size.

    - `mask`: which cells take part (`attnkit.masks`); default all.
    - `pse`: what is added to the scores (`attnkit.pse`); default nothing. A bias of
      `nn.Parameter` tensors trains with the module.
    - `scale`: default ``head_dim ** -0.5``. `softcap`: ``c * tanh(score / c)`` before the mask.
    - `dropout`: on the softmax weights, in training mode, from torch's generator.
    - `sink`: a learnable logit per head that joins the softmax's denominator, initially 0.
    - `backend`: "auto", or a name that must be able to run the composition.

    A row without any allowed key gives 0. Raises `CompositionError` when the parts contradict
    each other or the tensors, `BackendRefused` when the named backend cannot run them.

    >>> import torch
    >>> from attnkit import masks
    >>> layer = Attention(num_heads=4, head_dim=8, mask=masks.Causal() & masks.SlidingWindow(16))
    >>> x = torch.randn(2, 32, 4, 8)
    >>> layer(x, x, x).shape
    torch.Size([2, 32, 4, 8])
    """

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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads = check_int("num_heads", num_heads, 1)
        self.head_dim = check_int("head_dim", head_dim, 1)
        self.num_kv_heads = check_int(
            "num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads, 1
        )
        if num_heads % self.num_kv_heads:
            raise CompositionError(
                f"num_heads={num_heads} is no multiple of num_kv_heads={num_kv_heads}; each key "
                "head serves an equal group of query heads"
            )
        self.composition = Composition(
            Full() if mask is None else mask,
            pse,
            layout,
            head_dim**-0.5 if scale is None else scale,
            dropout,
            softcap,
        )
        _check_heads(self.composition, num_heads)
        _check_backend(backend, self.composition)
        self.backend = backend
        self.sink = nn.Parameter(torch.zeros(num_heads)) if sink else None
        for k, tensor in enumerate(pse.tensors if pse is not None else ()):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"pse_{k}", tensor)
        self._plans: dict[Hashable, Plan] = {}

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

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
        return_stats: bool = False,
    ) -> Tensor | AttentionOutput:
        """Attend; a call-time `mask` is intersected with the module's, a `pse` is added.

        With `return_stats`, returns `AttentionOutput(output, stats)`.
        """
        found = self._plan(query, key, value, mask, pse, seqlens)
        bias = self.composition.pse if pse is None else _added(self.composition.pse, pse)
        operands = Operands(query, key, value, bias, self.sink)
        result = BACKENDS[found.backend].run(found, operands)
        return result if return_stats else result.output

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
    ) -> Plan:
        """Return the plan that `forward` would run for these tensors; meta tensors will do."""
        return self._plan(query, key, value, mask, pse, seqlens)

    def explain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = None,
        pse: Pse | None = None,
        seqlens: SeqLens | None = None,
    ) -> str:
        """Return the report of the plan: what runs, on what, at what price, and why."""
        return self._plan(query, key, value, mask, pse, seqlens).explain()

    def _plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask | None,
        pse: Pse | None,
        seqlens: SeqLens | None,
    ) -> Plan:
        known: Hashable = None
        if pse is None and isinstance(query, Tensor):
            known = (
                *((t.shape, t.dtype, t.device, t.requires_grad) for t in (query, key, value)),
                mask,
                seqlens,
                self.training,
                torch.is_grad_enabled(),
            )
            found = self._plans.get(known)
            if found is not None:
                return found
        request = self._request(query, key, value, mask, pse, seqlens)
        found = make_plan(request, self.backend)
        if known is not None:
            self._plans[known] = found
        return found

    def _request(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask | None,
        pse: Pse | None,
        seqlens: SeqLens | None,
    ) -> Request:
        composed = self.composition
        if mask is not None or pse is not None:
            composed = Composition(
                composed.mask if mask is None else composed.mask & mask,
                _added(composed.pse, pse),
                composed.layout,
                composed.scale,
                composed.dropout,
                composed.softcap,
            )
        request = read_request(
            composed,
            query,
            key,
            value,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            seqlens=seqlens,
            sink=self.sink,
            training=self.training,
        )
        if request.head_dim != self.head_dim:
            raise CompositionError(
                f"query {list(query.shape)} has heads of {request.head_dim} dimensions; this "
                f"module was built with head_dim={self.head_dim}"
            )
        return request

    def extra_repr(self) -> str:
        """Describe the composition, defaults left out."""
        parts = [f"num_heads={self.num_heads}", f"head_dim={self.head_dim}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        parts.append(f"mask={self.mask!r}")
        if self.pse is not None:
            parts.append(f"pse={self.pse!r}")
        parts.append(f"layout={self.layout!r}")
        composed = self.composition
        parts += [f"dropout={composed.dropout}"] if composed.dropout else []
        parts += [f"softcap={composed.softcap}"] if composed.softcap else []
        parts += ["sink=True"] if self.sink is not None else []
        return ", ".join([*parts, f"backend={self.backend!r}"])


def _added(own: Pse | None, more: Pse | None) -> Pse | None:
    if own is None or more is None:
        return own if more is None else more
    return own + more


def _check_heads(composition: Composition, num_heads: int) -> None:
    for what, part in (("mask", composition.mask), ("pse", composition.pse)):
        heads = part.heads if part is not None else None
        if heads is not None and heads != num_heads:
            raise CompositionError(
                f"{what}={part!r} was made for {heads} heads, but num_heads={num_heads}; give it "
                "one entry per query head"
            )


def _check_backend(name: str, composition: Composition) -> None:
    """Fail when the module is built, not at its first batch, where that much is certain."""
    if name == "auto":
        return
    reasons = BACKENDS[name].composition_refusals(composition)
    if reasons:
        told = "\n".join(f"  {reason}" for reason in reasons)
        raise BackendRefused(f"backend {name!r} cannot run this composition:\n{told}", reasons)


def _functional(
    mask: Mask | None,
    pse: Pse | None,
    layout: str,
    scale: float | None,
    dropout: float,
    softcap: float | None,
) -> Composition:
    return Composition(Full() if mask is None else mask, pse, layout, scale, dropout, softcap)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    pse: Pse | None = None,
    layout: str = "BSND",
    seqlens: SeqLens | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    sink: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | AttentionOutput:
    """Attend without a module; the arguments are those of `Attention`.

    Layouts that merge heads (BSH, SBH) need `num_heads`, and `num_kv_heads` where it differs.
    `sink` is a tensor [n]. A `dropout` above 0 applies: there is no eval mode here.

    >>> import torch
    >>> from attnkit import masks
    >>> x = torch.randn(1, 16, 32)
    >>> attention(x, x, x, mask=masks.Causal(), layout="BSH", num_heads=4).shape
    torch.Size([1, 16, 32])
    """
    composition = _functional(mask, pse, layout, scale, dropout, softcap)
    request = read_request(
        composition,
        query,
        key,
        value,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seqlens=seqlens,
        sink=sink,
        training=True,
    )
    found = make_plan(request, backend)
    result = BACKENDS[found.backend].run(found, Operands(query, key, value, pse, sink))
    return result if return_stats else result.output


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    pse: Pse | None = None,
    layout: str = "BSND",
    seqlens: SeqLens | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    sink: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Plan:
    """Return the plan that `attention` would run; meta tensors will do.

    >>> import torch
    >>> from attnkit import masks
    >>> x = torch.empty(1, 2048, 8, 64, device="meta")
    >>> found = plan(x, x, x, mask=masks.SlidingWindow(256), backend="emulated")
    >>> found.calls[0].sparse_mode, found.calls[0].pre_tokens
    (4, 255)
    """
    composition = _functional(mask, pse, layout, scale, dropout, softcap)
    request = read_request(
        composition,
        query,
        key,
        value,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seqlens=seqlens,
        sink=sink,
        training=True,
    )
    return make_plan(request, backend)
