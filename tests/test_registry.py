"""The small registry class, and the text reader that works on registered names."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from attnkit import masks
from attnkit.backends import BACKENDS
from attnkit.config import AttentionConfig
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.layouts import LAYOUTS
from attnkit.masks import MASKS
from attnkit.pse import PSE
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


def test_what_is_defined_again_replaces_itself(fruits):
    def defined(**names):
        return type("Plum", (), {"__module__": "orchard", **names})

    fruits.add("plum", defined())
    again = defined(size=2)
    fruits.add("cherry", 4)
    assert fruits.add("plum", again) is again is fruits["plum"]  # a class, by where it stands
    assert fruits.add("apple", 1) == 1  # an equal value
    assert list(fruits) == ["apple", "pear", "plum", "cherry"]
    with pytest.raises(CompositionError, match="registered already"):
        fruits.add("plum", type("Plum", (), {"__module__": "elsewhere"}))
    fruits.add("quince", defined()())
    assert fruits.add("quince", defined()()) is fruits["quince"]  # an object of such a class
    with pytest.raises(CompositionError, match="registered already"):
        fruits.add("quince", type(fruits["quince"])())


def test_a_module_that_is_reloaded_registers_again(tmp_path, monkeypatch):
    file = tmp_path / "reloaded_mask.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from attnkit.masks import MASKS, Mask\n"
        "@MASKS.register('reloaded')\n"
        "@dataclass(frozen=True)\n"
        "class Reloaded(Mask):\n"
        "    size: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("reloaded_mask")
    try:
        first = module.Reloaded
        importlib.reload(module)
        assert module.Reloaded is not first
        assert MASKS["reloaded"] is module.Reloaded
        assert type(masks.parse("Reloaded(2)")) is module.Reloaded
        assert AttentionConfig(num_heads=1, head_dim=1, mask="Reloaded(2)").mask == masks.parse(
            "Reloaded(2)"
        )
    finally:
        MASKS.remove("reloaded")
        del sys.modules["reloaded_mask"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package that registers by entry points."""

    def make(group: str, **modules: str) -> None:
        info = tmp_path / "orchard-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: orchard\nVersion: 1.0\n")
        lines = [f"{name} = orchard_{name}" for name in modules]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
        for name, text in modules.items():
            (tmp_path / f"orchard_{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    for name in [name for name in sys.modules if name.startswith("orchard_")]:
        del sys.modules[name]


def test_plug_ins_are_imported_when_a_name_is_not_known(package):
    text = "from attnkit.masks import MASKS, Full\nMASKS.orchard.add('fig', 7)\n"
    registry = Registry("fruit", "orchard.fruits")
    package("orchard.fruits", fig=text)
    registry.add("apple", 1)
    MASKS.orchard = registry
    try:
        assert registry["apple"] == 1
        assert "orchard_fig" not in sys.modules
        assert registry["fig"] == 7
        assert list(registry) == ["apple", "fig"]
    finally:
        del MASKS.orchard


def test_a_plug_in_that_fails_is_told_and_others_are_loaded(package):
    package("orchard.fruits", bad="import no_such_module", good="")
    registry = Registry("fruit", "orchard.fruits")
    registry.add("apple", 1)
    with pytest.warns(RuntimeWarning, match="plug-in bad = orchard_bad failed.*no_such_module"):
        assert list(registry) == ["apple"]
    assert "orchard_good" in sys.modules
    with pytest.raises(CompositionError, match=r"(?s)unknown fruit 'fig'.*plug-in bad = orchard"):
        registry["fig"]


@pytest.mark.parametrize(
    ("registry", "group"),
    [
        (MASKS, "attnkit.masks"),
        (PSE, "attnkit.pse"),
        (LAYOUTS, "attnkit.layouts"),
        (BACKENDS, "attnkit.backends"),
    ],
    ids=["masks", "pse", "layouts", "backends"],
)
def test_every_registry_finds_plug_ins(registry, group, package, monkeypatch):
    package(group, found="")
    list(registry)
    monkeypatch.setattr(registry, "_group", group)  # as at the start of a process
    assert Registry("x", group)._group == group
    with pytest.raises(CompositionError, match="unknown"):
        registry["nothing of that name"]
    assert "orchard_found" in sys.modules
    assert registry._group is None


def test_nothing_is_imported_while_attnkit_is():
    code = (
        "import attnkit as ak\n"
        "from attnkit import masks, pse, layouts, backends\n"
        "registries = masks.MASKS, pse.PSE, layouts.LAYOUTS, backends.BACKENDS\n"
        "assert [one._group for one in registries] == "
        "['attnkit.masks', 'attnkit.pse', 'attnkit.layouts', 'attnkit.backends']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


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
