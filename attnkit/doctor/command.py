"""``python -m attnkit doctor``: look, test, time, fit, and write one report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from attnkit.doctor import report as reports
from attnkit.doctor.cases import CASES, Case
from attnkit.doctor.findings import find_machine, findings
from attnkit.doctor.fit import fit_weights, samples_of
from attnkit.doctor.report import Report
from attnkit.doctor.screen import FAILED, GOOD, INTERRUPTED, Screen, UsageError
from attnkit.doctor.suite import DTYPES, run_case
from attnkit.doctor.timing import make_timing_cases, time_case
from attnkit.errors import shown
from attnkit.registry import closest

__all__ = ["add_arguments", "run"]

DEFAULT_FILE = "attnkit-doctor.json"
_LONGEST_NAME = 1_000
Job = tuple[Case, torch.dtype]


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
        "--quick", action="store_true", help="small cases, float32 only (default without an NPU)"
    )
    level.add_argument(
        "--full", action="store_true", help="all cases in all dtypes (default on an NPU)"
    )
    parser.add_argument(
        "--device", default="auto", metavar="DEV",
        help="npu, npu:1: that device or exit code 3; cpu, cuda: the emulator there; "
        "default: an NPU if there is one",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", metavar="NAME", default=[],
        help="just the cases of this name, or NAME@DTYPE; * stands for anything; repeatable",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the cases and leave")


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Run the command and return its exit code."""
    if arguments.list:
        for case in CASES:
            screen.line(f"{case.name:<24} {case.composition}")
        return GOOD
    machine = find_machine(arguments.device)
    quick = arguments.quick or not (arguments.full or machine.is_hardware)
    jobs = _jobs(quick, arguments.only)
    out = arguments.out or (None if arguments.json else Path(DEFAULT_FILE))
    level = "selected" if arguments.only else "quick" if quick else "full"
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report = Report(machine, level, started, len(jobs), out)
    report.save()  # a file that cannot be written is known now, not in an hour
    screen.quiet = arguments.json
    threads = torch.get_num_threads()
    try:
        if not machine.is_hardware:
            torch.set_num_threads(1)  # tensors so small that several threads only wait
        _examine(report, jobs, screen)
        if not arguments.only:
            _time(report, list(make_timing_cases(machine, quick)), screen)
        report.status = "complete"
    except KeyboardInterrupt:
        report.status = "interrupted"
    except BaseException:
        report.status = "broken"  # a defect of the doctor itself; what it found until then stays
        raise
    finally:
        torch.set_num_threads(threads)
        report.save()
    if arguments.json:
        screen.data(report.text())
    _summarise(report, screen)
    if report.status == "interrupted":
        return INTERRUPTED
    return FAILED if report.failures else GOOD


def _jobs(quick: bool, only: Sequence[str]) -> list[Job]:
    """Return what to run: the level's cases, or those whose names are given."""
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
    if not only:
        every = DTYPES[:1] if quick else DTYPES
        return [(case, d) for case in CASES if case.quick or not quick for d in every]
    jobs = []
    for wanted in only:
        name, _, dtype = wanted.partition("@")
        # A pattern of a megabyte matches nothing, and is long in being read.
        known = CASES if len(name) <= _LONGEST_NAME else ()
        found = [case for case in known if fnmatchcase(case.name, name)]
        if not found:
            close = closest(name, [case.name for case in CASES])
            hint = "" if close is None else f"did you mean {close!r}? "
            raise UsageError(
                f"--only {shown(wanted)}: no case has this name; {hint}--list shows them"
            )
        if dtype and dtype not in names.values():
            raise UsageError(f"--only {wanted}: the dtype is one of {', '.join(names.values())}")
        dtypes = tuple(d for d in DTYPES if names[d] == dtype) or DTYPES
        jobs += [(case, d) for case in found for d in dtypes]
    return jobs


def _examine(report: Report, jobs: list[Job], screen: Screen) -> None:
    """Run the cases; whoever interrupts this keeps what is in the report."""
    machine = report.machine
    screen.line(f"attnkit doctor: {machine.label}")
    report.findings = findings(machine)
    for label, text in reports.told_findings(report.findings):
        screen.line(f"  {label:<24} {text}")
    with screen.progress("conformance", len(jobs)) as advance:
        for case, dtype in jobs:
            result = run_case(case, backend=machine.backend, device=machine.device, dtype=dtype)
            report.results.append(result)
            advance(result.name)
            report.save()  # a device that takes the process down leaves this much


def _time(report: Report, cases: list[Case], screen: Screen) -> None:
    with screen.progress("timing", len(cases)) as advance:
        for case in cases:
            report.timings.append(time_case(case, report.machine))
            advance(case.name)
            report.save()
    if report.machine.is_hardware:
        report.fit = fit_weights(samples_of(report.timings))


def _summarise(report: Report, screen: Screen) -> None:
    if report.results:
        screen.line(f"conformance, on {report.machine.label}:")
        screen.table(("cases", "passed", "failed", "refused"), report.rows())
    if report.timings:
        screen.line(f"forward pass, on {report.machine.label}:")
        titles = ("composition", "plan, us", "dense mask", "torch SDPA")
        screen.table(titles, report.timing_rows())
    if report.fit is not None:
        weights = ", ".join(f"{name} {value:.4g}" for name, value in report.fit.weights.items())
        screen.line(f"fitted weights: {weights}")
        screen.line(
            f"  they explain {report.fit.samples} times to {100 * report.fit.median_error:.0f} % "
            f"(median), {100 * report.fit.worst_error:.0f} % (worst)"
            + (f"; not told by them: {', '.join(report.fit.kept)}" if report.fit.kept else "")
        )
    for text in reports.told_refusals(report.results):
        screen.line(text)
    for result in report.failures:
        for text in reports.told_failure(result, report.machine):
            screen.line(text)
    counts = report.counts
    failed = counts["failed"] + counts["error"]
    screen.line(
        f"{report.status}: {counts['passed']} passed, {failed} failed, {counts['refused']} "
        f"refused of {report.expected} cases on {report.machine.label}"
    )
    if report.out is not None:
        screen.line(f"report: {report.out}")
