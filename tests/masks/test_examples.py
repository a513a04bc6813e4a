"""Every public class and function of masks and biases shows how it is used."""

from __future__ import annotations

import inspect

import pytest

from attnkit import masks, pse

PUBLIC = [
    (module.__name__, name)
    for module in (masks, pse)
    for name in module.__all__
    if inspect.isroutine(getattr(module, name)) or inspect.isclass(getattr(module, name))
]


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_a_docstring_has_an_example(module, name):
    entry = getattr({"attnkit.masks": masks, "attnkit.pse": pse}[module], name)
    told = inspect.getdoc(entry)
    assert told
    assert ">>> " in told


def test_values_are_all_that_is_left():
    known = {name for _, name in PUBLIC}
    others = {*masks.__all__, *pse.__all__} - known
    assert others == {"Align", "MASKS", "PSE", "Structure"}
