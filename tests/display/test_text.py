"""`Text`: a string in every way, that shows itself at a prompt, in a notebook and with rich."""

from __future__ import annotations

import ast
import copy
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import attnkit as ak
from attnkit import masks, parallel
from attnkit.display import Text, Told
from attnkit.doctor.screen import Screen
from attnkit.errors import Refusal
from attnkit.interop.torch import routing
from tests.display.looked import tree

REPORT = Text(
    "attention on backend 'tiled'\n"
    "  mask        Causal(): a < b\n"
    "              and more of it\n"
    "  passed over ascend: no NPU [no-npu]\n"
    "              flex: not asked [not-auto]\n"
    "                goes on here\n"
    "on Ascend:\n"
    "  refused     mode 0: too long [mask-size]"
)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def plan(**named: object) -> ak.Plan:
    x = meta(1, 8, 2, 16)
    return ak.plan(x, x, x, mask=masks.Causal(), **named)


def filled(cache: ak.KVCache | ak.StaticCache) -> ak.KVCache | ak.StaticCache:
    cache.append(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8))
    return cache


GIVEN: dict[str, Callable[[], object]] = {
    "Plan.explain": lambda: plan().explain(),
    "ParallelPlan.explain": lambda: parallel.plan(*[meta(1, 8, 2, 16)] * 3, ranks=2).explain(),
    "Attention.explain": lambda: ak.Attention(2, 16).explain(*[meta(1, 8, 2, 16)] * 3),
    "MultiHeadAttention.explain": lambda: ak.MultiHeadAttention(32, 2).explain(
        torch.zeros(1, 8, 32)
    ),
    "Mask.show": lambda: masks.Causal().show(3, 3),
    "Sharding.show": lambda: parallel.Sharding.zigzag(8, 2).show(),
    "KVCache.explain": lambda: filled(ak.KVCache()).explain(),
    "StaticCache.explain": lambda: filled(ak.StaticCache(4)).explain(),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_people_read_is_text(name: str) -> None:
    text = GIVEN[name]()
    assert isinstance(text, Text)
    assert repr(text) == str(text) == f"{text}"
    assert "\n" in repr(text)
    tree(text._repr_html_())


def test_it_is_a_string_in_every_other_way() -> None:
    plain = str.__str__(REPORT)
    assert type(plain) is str
    assert plain == REPORT
    assert hash(REPORT) == hash(plain)
    assert {plain: 1}[REPORT] == 1
    assert type(REPORT[:9]) is type(REPORT.upper()) is type(REPORT + "") is str
    assert REPORT.splitlines() == plain.splitlines()
    for again in (pickle.loads(pickle.dumps(REPORT)), copy.deepcopy(REPORT), copy.copy(REPORT)):
        assert again == REPORT
        assert type(again) is Text


def test_a_prompt_shows_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    sys.displayhook(Text("a\nb"))
    print(Text("a\nb"))
    assert capsys.readouterr().out == "a\nb\na\nb\n"


def test_a_notebook_shows_labels_in_bold_and_folds_refusals() -> None:
    page = REPORT._repr_html_()
    found = tree(page)
    assert [one.text for one in found.iter("b")] == ["mask", "passed over", "refused"]
    assert [one.text for one in found.iter("summary")] == ["passed over (2)", "refused (1)"]
    # All of it is there, in order.
    said = "\n".join("".join(one.itertext()) for one in found.iter("pre"))
    assert said == REPORT
    folded = ["".join(one.itertext()) for one in found.iter("details")]
    assert "goes on here" in folded[0]
    assert "on Ascend" not in folded[0]


def test_a_picture_in_signs_has_no_labels() -> None:
    assert list(tree(masks.Causal().show(20, 20)._repr_html_()).iter("b")) == []
    assert list(tree(Text("  row  a      b\n")._repr_html_()).iter("b")) == []


def test_rich_shows_the_same_lines_with_styled_labels() -> None:
    for terminal in (False, True):
        written = io.StringIO()
        kind = "truecolor" if terminal else None
        console = Console(file=written, force_terminal=terminal, color_system=kind, width=100)
        console.print(REPORT)
        text = written.getvalue()
        assert ("\x1b[1;36mmask\x1b[0m" in text) is terminal
        if not terminal:
            assert text == f"{REPORT}\n"
    styled = REPORT.__rich__()
    assert styled.plain == REPORT
    bold = {
        REPORT[s.start : s.end] for s in styled.spans if s.style == "bold cyan" and s.end > s.start
    }
    assert bold == {"mask", "passed over", "refused"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_command_is_plain_where_it_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    piped, terminal = io.StringIO(), Terminal()
    for out in (piped, terminal):
        Screen(out).text(REPORT)
    assert piped.getvalue() == f"{REPORT}\n"
    assert "\x1b[" in terminal.getvalue()
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as where it is not installed
    without = Terminal()
    Screen(without).text(REPORT)
    assert without.getvalue() == f"{REPORT}\n"


def test_reports_show_what_they_print() -> None:
    for report in (
        routing.Calls(12),
        masks.diff(masks.Causal(), masks.SlidingWindow(2), 4),
        masks.SlidingWindow(9).lint(4, 4)[0],
    ):
        said = "".join(tree(report._repr_html_()).itertext())  # type: ignore[attr-defined]
        assert said == str(report)


def test_a_report_that_cannot_be_told_is_shown_as_its_repr() -> None:
    class Broken(Told):
        def __str__(self) -> str:
            raise RuntimeError("half of it is gone")

        def __repr__(self) -> str:
            return "<broken>"

    page = Broken()._repr_html_()
    assert "&lt;broken&gt;" in page
    assert "half of it is gone" in page
    assert str(Refusal("mine", "not today")) == "not today [mine]"


def test_displays_need_nothing_but_python() -> None:
    folder = Path(ak.__file__).parent / "display"
    others = {
        (path.name, name)
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        for name in _imported(node)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not name.startswith("attnkit.display")
    }
    assert {file for file, _ in others} <= {"figure.py"}


def _imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
