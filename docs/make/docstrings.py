"""How docstrings become pages: doctests become blocks of code, names in backticks become links."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import griffe

from docs.make.names import entry_of

__all__ = ["Docstrings", "as_markdown"]

_NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*(?:\(\))?)`(?!`)")


class Docstrings(griffe.Extension):
    """Rewrites each docstring of the package as Markdown."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for obj in _objects(pkg):
            if obj.docstring is not None:
                obj.docstring.value = as_markdown(obj.docstring.value, _links(obj))


def as_markdown(text: str, prose: Callable[[str], str] = str) -> str:
    """Return a docstring with each run of doctest paragraphs in a fence, and its prose changed."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if not paragraph.lstrip().startswith(">>>"):
            parts.append(prose(paragraph))
        elif parts and parts[-1].startswith("```pycon"):
            parts[-1] = f"{parts[-1][:-4]}\n\n{paragraph}\n```"
        else:
            parts.append(f"```pycon\n{paragraph}\n```")
    return "\n\n".join(parts)


def _links(obj: griffe.Object) -> Callable[[str], str]:
    """Return what makes names in a text of `obj` lead to their entries, where they have one."""
    own = {parameter.name for parameter in getattr(obj, "parameters", ())} | {obj.name}

    def link(found: re.Match[str]) -> str:
        entry = None if found[1] in own else _entry(found[1], obj)
        return found[0] if entry is None else f"[`{found[1]}`][{entry}]"

    return lambda text: _NAME.sub(link, text)


def _entry(name: str, obj: griffe.Object) -> str | None:
    entry = entry_of(name, obj.path)
    if entry is not None or "." not in name:
        return entry
    owner, _, member = name.removesuffix("()").rpartition(".")
    owners = entry_of(owner, obj.path)
    if owners is None or member.startswith("_"):
        return None
    found = obj.package.get_member(owners.partition(".")[2])
    found = found.final_target if found.is_alias else found
    known = found.is_class and member in found.members and found.members[member].has_docstring
    return f"{owners}.{member}" if known else None


def _objects(owner: griffe.Object) -> Iterator[griffe.Object]:
    yield owner
    for member in owner.members.values():
        if not member.is_alias:
            yield from _objects(member)  # type: ignore[arg-type]
