"""One YAML file is one run: how to train, which model, which attention."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import attnkit as ak
from attnkit import masks

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class RunError(Exception):
    """The run cannot start as it was asked for; the message says why, in one line."""


class Section(BaseModel):
    """A part of the file: a value, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrainingConfig(Section):
    """How long and how hard to train."""

    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    steps: Count
    max_len: Count
    """Bytes in a sequence at most; longer documents are cut."""
    tokens_per_batch: Count
    learning_rate: Annotated[float, Field(gt=0)]
    warmup: Annotated[int, Field(ge=0)]
    final_learning_rate: Fraction = 0.02
    """What the cosine schedule ends on, as a fraction of `learning_rate`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    validate_every: Count = 100
    checkpoint_every: Count = 100
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """CPU threads; none given: as many as torch likes. The last bits of sums depend on it."""


class ModelConfig(Section):
    """What stands around the attention."""

    dim: Count
    layers: Count
    rotary: bool = False


class SampleConfig(Section):
    """What the trained model is asked to write."""

    prompt: str = "The "
    bytes: Count = 400
    temperature: Annotated[float, Field(gt=0)] = 0.7


def _read_attention(section: object) -> ak.AttentionConfig:
    return ak.AttentionConfig.model_validate(section)  # attnkit's own words for what is wrong


class RunConfig(Section):
    """The whole file."""

    training: TrainingConfig
    model: ModelConfig
    attention: Annotated[ak.AttentionConfig, BeforeValidator(_read_attention)]
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _trains_a_language_model(self) -> RunConfig:
        if self.attention.layout != "TND":
            raise ValueError(
                f"attention.layout is {self.attention.layout}, but documents of all lengths are "
                "packed into one [t, heads, dim] batch here; write TND"
            )
        # A mask is a set, so whether it looks ahead is a question with an exact answer.
        n = min(self.training.max_len, 512)
        ahead = self.attention.mask - masks.Causal()
        if ahead.region(n, n).area:
            raise ValueError(
                "attention.mask lets a query see keys after it, the very bytes it has to predict; "
                "intersect it with Causal()"
            )
        return self


def load_config(path: Path, **overrides: int | None) -> RunConfig:
    """Read a run's configuration; `overrides` replace keys of its training section.

    Raises `RunError`, whose one line says which key is wrong and what is possible.
    """
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        near = ", ".join(map(str, sorted(path.parent.glob("*.yaml")))) or "no *.yaml beside it"
        raise RunError(f"cannot read the config {path}: {error.strerror} (found: {near})") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no sections; it needs {_join(RunConfig.model_fields)}")
    given = {key: value for key, value in overrides.items() if value is not None}
    if isinstance(content.get("training"), dict):
        content["training"] |= given
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise RunError(f"{path}: {_first_sentence(error)}") from None


def _first_sentence(error: ValidationError) -> str:
    """Turn pydantic's report into a line: the first thing to mend, and how many more there are."""
    first, *others = error.errors(include_url=False)
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        sentence = _unknown_key(place)
    else:
        where = ".".join(place)
        whole = first["type"] == "missing" or isinstance(first["input"], dict)
        given = "" if whole else f" (given: {first['input']!r})"
        reason = first["msg"].removeprefix("Value error, ")
        sentence = f"{where}: {reason}{given}" if where else reason
    sentence = " ".join(sentence.split())
    return sentence + (f" (and {len(others)} more)" if others else "")


def _unknown_key(place: list[str]) -> str:
    model: Any = RunConfig
    for part in place[:-1]:
        annotation = model.model_fields[part].annotation
        if not hasattr(annotation, "model_fields"):
            return f"{'.'.join(place)}: unknown key"
        model = annotation
    close = difflib.get_close_matches(place[-1], model.model_fields, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{'.'.join(place)}: unknown key{hint} Possible: {_join(model.model_fields)}"


def _join(names: Any) -> str:
    return ", ".join(names)
