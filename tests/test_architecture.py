"""docs/how-it-works/architecture.md against the code: its layers, and its ways through it."""

from __future__ import annotations

import re

import pytest

from docs.make import diagrams
from tests.house import ROOT, caches, entered, paths, shared_names, trees

PAGE = (ROOT / "docs" / "how-it-works" / "architecture.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Return what stands under a heading."""
    return re.split(r"^##+ ", PAGE.partition(f"# {title}\n")[2], maxsplit=1, flags=re.M)[0]


def test_every_room_is_in_a_layer_and_imports_point_down() -> None:
    known = {name: k for k, row in enumerate(diagrams.rooms()) for name in row}
    rooms = {name.split("/")[0].removesuffix(".py") for name, _ in trees()} - {"__init__"}
    assert rooms == set(known)
    upward = {(a, b) for a, b in diagrams.imports() if a != "__init__" and known[a] > known[b]}
    assert not upward


@pytest.mark.parametrize("name", paths())
def test_a_way_through_the_code_is_entered_in_its_order(name: str) -> None:
    told = re.findall(r"`([\w/]+\.py:\w+)`", section(name[0].upper() + name[1:]))
    assert len(told) >= 5
    functions = entered(paths()[name])
    assert [one for one in told if one not in functions] == []
    places = [functions.index(one) for one in told]
    assert places == sorted(places)


def test_one_noun_means_one_thing() -> None:
    # A mask and a bias are cut alike, and a tensor is a dense mask or a dense bias.
    assert set(shared_names()) <= {"Cut", "Dense", "OfHeads", "Taken"}


def test_there_are_few_caches() -> None:
    assert len(caches()) <= 10
