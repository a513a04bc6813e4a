"""What each release of torch_npu runs, and how: the table in docs/guides/ascend.md.

python tests/npu/releases/table.py           prints it
python tests/npu/releases/table.py --write   puts it into docs/guides/ascend.md
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [] if __package__ else [str(Path(__file__).parents[3])]

from attnkit.backends import Ascend  # noqa: E402 -- found by the line above when run as a script
from attnkit.errors import Refusal  # noqa: E402
from attnkit.planner import Plan, Request  # noqa: E402
from tests.npu.compositions import CASES, Case  # noqa: E402
from tests.npu.releases.recorded import RELEASES, RecordedOps  # noqa: E402

__all__ = ["Outcome", "inserted", "outcome", "table"]

DOCUMENT = Path(__file__).parents[3] / "docs" / "guides" / "ascend.md"
BEGIN, END = "<!-- releases: begin -->", "<!-- releases: end -->"


@dataclass(frozen=True)
class Outcome:
    """A plan of the ascend backend on a release, or the reasons why there is none."""

    plan: Plan | None
    reasons: tuple[Refusal, ...] = ()

    @property
    def how(self) -> str:
        """The calls in words; equal calls are counted."""
        if self.plan is None:
            return "refused"
        labels = [step.label for step in self.plan.steps]
        counted = {label: labels.count(label) for label in labels}
        return " + ".join(f"{n} x {label}" if n > 1 else label for label, n in counted.items())


def outcome(case: Case, release: str) -> Outcome:
    """Return what the ascend backend would do for a case on a release."""
    backend, request = Ascend(RecordedOps(release), device="cpu"), _request(case)
    reasons = backend.refusals(request)
    return Outcome(None, tuple(reasons)) if reasons else Outcome(backend.plan(request))


def _request(case: Case) -> Request:
    return case.plan("reference").request


def table() -> str:
    """Return the table as Markdown: per composition the newest way, and who differs."""
    newest = RELEASES[-1]
    lines = [
        "| composition | on the newest release | " + " | ".join(RELEASES) + " |",
        "|---|---|" + "---|" * len(RELEASES),
    ]
    for case in CASES:
        outcomes = {release: outcome(case, release) for release in RELEASES}
        best = outcomes[newest].how
        cells = [_cell(found, best) for found in outcomes.values()]
        lines.append(f"| {case.name} | {best} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: Outcome, best: str) -> str:
    if found.plan is None:
        return "refused"
    return "yes" if found.how == best else found.how


def inserted(text: str) -> str:
    """Return the document with the table of today between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(inserted(DOCUMENT.read_text()))
    else:
        print(table())
