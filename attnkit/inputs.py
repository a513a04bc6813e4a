"""`LayerInputs`: what one call of a layer is given, and whether it fits together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnkit.arguments import FLOATS, check_tensor
from attnkit.attend import is_tracing
from attnkit.cache import KVCache
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.layouts import SeqLens, as_seqlens
from attnkit.masks import Mask
from attnkit.masks.parse import as_mask
from attnkit.parallel.shards import Shards, as_shards
from attnkit.pse import Pse
from attnkit.pse.parse import as_pse
from attnkit.rotary import Dynamic, Rotary
from attnkit.sharded_cache import ShardedCache
from attnkit.static import StaticCache

__all__ = ["LayerInputs", "check_tokens"]


class LayerInputs(NamedTuple):
    """The arguments of `MultiHeadAttention.forward`."""

    x: Tensor
    context: Tensor | None = None
    mask: Mask | None = None
    pse: Pse | None = None
    seqlens: SeqLens | None = None
    cache: KVCache | StaticCache | ShardedCache | None = None
    positions: Tensor | None = None
    values: Tensor | None = None
    shards: Shards | None = None

    @property
    def source(self) -> Tensor:
        """The tokens that keys are made of."""
        return self.x if self.context is None else self.context

    @property
    def of_values(self) -> Tensor:
        """The tokens that values are made of, as a rule those of the keys."""
        return self.source if self.values is None else self.values

    @property
    def crosses(self) -> bool:
        """Whether keys are those of another text than the queries."""
        return self.context is not None or (self.cache is not None and self.cache.sealed)

    def read(self) -> LayerInputs:
        """Return the same with a mask and a bias for what may be their texts.

        Raises for what is neither, and for a cache that is something else. Of `shards` come the
        lengths of a packed batch.
        """
        if not isinstance(self.cache, KVCache | StaticCache | ShardedCache | None):
            raise CompositionTypeError(
                f"cache={shown(self.cache)}; give a KVCache(), one per layer"
            )
        mask = None if self.mask is None else as_mask(self.mask)
        shards, seqlens = as_shards(self.shards), self.seqlens
        if isinstance(self.cache, ShardedCache):
            shards = self.cache.of_call(shards)
        elif shards is not None and self.cache is not None:
            raise CompositionError(
                f"cache={shown(self.cache)} with shards: it holds all tokens of a text; an "
                "ak.ShardedCache(shards) holds those of this process"
            )
        if shards is not None:
            seqlens = shards.lengths(seqlens)
            self._check_parts(shards)
        return self._replace(mask=mask, pse=as_pse(self.pse), seqlens=seqlens, shards=shards)

    def _check_parts(self, shards: Shards) -> None:
        """Raise unless tokens are those of this process; a graph finds it out when it runs."""
        if is_tracing():
            return
        for name, tokens, here in (("x", self.x, shards), ("context", self.context, shards.keys)):
            if isinstance(tokens, Tensor) and tokens.ndim in (2, 3):
                here.check(name, tokens, tokens.ndim - 2)

    def check_widths(
        self, widths: tuple[int, int, int], projections: tuple[nn.Module, nn.Module, nn.Module]
    ) -> None:
        """Raise unless tokens are as wide as a layer was built for: of queries, keys and values."""
        (dim, kv_dim, v_dim), (to_query, to_key, to_value) = widths, projections
        check_tokens("x", self.x, dim, "dim", to_query)
        if self.context is not None:
            check_tokens("context", self.context, kv_dim, "kv_dim", to_key)
        elif not self.crosses and kv_dim != dim:
            raise CompositionError(
                f"this module was built for cross-attention (kv_dim={kv_dim}, dim={dim}); pass "
                f"context=[..., {kv_dim}]"
            )
        if self.values is not None:
            check_tokens("values", self.values, v_dim, "v_dim", to_value)
        elif v_dim != kv_dim and (self.cache is None or not self.cache.sealed):
            raise CompositionError(
                f"this module makes values of other tokens (v_dim={v_dim}, kv_dim={kv_dim}); pass "
                f"values=[..., {v_dim}]"
            )

    def check_forms(self) -> None:
        """Raise unless tokens, lengths and cache are of one form, dense or packed."""
        x, context, cache = self.x, self.context, self.cache
        if context is not None and (
            x.ndim != context.ndim or (x.ndim == 3 and x.shape[0] != context.shape[0])
        ):
            raise CompositionError(
                f"x {list(x.shape)} and context {list(context.shape)}: give both as [b, s, ...] "
                "with one batch size, or both packed"
            )
        self._check_values()
        if isinstance(cache, StaticCache | ShardedCache) and (x.ndim == 2 or context is not None):
            raise CompositionError(
                f"x {list(x.shape)} with {cache}, which takes [b, s, {x.shape[-1]}] of the texts "
                "themselves; packed tokens and contexts go with a KVCache"
            )
        if x.ndim == 2 and cache is not None and (cache.sealed or context is not None):
            raise CompositionError(
                f"x {list(x.shape)} is packed, and a cache holds a context of one length for all "
                f"texts; give [b, s, {x.shape[-1]}]"
            )
        held = cache.length if cache is not None and cache.sealed else None
        if context is not None and held not in (None, context.shape[1]):
            raise CompositionError(
                f"context {list(context.shape)}, but {cache} holds the keys of {held} "
                "positions; a cache serves one context (reset() makes it ready for another)"
            )
        self._check_packing()

    def _check_values(self) -> None:
        if self.values is None:
            return
        if self.context is None and self.cache is not None and self.cache.sealed:
            raise CompositionError(
                f"values={shown(self.values)}, but {self.cache} holds those of a context already; "
                "give them with the context"
            )
        if self.values.shape[:-1] != self.source.shape[:-1]:
            raise CompositionError(
                f"values {list(self.values.shape)} for keys of {list(self.source.shape)}: each key "
                "has one value"
            )

    def _check_packing(self) -> None:
        x, seqlens = self.x, as_seqlens(self.seqlens)
        if seqlens is None:
            if x.ndim == 2:
                raise CompositionError(
                    f"x {list(x.shape)} is packed: say where its sequences end, "
                    "seqlens=ak.SeqLens([...]); or give [b, s, dim]"
                )
            return
        if x.ndim == 3:
            raise CompositionError(
                f"x {list(x.shape)} has a batch axis and takes no seqlens; pack it as [t, dim], or "
                "say lengths inside a row with a mask (masks.Documents, masks.Padding)"
            )
        if self.context is None and not seqlens._alike:  # the lengths differ in each step
            raise CompositionError(
                f"{seqlens}: in self-attention every sequence has as many keys as queries; give "
                "SeqLens(lengths), or a context"
            )
        if self.shards is not None:  # tokens are local, and their number is checked with the plan
            return
        if not is_tracing():  # where the plan is read, outside of the trace, this is checked too
            seqlens.check_totals(x.shape[0], self.source.shape[0])

    def check_rotary(self, rotary: Rotary | None) -> None:
        """Raise unless the layer turns by positions, and these are for the tokens."""
        if rotary is None:
            if self.positions is not None:
                raise CompositionError(
                    "positions= are what rotary turns by, and this module was built with "
                    "rotary=False; masks and biases count by themselves"
                )
            return
        if self.crosses:
            raise CompositionError(
                "rotary positions relate the queries and keys of one text; cross-attention has "
                "two: build its module with rotary=False"
            )
        if self.positions is not None:
            rotary.check_positions(self.positions, self.x.shape[:-1])
        elif rotary.order == "axial":
            raise CompositionError(
                f"{rotary} turns by several axes; say where tokens stand along each, "
                "positions=[a, s] or [a, b, s]"
            )
        scaling = rotary.scaling
        if self.shards is not None and self.positions is not None and isinstance(scaling, Dynamic):
            raise CompositionError(
                f"{scaling} turns by the length of the whole text, and positions= tell those of "
                "this process only; leave them out, its shards know them"
            )
        if self.cache is None or not isinstance(scaling, Dynamic):
            return
        start = self.cache.length
        if start:
            known = scaling.original_max_position_embeddings
            if self.positions is not None or start + self.x.shape[1] > known:
                raise CompositionError(
                    f"{scaling} turns all keys anew in a text of more than {known} tokens, and "
                    f"those of the first {start} are in the cache (positions= are not read, so it "
                    "takes none); use Interpolation or YaRN, or the forward of the whole text"
                )


def check_tokens(name: str, tensor: Tensor, width: int, label: str, projection: nn.Module) -> None:
    """Raise unless a projection can take tokens."""
    check_tensor(name, tensor)
    if tensor.ndim not in (2, 3) or tensor.shape[-1] != width:
        raise CompositionError(
            f"{name} {list(tensor.shape)}: give [b, s, {width}], or packed [t, {width}] with "
            f"seqlens; the module was built with {label}={width}"
        )
    # Parameters of its parts are not asked: a module that has no numbers to compute with (a
    # wrapper, a quantised one) decides for itself what it takes.
    for weight in projection._parameters.values():
        if weight is None or weight.dtype not in FLOATS:
            continue
        if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise CompositionTypeError(
                f"{name} is {tensor.dtype}, the module's weights are {weight.dtype}; cast one of "
                "them, or run under torch.autocast"
            )
        if tensor.device != weight.device:
            raise CompositionError(
                f"{name} is on {tensor.device}, the module on {weight.device}; move one of them"
            )
