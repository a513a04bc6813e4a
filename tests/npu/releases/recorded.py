"""``torch.ops.npu`` of past releases, from their recorded schemas: nothing is installed.

A file in ``schemas`` holds what the dispatcher of that release prints for each attention op, as
its published wheel has it. A call is taken only as its schema spells it, and answered by the
emulator, with as many results as that release returns.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from attnkit.kernel import fusion_attention, fusion_attention_grad
from attnkit.kernel.block_sparse_op import EMULATED

__all__ = ["RELEASES", "WHEELS", "RecordedOps"]

SCHEMAS = Path(__file__).parent / "schemas"

WHEELS = {
    "7.0.0": ("2.5.1", "8.1.RC1"),
    "7.1.0": ("2.5.1.post1", "8.2.RC1"),
    "7.2.0": ("2.7.1", "8.3.RC1"),
    "7.3.0": ("2.7.1.post2", "8.5.0"),
    "26.1.0": ("2.12.0", "9.1.0"),
}
"""Per release, the torch_npu wheel that was read, and the CANN that belongs to it."""

RELEASES = tuple(WHEELS)


class RecordedOps:
    """The ops of one release; `calls` are the names of those that were called."""

    def __init__(self, release: str) -> None:
        self.calls: list[str] = []
        for line in (SCHEMAS / f"{release}.txt").read_text().splitlines():
            schema = torch._C.parse_schema(line)
            name = schema.name.removeprefix("npu::")
            setattr(self, name, _RecordedOp(name, schema, self.calls))


class _RecordedOp:
    def __init__(self, name: str, schema: Any, calls: list[str]) -> None:
        self.name, self.schema, self._calls = name, schema, calls
        self.default = SimpleNamespace(_schema=schema)

    def __call__(self, **arguments: Any) -> tuple[Any, ...]:
        self._calls.append(self.name)
        known = {argument.name for argument in self.schema.arguments}
        foreign = sorted(arguments.keys() - known)
        if foreign:
            raise RuntimeError(f"{self.name}() got unexpected keyword arguments {foreign}")
        if "block_sparse" in self.name:
            return tuple(getattr(EMULATED, self.name)(**arguments))
        given = {name.replace("tockens", "tokens"): value for name, value in arguments.items()}
        if "_grad" in self.name:
            results = fusion_attention_grad(scale=given.pop("scale_value", 1.0), **given)
            found = (*results[:4], *[None] * (len(self.schema.returns) - 5), results.sink)
        else:
            found = tuple(fusion_attention(**given))
        return found[: len(self.schema.returns)]
