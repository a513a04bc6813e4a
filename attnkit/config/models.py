"""`AttentionConfig` and `MultiHeadAttentionConfig`: modules as checked, versioned mappings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticSerializationError

from attnkit.attention import Attention
from attnkit.config.foreign import plain, read_plain
from attnkit.config.kinds import BACKEND, BIAS, LAYOUT, MASK, Record, first_line
from attnkit.config.problems import config_error, problem, problems_at, unread
from attnkit.config.text import (
    Origin,
    check_size,
    inner,
    keys_of,
    read_json,
    read_yaml,
    text_of,
    write_yaml,
)
from attnkit.display import html
from attnkit.errors import AttnkitError, ConfigError
from attnkit.masks import Full, Mask
from attnkit.modules import MultiHeadAttention
from attnkit.pse import Pse
from attnkit.rotary import Rotary

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AttentionConfig", "MaskField", "MultiHeadAttentionConfig", "PseField", "load_config"]

A = ParamSpec("A")
R = TypeVar("R")
B = TypeVar("B")

Count = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Real = Annotated[StrictFloat, Field(allow_inf_nan=False)]

MaskField = Annotated[Mask, MASK]
PseField = Annotated[Pse, BIAS]

_ROTARY = Record(Rotary)

_READS = (1,)


def _ours(method: Callable[A, R]) -> Callable[A, R]:
    """Return a method of pydantic's that writes, with the errors that are ours."""

    @wraps(method)
    def told(*arguments: A.args, **named: A.kwargs) -> R:
        try:
            return method(*arguments, **named)
        except PydanticSerializationError as error:
            if isinstance(error.__cause__, AttnkitError):
                raise error.__cause__ from None
            raise ConfigError(str(error).rpartition("Error: ")[2]) from None

    return told


