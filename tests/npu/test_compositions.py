"""Every composition through torch_npu: output, statistics and gradients are the reference's."""

from __future__ import annotations

import pytest

from tests.npu.compare import check
from tests.npu.compositions import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case):
    check(case)
