"""Write docs/reference/models.md: ``python docs/make/models.py``.

Every number is counted from tests/zoo/results.jsonl, which ``python -m tests.zoo --write`` records;
a test keeps the page current.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["render"]

_DOCS = Path(__file__).parents[1]
RESULTS = _DOCS.parent / "tests" / "zoo" / "results.jsonl"
Record = dict[str, Any]

WAYS = {
    "attnkit": "attnkit",
    "sdpa": "`sdpa`",
    "npu-sdpa": "`sdpa` as on an NPU",
    "npu-flash": "flash path of an NPU",
}
MODES = {
    "plain": "a batch without padding",
    "right": "padding on the right",
    "left": "padding on the left",
    "holes": "padding in the middle",
    "long": "64 tokens, twice, padded in two ways",
    "packed": "documents told apart by `position_ids`",
    "custom4d": "a random additive mask of four axes",
    "decode": "a cache, token by token",
    "chunked": "a cache, in pieces",
    "static": "a cache of fixed size",
    "seq2seq_right": "an encoder behind padding",
    "seq2seq_decode": "the decoder token by token",
    "generate": "greedy `generate`, tokens and logits",
    "generate_static": "the same with a cache of fixed size",
    "grads": "every gradient",
    "checkpoint": "the same with checkpointing",
    "bf16": "bfloat16",
    "dropout": "dropout of the weights: acts, repeats",
    "image": "text with pictures or sounds",
    "image_grads": "its gradients",
}
KINDS = ("decoder", "encoder", "seq2seq", "vision", "audio", "other")

_INTRO = """\
# Models of transformers

What attnkit computes for every model type of transformers {transformers} (torch {torch}) that has
an attention interface, against transformers' own eager attention, on a CPU. This page is generated
by `python docs/make/models.py` from tests/zoo/results.jsonl; edit neither by hand.

Each type is built with random weights and tiny sizes and switched by
`attnkit.interop.transformers.enable(model)`. A check is right when every output differs from
eager's by at most 2e-5 of its largest number, every gradient by 2e-4, greedy tokens not at all
(bfloat16: the median error is at most twice eager's own), and when every module that calls the
interface under eager attention calls attnkit: a model that never calls is no pass. Rows of padding
and rows without a key are not compared. Where eager itself fails, has no finite result or moves
when its attention is rounded in another way, the check is skipped and says so.

```bash
python -m tests.zoo --types mistral,gpt_oss      # some types, every mode that applies
python -m tests.zoo --ways attnkit,sdpa,npu-sdpa,npu-flash --write      # all, on record
make test-models                                 # the types of tests/zoo/chosen.py
```
"""

_NPU = """\
`sdpa` is transformers' call of torch's fused attention. The two ways of an NPU are transformers'
own code for it: `sdpa` with its NPU branch switched on, which turns every additive mask into
"is it zero", and its flash path run on attnkit's emulator of the kernel (checks of devices left
out, what a model declares respected), which hands window, sink and soft-cap to a function that
takes any keyword and uses none. "Wrong" is a result that differs without a word.
"""


def records() -> tuple[dict[str, Record], Record]:
    """Return the records by type, and the versions."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    found = {record["type"]: record for record in map(json.loads, lines)}
    return found, found.pop("*")


def verdict(record: Record, way: str, modes: Iterable[str] = MODES) -> str | None:
    """Return right, wrong, raises, skipped, or None where the way did not run."""
    found = record.get(way)
    if found is None:
        return None
    modes = set(modes)
    said = [t for t, which in found.get("wrong", {}).items() if modes & set(which)]
    if any(text.startswith("differs") for text in said):
        return "wrong"
    if said:
        return "raises"
    return "right" if modes & set(found["ok"]) else "skipped"


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def summary(found: dict[str, Record]) -> list[str]:
    """Return how many types each way has right, in a plain batch and in every mode."""
    rows = []
    for way, name in WAYS.items():
        for label, modes in (("every mode", MODES), ("`plain` only", ("plain",))):
            count = Counter(v for r in found.values() if (v := verdict(r, way, modes)))
            if not count:
                continue
            rows.append([name, label, *(str(count[v]) for v in ("right", "wrong", "raises"))])
    built = sum("not_built" not in r and "failed" not in r for r in found.values())
    head = ["way", "asked of it", "types right", "wrong without a word", "raise or never call"]
    text = f"{len(found)} model types, of which {built} are built and run here."
    return ["## All in one table", "", text, "", *table(head, rows), "", _NPU]


def by_mode(found: dict[str, Record], way: str) -> list[str]:
    """Return right of all that apply, per mode and kind."""
    rows = []
    for mode, what in MODES.items():
        cells = []
        for kind in (*KINDS, None):
            count = Counter(
                v
                for r in found.values()
                if kind in (None, r.get("kind")) and (v := verdict(r, way, (mode,)))
            )
            ran = count["right"] + count["wrong"] + count["raises"]
            cells.append(f"{count['right']}/{ran}" if ran else "")
        rows.append([f"`{mode}`", what, *cells])
    return table(["mode", "what", *KINDS, "all"], rows)


def beside(found: dict[str, Record]) -> list[str]:
    """Return right, wrong and raising types per mode, for each way."""
    rows = []
    for mode in MODES:
        cells = []
        for way in WAYS:
            count = Counter(v for r in found.values() if (v := verdict(r, way, (mode,))))
            said = [str(count["right"]), str(count["wrong"]), str(count["raises"])]
            cells.append(" / ".join(said) if any(count.values()) else "")
        rows.append([f"`{mode}`", *cells])
    return table(["mode", *WAYS.values()], rows)