class _Config(BaseModel):
    """What both configurations share: the composition and its heads, YAML, JSON, and errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    version: Literal[1] = Field(default=1, description="version of the configuration's format")
    num_heads: Count = Field(description="query heads")
    num_kv_heads: Count | None = Field(
        default=None, description="key and value heads; none given means num_heads"
    )
    mask: MaskField = Field(
        default=Full(),
        description="the allowed cells",
        json_schema_extra={"default": {"kind": "full"}},
    )
    pse: PseField | None = Field(
        default=None, description="the positional bias, added to the scores"
    )
    scale: Real | None = Field(
        default=None, description="factor on q.k; none given means 1/sqrt(head_dim)"
    )
    dropout: Annotated[Real, Field(ge=0, lt=1)] = Field(
        default=0.0, description="probability to drop a softmax weight in training"
    )
    sink: StrictBool = Field(
        default=False, description="a learnable logit per head that joins the denominator"
    )
    softcap: Annotated[Real, Field(gt=0)] | None = Field(
        default=None, description="c of c*tanh(scale*q.k/c), before the bias"
    )
    deterministic: StrictBool = Field(
        default=False, description="the same bits from the same call, gradients too"
    )
    memory_limit: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="bytes that a fused call may take for gathered keys and masks"
    )
    backend: Annotated[str, BACKEND] = Field(
        default="auto", description="who computes; a name never falls back to another"
    )
    layout: Annotated[str, LAYOUT] = Field(
        default="BSND", description="how the axes of query, key and value lie in memory"
    )

    def __init__(self, /, **data: Any) -> None:
        with _read_plain(type(self), data) as read:
            super().__init__(**read)

    # Inside another pydantic model the fields are validated as pydantic's own, not through
    # __init__, so that errors keep their paths.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any) -> Self:  # type: ignore[override]
        """Return the configuration that a mapping or YAML text writes.

        A mapping may be of another library, such as an OmegaConf container, whose interpolations
        are resolved. A configuration is returned as it is. How strict to be is not the caller's
        choice: unknown keys and quoted numbers are errors always.

        Raises `ConfigError` with every problem found.
        """
        if isinstance(obj, str):
            return cls.from_yaml(obj)
        with _read_plain(cls, obj) as read:
            return super().model_validate(read)

    @classmethod
    def model_validate_json(  # type: ignore[override]
        cls, json_data: str | bytes | bytearray
    ) -> Self:
        """Return the configuration that JSON text writes; as `model_validate` otherwise."""
        with _teaching(cls, json_data):
            data = read_json(json_data)
        with _teaching(cls, data):
            return super().model_validate(data)

    @classmethod
    def from_yaml(cls, source: str | PathLike[str], at: str = "") -> Self:
        """Return the configuration in a YAML text, or in a file given as a `pathlib.Path`.

        `at` says under which keys it is, such as ``model.layers.0.attention``.
        """
        with _teaching(cls, source):
            text = text_of(source)
            data = inner(read_yaml(text), at)
        with _teaching(cls, data, Origin(text, keys_of(at))):
            return super().model_validate(data)

    def to_yaml(self) -> str:
        """Return the configuration as YAML that reads back as an equal one.

        Keys at their defaults are left out, except the version, which fixes the defaults.

        Raises `ConfigError` for a mask or bias that no text can hold.
        """
        said = self.model_dump(mode="json", exclude_defaults=True)
        required = {name: said.pop(name) for name in self._required()}
        return write_yaml({"version": self.version, **required, **said})

    def _repr_html_(self) -> str:
        """Return the configuration as YAML, for a notebook."""
        name = html.heading(type(self).__name__)
        return html.safely(
            lambda: html.block(name, html.preformatted(self.to_yaml().rstrip())), lambda: repr(self)
        )

    @classmethod
    def _required(cls) -> list[str]:
        return [name for name, item in cls.model_fields.items() if item.is_required()]

    model_dump = _ours(BaseModel.model_dump)
    model_dump_json = _ours(BaseModel.model_dump_json)

    def _built(self, module: Callable[..., B]) -> B:
        """Return the module whose arguments the keys are."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        del given["version"]
        # Modules that are built from one configuration share no weights.
        return module(**given | {"pse": copy.deepcopy(given["pse"])})

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        data = read_yaml(data) if isinstance(data, str) else data
        if isinstance(data, cls):
            return data
        data = read_plain(data)
        too_large = check_size(data)
        if too_large is not None:
            raise problem(too_large)
        if not isinstance(data, Mapping):
            file = " (is it a file? give pathlib.Path(...) to from_yaml)"
            raise problem(
                f"a configuration is a mapping with at least the keys {', '.join(cls._required())}"
                f"{file if isinstance(data, str) else ''}"
            )
        if "score_fn" in data:
            told = (
                "is a function, which no file holds; build the layer itself, "
                "ak.Attention(..., score_fn=...), or write what the function says as a pse"
            )
            raise problems_at({"score_fn": told}, data)
        version = data.get("version", _READS[-1])
        if type(version) is not int or version not in _READS:
            # Nothing else is worth saying: another version may have other keys.
            told = f"is not one that this release reads: {', '.join(map(str, _READS))}"
            raise problems_at({"version": told}, data)
        return data

    @model_validator(mode="after")
    def _heads_agree(self) -> Self:
        heads, told = self.num_heads, {}
        if self.num_kv_heads is not None and heads % self.num_kv_heads:
            told["num_kv_heads"] = f"must divide num_heads={heads}"
        for name, part in (("mask", self.mask), ("pse", self.pse)):
            if part is not None and part.heads not in (None, heads):
                told[name] = f"{part!r} is made for {part.heads} heads, but num_heads={heads}"
        if told:
            raise problems_at(told, self.__dict__)
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        written = handler(schema)
        handler.resolve_ref_schema(written)["description"] = first_line(cls)
        return written


class AttentionConfig(_Config):
    """An `Attention` as a versioned mapping, for YAML, JSON and training scripts.

    The keys are the arguments of `Attention`. A mask or a bias is the object itself, a mapping
    with its `kind` and fields, or its text; every registered family is known, whenever it was
    registered. A layout and a backend are names.

    Raises `ConfigError` with every problem found: the key, what was given, what is possible.

    >>> config = AttentionConfig.model_validate('''
    ... num_heads: 8
    ... head_dim: 64
    ... mask: Causal() & SlidingWindow(256)
    ... pse: {kind: alibi, num_heads: 8}
    ... ''')
    >>> config.mask
    Causal() & SlidingWindow(256)
    >>> print(config.to_yaml())
    version: 1
    num_heads: 8
    head_dim: 64
    mask:
      kind: and
      parts:
      - {kind: causal}
      - {kind: sliding_window, size: 256}
    pse: {kind: alibi, num_heads: 8}
    <BLANKLINE>
    >>> AttentionConfig.model_validate(config.to_yaml()) == config
    True
    >>> AttentionConfig.model_validate({"num_heads": 8, "head_dim": 64, "maks": "Causal()"})
    Traceback (most recent call last):
    ...
    attnkit.errors.ConfigError: AttentionConfig: 1 problem
      maks: unknown key; did you mean 'mask'? Known: num_heads, head_dim, version, \
num_kv_heads, mask, pse, scale, dropout, sink, softcap, deterministic, memory_limit, backend, \
layout; got 'Causal()'
    """

    head_dim: Count = Field(description="extent of one head")

    def build(self) -> Attention:
        """Return the module; raises `CompositionError` or `BackendRefused` as it does."""
        return self._built(Attention)


