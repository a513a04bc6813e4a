"""`parse`: read back the text that ``str(bias)`` writes."""

from __future__ import annotations

from attnkit.eager import BIAS_IN_GRAPH, untraced
from attnkit.errors import CompositionError, shown
from attnkit.pse.base import PSE, Pse
from attnkit.textform import evaluate

__all__ = ["parse"]


@untraced(BIAS_IN_GRAPH)
def parse(text: str) -> Pse:
    """Return the bias that `text` describes: ``parse(str(p)) == p``.

    The language is sums of registered classes with literal arguments; nothing else is
    evaluated. `Dense` holds a tensor and has no text form.

    Raises `CompositionError` for anything else, repeating the text.

    >>> parse("ALiBi(2) + SqrtALiBi(slopes=(0.5, 0.25), align='top_left')").heads
    2
    >>> parse("ALiBy(8)")
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: cannot read the positional bias 'ALiBy(8)': unknown \
positional bias ALiBy; did you mean 'ALiBi'? Known: ALiBi, LearnableALiBi, SqrtALiBi, \
T5Relative
    """
    constructors = {family.__name__: family for _, family in PSE.items()}
    bias = evaluate(text, constructors, "positional bias")
    if not isinstance(bias, Pse):
        raise CompositionError(
            f"the text {shown(text)} gives {shown(bias)}, not a positional bias; write for "
            "instance 'ALiBi(8) + SqrtALiBi(8)'"
        )
    return bias