def silent(found: dict[str, Record]) -> list[str]:
    """Return which types the other ways compute wrongly in a plain batch."""
    lines = []
    for way, name in list(WAYS.items())[1:]:
        plain = sorted(n for n, r in found.items() if verdict(r, way, ("plain",)) == "wrong")
        if plain:
            lines += [f"Wrong in a plain batch by the {name}: {', '.join(plain)}.", ""]
    return lines


def plans(found: dict[str, Record]) -> list[str]:
    """Return how the requests of every type lower onto the fused kernel."""
    rows, refused = [], defaultdict(set)
    for kind in ("inference", "training"):
        count: Counter[str] = Counter()
        for name, record in found.items():
            outcomes = record.get("plans", {}).get(kind)
            if not outcomes:
                continue
            bad = [o for o in outcomes if not o.isdigit()]
            for outcome in bad:
                refused[outcome, kind].add(name)
            most = max((int(o) for o in outcomes if o.isdigit()), default=0)
            count["refused" if bad else "one" if most <= 1 else "several"] += 1
        rows.append([kind, *(str(count[c]) for c in ("one", "several", "refused"))])
    lines = [
        "## Plans for Ascend",
        "",
        "Every request that these runs put to the planner, planned again in bfloat16 on meta",
        "tensors for the emulated kernel. A type counts by its worst request.",
        "",
        *table(["", "one fused call", "several calls", "a request refused"], rows),
        "",
    ]
    for (outcome, kind), names in sorted(refused.items()):
        lines += [f"{outcome}, {kind} ({len(names)}): {', '.join(sorted(names))}.", ""]
    return lines


def named(found: dict[str, Record]) -> list[str]:
    """Return every type that is not right, with the reason, and what was skipped."""
    lines = ["## What is not right, and why", ""]
    missing = {n: r.get("not_built") or r.get("failed") for n, r in found.items()}
    rows = [[f"`{n}`", cell(why)] for n, why in sorted(missing.items()) if why]
    lines += ["Not built or not run here:", "", *table(["type", "reason"], rows), ""]
    rows = [
        [f"`{name}`", ", ".join(f"`{m}`" for m in which), cell(text)]
        for name, record in sorted(found.items())
        for text, which in record.get("attnkit", {}).get("wrong", {}).items()
    ]
    if rows:
        lines += ["With attnkit:", "", *table(["type", "modes", "what"], rows), ""]
    skipped: dict[str, set[str]] = defaultdict(set)
    checks: Counter[str] = Counter()
    for name, record in found.items():
        for text, which in record.get("attnkit", {}).get("skipped", {}).items():
            reason = text if text.startswith("eager itself") else text.partition(":")[0]
            skipped[reason].add(name)
            checks[reason] += len(which)
    rows = [[cell(r), str(checks[r]), str(len(skipped[r]))] for r in sorted(skipped)]
    return [*lines, "Skipped checks:", "", *table(["reason", "checks", "types"], rows), ""]


def cell(text: str) -> str:
    """Return a text that stands in a table."""
    return " ".join(text.split()).replace("|", "\\|")[:200]


def each(found: dict[str, Record]) -> list[str]:
    """Return a row per type: checks right of those that ran, by way, and calls in a plain batch."""
    rows = []
    for name, record in sorted(found.items()):
        if "kind" not in record:
            continue
        cells = []
        for way in WAYS:
            if (modes := record.get(way)) is None:
                cells.append("")
                continue
            wrong = sum(map(len, modes.get("wrong", {}).values()))
            cells.append(f"{len(modes['ok'])}/{len(modes['ok']) + wrong}")
        calls = record.get("calls", {}).get("plain", "")
        rows.append([f"`{name}`", record["kind"], f"`{record['class']}`", *cells, str(calls)])
    head = ["type", "kind", "class", *WAYS.values(), "calls"]
    text = "Checks right of those that ran; calls of the interface in a plain batch."
    return ["## Type by type", "", text, "", *table(head, rows), ""]


def beyond(others: dict[str, Record]) -> list[str]:
    """Return what came of the types that have no interface of their own."""
    texts = {
        "own": "Attention written by hand, lifted by `enable`; transformers has no way for it.",
        "parts": "Types made of others, those that `make test-models` runs.",
    }
    lines = ["## Types without an interface of their own", ""]
    for kind, text in texts.items():
        chosen = {n: r for n, r in others.items() if r.get("set") == kind}
        if not chosen:
            continue
        count = Counter(verdict(r, "attnkit") or "not built" for r in chosen.values())
        told = ", ".join(f"{number} {what}" for what, number in count.most_common())
        lines += [text, "", f"{len(chosen)} types: {told}.", ""]
    return lines


def render() -> str:
    """Return the page."""
    every, versions = records()
    found = {name: r for name, r in every.items() if r.get("set") == "interface"}
    others = {name: r for name, r in every.items() if name not in found}
    lines = [_INTRO.format(**versions), *summary(found)]
    lines += [
        "## attnkit, by mode and kind",
        "",
        "Types right of those to which a mode applies.",
        "",
    ]
    lines += [*by_mode(found, "attnkit"), ""]
    lines += [
        "## Ways side by side",
        "",
        "Types right / wrong without a word / raising, by mode.",
        "",
    ]
    lines += [*beside(found), "", *silent(found), *plans(found)]
    lines += [*beyond(others), *named(every), *each(every)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (_DOCS / "reference" / "models.md").write_text(render(), encoding="utf-8")
