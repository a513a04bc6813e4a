"""The acceptance run: ``python -m tests.zoo [--types A,B] [--modes M,N] [--ways W] [--write]``.

Every model type of the installed transformers that has an attention interface, each in a worker
process: a crash or a hang is a failure of that type alone. Answers are appended to a file as they
come (``--resume`` goes on where a run stopped); ``--write`` puts them into tests/zoo/results.jsonl,
of which docs/reference/models.md is made.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.zoo.chosen import CHOSEN
from tests.zoo.types import interface_types, own_types

__all__ = ["RESULTS", "main", "read"]

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.jsonl")
MOST_SECONDS = 600
ALL_WAYS = "attnkit,sdpa,npu-sdpa,npu-flash"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a file by type; "*" has the versions."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {record["type"]: record for line in lines if (record := json.loads(line))}


class Worker:
    """A process that answers one type at a time, and is begun anew after it fell."""

    def __init__(self, ways: str, modes: str) -> None:
        self.command = [sys.executable, "-m", "tests.zoo.worker", ways, modes]
        self.process: subprocess.Popen[str] | None = None

    def ask(self, model_type: str) -> dict[str, Any]:
        """Return the record of a type."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        hung = threading.Timer(MOST_SECONDS, process.kill)
        hung.start()
        try:
            process.stdin.write(model_type + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            late = not hung.is_alive()
            hung.cancel()
        if answer:
            return json.loads(answer)
        process.wait()
        self.process = None
        why = f"took more than {MOST_SECONDS} s" if late else f"exit code {process.returncode}"
        return {"type": model_type, "failed": why}

    def close(self) -> None:
        """End the process."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def sweep(types: list[str], workers: int, ways: str, modes: str, out: Path) -> list[dict[str, Any]]:
    """Ask workers about every type; append each answer to the file as it comes."""
    waiting: queue.Queue[str] = queue.Queue()
    for model_type in types:
        waiting.put(model_type)
    found: list[dict[str, Any]] = []
    lock = threading.Lock()
    out.parent.mkdir(exist_ok=True)

    def work() -> None:
        worker = Worker(ways, modes)
        while True:
            try:
                model_type = waiting.get_nowait()
            except queue.Empty:
                break
            record = worker.ask(model_type)
            with lock:
                found.append(record)
                print(f"[{len(found)}/{len(types)}] {line_of(record)}", flush=True)
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
        worker.close()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def line_of(record: dict[str, Any]) -> str:
    """Return a record in one line, with what is wrong."""
    name = record["type"]
    for key in ("failed", "not_built"):
        if key in record:
            return f"{name}: {key.replace('_', ' ')}: {record[key][:300]}"
    parts = [f"{name} ({record['kind']}, {record['seconds']} s)"]
    for way in ALL_WAYS.split(","):
        if way in record:
            modes = record[way]
            part = f"{way}: {len(modes['ok'])} ok"
            for text, which in modes.get("skipped", {}).items():
                part += f"\n    - {way} {','.join(which)}: skipped: {text}"
            for text, which in modes.get("wrong", {}).items():
                part += f"\n    ! {way} {','.join(which)}: {text}"
            parts.append(part)
    return "; ".join(parts)


def new_failures(known: dict[str, Any], records: dict[str, Any]) -> list[str]:
    """Return what went wrong with attnkit that the results on record do not tell."""
    found = []
    for name, record in records.items():
        old = known.get(name, {})
        for key in ("failed", "not_built"):
            if key in record and key not in old:
                found.append(f"{name}: {record[key]}")
        before = old.get("attnkit", {}).get("wrong", {})
        modes = {mode for which in before.values() for mode in which}
        for text, which in record.get("attnkit", {}).get("wrong", {}).items():
            if new := sorted(set(which) - modes):
                found.append(f"{name} {','.join(new)}: {text}")
    return found


def kept(known: dict[str, Any], records: dict[str, Any]) -> dict[str, Any]:
    """Return the results on record with the new ones; a way that did not run stays."""
    found = dict(known)
    for name, record in records.items():
        old = known.get(name, {})
        new = record if "not_built" in record else {**old, **record}
        new = {**new, "set": set_of(name)}
        if "calls" in record:
            new["calls"] = {**old.get("calls", {}), **record["calls"]}
        gone = {"seconds"} | ({"failed", "not_built"} - record.keys())
        found[name] = {key: value for key, value in new.items() if key not in gone}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {**found, "*": {"type": "*", **versions}}


def set_of(model_type: str) -> str:
    """Return by what a type attends: transformers' interface, its own code, or other types."""
    if model_type in interface_types():
        return "interface"
    return "own" if model_type in own_types() else "parts"


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default="", help="commas between; all by default")
    parser.add_argument("--modes", default="", help="commas between; those that apply by default")
    parser.add_argument("--ways", default="attnkit", help=f"of {ALL_WAYS}")
    parser.add_argument("--own", action="store_true", help="also types without an interface")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "zoo.jsonl")
    parser.add_argument("--chosen", action="store_true", help="the types of tests.zoo.chosen")
    parser.add_argument(
        "--strict", action="store_true", help="fail where the recorded results know no failure"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what --out has")
    parser.add_argument("--write", action="store_true", help="write tests/zoo/results.jsonl")
    given = parser.parse_args()
    types = given.types.split(",") if given.types else list(interface_types())
    types = list(CHOSEN) if given.chosen else types
    if given.own and not given.types:
        types += [t for t in (*own_types(), *CHOSEN) if t not in types]
    if not given.resume:
        given.out.unlink(missing_ok=True)
    done = read(given.out)
    began = time.perf_counter()
    sweep([t for t in types if t not in done], given.workers, given.ways, given.modes, given.out)
    records = read(given.out)
    print(f"{len(records)} types in {(time.perf_counter() - began) / 60:.1f} minutes")
    if given.strict and (worse := new_failures(read(RESULTS), records)):
        raise SystemExit("\n".join(["not so in tests/zoo/results.jsonl:", *worse]))
    if given.write:
        records = kept(read(RESULTS), records)
        lines = [json.dumps(records[name], sort_keys=True) for name in sorted(records)]
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
