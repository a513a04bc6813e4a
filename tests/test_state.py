"""What modules keep between calls: registries, and the caches that CONTRIBUTING lists."""

from __future__ import annotations

import ast
import gc
import itertools
import pkgutil
import re
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import attnkit
import attnkit as ak
from attnkit import masks
from attnkit.backends.choose import make_plan
from attnkit.backends.tiled.job import schedule
from attnkit.constants import Store
from attnkit.registry import Registry

ROOT = Path(__file__).parents[1]
KEEPERS = {"lru_cache", "cache"}
CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict, itertools.count)
CONTAINERS += (weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet)
MUTATORS = {"append", "add", "update", "pop", "popitem", "setdefault", "clear", "extend", "remove"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield every module of the package: its name without ``attnkit.``, and what it says."""
    for found in pkgutil.walk_packages(attnkit.__path__, "attnkit."):
        module = found.module_finder.find_spec(found.name, None)
        assert module is not None
        assert module.origin is not None
        text = Path(module.origin).read_text(encoding="utf-8")
        yield found.name.removeprefix("attnkit."), ast.parse(text)


def kept_functions(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the functions whose results are kept, and how many results are."""
    for node in ast.walk(tree):
        for decorator in getattr(node, "decorator_list", []):
            made = isinstance(decorator, ast.Call)
            function = decorator.func if made else decorator
            if not isinstance(function, ast.Name) or function.id not in KEEPERS:
                continue
            sizes = [*decorator.args, *(k.value for k in decorator.keywords)] if made else []
            every = "all" if function.id == "cache" else "128"
            yield node.name, str(sizes[0].value) if sizes else every


def assigned(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module gives to values itself."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def mutated(tree: ast.Module, name: str) -> bool:
    """Whether a module changes what this name of it holds."""

    def named(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == name

    return any(
        (isinstance(node, ast.Attribute) and node.attr in MUTATORS and named(node.value))
        or (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, (ast.Store, ast.Del))
            and named(node.value)
        )
        or (isinstance(node, ast.Global) and name in node.names)
        for node in ast.walk(tree)
    )


def changes(value: object, tree: ast.Module, name: str) -> bool:
    """Whether a value of a module is state: it changes while the process runs."""
    if isinstance(value, Registry) or is_dataclass(value) or isinstance(value, type):
        return False
    if isinstance(value, CONTAINERS):
        return type(value) not in (dict, list, set) or mutated(tree, name)
    ours = type(value).__module__.startswith("attnkit")
    return ours and any(isinstance(part, CONTAINERS) for part in vars(value).values())


def test_modules_keep_what_contributing_lists() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"`([\w.]+)` \((\w+)\)", page.partition("## State")[2]))
    found: dict[str, str] = {}
    for name, tree in modules():
        found |= {f"{name}.{function}": most for function, most in kept_functions(tree)}
        if name.endswith("__main__"):
            continue
        values = vars(import_module(f"attnkit.{name}"))
        found |= {
            f"{name}.{item}": listed.get(f"{name}.{item}", "how many?")
            for item in assigned(tree)
            if item in values and changes(values[item], tree, item)
        }
    assert found == listed


def test_lengths_that_are_new_in_every_step_leave_nothing_behind() -> None:
    """A plan keeps its lengths; whatever else keeps them would grow with every step."""
    most = make_plan.cache_info().maxsize
    assert most is not None
    layers = [ak.Attention(1, 2, mask=masks.Causal(), layout="TND") for _ in range(2)]
    rows = ak.Attention(1, 2)
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    for step in range(most + 60):
        lens, padding = ak.SeqLens([step + 1, 2, 3]), masks.Padding([step + 2, 2])
        alive.update((_Told(lens), _Told(padding)))
        x = torch.zeros(step + 6, 1, 2, requires_grad=True)
        for layer in layers:
            layer(x, x, x, seqlens=lens).sum().backward()
        y = torch.zeros(2, step + 2, 1, 2, requires_grad=True)
        rows(y, y, y, mask=padding).sum().backward()
        del lens, padding
    gc.collect()
    modules_keep = sum(len(layer._plans) for layer in (*layers, rows))
    assert modules_keep <= 3 * 16
    assert len(alive) <= most + modules_keep


class _Told:
    """Lives as long as a value that is no key of a weak set, because equal ones would be one."""

    def __init__(self, value: object) -> None:
        vars(value)["_told"] = self


def test_equal_layers_lay_a_batch_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*given: Any) -> Any:
        made.append(given)
        return schedule(*given)

    monkeypatch.setattr("attnkit.backends.tiled.job.schedule", counted)
    layers = [ak.Attention(2, 4, mask=masks.Causal(), layout="TND") for _ in range(4)]
    x = torch.randn(61, 2, 4, requires_grad=True)
    lengths = [31, 13, 17]  # of no other test
    for layer in layers:
        layer(x, x, x, seqlens=ak.SeqLens(lengths)).sum().backward()
    assert len(made) == 1


def test_a_store_counts_what_it_holds() -> None:
    store = Store(most=3, bytes=64)
    for n in (1, 2, 3, 9, 2, 100, 1):
        store.get(n, torch.zeros, n)
        assert store.held == sum(4 * size for size in store) <= store.bytes
        assert list(store.values) == list(store)
    store.clear()
    assert store.held == len(store.values) == 0
