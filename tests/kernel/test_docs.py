"""The generated reference page is the one in the tree."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

from attnkit.kernel import OP_VERSIONS, RULES

SCHEMAS = Path(__file__).parents[1] / "npu" / "releases" / "schemas"
DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "reference" / "kernel.md"


def render() -> str:
    """What the generator beside the page writes."""
    return str(runpy.run_path(str(DOCS / "make" / "kernel.py"))["render"]())


def test_the_page_is_current():
    """Regenerate it with `python docs/make/kernel.py` when this fails."""
    assert PAGE.read_text(encoding="utf-8") == render()


def test_the_page_lists_every_argument_of_every_release():
    """Those of the recorded schemas, spelled as the newest version of the op spells them."""
    known = {spelled: name for v in OP_VERSIONS.values() for name, spelled in v.spelling.items()}
    text = render()
    for path in SCHEMAS.glob("*.txt"):
        for line in path.read_text().splitlines():
            schema = torch._C.parse_schema(line)
            version = {v.op: v for v in OP_VERSIONS.values()}.get(schema.name[len("npu::") :])
            for argument in schema.arguments if version else ():
                name = known.get(argument.name, argument.name)
                assert name in (*version.arguments, *version.beyond), (path.stem, schema.name)
                assert f"| `{name}` |" in text, (path.stem, schema.name)


def test_the_page_holds_every_rule_and_output():
    text = render()
    for rule in RULES:
        assert f"| `{rule.code}` | {rule.layer} |" in text
    assert "| TND | float16 | float16 [10, 4, 6] | float32 [10, 4, 8] |" in text
