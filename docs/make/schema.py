"""Write the page of the configuration's schema: ``python docs/make/schema.py``.

It writes docs/reference/config.md and the schemas beside it, as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import attnkit as ak

REFERENCE = Path(__file__).parents[1] / "reference"

HEAD = """\
# The configuration's schema

Every key of a configuration, its type and its default, as `model_json_schema()` has them; the
[guide](../guides/configuration.md) shows configurations at work. As JSON, for editors and other
tools: [attention.schema.json](attention.schema.json),
[multihead-attention.schema.json](multihead-attention.schema.json), or `attnkit schema attention`.

Masks and biases are mappings with a `kind`, or text: `{kind: sliding_window, size: 256}` and
`SlidingWindow(256)` are the same. A key without a default must be given.
"""

SCALING = "[scaling](#scalings-of-rotary-positions)"
MODELS = {"attention": ak.AttentionConfig, "multihead-attention": ak.MultiHeadAttentionConfig}


def write(folder: Path) -> None:
    """Write the page and the schemas into a folder."""
    schemas = {name: model.model_json_schema() for name, model in MODELS.items()}
    for name, schema in schemas.items():
        text = json.dumps(schema, indent=1) + "\n"
        (folder / f"{name}.schema.json").write_text(text, encoding="utf-8")
    (folder / "config.md").write_text(_page(schemas), encoding="utf-8")


def _page(schemas: dict[str, dict[str, Any]]) -> str:
    core, whole = schemas.values()
    more = {
        key: field
        for key, field in whole["properties"].items()
        if field != core["properties"].get(key)
    }
    kinds = whole["$defs"]
    parts = [
        HEAD,
        f"## {core['title']}\n\n{core['description']}\n\n{_table(core)}",
        f"## {whole['title']}\n\n{whole['description']} Its keys are those above, and\n\n"
        f"{_table({**whole, 'properties': more})}",
    ]
    (rotary,) = (one for one in whole["properties"]["rotary"]["anyOf"] if "properties" in one)
    parts.append(f"## {rotary['title']}\n\n{rotary['description']}\n\n{_table(rotary)}")
    titles = {"Masks": "Mask", "Biases": "Pse", "Scalings of rotary positions": "Scaling"}
    for title, union in titles.items():
        names = re.findall(r"#/\$defs/(\w+)", json.dumps(kinds[union]))
        entries = [_kind(name, kinds[name]) for name in sorted(set(names))]
        parts.append("\n".join([f"## {title}\n", *entries]))
    return "\n".join(parts)


def _kind(name: str, schema: dict[str, Any]) -> str:
    kind = _fields(schema)["kind"]["const"]
    first = schema.get("description", "").split("\n\n")[0].replace("\n", " ")
    table = _table(schema, without="kind")
    head = f"### `kind: {kind}` {{ #kind-{kind} }}\n\n`{name}`: {first}\n"
    return f"{head}\n{table}" if table else head


def _table(schema: dict[str, Any], without: str = "") -> str:
    fields = {key: field for key, field in _fields(schema).items() if key != without}
    if not fields:
        return ""
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for key, field in fields.items():
        required = key in schema.get("required", ())
        default = "" if required else f"`{json.dumps(field.get('default'))}`"
        note = field.get("description", "").replace("|", "\\|")
        rows.append(f"| `{key}` | {_type(field)} | {default} | {note} |")
    return "\n".join(rows) + "\n"


def _fields(schema: dict[str, Any]) -> dict[str, Any]:
    return schema.get("properties", {})  # type: ignore[no-any-return]


def _type(field: dict[str, Any]) -> str:
    """Return the type of a field in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return {"Mask": "[mask](#masks)", "Pse": "[bias](#biases)", "Scaling": SCALING}.get(
            name, f"`{name}`"
        )
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{one}`" for one in field["enum"])
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(dict.fromkeys(_type(one) for one in field[several]))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"list of {' and '.join(_type(one) for one in field['prefixItems'])}"
        return f"list of {_type(field['items'])}" if field.get("items") else "list"
    words = {
        "null": "none",
        "object": "[mapping](#rotary)" if field.get("title") == "Rotary" else "mapping",
    }
    return words.get(field.get("type", ""), field.get("type", "any")) + _bounds(field)


def _bounds(field: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    given = {sign: field[key] for key, sign in signs.items() if key in field}
    bounds = [f"{sign} {value}" for sign, value in given.items() if abs(value) < 2**30]
    return f" {', '.join(bounds)}" if bounds else ""


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else REFERENCE)
