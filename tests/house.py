"""What the house is made of, counted: ``python -m tests.house``.

Lines of the package, caches, class names that mean two things, records around a kernel call, and
the files that four calls enter. The calls are those of docs/how-it-works/architecture.md.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from types import FrameType

import torch
from torch.distributed import HashStore

import attnkit as ak
from attnkit import masks
from attnkit.parallel import ContextParallel
from attnkit.parallel.guard import Guard
from tests.parallel.threads import Switchboard, ThreadWires

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attnkit"


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Yield every file of the package, by its name there."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))


def lines() -> int:
    """Return the lines of the package."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py"))


def caches() -> list[str]:
    """Return what is kept between calls: the table of CONTRIBUTING, which a test holds true."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(r"`([\w.]+)` \(\w+\)", page.partition("## State")[2])


def shared_names() -> dict[str, list[str]]:
    """Return the class names that two files give, and the files."""
    found = defaultdict(list)
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name.lstrip("_")].append(name)
    return {name: files for name, files in found.items() if len(files) > 1}


def records() -> list[str]:
    """Return the classes with a field that is a kernel call, or a record around one."""
    fields = {
        f"{name}:{node.name}": " ".join(
            ast.unparse(item.annotation) for item in node.body if isinstance(item, ast.AnnAssign)
        )
        for name, tree in trees()
        if name.startswith(("planner", "backends"))
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and _is_record(node)
    }
    known, found = {"KernelCall"}, []
    for _ in fields:
        pattern = re.compile(rf"\b({'|'.join(known)})\b")
        found = [name for name, text in fields.items() if pattern.search(text)]
        known |= {name.partition(":")[2] for name in found}
    return found


def _is_record(node: ast.ClassDef) -> bool:
    said = " ".join(map(ast.unparse, [*node.decorator_list, *node.bases]))
    return "dataclass" in said or "NamedTuple" in said


def entered(call: Callable[[], object]) -> list[str]:
    """Return the functions of the package that a call enters, ``file:function``, in order."""
    seen: dict[str, None] = {}

    def watch(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            seen[f"{path.relative_to(PACKAGE)}:{frame.f_code.co_name}"] = None

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(seen)


def paths() -> dict[str, Callable[[], object]]:
    """Return the four calls of docs/how-it-works/architecture.md."""
    x, y = torch.randn(1, 1024, 2, 16), torch.randn(1, 8192, 1, 16)
    window = ak.Attention(2, 16, mask=masks.Causal() & masks.SlidingWindow(128))
    sink = masks.Causal() & (masks.Columns(0, 4) | masks.SlidingWindow(64))
    fused = ak.Attention(1, 16, mask=sink, backend="emulated")
    text = "{num_heads: 2, head_dim: 16, mask: Causal() & SlidingWindow(128)}"
    return {
        "a causal window on the CPU": lambda: window(x, x, x),
        "a sink and a window on fused calls": lambda: fused(y, y, y),
        "a configuration to a layer": lambda: ak.AttentionConfig.from_yaml(text).build(),
        "a text on two processes": two_ranks,
    }


def two_ranks() -> None:
    """Train a layer on a text that two ranks share, which are threads; this one is the first."""
    board, store, x = Switchboard(2, 60.0), HashStore(), torch.randn(1, 64, 32)
    layer = ak.MultiHeadAttention(32, 2, mask=masks.Causal(), rotary=True)

    def rank(number: int) -> None:
        wires = ThreadWires(number, 2, board, None)
        wires.guard = Guard(store, number, 2)
        here = ContextParallel(wires, method="needed").shards(masks.Causal(), tokens=64)
        layer(here.take(x), shards=here).sum().backward()

    other = Thread(target=rank, args=(1,), daemon=True)
    other.start()
    rank(0)
    other.join(60.0)


def main() -> None:
    """Print the counts."""
    print(f"lines of the package: {lines():,}")
    kept = caches()
    print(f"caches: {len(kept)}\n  " + "\n  ".join(kept))
    shared = shared_names()
    print(f"class names with two meanings: {len(shared)}")
    print("".join(f"  {name}: {', '.join(files)}\n" for name, files in shared.items()), end="")
    around = records()
    print(f"records around a kernel call: {len(around)}\n  " + "\n  ".join(around))
    for name, call in paths().items():
        for what in ("first", "second"):
            functions = entered(call)
            files = {function.partition(":")[0] for function in functions}
            print(f"{name}, {what} call: {len(files)} files, {len(functions)} functions")


if __name__ == "__main__":
    main()
