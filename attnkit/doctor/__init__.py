"""The doctor: what a machine has, and whether its kernel computes what attnkit expects of it.

`run_suite` runs the conformance cases from a program; ``python -m attnkit doctor`` does that
and the rest.
"""

from attnkit.doctor.cases import CASES, Case
from attnkit.doctor.compare import Check
from attnkit.doctor.suite import DTYPES, Result, run_case, run_suite

__all__ = ["CASES", "DTYPES", "Case", "Check", "Result", "run_case", "run_suite"]
