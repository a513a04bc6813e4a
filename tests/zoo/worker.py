"""A worker: reads a model type per line, writes a JSON line about it.

``python -m tests.zoo.worker WAYS MODES``. It runs in a process of its own, so that a crash or a
hang of one type costs that type alone.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from typing import Any

import torch
import transformers

from tests.zoo.build import NotBuilt, case_of
from tests.zoo.check import UNSTEADY, Eager, checked
from tests.zoo.plans import Plans

__all__ = ["about", "main"]


def about(model_type: str, ways: list[str], modes: list[str] | None) -> dict[str, Any]:
    """Return the record of one type: its kind, and per way what each mode gave."""
    began = time.perf_counter()
    found: dict[str, Any] = {"type": model_type}
    try:
        case = case_of(model_type)
    except NotBuilt as error:
        return {**found, "not_built": str(error)}
    source = sys.modules[type(case.model).__module__].__name__
    found |= {
        "kind": case.kind,
        "file": source.rpartition(".")[2].removeprefix("modeling_"),
        "class": type(case.model).__name__,
        "inputs": sorted(case.inputs),
        "media": sorted(case.media or {}),
    }
    eager = Eager(case)
    answers = {}
    for way in ways:
        with Plans() as plans:
            answers[way] = checked(eager, way, modes)
        if way == "attnkit":
            found["plans"] = plans.record()
    with_other_weights(model_type, answers)
    found |= {way: short(answer) for way, answer in answers.items()}
    found["calls"] = eager.calls()
    found["seconds"] = round(time.perf_counter() - began, 1)
    return found


def with_other_weights(model_type: str, answers: dict[str, dict[str, str]]) -> None:
    """Repeat with other weights what eager was no yardstick for; at most three times."""
    for seed in (2, 3, 4):
        again = {
            way: [mode for mode, text in answer.items() if text.endswith(UNSTEADY)]
            for way, answer in answers.items()
        }
        if not any(again.values()):
            return
        eager = Eager(case_of(model_type, seed))
        for way, modes in again.items():
            if modes:
                answers[way] |= checked(eager, way, modes)


def short(modes: dict[str, str]) -> dict[str, Any]:
    """Return the modes that went well as one list, and the others by their reasons."""
    found: dict[str, Any] = {"ok": [mode for mode, text in modes.items() if text == "ok"]}
    for mode, text in modes.items():
        if text != "ok":
            kind = "skipped" if text.startswith("skipped: ") else "wrong"
            text = text.removeprefix("skipped: ")[:160]
            found.setdefault(kind, {}).setdefault(text, []).append(mode)
    return found


def main() -> None:
    """Answer line by line."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    ways = sys.argv[1].split(",")
    modes = sys.argv[2].split(",") if len(sys.argv) > 2 and sys.argv[2] else None
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a model prints is no answer
    for line in sys.stdin:
        model_type = line.strip()
        try:
            answer = about(model_type, ways, modes)
        except Exception as error:
            answer = {"type": model_type, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
        # Where things are installed is nobody's business.
        answers.write(re.sub(r"(?:/[\w.-]+)*/site-packages/", "", json.dumps(answer)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
