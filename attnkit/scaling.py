"""How the rotary positions of texts longer than those of the training are scaled."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnkit.arguments import check_bool, check_number
from attnkit.errors import CompositionError

__all__ = ["Dynamic", "Interpolation", "Llama3", "Scaling", "YaRN"]


@dataclass(frozen=True)
class Scaling(ABC):
    """What the pairs of a `Rotary` turn by in texts that are longer than those of the training.

    `Interpolation` ("linear"), `Llama3`, `YaRN`, `Dynamic`: the formulas and the other names are
    those of ``rope_scaling`` in Hugging Face's configurations, so that its numbers can be copied.
    ``f[c] = base**(-2*c/r)`` is what pair `c` turns by without a scaling.

    >>> isinstance(Interpolation(4.0), Scaling)
    True
    """

    kind: ClassVar[str]  # its `rope_type`
    _by_length: ClassVar[bool] = False  # whether the pairs turn otherwise in a longer text

    factor: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            told = f"{type(self).__name__}: {name}"
            if name == "truncate":
                check_bool(told, value)
            elif value is not None or name != "attention_factor":
                check_number(told, value, lambda number: 0 < number < 1e30, "positive")

    @abstractmethod
    def _scaled(self, turns: Tensor, base: float, length: Tensor | None) -> Tensor:
        """Return what each pair turns by, given `f`; the length where it matters and is known."""

    @property
    def _size(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class Interpolation(Scaling):
    """Position interpolation: ``f[c] / factor``.

    Source: Chen et al., "Extending Context Window of Large Language Models via Positional
    Interpolation" (2023).

    >>> Interpolation(4.0)
    Interpolation(factor=4.0)
    """

    kind: ClassVar[str] = "linear"

    def _scaled(self, turns: Tensor, base: float, length: Tensor | None) -> Tensor:
        return turns / self.factor


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's: pairs that turn seldom are interpolated, pairs that turn often are kept.

    ``f[c] * (s + (1 - s) / factor)``, where `s` rises from 0 to 1 as the turns of the pair in the
    original length rise from `low_freq_factor` to `high_freq_factor`.

    >>> Llama3(32.0).original_max_position_embeddings
    8192
    """

    kind: ClassVar[str] = "llama3"

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_freq_factor >= self.high_freq_factor:
            raise CompositionError(f"{self}: low_freq_factor must be below high_freq_factor")

    def _scaled(self, turns: Tensor, base: float, length: Tensor | None) -> Tensor:
        low, high = self.low_freq_factor, self.high_freq_factor
        often = turns * (self.original_max_position_embeddings / (2 * math.pi))
        kept = ((often - low) / (high - low)).clamp(0, 1)
        return turns * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class YaRN(Scaling):
    """YaRN: a ramp over the pairs between kept and interpolated ones, and a temperature.

    ``f[c] * (1 - ramp[c] + ramp[c] / factor)``; the ramp rises from 0 to 1 between the pairs that
    turn `beta_fast` and `beta_slow` times in the original length, rounded outwards (`truncate`;
    False in gpt-oss). cos and sin are multiplied by `attention_factor`, None for
    ``0.1 * ln(factor) + 1`` (DeepSeek: `mscale` over `mscale_all_dim`, which is 1.0).

    Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023).

    >>> YaRN(4.0, original_max_position_embeddings=32768).beta_fast  # Qwen3
    32.0
    """

    kind: ClassVar[str] = "yarn"

    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    @property
    def _size(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(max(self.factor, 1)) + 1.0

    def _scaled(self, turns: Tensor, base: float, length: Tensor | None) -> Tensor:
        size = 2 * len(turns)

        def pair(rotations: float) -> float:
            """Return the pair, in parts of one, that turns so often in the original length."""
            wave = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return size * math.log(wave) / (2 * math.log(base))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        pairs = torch.arange(len(turns), dtype=turns.dtype, device=turns.device)
        ramp = ((pairs - first) / ((last - first) or 0.001)).clamp(0, 1)
        return turns * (1 - ramp + ramp / self.factor)


@dataclass(frozen=True)
class Dynamic(Scaling):
    """Dynamic NTK: a base that grows with the text, once it is longer than the original.

    ``base * (factor * n / original - (factor - 1)) ** (r / (r - 2))`` in a text of `n` tokens: the
    largest position of the call and one. Keys that a cache holds cannot be turned again, so
    decoding beyond the original length is refused.

    >>> Dynamic(2.0, original_max_position_embeddings=4096).factor
    2.0
    """

    kind: ClassVar[str] = "dynamic"
    _by_length: ClassVar[bool] = True

    original_max_position_embeddings: int

    def _scaled(self, turns: Tensor, base: float, length: Tensor | None) -> Tensor:
        if length is None:
            return turns
        known, size = self.original_max_position_embeddings, 2 * len(turns)
        growth = self.factor * length.clamp(min=known).to(turns.dtype) / known - (self.factor - 1)
        pairs = torch.arange(0, size, 2, dtype=turns.dtype, device=turns.device)
        return turns * growth ** (-pairs / max(size - 2, 1))
