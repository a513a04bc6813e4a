"""Every code that is given has a meaning and a remedy, and every remedy a code."""

from __future__ import annotations

import ast

import pytest
import torch

import attnkit as ak
from attnkit.errors import reasons_told
from attnkit.kernel import RULES
from attnkit.remedies import KINDS, REMEDIES
from docs.make.refusals import codes_in, given, render
from tests.docs.pages import DOCS


def test_every_code_has_a_remedy_and_every_remedy_a_code() -> None:
    codes = set(given())
    assert len(codes) > 200
    assert codes - set(REMEDIES) == set()
    assert set(REMEDIES) - codes == set()


def test_a_code_is_found_however_it_is_written() -> None:
    found = codes_in(
        ast.parse(
            "NEW_CODES = {'a': 'one', 'b': ('two', 'three')}\n"
            "code = 'four' if 'x' in some else 'five'\n"
            "Refusal(code, reason)\n"
            "Refusal('six', reason, name)\n"
            "KernelContractError(words, ['seven', other.code])\n"
            "with contract('eight'): pass\n"
        )
    )
    assert set(found) == {"one", "two", "three", "four", "five", "six", "seven", "eight"}
    for written in (
        "Refusal(f'flex-{what}', reason)",
        "KernelContractError(words, [name])",
        "Refusal(code, x)",
    ):
        with pytest.raises(ValueError, match="is not written there"):
            list(codes_in(ast.parse(written)))


def test_the_page_is_what_its_generator_writes() -> None:
    page = (DOCS / "reference" / "refusals.md").read_text(encoding="utf-8")
    assert page == render(), "write it anew: python docs/make/refusals.py"
    for code in REMEDIES:
        assert f'<a id="{code}"></a>' in page


def test_remedies_are_short_sentences() -> None:
    for code, told in REMEDIES.items():
        assert told.kind in KINDS
        for text in (told.meaning, told.remedy):
            assert text.endswith("."), code
            assert len(text) < 400, code


def test_a_refusal_says_its_remedy() -> None:
    with pytest.raises(ak.BackendRefused) as raised:
        ak.Attention(2, 8, softcap=30.0, backend="emulated")
    (refusal,) = raised.value.refusals
    assert refusal.remedy == REMEDIES["softcap"].remedy
    assert ak.Refusal("of-a-plug-in", "it does not").remedy == ""
    assert ak.Refusal(RULES[0].code, "wrong").remedy == RULES[0].remedy


def test_an_error_says_first_what_most_candidates_fell_for_and_what_to_do() -> None:
    x = torch.empty(1, 64, 2, 1024, device="meta", dtype=torch.bfloat16)
    with pytest.raises(ak.BackendRefused) as raised:
        ak.plan(x, x, x, mask=ak.masks.Causal(), backend="emulated")
    told = str(raised.value).splitlines()
    assert "and 9 more: heads of 1024 and 1024 [head-dim-limit]" in told[1]
    assert sum("head-dim-limit" in line for line in told) == 2
    assert told[-3:-1] == ["what to do:", "  Use more, smaller heads. [head-dim-limit]"]
    with pytest.raises(ak.BackendRefused, match="what to do:"):
        ak.Attention(2, 8, softcap=3.0, backend="emulated")
    assert reasons_told([ak.Refusal("mine", "not here")]) == "  not here [mine]"