class MultiHeadAttentionConfig(_Config):
    """A `MultiHeadAttention` as a versioned mapping: `AttentionConfig` with its projections.

    The keys are the arguments of `MultiHeadAttention`. `rotary` is true, false, or a mapping of
    the fields of `Rotary`.

    Raises `ConfigError` as `AttentionConfig` does.

    >>> config = MultiHeadAttentionConfig.from_yaml('''
    ... dim: 64
    ... num_heads: 4
    ... num_kv_heads: 2
    ... mask: Causal()
    ... rotary: {base: 500000.0}
    ... ''')
    >>> config.rotary == Rotary(base=500000.0)
    True
    >>> config.build().k_proj
    Linear(in_features=64, out_features=32, bias=False)
    """

    dim: Count = Field(description="width of the input and of the output")
    head_dim: Count | None = Field(
        default=None, description="extent of one head; none given means dim / num_heads"
    )
    v_head_dim: Count | None = Field(
        default=None, description="extent of one head of values; none given means head_dim"
    )
    kv_dim: Count | None = Field(
        default=None, description="width of the context in cross-attention; none given means dim"
    )
    v_dim: Count | None = Field(
        default=None,
        description="width of the tokens that values are made of; none given means kv_dim",
    )
    bias: StrictBool | tuple[Literal["q", "k", "v", "out", "gate"], ...] = Field(
        default=False, description="whether the projections add a bias, or which of them do"
    )
    qk_norm: Literal["rms", "layer", "rms_whole"] | None = Field(
        default=None, description="norm of the heads of queries and keys"
    )
    gate: Literal["head", "elementwise"] | None = Field(
        default=None, description="what multiplies the output: a number per head, or per dimension"
    )
    extra_key: StrictBool = Field(
        default=False, description="whether every query also sees a key of the layer's own"
    )
    rotary: StrictBool | Annotated[Rotary, _ROTARY] = Field(
        default=False, description="rotary positions"
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_dim is None and self.dim % self.num_heads:
            told = f"must be a multiple of num_heads={self.num_heads}, or give head_dim"
            raise problems_at({"dim": told}, self.__dict__)
        return self

    def build(self) -> MultiHeadAttention:
        """Return the module; its weights are drawn from torch's generator."""
        return self._built(MultiHeadAttention)


def load_config(
    source: str | PathLike[str], at: str = ""
) -> AttentionConfig | MultiHeadAttentionConfig:
    """Return the configuration in a YAML text or file, whichever it is: the second has `dim`.

    `at` says under which keys it is.

    >>> load_config("model: {attention: {dim: 64, num_heads: 4}}", at="model.attention").head_dim
    """
    with _teaching(AttentionConfig, source):
        data = inner(read_yaml(text_of(source)), at)
    whole = isinstance(data, Mapping) and "dim" in data
    return (MultiHeadAttentionConfig if whole else AttentionConfig).from_yaml(source, at)


_OBJECTS = {"mask": MASK, "pse": BIAS, "rotary": _ROTARY}


@contextmanager
def _read_plain(model: type[BaseModel], data: object) -> Iterator[Any]:
    """Give `data` with what it holds of other libraries as dicts and lists, and teach."""
    read, unreadable = plain(data)
    with _teaching(model, read):
        if unreadable:
            raise unread(unreadable)
        yield read


@contextmanager
def _teaching(model: type[BaseModel], data: object, origin: Origin | None = None) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise config_error(error, model, data, _OBJECTS, origin) from None
    except ConfigError as error:
        raise ConfigError(f"{model.__name__}: {error}") from None
    except RecursionError:
        raise ConfigError(
            f"{model.__name__}: too deep for what is left of Python's stack; call it less deep"
        ) from None
