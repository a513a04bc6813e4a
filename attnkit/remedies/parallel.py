"""Plans over several processes: what cannot be exchanged, and plans that are not proven."""

from __future__ import annotations

__all__ = ["TOLD"]

_AGAIN = "Plan again. If nobody changed the plan, report it with its `explain()`: it is a defect."

_MEANINGS = {
    "heads-ways": "The ranks are no neighbourhoods of as many ranks as exchange heads.",
    "key-missing": "Rows of a rank see a key that none of its stages has.",
    "key-twice": "A rank computes over a key in two stages.",
    "other-cells": "A stage computes other cells than the mask's, or some of them twice.",
    "other-dropout": "There is no such way to drop weights.",
    "other-heads": "Neighbours have a head twice or not at all, or read other key heads.",
    "other-keys": "The keys of a stage are not those that arrive for it.",
    "other-messages": "A rank has two messages for another, none in them, or other heads' keys.",
    "other-owner": "A rank is to receive keys from one that has not got them.",
    "other-share": "A piece of a stage is not the share that its rows and keys are.",
    "other-stages": "Stages are not counted from 0, differ in number, or begin with others' keys.",
    "other-tokens": "A token is with two ranks, or with none.",
    "unneeded": "A rank receives keys that none of its rows sees.",
    "unpaired": "What one rank sends is not what the other receives.",
}

TOLD = {
    "few-heads": (
        "There are more ranks than heads, so exchanging heads would leave some without any.",
        'Nothing while another method is taken; "ulysses" needs at most as many ranks as heads.',
    ),
    "no-neighbourhoods": (
        "The ranks are not several neighbourhoods that could split the heads.",
        'Nothing while another method is taken; "hybrid" needs a number of ranks that divides.',
    ),
    "refused": (
        "The backend refuses a share of the plan; the reason says why.",
        'Look up the reason\'s own code, or leave `backend` at "auto".',
    ),
    **{code: (meaning, _AGAIN) for code, meaning in _MEANINGS.items()},
}
"""Codes to what they mean and what to do."""
