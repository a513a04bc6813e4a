"""What the attention of a model ran as: layer by layer, after it ran."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from attnkit.attention import Attention, check_backend_name
from attnkit.backends import make_plan
from attnkit.display import Told
from attnkit.errors import BackendRefused, CompositionError, CompositionTypeError, Refusal
from attnkit.kept_plans import Ran
from attnkit.masks import Mask
from attnkit.masks.cut import Cut
from attnkit.parallel.plan import ParallelPlan
from attnkit.planner import Plan, Request
from attnkit.registry import Registry

__all__ = ["READERS", "LayerReport", "ModelReport", "expect", "report"]

_MOST_TOLD = 4


@dataclass(frozen=True)
class LayerReport:
    """One attention module: how often it was called, its plans, and what was done beside them.

    `plans` are the latest that differ, at most 16, `times` how often each of them ran; `refused`
    says why one has none on the backend that was asked for. `dense` counts, by operator, where the
    model's own code made cells of a mask that is a set; `read` what was read cell by cell; `notes`
    what was computed beside a plan. These three are of models that other libraries wrote.
    """

    name: str
    kind: str
    calls: int
    plans: tuple[Plan | ParallelPlan, ...] = ()
    refused: tuple[Refusal, ...] = ()
    dense: Mapping[str, int] = field(default_factory=dict)
    read: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    times: tuple[int, ...] = ()

    @classmethod
    def of(cls, name: str, kind: str, calls: int, ran: Iterable[Ran], **beside: Any) -> LayerReport:
        """Return the report of a module from its plans, each with how often it ran."""
        plans, times = zip(*_merged(ran), strict=True) if (ran := list(ran)) else ((), ())
        return cls(name, kind, calls, plans, times=times, **beside)

    @property
    def fused(self) -> bool:
        """Whether it was called, and every plan runs on fused kernels and not as the definition."""
        ours = all(plan.backend != "reference" for plan in self.plans)
        return bool(self.plans) and ours and not self.refused

    def lines(self) -> Iterator[str]:
        """Yield what there is to say of it."""
        yield f"{self.kind}, {self.calls} call{'s' * (self.calls != 1)}"
        told: Counter[str] = Counter()
        for plan, times in zip(self.plans, self.times, strict=True):
            told[_told(plan)] += times
        for text, times in list(told.items())[-_MOST_TOLD:]:
            often = "once" if times == 1 else f"{times} times"
            yield text if len(told) == 1 else f"{text} ({often})"
        for refusal in self.refused:
            yield f"refused: {refusal}"
        beside = (("made dense by", self.dense), ("read cell by cell:", self.read))
        for word, count in (*beside, ("beside:", self.notes)):
            yield from (f"{word} {what} ({times} times)" for what, times in count.items())

    def planned_for(self, backend: str) -> LayerReport:
        """Return the report with the same calls planned for another backend."""
        found: list[Ran] = []
        refused: dict[Refusal, None] = {}
        for plan, times in zip(self.plans, self.times, strict=True):
            try:
                found.append((make_plan(_narrow(plan.request), backend), times))
            except BackendRefused as error:
                refused.update(dict.fromkeys(error.refusals))
        plans, counts = tuple(plan for plan, _ in found), tuple(times for _, times in found)
        return replace(self, plans=plans, times=counts, refused=tuple(refused))


@dataclass(frozen=True)
class ModelReport(Told):
    """What `report` found: print it, or look at `layers`.

    `layers` holds the modules that call attnkit, or would.
    """

    layers: tuple[LayerReport, ...]

    @property
    def calls(self) -> int:
        """How often attnkit was called in all."""
        return sum(layer.calls for layer in self.layers)

    def __str__(self) -> str:
        groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for layer in self.layers:
            key = re.sub(r"\d+", "*", layer.name), tuple(layer.lines())
            groups.setdefault(key, []).append(layer.name)
        lines = [f"{len(self.layers)} attention modules, {self.calls} calls of attnkit"]
        for (pattern, said), names in groups.items():
            name = names[0] if len(names) == 1 else f"{pattern} ({len(names)} modules)"
            lines.append(f"{name or 'the module itself'}: {said[0]}")
            lines += [f"    {line}" for line in said[1:]]
        return "\n".join(lines)


READERS: Registry[Callable[[nn.Module], Iterator[LayerReport]]] = Registry("reader")
"""What finds attention modules in a model, and says what ran in each; adapters add theirs."""


def _own_layers(model: nn.Module) -> Iterator[LayerReport]:
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            kept = module._plans
            yield LayerReport.of(name, type(module).__name__, kept.calls, kept.ran())


READERS.add("attention", _own_layers)


def report(model: nn.Module, *, backend: str | None = None) -> ModelReport:
    """Return what the attention of a model ran as so far, layer by layer; print it.

    Layers are the `Attention` modules of the model, those inside of `MultiHeadAttention`, and
    what `attnkit.interop.transformers.enable` switched. A layer counts its calls and keeps its
    latest plans, so nothing has to be turned on; a copy begins anew. What a graph of
    `torch.compile` runs is not counted: look before compiling.

    With `backend` (such as "emulated", the contract of Ascend's fused kernel) the calls that were
    seen are planned for it, in bfloat16 where they were in a wider type, and nothing runs: how
    many kernel calls each takes, or why it is refused. Before the first call every module is
    listed, with no plan.

    >>> import torch
    >>> import attnkit as ak
    >>> model = torch.nn.Sequential(*(ak.MultiHeadAttention(32, 4) for _ in range(2)))
    >>> _ = model(torch.randn(1, 8, 32))
    >>> print(ak.report(model))
    2 attention modules, 2 calls of attnkit
    *.attention (2 modules): Attention, 1 call
        tiled: 8 x 8, Full(); training
    """
    if not isinstance(model, nn.Module):
        raise CompositionTypeError(f"report takes a model, got {type(model).__name__}")
    if backend is not None:
        check_backend_name(backend)
    place = {name: k for k, (name, _) in enumerate(model.named_modules())}
    found = [layer for _, read in READERS.items() for layer in read(model)]
    found.sort(key=lambda layer: place[layer.name])
    if backend is not None:
        found = [layer.planned_for(backend) for layer in found]
    return ModelReport(tuple(found))


def expect(
    model: nn.Module, *, fused: bool = True, sets: bool = False, backend: str | None = None
) -> ModelReport:
    """Raise unless the attention of a model ran as a training script relies on; return the report.

    `fused`: every attention module was called and ran on fused kernels. `backend`: every one of
    its plans ran on this one. `sets`: no mask was made dense or read cell by cell.

    >>> import torch
    >>> import attnkit as ak
    >>> layer, x = ak.Attention(2, 8), torch.randn(1, 4, 2, 8)
    >>> _ = layer(x, x, x)
    >>> ak.expect(layer, backend="tiled").calls
    1
    """
    found = report(model)
    wrong = []
    for layer in found.layers:
        ran = {plan.backend for plan in layer.plans}
        other = backend is not None and ran != {backend}
        if other or (fused and not layer.fused) or (sets and (layer.dense or layer.read)):
            wrong.append(f"{layer.name or 'the module itself'}: {'; '.join(layer.lines())}")
    if wrong or not found.layers:
        told = "\n".join(wrong[:8]) or "there is no attention of attnkit in it"
        raise CompositionError(f"attention does not run as expected:\n{told}")
    return found


def _merged(ran: Iterable[Ran]) -> list[Ran]:
    """Return the plans that differ, each with how often it or one of its kind ran."""
    found: list[Ran] = []
    for plan, times in ran:
        for k, (kept, before) in enumerate(found):
            if _stands_for(kept, plan):
                found[k] = kept, before + times
                break
        else:
            found.append((plan, times))
    return found


def _stands_for(kept: Plan | ParallelPlan, other: Plan | ParallelPlan) -> bool:
    """Whether a plan is another one, or that of another step with as many rows."""
    if not isinstance(kept, Plan) or not kept.of_any_length:
        return kept == other
    a, b = kept.request, other.request
    return replace(a, kv_len=b.kv_len) == b


def _narrow(request: Request) -> Request:
    """Return a request as it would be of a model in bfloat16, for tensors without content."""
    if request.dtype in (torch.float32, torch.float64):
        narrow = torch.bfloat16
        same = request.dtype
        bias = tuple(replace(t, dtype=narrow) if t.dtype == same else t for t in request.bias)
        request = replace(request, dtype=narrow, bias=bias)
    return replace(request, device="meta")


def _mask_told(mask: Mask) -> str:
    """Return a mask as text; of a decoding step what it is a row of, whichever row it was."""
    if isinstance(mask, Cut) and mask.q_len is not None:
        (first, last), whole = mask.q_range, (0, mask.kv_len)
        if last == mask.q_len and mask.kv_range == whole:
            rows = last - first
            return f"the last {'row' if rows == 1 else f'{rows} rows'} of {mask.mask!r}"
    return repr(mask)


def _told(plan: Plan | ParallelPlan) -> str:
    """Return one plan in one line."""
    request = plan.request
    extras = [term.text for term in request.bias]
    extras += ["a sink"] if request.sink else []
    extras += [f"soft-cap {request.softcap:g}"] if request.softcap else []
    extras += [f"dropout {request.dropout:g}"] if request.dropout else []
    extras += ["training"] if request.needs_grad else []
    told = "; ".join([_mask_told(request.mask), *extras])
    size = f"{request.q_len} x {request.kv_len}"
    if isinstance(plan, ParallelPlan):
        return f"{plan.size} processes, {plan.method}: {size}, {told}"
    steps = len(plan.steps)
    how = f"{steps} fused call{'s' * (steps != 1)}, " if steps else ""
    if plan.of_any_length and not plan.steps:
        size = f"{request.q_len} x any number"
    if request.seqlens is not None:
        size = f"{request.batch} packed sequences, {size} in all"
    return f"{plan.backend}: {how}{size}, {told}"
