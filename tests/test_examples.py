"""Every public name has an example that runs; the doctests run them, this counts them."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import attnkit
from attnkit import kernel, layouts, masks, parallel, pse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "guides" / "backends.md"]
PACKAGES = [attnkit, masks, pse, layouts, kernel, parallel]


def public(package: ModuleType) -> Iterator[tuple[str, type]]:
    """Yield the classes and functions among a package's public names."""
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value


def methods(owner: type) -> Iterator[str]:
    """Yield the public methods that a class adds to what it inherits."""
    for name, value in vars(owner).items():
        plain = getattr(value, "__func__", value)
        inherited = any(hasattr(base, name) for base in owner.__mro__[1:])
        if inspect.isfunction(plain) and not name.startswith("_") and not inherited:
            yield name


def examples() -> str:
    """Return the code of the examples in the package and on the pages whose examples run."""
    lines = [page.read_text(encoding="utf-8") for page in PAGES]
    for found in pkgutil.walk_packages(attnkit.__path__, "attnkit."):
        if found.name.endswith("__main__"):
            continue
        text = inspect.getsource(import_module(found.name))
        lines += [line for line in text.splitlines() if line.lstrip().startswith((">>>", "... "))]
    return "\n".join(lines)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_has_an_example(package: ModuleType) -> None:
    without = [name for name, value in public(package) if ">>>" not in (value.__doc__ or "")]
    assert not without


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_method_is_called_in_an_example(package: ModuleType) -> None:
    code = examples()
    without = [
        f"{name}.{method}"
        for name, value in public(package)
        if inspect.isclass(value) and value.__module__.startswith("attnkit")
        for method in methods(value)
        if f".{method}(" not in code
    ]
    assert not without
