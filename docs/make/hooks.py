"""What mkdocs calls while it builds the site: pages from outside of docs/, and where links lead.

A page of the repository links to files as they lie in the repository, so that links work there
too. In the site some of these files are pages at another place, and others are no pages at all.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.make import cells, pictures
from docs.make.names import entry_of

ROOT = Path(__file__).parents[2]

PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/RESULTS.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
    "examples/README.md",
    "examples/models/README.md",
)
"""What lies outside of docs/ and is part of the site, under project/."""

MADE = {"images/first.html": pictures.explorer}
"""What is in no folder: each build makes it."""

SPARED = ("CHANGELOG.md",)
"""Pages whose names may be those of another time."""

LATER = ("project/", *(f"reference/{page}.md" for page in ("backends", "config", "interop")))
"""Pages that search finds after others."""

SOURCES = ("examples/*.py", "examples/*/*.py", "examples/configs/*.yaml")
"""Files that are shown as they are, on a page of their own under project/source/."""

_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2[ ]*$", re.S | re.M)
_CODE = re.compile(  # a heading, a link, or what stands in backticks, which may be a name
    r"^#.*$|\[(?:[^\[\]]|\[[^\[\]]*\])*\][(\[][^)\]]*[)\]]|(?<!`)`(?P<name>[A-Za-z][\w.]*(?:\(\))?)`(?!`)"
    r"|(`+).+?\2",
    re.M,
)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write out the patterns of the nav."""
    config.nav = _written_out(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/."""
    for path, place in _outside().items():
        if place.endswith(".md") and not path.endswith(".md"):
            files.append(File.generated(config, place, content=_source_page(path)))
        else:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    for place, make in MADE.items():
        files.append(File.generated(config, place, content=make()))
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        place = path.relative_to(ROOT / "docs").as_posix()
        text = cells.as_page(path.read_text(encoding="utf-8"), path.name)
        files.append(File.generated(config, _page_of(place), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links of a page lead where the site has what they name."""
    if page.file.src_uri.startswith(LATER):
        page.meta.setdefault("search", {"boost": 0.5})
    here = _repository_path(page.file)
    moved = outside_fences(markdown, lambda text: _relinked(text, here))
    return moved if here in SPARED else named(moved)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the pictures of a notebook where its page says."""
    notebook = ROOT / "docs" / page.file.src_uri.replace(".md", ".ipynb")
    if page.file.generated_by is None or not notebook.exists():
        return html
    return cells.with_outputs(html, notebook.read_text(encoding="utf-8"))


def named(markdown: str) -> str:
    """Return a page on which each public name leads to its entry, where it is named first.

    >>> named("`Causal` and `masks.Causal`: `Causal`. `Dense` is two.")
    '[`Causal`][attnkit.masks.Causal] and `masks.Causal`: `Causal`. `Dense` is two.'
    >>> named("# `Causal`\\n[`Causal`](variants.md)")
    '# `Causal`\\n[`Causal`](variants.md)'
    """
    linked: set[str] = set()

    def link(found: re.Match[str]) -> str:
        name = found["name"]
        entry = entry_of(name) if name else None
        if entry is None or entry in linked:
            return found[0]
        linked.add(entry)
        return f"[`{name}`][{entry}]"

    return outside_fences(markdown, lambda text: _CODE.sub(link, text))


def on_post_build(config: MkDocsConfig) -> None:
    """Drop what search needs for other languages than English."""
    shutil.rmtree(Path(config.site_dir) / "assets" / "javascripts" / "lunr", ignore_errors=True)


def outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """Return a page with everything changed but its blocks of code.

    >>> outside_fences("a\\n```\\na\\n```\\na", str.upper)
    'A\\n```\\na\\n```\\nA'
    """
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def site_path(path: str) -> str | None:
    """Return where a file of the repository is in the site, None if it is not there.

    >>> site_path("docs/guides/decoding.md"), site_path("CONTRIBUTING.md")
    ('guides/decoding.md', 'project/CONTRIBUTING.md')
    >>> site_path("README.md"), site_path("attnkit/errors.py")
    ('index.md', None)
    """
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and not path.startswith("docs/make/"):
        place = path.removeprefix("docs/")
        return _page_of(place) if place in MADE or (ROOT / path).is_file() else None
    return _outside().get(path)


def _outside() -> dict[str, str]:
    """Return the files outside of docs/ that the site has, each with its place."""
    found = {}
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            found[name] = f"project/{name}"
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            found[name] = f"project/source/{name}.md"
    return found


def _page_of(place: str) -> str:
    """Return the page that a notebook becomes; others are what they are."""
    return re.sub(r"\.ipynb$", ".md", place)


def _written_out(nav: Any) -> Any:
    """Return the nav with ``folder/*`` as every page of the folder, in order."""
    if isinstance(nav, dict):
        return {title: _written_out(inside) for title, inside in nav.items()}
    if isinstance(nav, str):
        return nav
    known, found = sorted(_outside().values()), []
    for entry in nav:
        if isinstance(entry, str) and entry.endswith("/*"):
            folder = entry.removesuffix("*")
            found += [name for name in known if name.startswith(folder) and name.endswith(".md")]
        else:
            found.append(_written_out(entry))
    return found


def _source_page(path: str) -> str:
    language = {"py": "python"}.get(path.rpartition(".")[2], path.rpartition(".")[2])
    text = (ROOT / path).read_text(encoding="utf-8")
    return (
        f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n"
        f"# `{path}`\n\n````{language}\n{text}````\n"
    )


def _repository_path(file: File) -> str:
    """Return where a page of the site lies in the repository."""
    if file.src_uri.startswith("project/source/"):
        return file.src_uri.removeprefix("project/source/").removesuffix(".md")
    if file.src_uri.startswith("project/"):
        return file.src_uri.removeprefix("project/")
    notebook = re.sub(r"\.md$", ".ipynb", f"docs/{file.src_uri}")
    return notebook if (ROOT / notebook).is_file() else f"docs/{file.src_uri}"


def _relinked(text: str, here: str) -> str:
    return _LINK.sub(lambda found: _link(found, here), text)


def _link(found: re.Match[str], here: str) -> str:
    mark, label, target, anchor = found[1], found[2], found[3], found[4] or ""
    if not target or re.match(r"[a-z]+:", target):
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    place = site_path(path) or site_path(f"{path}/README.md")
    if place is not None:
        start = posixpath.dirname(site_path(here) or "")
        return f"{mark}[{label}]({posixpath.relpath(place, start or '.')}{anchor})"
    if not mark and (ROOT / path).exists():  # no page: its name is all there is to show
        return label if label.startswith("`") else f"`{path}`"
    return found[0]
