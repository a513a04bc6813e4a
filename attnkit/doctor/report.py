"""The report: one JSON file with everything, valid at every moment, and its summary in words."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_json

from attnkit.doctor.findings import Machine, backends_of
from attnkit.doctor.screen import UsageError, table
from attnkit.doctor.suite import Result
from attnkit.doctor.timing import Fit, Timing

__all__ = ["Report", "told_findings", "told_summary"]

_MOST_REASONS = 3


@dataclass
class Report:
    """What the doctor has found so far; `status` is "running" until it says otherwise.

    `out` is the file that it goes to, if any.
    """

    machine: Machine
    level: str
    started: str
    expected: int
    out: Path | None
    findings: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    fit: Fit | None = None
    status: Literal["running", "complete", "interrupted", "broken"] = "running"

    @property
    def counts(self) -> dict[str, int]:
        """How many results have each status."""
        found = Counter(result.status for result in self.results)
        return {status: found[status] for status in ("passed", "failed", "error", "refused")}

    @property
    def failures(self) -> list[Result]:
        """The results that make the run fail."""
        return [r for r in self.results if r.status in ("failed", "error")]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        emulated = "emulated" in self.machine.backends
        note = "timings of an emulator; no weights follow" if emulated else ""
        return {
            "format": 1,  # the version of these keys
            "report": "attnkit doctor",
            "status": self.status,
            "target": self.machine.label,
            "hardware": self.machine.is_hardware,
            "backend": ", ".join(self.machine.backends),
            "device": self.machine.device,
            "level": self.level,
            "started": self.started,
            "findings": self.findings,
            "summary": {"expected": self.expected, **self.counts},
            "cases": [result.to_dict() for result in self.results],
            "timings": {
                "target": self.machine.label,
                "note": note,
                "unit": "ns, median of a forward pass",
                "rows": self.timings,
            },
            "weights": self.fit,
        }

    def text(self) -> str:
        """Return the report as JSON, which has no word for infinity or NaN: they are text."""
        return to_json(self.to_dict(), indent=1, inf_nan_mode="strings").decode()

    def save(self) -> None:
        """Write the report; a reader sees the old file or the new one, never half of one."""
        if self.out is None:
            return
        try:
            draft = self.out.with_name(f"{self.out.name}.part")
            try:
                draft.write_text(f"{self.text()}\n", encoding="utf-8")
                os.replace(draft, self.out)
            finally:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)  # a full disk does not need half a report
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL, or without a name
            reason = error.strerror if isinstance(error, OSError) else None
            raise UsageError(f"--out {self.out}: {reason or error}") from None


def told_findings(report: Report) -> Iterator[str]:
    """Yield the lines about what was found."""
    yield f"attnkit doctor: {report.machine.label}"
    for label, text in _findings(report.findings):
        yield f"  {label:<24} {text}"


def _findings(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("attnkit", "python", "torch", "cuda", "torch_npu", "cann", "npu"):
        yield name, str(found[name] or "not found")
    for device in found["devices"]:
        yield device["device"], device["name"]
    for op, arguments in found["ops"].items():
        told = "not installed" if arguments is None else f"{len(arguments)} arguments"
        special = [a for a in ("pse_type", "sink", "softmax_layout") if a in (arguments or ())]
        yield f"op {op}", told + (f", with {', '.join(special)}" if special else "")
    for name, refusals in found["backends"].items():
        reasons = "; ".join(dict.fromkeys(r["reason"] for r in refusals))
        yield f"backend {name}", f"refuses: {reasons}" if refusals else "ready"


def told_summary(report: Report) -> Iterator[str]:
    """Yield the lines of the whole report."""
    label = report.machine.label
    if report.results:
        yield f"conformance, on {label}:"
        rows = _groups(report.results, several=len(report.machine.backends) > 1)
        yield from table(("cases", "passed", "failed", "refused"), rows)
    if report.timings:
        yield f"forward pass, on {label}:"
        titles = ("composition", "plan, us", "dense mask", "torch SDPA")
        yield from table(titles, map(_times, report.timings))
    if report.fit is not None:
        yield from _fitted(report.fit)
    yield from _refusals(report.results)
    for result in report.failures:
        yield from _failure(result, report.machine)
    counts = report.counts
    yield (
        f"{report.status}: {counts['passed']} passed, {len(report.failures)} failed, "
        f"{counts['refused']} refused of {report.expected} cases on {label}"
    )
    if report.out is not None:
        yield f"report: {report.out}"


def _fitted(fit: Fit) -> Iterator[str]:
    weights = ", ".join(f"{name} {value:.4g}" for name, value in fit.weights.items())
    yield f"fitted weights: {weights}"
    kept = f"; not told by them: {', '.join(fit.kept)}" if fit.kept else ""
    yield (
        f"  they explain {fit.samples} times to {100 * fit.median_error:.0f} % (median), "
        f"{100 * fit.worst_error:.0f} % (worst){kept}"
    )


def _failure(result: Result, machine: Machine) -> Iterator[str]:
    on = f" on {result.backend}" if len(machine.backends) > 1 else ""
    yield f"{result.status.upper()} {result.name}{on}"
    yield f"  composition: {result.composition}"
    for call in result.calls[:_MOST_REASONS]:
        yield f"  call: {call}"
    for check in result.failures:
        yield f"  {check}"
    for reason in result.reasons[:_MOST_REASONS]:
        yield f"  {reason}"
    name = shlex.quote(result.name)
    named = backends_of(machine.device) != (result.backend,)
    backend = f" --backend {shlex.quote(result.backend)}" if named else ""
    yield f"  rerun: python -m attnkit doctor --device {machine.device}{backend} --only {name}"


def _refusals(results: Sequence[Result]) -> Iterator[str]:
    """Yield a line per reason for which cases were refused."""
    cases: dict[str, list[str]] = {}
    for result in results:
        if result.status == "refused":
            cases.setdefault(result.reasons[0], []).append(result.name)
    for reason, names in cases.items():
        more = f" and {len(names) - _MOST_REASONS} more" if len(names) > _MOST_REASONS else ""
        yield f"refused {', '.join(names[:_MOST_REASONS])}{more}: {reason}"


def _groups(results: Sequence[Result], several: bool) -> Iterator[tuple[str, ...]]:
    """Yield a row per group of cases and, where there are several, backend, with its counts."""
    places = list(dict.fromkeys(result.backend for result in results))
    rows = dict.fromkeys((result.backend, result.group) for result in results)
    for own in sorted(rows, key=lambda row: places.index(row[0])):
        found = Counter(r.status for r in results if (r.backend, r.group) == own)
        counts = found["passed"], found["failed"] + found["error"], found["refused"]
        yield ", ".join(own if several else own[1:]), *map(str, counts)


def _times(timing: Timing) -> tuple[str, ...]:
    """Return the row of microseconds of the plan, and the others' times as ratios."""
    if not timing.plan:
        return timing.name, "-", "-", "-"
    ratios = (
        "-" if other is None else f"{other / timing.plan:.2f}x"
        for other in (timing.dense, timing.sdpa)
    )
    return timing.name, f"{timing.plan / 1000:,.0f}", *ratios
