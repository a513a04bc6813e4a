"""What a report of a model has to tell of what `enable` switched, and the masks of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attnkit.interop.torch.byhand.watch import Spot
from attnkit.interop.transformers.site import Site, site_at, site_of
from attnkit.interop.transformers.switching import calling
from attnkit.masks import Full, Mask
from attnkit.reports import READERS, LayerReport

__all__ = ["masks_of"]


def _switched_layers(model: nn.Module) -> Iterator[LayerReport]:
    """Yield what ran in modules that call attention by name, and in those that write it by hand."""
    names = set(calling(model))
    for name, module in model.named_modules():
        site, kind = site_at(module), type(module).__name__
        spot = getattr(vars(module).get("forward"), "spot", None)
        if isinstance(spot, Spot):
            notes = {f"as it is written, for {why}": times for why, times in spot.left.items()}
            yield LayerReport.of(name, kind, spot.fused, spot.ran(), notes=notes)
        elif name in names or (site is not None and site.told):
            site = site or Site()
            told = {"dense": dict(site.dense), "read": dict(site.read), "notes": dict(site.notes)}
            yield LayerReport.of(name, kind, site.calls, site.ran(), **told)


READERS.add("transformers", _switched_layers)


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
