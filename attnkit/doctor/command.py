"""``python -m attnkit doctor``: look, test, time, fit, and write one report."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from attnkit.doctor.cases import CASES, OTHER_CASES, Case, cases_of
from attnkit.doctor.findings import find_machine, findings
from attnkit.doctor.report import Report, told_findings, told_summary
from attnkit.doctor.screen import FAILED, GOOD, INTERRUPTED, Screen, UsageError
from attnkit.doctor.suite import DTYPES, run_case
from attnkit.doctor.timing import fit_weights, make_timing_cases, samples_of, time_case
from attnkit.errors import shown
from attnkit.progress import progress
from attnkit.registry import closest

__all__ = ["add_arguments", "run"]

DEFAULT_FILE = "attnkit-doctor.json"
_LONGEST_NAME = 1_000
Job = tuple[str, Case, torch.dtype]
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON, and nothing else"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path,
        help=f"where the report goes (default {DEFAULT_FILE}; with --json no file)",
    )  # fmt: skip
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--quick", action="store_true", help="small cases, float32 only (default on the CPU)"
    )
    level.add_argument(
        "--full", action="store_true", help="all cases in all dtypes (default on an NPU or GPU)"
    )
    parser.add_argument(
        "--device", default="auto", metavar="DEV",
        help="npu, npu:1, cuda, cuda:1: that device or exit code 3; cpu: the emulator there; "
        "default: an NPU if there is one, else cpu",
    )  # fmt: skip
    parser.add_argument(
        "--backend", action="append", metavar="NAME", default=[],
        help="what is tested there; repeatable; default: ascend on an NPU, cuda, flex, tiled and "
        "reference on a GPU, emulated on the CPU",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", metavar="NAME", default=[],
        help="just the cases of this name, or NAME@DTYPE; * stands for anything; repeatable",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the cases and leave")


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Run the command and return its exit code."""
    if arguments.list:
        for case in (*CASES, *OTHER_CASES):
            screen.line(f"{case.name:<24} {case.composition}")
        return GOOD
    machine = find_machine(arguments.device, arguments.backend)
    quick = arguments.quick or not (arguments.full or machine.is_hardware)
    jobs = _jobs(machine.backends, quick, arguments.only)
    out = arguments.out or (None if arguments.json else Path(DEFAULT_FILE))
    level = "selected" if arguments.only else "quick" if quick else "full"
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report = Report(machine, level, started, len(jobs), out)
    report.save()  # a file that cannot be written is known now, not in an hour
    threads = torch.get_num_threads()
    try:
        if not machine.is_hardware:
            torch.set_num_threads(1)  # tensors so small that several threads only wait
        report.findings = findings(machine)
        for text in () if arguments.json else told_findings(report):
            screen.line(text)
        _examine(report, jobs, screen)
        if not arguments.only:
            _time(report, make_timing_cases(machine, quick), screen)
        report.status = "complete"
    except KeyboardInterrupt:
        report.status = "interrupted"
    except BaseException:
        report.status = "broken"  # a defect of the doctor itself; what it found until then stays
        raise
    finally:
        torch.set_num_threads(threads)
        report.save()
    for text in [report.text()] if arguments.json else told_summary(report):
        screen.line(text)
    if report.status == "interrupted":
        return INTERRUPTED
    return FAILED if report.failures else GOOD


def _jobs(backends: Sequence[str], quick: bool, only: Sequence[str]) -> dict[str, Job]:
    """Return what to run, by name: the level's cases, or those whose names are given."""
    patterns = [_pattern(wanted) for wanted in only]

    def chosen(backend: str, case: Case, dtype: torch.dtype, name: str) -> bool:
        if only:
            return any(fnmatchcase(name, pattern) for pattern in patterns)
        return case in cases_of(backend) and (not quick or (case.quick and dtype == DTYPES[0]))

    # Backends innermost: two that compile the same kernel have it while it is still kept.
    return {
        name if len(backends) == 1 else f"{name} {backend}": (backend, case, dtype)
        for case in (*CASES, *OTHER_CASES)
        for told, dtype in _DTYPES.items()
        for name in (f"{case.name}@{told}",)
        for backend in backends
        if chosen(backend, case, dtype, name)
    }


def _pattern(wanted: str) -> str:
    """Return the pattern of names ``CASE@DTYPE`` that is wanted; one that fits nothing is told."""
    name, _, dtype = wanted.partition("@")
    # A pattern of a megabyte matches nothing, and is long in being read.
    known = [case.name for case in (*CASES, *OTHER_CASES)] if len(name) <= _LONGEST_NAME else []
    if not any(fnmatchcase(one, name) for one in known):
        close = closest(name, known)
        hint = "" if close is None else f"did you mean {close!r}? "
        raise UsageError(f"--only {shown(wanted)}: no case has this name; {hint}--list shows them")
    if dtype and dtype not in _DTYPES:
        raise UsageError(f"--only {wanted}: the dtype is one of {', '.join(_DTYPES)}")
    return f"{name}@{dtype or '*'}"


def _examine(report: Report, jobs: Mapping[str, Job], screen: Screen) -> None:
    """Run the cases; whoever interrupts this keeps what is in the report."""
    machine = report.machine
    with progress("conformance", len(jobs), screen.err) as bar:
        for name, (backend, case, dtype) in jobs.items():
            result = run_case(case, backend=backend, device=machine.device, dtype=dtype)
            report.results.append(result)
            report.save()  # a device that takes the process down leaves this much
            bar.step(name)


def _time(report: Report, cases: Iterable[Case], screen: Screen) -> None:
    timed = list(cases)
    with progress("timing", len(timed), screen.err) as bar:
        for case in timed:
            report.timings.append(time_case(case, report.machine))
            report.save()
            bar.step(case.name)
    if "ascend" in report.machine.backends:
        report.fit = fit_weights(samples_of(report.timings))
