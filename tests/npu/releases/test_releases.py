"""The ascend backend on the schemas of past releases: what it cannot say, it refuses."""

from __future__ import annotations

import pytest
import torch

import attnkit as ak
from attnkit.backends import Ascend, Operands
from tests.agreement import distance
from tests.npu.compare import run
from tests.npu.compositions import CASES, Case, by_name
from tests.npu.releases.recorded import RELEASES, RecordedOps
from tests.npu.releases.table import DOCUMENT, inserted, outcome

TABLE_IS_OLD = "docs/guides/ascend.md: python tests/npu/releases/table.py --write"


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs_right_or_says_why_not(case: Case, release: str):
    ops = RecordedOps(release)
    backend = Ascend(ops, device="cpu")
    request = case.plan("reference").request
    reasons = backend.refusals(request)
    if reasons:
        assert all(reason.code and reason.reason for reason in reasons)
    else:
        runs_right(case, ops, backend, backend.plan(request))


def runs_right(case: Case, ops: RecordedOps, backend: Ascend, plan: ak.Plan) -> None:
    exact = run(case, "reference", "cpu", torch.float64)
    given = case.tensors(torch.float32)
    bias = case.arguments("cpu", torch.float32)["pse"]
    leaves = {n: given[n].requires_grad_() for n in given if n != "grad"}
    query, key, value = (leaves[name] for name in ("query", "key", "value"))
    output = backend.run(plan, Operands(query, key, value, bias, leaves.get("sink"))).output
    output.backward(given["grad"])
    found = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    assert ops.calls
    for name, tensor in {"output": output.detach(), **found}.items():
        assert tensor is not None
        # float32 against float64: a few hundred roundings of numbers of this size.
        assert distance(tensor, exact[name]) < 1e-5 * (1 + exact[name].abs().max())


@pytest.mark.parametrize(
    ("name", "since"),
    [
        ("causal", "7.0.0"),
        ("packed causal", "7.0.0"),
        ("documents", "7.0.0"),
        ("ALiBi", "7.1.0"),
        ("square-root ALiBi", "7.1.0"),
        ("bias matrix before the scale", "7.0.0"),
    ],
)
def test_what_came_when(name: str, since: str):
    runs = [release for release in RELEASES if outcome(by_name(name), release).plan is not None]
    assert runs[0] == since
    assert runs == list(RELEASES[RELEASES.index(since) :])


def test_a_refusal_names_the_argument_and_the_way_out():
    case = by_name("ALiBi")
    reasons = outcome(case, "7.0.0").reasons
    assert any(reason.code == "op-version" for reason in reasons)
    assert "newer" in " ".join(reason.reason for reason in reasons)


def test_the_schemas_parse_and_grow():
    """A later release knows every argument of an earlier one."""
    known: dict[str, set[str]] = {}
    for release in RELEASES:
        for name, op in vars(RecordedOps(release)).items():
            if name == "calls":
                continue
            arguments = {argument.name for argument in op.schema.arguments}
            assert known.get(name, set()) <= arguments
            known[name] = arguments
    assert ak.kernel.OP_VERSIONS.keys() >= {"v1", "v2", "v3"}


def test_the_table_in_the_documentation_is_current():
    text = DOCUMENT.read_text()
    assert inserted(text) == text, TABLE_IS_OLD
