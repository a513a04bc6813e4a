"""What the attention of a model runs as: layer by layer, after it ran."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from attnkit.backends import make_plan
from attnkit.errors import BackendRefused, CompositionError, Refusal
from attnkit.interop.torch.byhand.watch import Spot
from attnkit.interop.transformers.site import Site, site_at, site_of
from attnkit.interop.transformers.switching import calling
from attnkit.masks import Full, Mask
from attnkit.planner import Plan, Request

__all__ = ["LayerReport", "ModelReport", "expect", "masks_of", "report"]


@dataclass(frozen=True)
class LayerReport:
    """One attention module: how often it was called, its plans, and what was done beside them.

    `plans` are the latest that differ, at most 16; `refused` says why one has none on the backend
    that was asked for. `dense` counts, by operator, where the model's own code made cells of a
    mask that is a set; `read` what was read cell by cell; `notes` what was computed beside a plan.
    """

    name: str
    kind: str
    calls: int
    plans: tuple[Plan, ...] = ()
    refused: tuple[Refusal, ...] = ()
    dense: Mapping[str, int] = field(default_factory=dict)
    read: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        """Whether it was called, and every plan runs on fused kernels and not as the definition."""
        ours = all(plan.backend != "reference" for plan in self.plans)
        return bool(self.plans) and ours and not self.refused

    def lines(self) -> Iterator[str]:
        """Yield what there is to say of it."""
        yield f"{self.kind}, {self.calls} call{'s' * (self.calls != 1)}"
        told = dict.fromkeys(_told(plan) for plan in self.plans)
        yield from list(told)[-_MOST_TOLD:]
        for refusal in self.refused:
            yield f"refused: {refusal}"
        beside = (("made dense by", self.dense), ("read cell by cell:", self.read))
        for word, count in (*beside, ("beside:", self.notes)):
            yield from (f"{word} {what} ({times} times)" for what, times in count.items())


_MOST_TOLD = 4


@dataclass(frozen=True)
class ModelReport:
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
            head = names[0] if len(names) == 1 else f"{pattern} ({len(names)} modules)"
            lines.append(f"{head}: {said[0]}")
            lines += [f"    {line}" for line in said[1:]]
        return "\n".join(lines)


def report(model: nn.Module, *, backend: str | None = None) -> ModelReport:
    """Return what the attention of a model ran as since it was switched; print it.

    With `backend` (such as "emulated", the contract of Ascend's fused kernel) the calls that were
    seen are planned for it, in bfloat16 where they were in a wider type, and nothing runs: how
    many kernel calls each takes, or why it is refused. Before the first call every module is
    listed, with no plan.
    """
    names = set(calling(model))
    layers = []
    for name, module in model.named_modules():
        site = site_at(module)
        spot = getattr(vars(module).get("forward"), "spot", None)
        if isinstance(spot, Spot):
            layers.append(_of_spot(name, module, spot, backend))
        elif name in names or (site is not None and site.told):
            layers.append(_of_site(name, module, site or Site(), backend))
    return ModelReport(tuple(layers))


def _of_site(name: str, module: nn.Module, site: Site, backend: str | None) -> LayerReport:
    """Report a module that calls attention by name, or one that computed with its mask."""
    found = _planned(site.plans, backend)
    told = dict(site.dense), dict(site.read), dict(site.notes)
    return LayerReport(name, type(module).__name__, site.calls, *found, *told)


def _of_spot(name: str, module: nn.Module, spot: Spot, backend: str | None) -> LayerReport:
    """Report a module that writes attention by hand."""
    found = _planned([] if spot.latest is None else [spot.latest], backend)
    notes = {f"as it is written, for {why}": times for why, times in spot.left.items()}
    return LayerReport(name, type(module).__name__, spot.fused, *found, notes=notes)


def _planned(
    plans: list[Plan], backend: str | None
) -> tuple[tuple[Plan, ...], tuple[Refusal, ...]]:
    """Plan the same requests for another backend, if one is asked for."""
    if backend is None:
        return tuple(plans), ()
    found: list[Plan] = []
    refused: list[Refusal] = []
    for plan in plans:
        try:
            found.append(make_plan(_narrow(plan.request), backend))
        except BackendRefused as error:
            refused += error.refusals
    return tuple(found), tuple(dict.fromkeys(refused))


def _narrow(request: Request) -> Request:
    """Return a request as it would be of a model in bfloat16, for tensors without content."""
    if request.dtype in (torch.float32, torch.float64):
        narrow = torch.bfloat16
        same = request.dtype
        bias = tuple(replace(t, dtype=narrow) if t.dtype == same else t for t in request.bias)
        request = replace(request, dtype=narrow, bias=bias)
    return replace(request, device="meta")


def _told(plan: Plan) -> str:
    """Return one plan in one line."""
    request = plan.request
    how = f"{len(plan.steps)} fused call{'s' * (len(plan.steps) != 1)}, " if plan.steps else ""
    extras = [term.text for term in request.bias]
    extras += ["a sink"] if request.sink else []
    extras += [f"soft-cap {request.softcap:g}"] if request.softcap else []
    extras += [f"dropout {request.dropout:g}"] if request.dropout else []
    extras += ["training"] if request.needs_grad else []
    told = "; ".join([repr(request.mask), *extras])
    size = f"{request.q_len} x {request.kv_len}"
    if plan.of_any_length and not plan.steps:
        size = f"{request.q_len} x any number"
    if request.seqlens is not None:
        size = f"{request.batch} packed sequences, {size} in all"
    return f"{plan.backend}: {how}{size}, {told}"


def expect(model: nn.Module, *, fused: bool = True, sets: bool = False) -> ModelReport:
    """Raise unless the attention of a model ran as a training script relies on; return the report.

    `fused`: every attention module was called and ran on fused kernels. `sets`: no mask was made
    dense or read cell by cell.
    """
    found = report(model)
    wrong = []
    for layer in found.layers:
        if fused and not layer.fused:
            wrong.append(f"{layer.name}: {'; '.join(layer.lines())}")
        if sets and (layer.dense or layer.read):
            wrong.append(f"{layer.name}: {'; '.join(layer.lines())}")
    if wrong:
        told = "\n".join(wrong[:8])
        raise CompositionError(f"attention does not run as expected:\n{told}")
    return found


def masks_of(model: nn.Module, **inputs: Any) -> dict[str, Mask]:
    """Return the mask of every attention module for some inputs, by the module's name.

    The model runs once, without gradients. A module that is called several times with other
    masks has one entry for each: ``name``, ``name#2`` and so on. `masks.diff` compares two models.
    """
    named = list(model.named_modules())
    for _, module in named:
        site_of(module).masks = []
    try:
        with torch.no_grad():
            model(**inputs)
        return dict(_seen(named))
    finally:
        for _, module in named:
            site_of(module).masks = None


def _seen(named: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, Mask]]:
    for name, module in named:
        each = [Full() if one is None else one for one in site_of(module).masks or ()]
        for k, mask in enumerate(dict.fromkeys(each), 1):
            yield (name if k == 1 else f"{name}#{k}"), mask
