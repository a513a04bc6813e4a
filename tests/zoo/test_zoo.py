"""The harness sees what an adapter drops, and the page tells what was recorded."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.zoo import ways
from tests.zoo.__main__ import RESULTS, kept, new_failures, read
from tests.zoo.build import case_of
from tests.zoo.check import Eager, checked
from tests.zoo.chosen import CHOSEN
from tests.zoo.types import interface_types

DOCS = Path(__file__).parents[2] / "docs"

Attend = Callable[..., Any]


def honest(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """transformers' own, with sinks as a key more would give them."""
    kwargs.pop("s_aux", None)
    return sdpa_attention_forward(module, *args, **kwargs)


def without_mask(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kw: Any) -> Any:
    """Drops the mask, and so the padding: what is left is causal."""
    del mask
    return sdpa_attention_forward(module, query, key, value, None, **kw)


def without_window(**kwargs: Any) -> Any:
    """A mask interface that takes every window for a causal mask."""
    from transformers.masking_utils import causal_mask_function

    kwargs["mask_function"] = causal_mask_function
    kwargs["local_size"] = None
    return sdpa_mask(**kwargs)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[Attend, Attend], None]:
    """Register an adapter under a name of its own, as the way "planted"."""

    def plant(attend: Attend, mask: Attend) -> None:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "planted", attend)
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "planted", mask)
        monkeypatch.setitem(ways.WAYS, "planted", lambda m: m.set_attn_implementation("planted"))

    return plant


@pytest.mark.parametrize(
    ("model_type", "attend", "mask", "seen"),
    [
        ("mistral", honest, sdpa_mask, set()),
        ("mistral", honest, without_window, {"plain", "right", "decode", "grads"}),
        ("bert", without_mask, sdpa_mask, {"right", "grads"}),
        ("gpt_oss", honest, sdpa_mask, {"plain", "right", "decode", "grads"}),
    ],
    ids=["nothing", "the window", "the padding", "the sink"],
)
def test_what_an_adapter_drops_is_seen(fault, model_type, attend, mask, seen):
    """And nothing is seen where nothing was dropped."""
    fault(attend, mask)
    found = checked(Eager(case_of(model_type)), "planted", ["plain", "right", "decode", "grads"])
    assert {mode for mode, text in found.items() if text != "ok"} == seen, found


def test_a_model_that_never_calls_is_no_pass(fault):
    """Its logits are eager's, since eager computed them."""
    fault(honest, sdpa_mask)
    found = checked(Eager(case_of("bloom")), "planted", ["plain"])
    assert found == {"plain": "never calls the interface"}


def test_a_failure_that_is_not_on_record_is_told():
    """And one that is on record is not, nor a way that did not run lost."""
    known = {"a": {"type": "a", "sdpa": {"ok": ["plain"]}, "attnkit": {"ok": ["plain"]}}}
    worse = {"a": {"type": "a", "attnkit": {"ok": [], "wrong": {"differs": ["plain"]}}}}
    assert new_failures(known, worse) == ["a plain: differs"]
    assert new_failures(worse, worse) == []
    assert kept(known, worse)["a"] == {**known["a"], **worse["a"], "set": "parts"}


def test_the_page_is_current():
    """Regenerate it with `python docs/make/models.py` when this fails."""
    page = runpy.run_path(str(DOCS / "make" / "models.py"))["render"]()
    assert (DOCS / "reference" / "models.md").read_text(encoding="utf-8") == page


def test_the_record_is_of_every_type():
    """Each is there, right or with the reason; so are those of `make test-models`."""
    records = read(RESULTS)
    import transformers

    if records["*"]["transformers"] == transformers.__version__:
        assert set(interface_types()) <= records.keys()
    assert CHOSEN.keys() <= records.keys()
