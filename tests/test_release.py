"""What a release says of itself in several places says the same, and is there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from ruamel.yaml import YAML

import attnkit
from attnkit.__main__ import main
from attnkit.doctor import findings
from setup import described

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_written_once() -> None:
    project = read("pyproject.toml")
    assert 'version = { attr = "attnkit.__version__" }' in project
    assert re.search(r'^version = "', project, re.MULTILINE) is None
    assert re.fullmatch(r"\d+\.\d+\.\d+", attnkit.__version__)


def test_a_command_tells_the_versions(capsys: Any) -> None:
    assert main(["--version"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"attnkit {attnkit.__version__}, python 3.")
    assert f", torch {torch.__version__}" in told
    assert told.count("\n") == 1


def test_torch_npu_is_told_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(findings, "_version", {"torch_npu": "2.13.0"}.get)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(", torch_npu 2.13.0\n")


# -- what a release is described by ------------------------------------------------------------


def test_the_changelog_begins_with_this_version() -> None:
    titles = re.findall(r"^## (.*)", read("CHANGELOG.md"), re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{attnkit.__version__}\] - \d{{4}}-\d\d-\d\d", titles[1])
    dates = [title.partition(" - ")[2] for title in titles[1:]]
    assert dates == sorted(dates, reverse=True)


def test_the_changelog_has_the_sections_that_it_says_it_has() -> None:
    sections = set(re.findall(r"^### (.*)", read("CHANGELOG.md"), re.MULTILINE))
    kept = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {one for one in sections if not one.startswith("Upgrading from ")} <= kept


def test_the_citation_is_of_this_version() -> None:
    citation = YAML(typ="safe").load(read("CITATION.cff"))
    released = re.search(r"^## \[[\d.]+\] - (.*)", read("CHANGELOG.md"), re.MULTILINE)
    assert released is not None
    assert str(citation["version"]) == attnkit.__version__
    assert citation["date-released"] == released[1]
    project = read("pyproject.toml")
    assert f'license = "{citation["license"]}"' in project
    assert f'authors = [{{ name = "{citation["authors"][0]["name"]}" }}]' in project


# -- what is asked of those who report ---------------------------------------------------------

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
# What each kind of field needs and may have: the syntax of issue forms.
FIELDS = {
    "markdown": ({"value"}, set()),
    "textarea": ({"label"}, {"description", "render", "placeholder", "value"}),
    "input": ({"label"}, {"description", "placeholder", "value"}),
    "dropdown": ({"label", "options"}, {"description", "multiple", "default"}),
    "checkboxes": ({"label", "options"}, {"description"}),
}


@pytest.mark.parametrize("path", [p for p in FORMS if p.stem != "config"], ids=lambda p: p.stem)
def test_a_form_for_issues_is_one(path: Path) -> None:
    form = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    assert set(form) == {"name", "description", "body"}
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0
    for field in form["body"]:
        needed, optional = FIELDS[field["type"]]
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert needed <= set(field["attributes"]) <= needed | optional
        assert set(field.get("validations", {})) <= {"required"}
        options = field["attributes"].get("options", [])
        assert len({str(option) for option in options}) == len(options)


def test_forms_ask_for_what_commands_print(capsys: Any) -> None:
    asked = "".join(path.read_text(encoding="utf-8") for path in FORMS)
    commands = set(re.findall(r"`attnkit ([^`]+)`", asked + read("SECURITY.md")))
    assert {"--version", "doctor", "doctor --quick"} <= commands
    for command in commands:
        assert main([*command.split(), "--help"]) == 0
    capsys.readouterr()


# -- what is in a release ----------------------------------------------------------------------


def test_the_source_distribution_has_every_file_and_folder_of_the_tree() -> None:
    made = [line.strip("/\n") for line in read(".gitignore").splitlines()]
    there = [p for p in ROOT.iterdir() if not any(p.match(one) for one in [*made, ".git"])]
    told = read("MANIFEST.in")
    grafted = set(re.findall(r"^graft (.*)", told, re.MULTILINE))
    patterns = re.findall(r"^include (.*)", told, re.MULTILINE)[0].split()
    by_setuptools = {"LICENSE", "pyproject.toml", "setup.py", "MANIFEST.in"}
    assert {p.name for p in there if p.is_dir()} == grafted
    files = {p.name for p in there if p.is_file() and not any(p.match(one) for one in patterns)}
    assert files == by_setuptools


def test_every_file_beside_the_code_is_data_of_the_wheel() -> None:
    (told,) = re.findall(r"^attnkit = \[(.*?)^\]", read("pyproject.toml"), re.MULTILINE | re.DOTALL)
    patterns = re.findall(r'"(.*?)"', told)
    others = [
        path.relative_to(ROOT / "attnkit")
        for path in (ROOT / "attnkit").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    kinds = {pattern.removeprefix("**/") for pattern in patterns}
    assert [path for path in others if not any(path.match(kind) for kind in kinds)] == []
    assert {".html", ".css", ".js", ".cpp", ".json"} <= {path.suffix for path in others}


def test_the_description_of_the_package_has_no_link_into_the_tree() -> None:
    told = described(read("README.md"))
    assert re.findall(r"\]\((?!https?://)", told) == []
    assert "[install](docs/" in read("README.md")
    assert "| start | install, " in told
    text = "![p](a.png)\n\n[x](a/b.md), [y](https://a.b/c), [z](#here)\n"
    assert described(text).startswith("x, [y](https://a.b/c), [z](#here)\n")


# -- what is asked for, and what there is ------------------------------------------------------

# What a distribution is imported as, where that is another name.
IMPORTED_AS = {"hydra-core": "hydra", "mkdocs-material": "material", "pytest-xdist": "xdist"}


def wanted(project: dict[str, Any], extra: str) -> Iterator[Requirement]:
    """Yield what an extra installs, that of extras which it names among it."""
    for text in project["optional-dependencies"][extra]:
        one = Requirement(text)
        if one.name == "attnkit":
            for other in one.extras:
                yield from wanted(project, other)
        elif one.marker is None or one.marker.evaluate():
            yield one


def test_what_extras_promise_is_here_and_imports() -> None:
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads(read("pyproject.toml"))["project"]
    extras = set(project["optional-dependencies"])
    # torch_npu needs CANN to be imported; `make test-npu` has it in a folder of its own.
    for extra in sorted(extras - {"npu"}):
        for one in wanted(project, extra):
            assert one.specifier.contains(version(one.name), prereleases=True), (extra, one)
            name = IMPORTED_AS.get(one.name, one.name.replace("-", "_"))
            assert find_spec(name) is not None, (extra, one)
    # `dev` has what tests need, so that all the others are tested.
    assert {one.name for extra in extras - {"npu"} for one in wanted(project, extra)} == {
        one.name for one in wanted(project, "dev")
    }


def test_the_torch_that_is_asked_for_is_the_one_that_is_tested() -> None:
    (pinned,) = re.findall(r"^torch==(\d+\.\d+)\.\d+$", read("constraints.txt"), re.MULTILINE)
    assert f'"torch>={pinned}"' in read("pyproject.toml")
    for page in ("README.md", "CONTRIBUTING.md", "docs/start/install.md", "docs/guides/ascend.md"):
        assert set(re.findall(r"torch (\d+\.\d+) or newer", read(page))) == {pinned}, page
