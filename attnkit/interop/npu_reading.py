"""What the integers of a call of ``npu_fusion_attention`` mean, as a composition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef

from attnkit.backends import AttentionOutput
from attnkit.constants import constant
from attnkit.display import Told
from attnkit.errors import KernelContractError
from attnkit.functional import attention, plan
from attnkit.geometry import Region
from attnkit.interop.npu_biases import bias_of
from attnkit.kernel import KernelCall
from attnkit.kernel.call_tensors import check_devices
from attnkit.kernel.given import described
from attnkit.kernel.launch import device_product
from attnkit.kernel.legality import Target, Violation, contract_error, violations
from attnkit.kernel.mask_facts import mask_facts
from attnkit.kernel.sizes import UNBOUNDED
from attnkit.layouts import SeqLens
from attnkit.masks import (
    Band,
    Causal,
    Finding,
    Full,
    Mask,
    PerBatch,
    Prefix,
    Slices,
    SlidingWindow,
)
from attnkit.masks.foreign.torch import from_torch
from attnkit.planner import Plan
from attnkit.pse import Pse

__all__ = ["CallReading", "read"]

# What such a call computes depends on tile sizes, or on memory that nobody wrote.
_UNDEFINED = frozenset(
    {
        "mask-content",
        "mask-outside-window",
        "mask-total-lengths",
        "mask-4d-packed",
        "scale-finite",
        "varlen-decreasing",
        "varlen-tail",
        "start-empty-first",
    }
)


@dataclass(frozen=True, eq=False)
class CallReading(Told):
    """A call of the op as what it computes: a mask, a bias, a scale, a layout.

    `said` tells in words what the sparse mode means at these sizes; `findings` where the integers
    compute something else than one usually wants. `attend` computes the same on any device, and
    `plan` is the plan of it.
    """

    call: KernelCall
    mask: Mask
    pse: Pse | None
    seqlens: SeqLens | None
    sink: Tensor | None
    said: str
    findings: tuple[Finding, ...]

    @property
    def dropout(self) -> float:
        """The share of weights that is dropped."""
        return 1.0 - self.call.keep_prob

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        """Attend to tensors like those of the call; the output has the query's layout."""
        held, (query, key, value) = query, self._used(query, key, value)
        found = attention(query, key, value, return_stats=True, dropout=self.dropout, **self._how)
        unused = len(held) - len(query)
        if not self.call.is_packed or not unused:
            return found
        # Rows behind the last sequence, which zeros at the end of the lists declare unused.
        rest = found.output.new_zeros((unused, *found.output.shape[1:]))
        return AttentionOutput(torch.cat((found.output, rest)), found.stats)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Plan:
        """Return the plan that `attend` runs for such tensors; meta tensors will do."""
        used = self._used(query, key, value)
        found: Plan = plan(*used, dropout=self.dropout, backend=backend, **self._how)
        return found

    @property
    def _how(self) -> dict[str, Any]:
        call = self.call
        return {
            "mask": self.mask,
            "pse": self.pse,
            "layout": call.layout,
            "seqlens": self.seqlens,
            "num_heads": call.num_heads,
            "num_kv_heads": call.num_kv_heads,
            "scale": float(call.scale),
            "sink": self.sink,
        }

    def _used(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.seqlens is None:
            return tensors
        totals = (self.seqlens.total_q, self.seqlens.total_kv, self.seqlens.total_kv)
        return tuple(t[:n] for t, n in zip(tensors, totals, strict=True))

    def __str__(self) -> str:
        call, term = self.call, "" if self.pse is None else f", pse={self.pse!r}"
        dropped = f", dropout={self.dropout:.6g}" if self.dropout else ""
        sink = ", with a sink" if self.sink is not None else ""
        head = f"{self.mask!r}{term}, scale={float(call.scale):.6g}{dropped}{sink}, {call.layout}"
        return "\n".join([head, self.said, *map(str, self.findings)])


def read(given: Mapping[str, Any], version: str) -> CallReading:
    """Read the parameters of `attnkit.fusion_attention`, by name, as a version of the op has them.

    Raises `KernelContractError` for what the op rejects, and for what is not defined.
    """
    call = described(given)
    tensors = {name: given[name] for name in _TENSORS}
    check_devices({n: t for n, t in tensors.items() if t is not None and not t.is_meta})
    mask, pse, sink = (tensors[name] for name in ("atten_mask", "pse", "sink"))
    on = _target(tensors, version)
    _refuse(_broken(call, on))
    # Content is looked at last: it makes sense only for shapes that are in order.
    broken = _broken(call, replace(on, mask=mask_facts(call, mask)))
    _refuse(broken)
    if call.dropout_mask is not None:
        raise KernelContractError(
            "dropout_mask says which weights are dropped, and a planned call draws its own; "
            "attnkit.fusion_attention takes it",
            ["dropout-mask"],
        )
    cells, seqlens = _cells(call, mask)
    said, hints = _told(call, cells)
    findings = (*map(_as_finding, broken), *hints)
    return CallReading(call, cells, bias_of(call, pse), seqlens, sink, said, findings)


_TENSORS = ("query", "key", "value", "atten_mask", "pse", "sink", "dropout_mask")


def _target(tensors: Mapping[str, Any], version: str) -> Target:
    """Return what the rules go by beside the call."""
    device = tensors["query"].device
    wanting = [
        name
        for name, tensor in tensors.items()
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
    ]
    product = device_product(device) if device.type == "npu" else "emulator"
    return Target(version, product, bool(set(wanting) - {"pse"}), "pse" in wanting)


@constant
def _broken(call: KernelCall, on: Target) -> tuple[Violation, ...]:
    return violations(call, on)


def _refuse(broken: tuple[Violation, ...]) -> None:
    """Raise for what the op rejects, and for what is not defined."""
    bad = [found for found in broken if found.layer != "silent" or found.code in _UNDEFINED]
    if bad:
        raise contract_error(bad)


def _as_finding(found: Violation) -> Finding:
    sentence = found.rule.sentence.rstrip(".")
    here = ". Here it is 0" if found.code.startswith("rows-") else ""
    return Finding(found.code, f"{found.found}. {sentence}{here}", found.rule.remedy.rstrip("."))


# -- the mask ---------------------------------------------------------------------------------


def _cells(call: KernelCall, mask: Tensor | None) -> tuple[Mask, SeqLens | None]:
    """Return the set of cells of a call, and the lengths of its packed sequences."""
    seqlens = None
    if call.is_packed:
        seqlens = SeqLens(*(list(side) for side in zip(*call.sequences, strict=True)))
    if mask is None:
        return Full(), seqlens
    if call.sparse_mode not in (0, 1, 5):
        return _by_mode(call), seqlens
    if mask.is_meta:
        raise KernelContractError(
            f"sparse_mode={call.sparse_mode} computes what atten_mask allows, and one on the meta "
            "device holds nothing; give the mask itself",
            ["mask-content-unknown"],
        )
    sizes = tuple(dict.fromkeys(call.sequences)) if call.is_packed else ()
    if mask.is_inference():
        found = _drawn(mask, sizes)
    else:
        found = _kept(WeakIdRef(mask), mask._version, sizes)
    if not call.is_packed or len(found) == 1:
        return found[0], seqlens
    each = dict(zip(sizes, found, strict=True))
    if any(one.extent != (None, None) for one in found):
        return _side_by_side(call, each)
    return _each([each[size] for size in call.sequences]), seqlens


def _side_by_side(call: KernelCall, each: dict[tuple[int, int], Mask]) -> tuple[Mask, SeqLens]:
    """Return masks that are made for some lengths, in one score matrix of all sequences.

    A mask of a packed batch is one for sequences of any length, which a drawn one is not.
    """
    found, row, key = [], 0, 0
    for size in call.sequences:
        if not each[size].is_region(*size):
            raise KernelContractError(
                f"atten_mask holds scattered cells for packed sequences of unlike lengths, "
                f"{each[size]!r}; give them in one call per length",
                ["mask-scattered-packed"],
            )
        found.append(each[size].region(*size).shift(row, key))
        row, key = row + size[0], key + size[1]
    return Slices.of(Region.union(found), row, key), SeqLens([row], [key])


@constant
def _kept(mask: Any, version: int, sizes: tuple[tuple[int, int], ...]) -> tuple[Mask, ...]:
    return _drawn(mask(), sizes)


def _drawn(mask: Tensor, sizes: tuple[tuple[int, int], ...]) -> tuple[Mask, ...]:
    """Return the set that a mask tensor leaves; for packed sequences that of its corner."""
    drops = mask.detach().bool()
    if not sizes:
        return (from_torch(drops, keep=False).mask,)
    corners = (drops[:q_len, :kv_len] for q_len, kv_len in sizes)
    return tuple(
        from_torch(corner, keep=False).mask if corner.numel() else Full() for corner in corners
    )


def _each(masks: list[Mask]) -> Mask:
    return masks[0] if all(mask == masks[0] for mask in masks) else PerBatch(masks)


def _by_mode(call: KernelCall) -> Mask:
    """Return the set of a mode whose mask tensor is compressed."""
    mode = call.sparse_mode
    if mode == 2:
        return Causal("top_left")
    if mode == 3:
        return Causal()
    if mode == 4:
        return _band(call)
    if mode == 6:
        return Causal() | Prefix(call.prefix or ())
    others = Causal("top_left") if mode == 8 else Causal()
    cut = Causal() if call.next_tokens == 0 else Band(None, call.next_tokens)
    return _each([cut if b == call.band_index else others for b in range(call.batch)])


def _band(call: KernelCall) -> Mask:
    """Return mode 4's band by its shortest name; ends beyond every cell are no ends."""
    left = None if call.pre_tokens >= min(call.kv_len, UNBOUNDED) else call.pre_tokens
    right = None if call.next_tokens >= min(call.q_len, UNBOUNDED) else call.next_tokens
    if right == 0:
        return Causal() if left is None else SlidingWindow(left + 1)
    return Full() if left is None and right is None else Band(left, right)


# -- in words ---------------------------------------------------------------------------------


def _said(call: KernelCall, mask: Mask) -> str:
    """Return what the sparse mode means, in a sentence."""
    mode, pre, ahead = call.effective_mode, call.pre_tokens, call.next_tokens
    if mode is None:
        return "no atten_mask: every key, whatever sparse_mode and the tokens say"
    corner = "bottom-right corner (the last query stands on the last key)"
    told = {
        0: f"what atten_mask leaves, {mask!r}; pre_tokens and next_tokens only skip tiles",
        1: f"what atten_mask leaves, {mask!r}",
        2: "keys up to the query's own index, from the top-left corner (query 0 on key 0)",
        3: f"keys up to the query's place, from the {corner}",
        4: f"from {_far(pre)} behind the query's place to {_far(ahead)} ahead of it, both "
        f"included, from the {corner}{_width(call)}",
        5: f"what atten_mask leaves, {mask!r}; prefix only skips tiles",
        6: f"keys up to the query's place, from the {corner}, and the first ones, `prefix` many",
        7: f"as mode 3, and the last sequence with queries ends {ahead} beyond its place",
        8: f"as mode 2, and the first sequence with queries ends {ahead} beyond the place from its "
        f"{corner}",
    }
    return f"sparse_mode={mode}: {told[mode]}"


def _far(tokens: int) -> str:
    return "any number" if tokens >= UNBOUNDED else str(tokens)


def _width(call: KernelCall) -> str:
    if call.pre_tokens >= UNBOUNDED or call.next_tokens >= UNBOUNDED:
        return ""
    return f": {call.pre_tokens + call.next_tokens + 1} keys"


@constant
def _told(call: KernelCall, mask: Mask) -> tuple[str, tuple[Finding, ...]]:
    return _said(call, mask), tuple(_hints(call, mask))


def _hints(call: KernelCall, mask: Mask) -> list[Finding]:
    """Return where a legal call computes something else than one usually means by it."""
    found = [*_about_windows(call), *_about_polarity(call, mask)]
    if call.scale == 1.0 and call.head_dim > 1:
        found.append(
            Finding(
                "scale-is-one",
                "scale=1.0, the op's default: the scores are not divided by the root of the head "
                "size",
                f"pass scale={call.head_dim**-0.5:.6g} unless the query is scaled already",
            )
        )
    if call.pse is not None and call.pse_type == 1 and call.scale != 1.0:
        found.append(
            Finding(
                "pse-is-scaled",
                f"pse_type=1, the op's default, adds pse before the scale: {call.scale:.6g} * "
                "(q.k + pse)",
                "pass pse_type=0 for a bias that is added to the scaled scores",
            )
        )
    return found


def _about_windows(call: KernelCall) -> list[Finding]:
    mode, pre, ahead = call.effective_mode, call.pre_tokens, call.next_tokens
    found = []
    if mode == 4 and ahead == 0 and 0 < pre < call.kv_len and pre % 8 == 0:
        found.append(
            Finding(
                "window-keeps-one-more",
                f"pre_tokens={pre} keeps {pre + 1} keys, the query's own included",
                f"pass pre_tokens={pre - 1} for a window of {pre} keys",
            )
        )
    ignored = mode in (1, 2, 3, 5, 6) and (pre < call.q_len or ahead < 0)
    if ignored or (mode in (2, 3, 6) and 0 < ahead < UNBOUNDED):
        found.append(
            Finding(
                "tokens-ignored",
                f"sparse_mode={mode} does not read pre_tokens={pre} and next_tokens={ahead}",
                "a window is sparse_mode=4, or the mask tensor itself in modes 0 and 1",
            )
        )
    return found


def _about_polarity(call: KernelCall, mask: Mask) -> list[Finding]:
    """Tell of a mask tensor that drops all of the past and leaves the future."""
    if call.effective_mode not in (0, 1) or call.is_packed or call.q_len < 2:
        return []
    sizes = call.q_len, call.kv_len
    if mask.heads is not None or mask.batches is not None or not mask.is_region(*sizes):
        return []
    left = mask.region(*sizes)
    for past in (Causal("top_left").region(*sizes), Causal().region(*sizes)):
        if left and past and left.isdisjoint(past):
            return [
                Finding(
                    "polarity",
                    "atten_mask drops every key up to the query's own and leaves the later ones: "
                    "True drops here, and keeps in torch's scaled_dot_product_attention",
                    "pass its complement",
                )
            ]
    return []
