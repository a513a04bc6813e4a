"""The small registry class, and the text reader that works on registered names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.registry import Registry
from attnkit.textform import arguments_text, evaluate


@pytest.fixture
def fruits():
    registry = Registry("fruit")
    registry.add("apple", 1)
    registry.add("pear", 2)
    return registry


def test_names_to_entries_in_order(fruits):
    assert list(fruits) == ["apple", "pear"]
    assert fruits.items() == (("apple", 1), ("pear", 2))
    assert len(fruits) == 2
    assert fruits["pear"] == 2
    assert "apple" in fruits
    assert "plum" not in fruits
    assert 3 not in fruits


def test_the_decorator_returns_what_it_registers(fruits):
    def plum():
        return 3

    assert fruits.register("plum")(plum) is plum
    assert fruits["plum"] is plum


def test_a_name_is_given_once_and_can_be_removed(fruits):
    with pytest.raises(CompositionError, match=r"'apple' is registered already \(as 1\).*another"):
        fruits.add("apple", 3)
    fruits.remove("apple")
    fruits.add("apple", 3)
    assert list(fruits) == ["pear", "apple"]


def test_unknown_names_say_what_is_known(fruits):
    with pytest.raises(CompositionError, match=r"unknown fruit 'aple'; did you mean 'apple'.*pear"):
        fruits["aple"]
    with pytest.raises(CompositionError, match=r"unknown fruit 3\. Known: apple, pear"):
        fruits[3]
    with pytest.raises(CompositionError, match="unknown fruit 'fig'"):
        fruits.remove("fig")
    with pytest.raises(CompositionTypeError, match="under a string, not 3"):
        fruits.add(3, 3)


@pytest.mark.parametrize("name", [["apple"], {}, None, 10**5000, "x" * 100_000, b"apple"], ids=type)
def test_a_name_of_any_kind_is_unknown(fruits, name):
    assert name not in fruits
    with pytest.raises(CompositionError, match=r"^unknown fruit .*Known: apple, pear$") as caught:
        fruits[name]
    assert len(str(caught.value)) < 300


@dataclass
class Point:
    x: int
    y: int = 0
    name: str = "p"
    weight: float = 1.0


@pytest.mark.parametrize(
    ("point", "text"),
    [
        (Point(1), "1"),
        (Point(1, 2), "1, 2"),
        (Point(1, 0, "q"), "1, name='q'"),
        (Point(1, 2, "q", 0.5), "1, 2, name='q', weight=0.5"),
        (Point(1, 0, "p", 0.5), "1, weight=0.5"),
    ],
)
def test_arguments_are_written_and_read(point, text):
    assert arguments_text(point) == text
    assert evaluate(f"Point({text})", {"Point": Point}, "point") == point


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2", 3),
        ("  -1.5 ", -1.5),
        ("[1, (2, None)]", (1, (2, None))),
        ("'a'", "a"),
        ("~6 & 3 | 8", ~6 & 3 | 8),
        ("size(x='abc')", 3),
    ],
)
def test_the_language_is_literals_operators_and_names(text, value):
    assert evaluate(text, {"size": lambda x: len(x)}, "thing") == value


@pytest.mark.parametrize(
    "text", ["x", "1 if 1 else 2", "size.real", "1 < 2", "1 @ 2", "{1: 2}", "b'x'", "2 * 3"]
)
def test_anything_else_is_not_part_of_the_language(text):
    with pytest.raises(CompositionError, match=r"cannot read the thing .*part of the language"):
        evaluate(text, {"size": len}, "thing")
