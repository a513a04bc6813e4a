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
from functools import lru_cache
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
    ValidationError,
    create_model,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from attnkit.config.text import check_size, parts_of_data
from attnkit.errors import CompositionError, ConfigError
from attnkit.masks import MASKS, Mask
from attnkit.masks import parse as parse_mask
from attnkit.pse import PSE, Pse, Sum
from attnkit.pse import parse as parse_pse
from attnkit.registry import suggestion

__all__ = [
    "BIAS",
    "MASK",
    "Family",
    "Named",
    "Record",
    "first_line",
    "problem",
    "problems_at",
]

# A file says what it means: a quoted "64" is no number, and yes is no 1.
_STRICT: dict[object, object] = {
    int: StrictInt,
    float: StrictFloat,
    bool: StrictBool,
    str: StrictStr,
}


@dataclass(frozen=True)
class Family:
    """A pydantic field type: any object of a registry of classes, discriminated by `kind`.

    `inside` marks the field of an object that is itself of the family (the parts of an
    `And`); its JSON schema refers to the definition instead of repeating it for ever.
    """

    what: str
    base: type
    classes: Callable[[], Mapping[str, type]]
    parse: Callable[[str], Any]
    inside: bool = False

    # -- reading -------------------------------------------------------------------------

    def read(self, value: object) -> Any:
        """Return the object that `value` writes: a mapping, text, or the object itself."""
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            return self._from_text(value)
        if isinstance(value, Mapping):
            too_large = None if self.inside else check_size(value)
            if too_large is not None:
                raise problem(too_large)
            return self._from_mapping(value)
        raise problem(
            f"must be a mapping such as {{kind: {next(iter(self.classes()))}}}, or text such as "
            f"'{next(iter(self.classes().values())).__name__}(...)'"
        )

    def _from_text(self, text: str) -> Any:
        try:
            return self.parse(text)
        except CompositionError as error:
            hint = f"; for the kind alone write {{kind: {text}}}" if text in self.classes() else ""
            raise problem(f"{error}{hint}") from None

    def _from_mapping(self, value: Mapping[Any, Any]) -> Any:
        classes = self.classes()
        if "kind" not in value:
            raise problems_at({"kind": f"is missing. Known: {', '.join(classes)}"}, value)
        kind = value["kind"]
        if not isinstance(kind, str) or kind not in classes:
            aliases = {family.__name__: name for name, family in classes.items()}
            hint = suggestion(kind, classes, aliases)
            raise problems_at({"kind": f"is no registered {self.what}{hint}"}, value)
        return _construct(classes[kind], _model(self.base, kind, classes[kind]), value)

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
        if isinstance(value, self.base) and is_dataclass(value):
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
        return {"kind": kind} | {
            name: self._plain(f"{kind}.{name}", part) for name, part in _shortest(value).items()
        }

    def _plain(self, where: str, value: object) -> Any:
        if isinstance(value, self.base):
            return self._mapping(value)
        if isinstance(value, (tuple, list)):
            return [self._plain(f"{where}[{k}]", item) for k, item in enumerate(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ConfigError(
            f"{where} of a {self.what} is a {type(value).__name__}, which no file can hold; a "
            "field is a number, a word, a list of them, or an object of the same family"
        )

    # -- what pydantic asks --------------------------------------------------------------

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
        # Built anew each time it is asked for: the registry may have grown since.
        name = f"{self.base.__module__}.{self.base.__name__}"
        reference = core_schema.definition_reference_schema(name)
        if self.inside:
            return handler(reference)
        choices: dict[Any, CoreSchema] = {
            kind: _model(self.base, kind, family).__pydantic_core_schema__
            for kind, family in self.classes().items()
        }
        union = core_schema.union_schema(
            [core_schema.tagged_union_schema(choices, "kind"), core_schema.str_schema(min_length=1)]
            if handler.mode == "validation"
            else [core_schema.tagged_union_schema(choices, "kind")],
            ref=name,
            metadata={"pydantic_js_updates": {"description": first_line(self.base)}},
        )
        return handler(core_schema.definitions_schema(reference, [union]))

    def keys(self, kind: object) -> tuple[str, ...]:
        """Return the keys that a mapping of this kind may have."""
        family = self.classes().get(kind) if isinstance(kind, str) else None
        names = () if family is None else tuple(item.name for item in _arguments(family))
        return ("kind", *names)


@dataclass(frozen=True)
class Record:
    """A pydantic field type: one dataclass, written as a mapping of its fields."""

    owner: type

    def read(self, value: object) -> Any:
        """Return the object that a mapping writes, or the object itself."""
        if isinstance(value, self.owner):
            return value
        if not isinstance(value, Mapping):
            raise problem(f"must be a mapping with the keys {', '.join(self.keys())}")
        return _construct(self.owner, _model(self.owner, None, self.owner), value)

    def write(self, value: object) -> dict[str, Any]:
        """Return the shortest mapping that reads back as `value`."""
        return _shortest(value)

    def keys(self, kind: object = None) -> tuple[str, ...]:
        """Return the keys that the mapping may have."""
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
        return handler(_model(self.owner, None, self.owner).__pydantic_core_schema__)


@dataclass(frozen=True)
class Named:
    """A pydantic field type: the name of a registered object (a layout, a backend)."""

    what: str
    entries: Callable[[], Mapping[str, object]]

    def read(self, value: object) -> str:
        """Return the name, given it or the registered object itself."""
        known = self.entries()
        name = value if isinstance(value, str) else getattr(value, "name", None)
        if (
            not isinstance(name, str)
            or name not in known
            or not (name is value or known[name] == value)
        ):
            other = {key: k for k in known for key in (k.lower(), k.upper())}
            raise problem(f"is no registered {self.what}{suggestion(name or value, known, other)}")
        return name

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(core_schema.literal_schema(list(self.entries())))


def _pse_classes() -> dict[str, type]:
    # `+` joins biases in text, so the sum itself need not be registered; a file needs a name.
    return {"sum": Sum} | dict(PSE.items())


MASK = Family("mask", Mask, lambda: dict(MASKS.items()), parse_mask)
BIAS = Family("positional bias", Pse, _pse_classes, parse_pse)


def first_line(owner: type) -> str:
    """Return the first line of a docstring."""
    return (owner.__doc__ or owner.__name__).strip().splitlines()[0]


def _arguments(family: type) -> tuple[DataclassField[Any], ...]:
    if not is_dataclass(family):
        raise ConfigError(
            f"{family.__name__} is registered but is no dataclass, so a configuration cannot know "
            "its fields; decorate it with @dataclass(frozen=True)"
        )
    return tuple(item for item in fields(family) if item.init)


@lru_cache(maxsize=512)
def _model(base: type, kind: str | None, owner: type) -> type[BaseModel]:
    """Return the pydantic model of what a mapping of this kind says; None has no key `kind`.

    It does not depend on what else is registered: a nested field looks its kind up when a
    value arrives.
    """
    try:
        hints = get_type_hints(owner)
    except NameError as error:
        raise ConfigError(
            f"cannot read the annotations of {owner.__name__}, registered as {kind!r}: {error}; "
            "import the name at run time, not under TYPE_CHECKING"
        ) from None
    parameters: dict[str, Any] = {} if kind is None else {"kind": (Literal[kind], ...)}
    for item in _arguments(owner):
        parameters[item.name] = (_annotation(hints[item.name], base), _default(item))
    return create_model(
        owner.__name__,
        __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True),
        __doc__=first_line(owner),
        __module__=owner.__module__,
        **parameters,
    )


def _annotation(hint: Any, base: type) -> Any:
    """Return a dataclass annotation with its scalars strict, and masks and biases readable.

    `base` is what the owner of the field is itself.
    """
    if hint in _STRICT:
        return _STRICT[hint]
    for family in (MASK, BIAS):
        if isinstance(hint, type) and issubclass(hint, family.base):
            return Annotated[hint, replace(family, inside=family.base is base)]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal or not arguments:
        return hint
    parts = tuple(_annotation(part, base) for part in arguments)
    if origin in (Union, types.UnionType):
        return Union[parts]  # noqa: UP007 -- the parts are known only now
    return origin[parts]


def _default(item: DataclassField[Any]) -> Any:
    if item.default is not MISSING:
        return item.default
    if item.default_factory is not MISSING:
        return Field(default_factory=item.default_factory)
    return ...


def _construct(owner: type, model: type[BaseModel], value: Mapping[Any, Any]) -> Any:
    given = model.model_validate(value)
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


def problem(message: str, *, of_a_key: bool = False) -> PydanticCustomError:
    """Return the error for pydantic that says `message`.

    `of_a_key`: its location ends with a key, even where the mapping has no such key.
    """
    # The message goes in as a value: braces in it are no template.
    return PydanticCustomError(
        "attnkit_key" if of_a_key else "attnkit", "{message}", {"message": message}
    )


def problems_at(told: Mapping[str, str], value: Mapping[str, Any]) -> ValidationError:
    """Return the error that says one message for each of these keys of `value`."""
    return ValidationError.from_exception_data(
        "configuration",
        [
            InitErrorDetails(type=problem(message, of_a_key=True), loc=(key,), input=value.get(key))
            for key, message in told.items()
        ],
    )
