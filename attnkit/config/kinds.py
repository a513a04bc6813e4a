"""Registered kinds as pydantic fields: masks, biases, layouts and backends, by their names.

A field holds the object itself, a `Mask` or a `Pse`; a file writes it as a mapping with a
`kind`, or as text. What a kind may say is read off its dataclass when a value is validated,
so a family that someone registers later is as good as a built-in one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from dataclasses import Field as DataclassField
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    create_model,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from attnkit.backends import BACKENDS
from attnkit.config.foreign import read_plain
from attnkit.config.problems import problem, problems_at
from attnkit.config.text import check_size, parts_of_data
from attnkit.errors import CompositionError, ConfigError
from attnkit.layouts import LAYOUTS
from attnkit.layouts.names import meant
from attnkit.masks import MASKS, Mask
from attnkit.masks import parse as parse_mask
from attnkit.pse import PSE, Pse, Sum
from attnkit.pse import parse as parse_pse
from attnkit.registry import suggestion
from attnkit.rotary import Dynamic, Interpolation, Llama3, Scaling, YaRN

__all__ = [
    "BACKEND",
    "BIAS",
    "LAYOUT",
    "MASK",
    "Family",
    "Name",
    "Record",
    "first_line",
]

# A file says what it means: a quoted "64" is not a number, and true is not 1.
_STRICT: dict[object, object] = {
    int: StrictInt,
    float: StrictFloat,
    bool: StrictBool,
    str: StrictStr,
}


@dataclass(frozen=True)
class Record:
    """A pydantic field type: an object of one dataclass, written as a mapping of its fields."""

    owner: type

    def read(self, value: object) -> Any:
        """Return the object that a mapping writes, or the object itself."""
        if isinstance(value, self.owner):
            return value
        value = read_plain(value)
        if not isinstance(value, Mapping):
            raise problem(f"must be a mapping with the keys {', '.join(self.keys())}")
        return _construct(self.owner, value)

    def write(self, value: object) -> dict[str, Any]:
        """Return the shortest mapping that reads back as `value`."""
        parts = _shortest(value)
        return {name: _plain(self.owner.__name__, name, part) for name, part in parts.items()}

    def keys(self, kind: object = None) -> tuple[str, ...]:
        """Return the keys that the mapping, or what is of this kind in it, may have."""
        if kind is not None:
            return SCALING.keys(kind)
        return tuple(item.name for item in _arguments(self.owner))

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.read,
            serialization=core_schema.plain_serializer_function_ser_schema(self.write),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(_model(self.owner).__pydantic_core_schema__)


@dataclass(frozen=True)
class Family(Record):
    """A pydantic field type: any object of a registry of classes, discriminated by `kind`.

    `inside` marks the field of an object that is itself of the family (the parts of an
    `And`); its JSON schema refers to the definition instead of repeating it for ever.
    """

    what: str
    classes: Callable[[], Mapping[str, type]]
    parse: Callable[[str], Any]
    inside: bool = False

    # -- reading -------------------------------------------------------------------------

    def read(self, value: object) -> Any:
        """Return the object that `value` writes: a mapping, text, or the object itself."""
        if isinstance(value, self.owner):
            return value
        if isinstance(value, str):
            try:
                return self.parse(value)
            except CompositionError as error:
                known = value in self.classes()
                hint = f"; for the kind alone write {{kind: {value}}}" if known else ""
                raise problem(f"{error}{hint}") from None
        value = read_plain(value)
        if isinstance(value, Mapping):
            too_large = None if self.inside else check_size(value)
            if too_large is not None:
                raise problem(too_large)
            return self._from_mapping(value)
        raise problem(
            f"must be a mapping such as {{kind: {next(iter(self.classes()))}}}, or text such as "
            f"'{next(iter(self.classes().values())).__name__}(...)'"
        )

    def _from_mapping(self, value: Mapping[Any, Any]) -> Any:
        classes = self.classes()
        if "kind" not in value:
            raise problems_at({"kind": f"is missing. Known: {', '.join(classes)}"}, value)
        kind = value["kind"]
        if not isinstance(kind, str) or kind not in classes:
            aliases = {family.__name__: name for name, family in classes.items()}
            hint = suggestion(kind, classes, aliases)
            raise problems_at({"kind": f"is not a registered {self.what}{hint}"}, value)
        return _construct(classes[kind], value, kind)

    # -- writing -------------------------------------------------------------------------

    def write(self, value: object) -> dict[str, Any]:
        """Return `value` as the shortest mapping that reads back as it, in plain types.

        A field is left out where the object is the same without it. Raises `ConfigError` for an
        object that no file can hold.
        """
        too_large = None if self.inside else check_size(value, self._parts)
        if too_large is not None:
            raise ConfigError(f"no file can hold this {self.what}: {too_large}")
        return self._mapping(value)

    def _parts(self, value: object) -> Iterable[object]:
        if isinstance(value, self.owner) and is_dataclass(value):
            return [getattr(value, item.name) for item in _arguments(type(value))]
        return parts_of_data(value)

    def _mapping(self, value: object) -> dict[str, Any]:
        kind = next((k for k, family in self.classes().items() if family is type(value)), None)
        if kind is None:
            raise ConfigError(
                f"{value!r} is of no registered kind of {self.what}, so no file can hold it; "
                f"register its class, or give it to the module instead of the configuration "
                f"(registered: {', '.join(self.classes())})"
            )
        parts = _shortest(value)
        return {"kind": kind} | {
            name: _plain(f"a {self.what}", f"{kind}.{name}", part) for name, part in parts.items()
        }

    # -- what pydantic asks --------------------------------------------------------------

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        # Built anew each time it is asked for: the registry may have grown since.
        name = f"{self.owner.__module__}.{self.owner.__name__}"
        reference = core_schema.definition_reference_schema(name)
        if self.inside:
            return handler(reference)
        choices: dict[Any, CoreSchema] = {
            kind: _model(family, kind).__pydantic_core_schema__
            for kind, family in self.classes().items()
        }
        text = [core_schema.str_schema(min_length=1)] if handler.mode == "validation" else []
        union = core_schema.union_schema(
            [core_schema.tagged_union_schema(choices, "kind"), *text],
            ref=name,
            metadata={"pydantic_js_updates": {"description": first_line(self.owner)}},
        )
        return handler(core_schema.definitions_schema(reference, [union]))

    def keys(self, kind: object = None) -> tuple[str, ...]:
        """Return the keys that a mapping of this kind may have."""
        family = self.classes().get(kind) if isinstance(kind, str) else None
        names = () if family is None else tuple(item.name for item in _arguments(family))
        return ("kind", *names)


@dataclass(frozen=True)
class Name:
    """A pydantic field type: the name of a registered object (a layout, a backend).

    `of` returns the name of what is meant, given a name or the object; None for nothing known.
    """

    what: str
    known: Callable[[], Mapping[str, object]]
    of: Callable[[str], str | None]

    def read(self, value: object) -> str:
        """Return the name, given it or the registered object itself."""
        known = self.known()
        word = value if isinstance(value, str) else getattr(value, "name", None)
        name = self.of(word) if isinstance(word, str) else None
        if name is None or not (word is value or known.get(name) == value):
            other = {key: k for k in known for key in (k.lower(), k.upper())}
            hint = suggestion(word or value, known, other)
            raise problem(f"is not a registered {self.what}{hint}")
        return name

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(core_schema.literal_schema(list(self.known())))


def _pse_classes() -> dict[str, type]:
    # `+` joins biases in text, so the sum itself need not be registered; a file needs a name.
    return {"sum": Sum} | dict(PSE.items())


def _plain(owner: str, where: str, value: object) -> Any:
    """Return a field of an object in plain types."""
    for family in FAMILIES:
        if isinstance(value, family.owner):
            return family._mapping(value)
    if isinstance(value, (tuple, list)):
        return [_plain(owner, f"{where}[{k}]", item) for k, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"{where} of {owner} is a {type(value).__name__}, which no file can hold; a "
        "field is a number, a word, a list of them, or an object of the same family"
    )


def _no_text(text: str) -> Any:
    raise CompositionError(f"{text!r} is not a mapping such as {{kind: linear, factor: 4.0}}")


MASK = Family(Mask, "mask", lambda: dict(MASKS.items()), parse_mask)
BIAS = Family(Pse, "positional bias", _pse_classes, parse_pse)
SCALING = Family(
    Scaling,
    "scaling",
    lambda: {s.kind: s for s in (Interpolation, Llama3, YaRN, Dynamic)},
    _no_text,
)
FAMILIES = (MASK, BIAS, SCALING)
LAYOUT = Name(
    "layout", lambda: dict(LAYOUTS.items()), lambda word: getattr(meant(word), "name", None)
)
BACKEND = Name(
    "backend",
    lambda: {"auto": None} | dict(BACKENDS.items()),
    lambda word: word if word == "auto" or word in BACKENDS else None,
)


def first_line(owner: type) -> str:
    """Return the first line of a docstring."""
    return (owner.__doc__ or owner.__name__).strip().splitlines()[0]


def _arguments(family: type) -> tuple[DataclassField[Any], ...]:
    if not is_dataclass(family):
        raise ConfigError(
            f"{family.__name__} is registered but is not a dataclass, so its fields are not known; "
            "decorate it with @dataclass(frozen=True)"
        )
    return tuple(item for item in fields(family) if item.init)


def _model(owner: type, kind: str | None = None) -> type[BaseModel]:
    """Return the pydantic model of what a mapping of this kind says; None has no key `kind`.

    It does not depend on what else is registered: a nested field looks its kind up when a
    value arrives. So the class it describes keeps it.
    """
    made: type[BaseModel] | None = vars(owner).get("_config_model")
    if made is None:
        made = _make_model(owner, kind)
        type.__setattr__(owner, "_config_model", made)
    return made


def _make_model(owner: type, kind: str | None) -> type[BaseModel]:
    try:
        hints = get_type_hints(owner)
    except NameError as error:
        raise ConfigError(
            f"cannot read the annotations of {owner.__name__}, registered as {kind!r}: {error}; "
            "import the name at run time, not under TYPE_CHECKING"
        ) from None
    parameters: dict[str, Any] = {} if kind is None else {"kind": (Literal[kind], ...)}
    for item in _arguments(owner):
        parameters[item.name] = (_annotation(hints[item.name], owner), _default(item))
    return create_model(
        owner.__name__,
        __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True),
        __doc__=first_line(owner),
        __module__=owner.__module__,
        **parameters,
    )


def _annotation(hint: Any, owner: type) -> Any:
    """Return a dataclass annotation with its scalars strict, and masks and biases readable."""
    if hint in _STRICT:
        return _STRICT[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    for family in FAMILIES:
        # To Python 3.10 `tuple[Mask, ...]` is a type, too.
        if origin is None and isinstance(hint, type) and issubclass(hint, family.owner):
            return Annotated[hint, replace(family, inside=issubclass(owner, family.owner))]
    if origin is Literal or not arguments:
        return hint
    parts = tuple(_annotation(part, owner) for part in arguments)
    if origin in (Union, types.UnionType):
        return Union[parts]  # noqa: UP007 -- the parts are known only now
    return origin[parts]


def _default(item: DataclassField[Any]) -> Any:
    if item.default_factory is not MISSING:
        return Field(default_factory=item.default_factory)
    return ... if item.default is MISSING else item.default


def _construct(owner: type, value: Mapping[Any, Any], kind: str | None = None) -> Any:
    given = _model(owner, kind).model_validate(value)
    arguments = {name: getattr(given, name) for name in given.model_fields_set - {"kind"}}
    try:
        return owner(**arguments)
    except (TypeError, ValueError) as error:
        raise problem(str(error)) from error


def _shortest(value: object) -> dict[str, Any]:
    """Return the fewest arguments that construct `value`, the last ones left out first."""
    arguments = _arguments(type(value))
    given = {item.name: getattr(value, item.name) for item in arguments}
    for item in reversed(arguments):
        shorter = {name: given[name] for name in given if name != item.name}
        if item.compare and _is(value, shorter):
            given = shorter
    return given


def _is(value: object, arguments: Mapping[str, Any]) -> bool:
    try:
        return bool(type(value)(**arguments) == value)
    except (TypeError, ValueError):
        return False
