"""What the models share besides attention, and how they take the weights of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit.rotary import Interpolation, Llama3, YaRN

M = TypeVar("M", bound=nn.Module)


class SwiGLU(nn.Module):
    """``down(act(gate(x)) * up(x))``, of ``[... dim]``."""

    def __init__(self, dim: int, hidden: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        """``[... dim] -> [... dim]``."""
        out: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


class Shifted(nn.RMSNorm):
    """An RMS norm whose checkpoint holds its weight less one (Gemma)."""

    def forward(self, x: Tensor) -> Tensor:
        """``[... dim] -> [... dim]``."""
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


def rotary(parameters: Mapping[str, Any], pairing: str = "half") -> ak.Rotary:
    """Return the rotary positions that a configuration's `rope_parameters` describe.

    Raises `KeyError` for a `rope_type` that is not listed here.

    >>> rotary({"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}).scaling
    Interpolation(factor=2.0)
    """
    kinds = {"default": None, "linear": Interpolation, "llama3": Llama3, "yarn": YaRN}
    kind = kinds[parameters.get("rope_type", "default")]
    names = kind.__dataclass_fields__ if kind is not None else ()
    given = {name: parameters[name] for name in names if parameters.get(name) is not None}
    if kind is YaRN and parameters.get("mscale"):
        part, whole = (stretch(parameters, name) for name in ("mscale", "mscale_all_dim"))
        given["attention_factor"] = part / whole
    scaling = None if kind is None else kind(**given)
    base = float(parameters["rope_theta"])
    return ak.Rotary(base, pairing=pairing, scaling=scaling)  # type: ignore[arg-type]


def stretch(parameters: Mapping[str, Any], name: str) -> float:
    """Return by how much YaRN stretches scores in a long text: ``0.1 * m * log(factor) + 1``."""
    found: float = 0.1 * parameters.get(name, 0.0) * math.log(parameters.get("factor", 1.0)) + 1
    return found


def tokens_of(mask: Tensor | None, ids: Tensor, cache: ak.KVCache | None) -> Tensor | None:
    """Return the positions of new tokens ``[b s]`` in texts that a padding mask ``[b t]`` holds."""
    if mask is None:
        return None
    start = 0 if cache is None else cache.length
    places = (mask.cumsum(1) - 1).clamp(min=0)
    if start + ids.shape[1] > mask.shape[1]:  # beyond the prompt, all tokens exist
        more = torch.arange(1, start + ids.shape[1] - mask.shape[1] + 1, device=ids.device)
        places = torch.cat([places, places[:, -1:] + more], 1)
    return places[:, start : start + ids.shape[1]]


def through(
    layers: nn.ModuleList, x: Tensor, caches: Sequence[ak.KVCache] | None, *told: Any
) -> Tensor:
    """Return tokens after all layers, each with its own cache where there are caches."""
    each = caches if caches is not None else [None] * len(layers)
    for layer, cache in zip(layers, each, strict=True):
        x = layer(x, *told, cache)
    return x


def load(model: M, state: Mapping[str, Tensor], renamed: Mapping[str, str]) -> M:
    """Fill a model with a checkpoint's tensors; `renamed` says what parts of names become.

    Every tensor must find its place, and every parameter its tensor. Of parameters that are one,
    as an embedding and a head that share it, the checkpoint may have either name.
    """
    known: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        known[name] = tensor
    found = model.load_state_dict(known, strict=False)
    own = dict(model.named_parameters(remove_duplicate=False))
    given = {id(own[name]) for name in known if name in own}
    missing = [name for name in found.missing_keys if id(own.get(name)) not in given]
    if missing or found.unexpected_keys:
        raise ValueError(f"without a tensor: {missing}; without a place: {found.unexpected_keys}")
    return model
