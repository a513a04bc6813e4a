"""Settings of OmegaConf and Hydra: taken as they are, with errors that say where."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

import attnkit as ak
from attnkit import masks
from attnkit.config import AttentionConfig, MaskField, MultiHeadAttentionConfig
from attnkit.config.foreign import plain
from attnkit.errors import CompositionError, ConfigError
from attnkit.rotary import Interpolation, Rotary
from tests.docs.pages import DOCS, ROOT, blocks

BASE = {"num_heads": 4, "head_dim": 8}
PARTS = "{kind: and, parts: [{kind: causal}, {kind: sliding_window, size: '${window}'}]}"


def settings(mask: str, **more: object) -> Any:
    return OmegaConf.merge(OmegaConf.create({"attention": BASE, **more}), in_attention(mask))


def in_attention(mask: str) -> Any:
    return OmegaConf.create(f"attention:\n  mask: {mask}")


# -- what is taken -------------------------------------------------------------------------


def validated(given: Any) -> masks.Mask:
    return AttentionConfig.model_validate(given).mask


def as_arguments(given: Any) -> masks.Mask:
    return AttentionConfig(**given).mask


def as_container(given: Any) -> masks.Mask:
    return validated(OmegaConf.to_container(given, resolve=True))


class Mine(BaseModel):
    attention: AttentionConfig


class MyMask(BaseModel):
    mask: MaskField


def inside_a_model(given: Any) -> masks.Mask:
    return Mine.model_validate({"attention": given}).attention.mask


def as_a_field(given: Any) -> masks.Mask:
    return MyMask(mask=given.mask).mask


WAYS = [validated, as_arguments, as_container, inside_a_model, as_a_field]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mask", [PARTS, "Causal() & SlidingWindow(${window})"])
def test_containers_are_read_with_their_interpolations(
    way: Callable[[Any], masks.Mask], mask: str
) -> None:
    given = settings(mask, window=64).attention
    assert way(given) == masks.Causal() & masks.SlidingWindow(64)


def test_containers_inside_of_dicts_and_lists() -> None:
    parts = settings(PARTS, window=64).attention.mask.parts
    expected = masks.Causal() & masks.SlidingWindow(64)
    for given in (parts, list(parts), tuple(parts)):
        assert validated(BASE | {"mask": {"kind": "and", "parts": given}}) == expected


def test_rotary_positions_in_a_container() -> None:
    given = OmegaConf.create(
        "{dim: 32, num_heads: 4, bias: [q, k], rotary: {base: 5.0, scaling: "
        "{kind: linear, factor: 2.0}}}"
    )
    config = MultiHeadAttentionConfig.model_validate(given)
    assert config.rotary == Rotary(base=5.0, scaling=Interpolation(2.0))
    assert config.bias == ("q", "k")


def test_what_is_plain_is_not_copied() -> None:
    held: dict[str, Any] = {"kind": "prefix", "length": (1, 2)}
    held["itself"] = held
    given = {"mask": held, "many": [held, [held], masks.Causal()]}
    assert plain(given) == (given, {})
    assert plain(given)[0] is given
    mixed = {"a": held["length"], "b": (MappingProxyType({"c": held["length"]}), 1)}
    read, told = plain(mixed)
    assert read == {"a": (1, 2), "b": [{"c": (1, 2)}, 1]}
    assert not told
    assert mixed["b"][0]["c"] is read["b"][0]["c"]


# -- what is told --------------------------------------------------------------------------

NOWHERE = PARTS.replace("window}", "nowhere}")


@pytest.mark.parametrize("way", [validated, inside_a_model, as_a_field])
@pytest.mark.parametrize(
    ("mask", "where", "told"),
    [
        (NOWHERE, "mask.parts[1].size", "Interpolation key 'nowhere' not found"),
        (PARTS.replace("${window}", "???"), "mask.parts[1].size", "Missing mandatory value"),
        ("{kind: prefix, length: ['${nowhere}']}", "mask.length[0]", "'nowhere' not found"),
        ("{kind: not, part: '${attention.mask}'}", "mask.part", "Interpolation to parent node"),
        (PARTS.replace("window}", "word}"), "mask.parts[1].size", "a.* integer"),
    ],
)
def test_what_is_wrong_in_a_container_says_where(
    way: Callable[[Any], masks.Mask], mask: str, where: str, told: str
) -> None:
    with pytest.raises((ConfigError, ValidationError)) as caught:
        way(settings(mask, word="wide").attention)
    found = str(caught.value)
    if isinstance(caught.value, ValidationError):
        assert where.replace("[", ".").replace("]", "") in found
    else:
        assert f"  {where}: " in found
    assert re.search(told, found), found


def test_everything_that_cannot_be_read_is_told_at_once() -> None:
    given = OmegaConf.create({"num_heads": "???", "head_dim": 4, "mask": "${far}", "pse": "${no}"})
    with pytest.raises(ConfigError) as caught:
        AttentionConfig.model_validate(given)
    assert str(caught.value).splitlines() == [
        "AttentionConfig: 3 problems",
        "  num_heads: cannot be read: Missing mandatory value: num_heads",
        "  mask: cannot be read: Interpolation key 'far' not found",
        "  pse: cannot be read: Interpolation key 'no' not found",
    ]


def test_a_file_whose_interpolations_nobody_resolved_says_so() -> None:
    text = "{num_heads: 4, head_dim: '${size}', mask: '${mask}', pse: 'ALiBi(${heads})'}"
    with pytest.raises(ConfigError) as caught:
        AttentionConfig.from_yaml(text)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 3
    assert all("is an interpolation that nobody has resolved" in line for line in lines)
    assert lines[2].endswith("got '${size}' (line 1, column 26)")


def test_containers_have_the_size_of_other_configurations() -> None:
    many = OmegaConf.create({"kind": "and", "parts": [{"kind": "causal"}] * 10_001})
    with pytest.raises(ConfigError, match="mask: holds itself, or more than a configuration may"):
        AttentionConfig(**BASE, mask=many)


@pytest.mark.parametrize("given", [{"kind": "causal"}, OmegaConf.create({"kind": "causal"})])
def test_a_layer_sends_mappings_to_configurations(given: Any) -> None:
    for argument in ({"mask": given}, {"pse": given}):
        with pytest.raises(CompositionError, match="mappings are what"):
            ak.Attention(4, 8, **argument)


# -- the example, and the page about it ----------------------------------------------------

HERE = ROOT / "examples" / "with_hydra"
PAGE = (DOCS / "guides" / "configuration.md").read_text(encoding="utf-8")


def test_the_page_shows_the_files_of_the_example() -> None:
    shown = [block.text for block in blocks(PAGE)]
    for name in ("train.py", "conf/config.yaml", "conf/mask/window.yaml", "conf/mask/sinks.yaml"):
        assert f"# {name}\n{(HERE / name).read_text(encoding='utf-8')}" in shown, name


def test_the_example_prints_what_the_page_shows(tmp_path: Path) -> None:
    (shown,) = [b.text for b in blocks(PAGE) if b.text.startswith("$ python train.py")]
    commands = [shlex.split(line)[3:] for line in shown.splitlines() if line.startswith("$")]
    run = f"""
import runpy, sys, torch
torch.set_num_threads(1)
for arguments in {commands!r}:
    sys.argv = ["train.py", *arguments]
    runpy.run_path({str(HERE / "train.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    printed = [line for line in done.stdout.splitlines() if not line.startswith("[")]
    assert printed == [line for line in shown.splitlines() if not line.startswith("$")]
