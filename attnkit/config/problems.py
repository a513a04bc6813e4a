"""What pydantic found wrong, as one `ConfigError` that says where, what and what instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from attnkit.config.text import Origin
from attnkit.errors import ConfigError, clipped, shown
from attnkit.registry import suggestion

if TYPE_CHECKING:
    from attnkit.config.kinds import Record

__all__ = ["NOTHING", "Path", "config_error", "problem", "problems_at", "unread"]

_SHOWN = 16
_WIDTH = 80
_ROOM = 1_800  # characters, for all problems together
Path = tuple[str | int, ...]

NOTHING = object()
"""Stands where data has nothing to show: no such key, or one that could not be read."""


def problem(message: str, *, of_a_key: bool = False) -> PydanticCustomError:
    """Return the error for pydantic that says `message`.

    `of_a_key`: its location ends with a key, even where the mapping has no such key.
    """
    # The message goes in as a value: braces in it are not a template.
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


def unread(told: Mapping[Path, str]) -> ValidationError:
    """Return the error that says which parts of given data could not be read, and why."""
    details = [
        InitErrorDetails(type=problem(message, of_a_key=True), loc=path, input=None)
        for path, message in told.items()
    ]
    return ValidationError.from_exception_data("configuration", details)


def config_error(
    error: ValidationError,
    model: type[BaseModel],
    data: object,
    fields: Mapping[str, Record],
    origin: Origin | None = None,
) -> ConfigError:
    """Return the `ConfigError` of everything that `error` found in `data`.

    `fields` names those of `model` that hold objects; `origin` says what `data` was read from.
    """
    found: dict[Path, list[Any]] = {}
    for one in error.errors(include_url=False):
        found.setdefault(_path(one, data), []).append(one)
    # Of a union `int | list of int` both branches fail; what is wrong inside says more.
    outer = {path[:end] for path in found for end in range(len(path))}
    told = [path for path in found if path not in outer]
    count = "1 problem" if len(told) == 1 else f"{len(told)} problems"
    lines: list[str] = []
    room = _ROOM
    for path in told[:_SHOWN]:
        sentences = [_sentence(one, path, model, data, fields) for one in found[path]]
        sentence = " or ".join(dict.fromkeys(sentences))
        where = f" ({origin.place(path)})" if origin is not None else ""
        line = f"{_text(path)}{clipped(sentence, _ROOM)}{_given(path, data, sentence)}{where}"
        room -= len(line)
        if lines and room < 0:
            break
        lines.append(line)
    more = f"\n  ... and {len(told) - len(lines)} more" if len(told) > len(lines) else ""
    listed = "\n  ".join(lines)
    return ConfigError(f"{model.__name__}: {count}\n  {listed}{more}")


def _path(problem: Any, data: object) -> Path:
    """Return the keys and indices of a location, without the names of union branches.

    A union adds the name of the branch that failed; it is not a key of what was given there.
    """
    path: list[str | int] = []
    here = data
    loc: tuple[str | int, ...] = problem["loc"]
    key_at = len(loc) - 1 if problem["type"] in ("missing", "attnkit_key") else None
    for k, step in enumerate(loc):
        if isinstance(here, Mapping) and (step in here or k == key_at):
            here = here.get(step)
        elif isinstance(step, int) and isinstance(here, Sequence) and step < len(here):
            here = here[step]
        else:
            continue
        path.append(step)
    return tuple(path)


def _sentence(
    problem: Any,
    path: Path,
    model: type[BaseModel],
    data: object,
    fields: Mapping[str, Record],
) -> str:
    kind, given = problem["type"], _at(path, data)
    if isinstance(given, str) and "${" in given:
        return "is an interpolation that nobody has resolved; load the file with OmegaConf"
    if kind == "extra_forbidden":
        return f"unknown key{suggestion(path[-1], _known(path, model, data, fields))}"
    if kind == "missing":
        return f"is missing. Known keys: {', '.join(_known(path, model, data, fields))}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be", "must be").replace("a valid tuple", "a list")
    message = message.replace("a valid integer", "an integer").replace("a valid ", "a ")
    if kind in ("int_type", "float_type") and _is_number(problem["input"]):
        message += " without quotes"
        if "e" in problem["input"].lower():
            message += " (to YAML 1.1 it is a text: write 1.0e-3)"
    return message


def _known(
    path: Path, model: type[BaseModel], data: object, fields: Mapping[str, Record]
) -> tuple[str, ...]:
    """Return the keys that the mapping around the last step may have."""
    if len(path) == 1:
        required_first = sorted(model.model_fields.items(), key=lambda f: not f[1].is_required())
        return tuple(name for name, _ in required_first)
    parent = _at(path[:-1], data)
    kind = parent.get("kind") if isinstance(parent, Mapping) else None
    return fields[str(path[0])].keys(kind)


def _text(path: Path) -> str:
    """Return ``mask.parts[1].size: ``, or nothing for the whole.

    >>> _text(("mask", "parts", 1, "size"))
    'mask.parts[1].size: '
    """
    steps = (f"[{step}]" if isinstance(step, int) else f".{clipped(step, _WIDTH)}" for step in path)
    return f"{''.join(steps).removeprefix('.')}: " if path else ""


def _given(path: Path, data: object, sentence: str) -> str:
    value = _at(path, data)
    if value is NOTHING or isinstance(value, Mapping):
        return ""
    text = clipped(shown(value), _WIDTH)
    if len(text) > 8 and text in sentence:
        return ""
    return f"; got {text}"


def _at(path: Path, data: object) -> Any:
    here: Any = data
    for step in path:
        if isinstance(here, Mapping) and step not in here:
            return NOTHING
        here = here[step]
    return here


def _is_number(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True
