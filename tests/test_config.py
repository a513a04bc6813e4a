"""Configurations: what they accept, what they write, and how they say no."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
import pickle
import re
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from ruamel.yaml import YAML

from attnkit import masks, pse
from attnkit.attention import Attention
from attnkit.config import AttentionConfig, MaskField, MultiHeadAttentionConfig, problems
from attnkit.config.text import write_yaml
from attnkit.errors import AttnkitError, ConfigError
from attnkit.geometry import Region, Slice
from attnkit.layouts import BNSD, LAYOUTS, Layout
from attnkit.modules import MultiHeadAttention
from attnkit.rotary import Interpolation, Rotary, YaRN

YAML_1_2 = YAML(typ="safe", pure=True)
BASE = {"num_heads": 4, "head_dim": 8}

MASKS_OF_EVERY_KIND = [
    masks.Full(),
    masks.Causal(),
    masks.Causal(align="top_left"),
    masks.SlidingWindow(3),
    masks.Slices([(0, 4, 0, 4, -3, 0)], 4, 4),
    masks.Band(None, 2, align="top_left"),
    masks.Columns(1),
    masks.Columns(1, 3),
    masks.Rows(0, 2),
    masks.Prefix(2),
    masks.Prefix((2, 3)),
    masks.Spans([(0, 2), (3, 4)]),
    masks.Spans([[(0, 2)], []]),
    masks.PrefixLM(3),
    masks.Documents([2, 3]),
    masks.Documents([[2, 3], [1, 4]], [[2, 2], [1, 3]]),
    masks.Padding([2, 4], side="left"),
    masks.Chunked(4),
    masks.Chunked(4, phase=(1, 2)),
    masks.BlockCausal(4, align="top_left"),
    masks.BlockCausal(4, phase=1, before=2),
    masks.Keys([(0, 2), (3, None)]),
    masks.Keys([[(0, 2)], [(3, None)]]),
    masks.SameId([(0, 2), (None, 1), (0, 3)]),
    masks.SameId([[(0, 2)], [(1, 2)]], [(0, 1), (1, 3)]),
    masks.Blocks("##. #.#", 64, 32, causal=True, q_len=100),
    masks.Blocks(torch.eye(40).bool().expand(2, 4, 40, 40), 16, 16),
    masks.Tree([-1, 0, 0, 2]),
    masks.Tree([[-1, 0], [1, -1]], prefix=3),
    masks.SlidingTiles((4, 6, 6), (2, 3, 3), 1),
    masks.ShiftedWindows((4, 6), 2),
    masks.ShiftedWindows((4, 6), (2, 3), 1),
    masks.Placed(masks.Neighborhood((4, 6), 3), 1) | masks.Columns(0, 1),
    masks.Placed(masks.Causal(), before=(1, 2), after=3),
    masks.Neighborhood((4, 6), 3),
    masks.Neighborhood((4, 4, 6), (1, 3, 2), (1, 1, 2), (True, False, False)),
    masks.Dilated(2),
    masks.Dense.keep(torch.tensor([[True, False, True], [False, True, True]])),
    masks.PerBatch([masks.Causal(), masks.Columns(0, 2)]),
    masks.PerHead([masks.Causal(), masks.Full(), masks.SlidingWindow(2), ~masks.Causal()]),
    masks.OfHeads(masks.PerHead([masks.Causal()] * 4 + [masks.Full()]), 1, 5),
    masks.Causal()[2:, :],
    masks.Causal().take([(0, 2), (7, 5)], [(0, 3), (5, 8)], q_len=8, kv_len=8),
    masks.Taken(masks.Prefix([3, 2, 5]), [(8, 8, [(0, 2)], [(1, 6)], 2)]),
    masks.Columns(1)[:3, 2:5],
    masks.Causal().cut((2, 4), (0, None), q_len=8),
    (masks.Causal() & ~masks.SlidingWindow(2)) | masks.Prefix(1) - masks.Rows(3),
]

BIASES = [
    None,
    pse.ALiBi(4),
    pse.ALiBi([0.5, 0.1, 1 / 3, 1e-7], align="top_left"),
    pse.SqrtALiBi(slopes=(0.5, 0.25, 0.125, 0.0625)),
    pse.ALiBi(4) + pse.SqrtALiBi(4) + pse.ALiBi([1.0] * 4),
]


def fails(data: object) -> str:
    """Return the message that a wrong configuration gets."""
    with pytest.raises(ConfigError) as caught:
        AttentionConfig.model_validate(data)
    assert isinstance(caught.value, AttnkitError)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# -- forms in ----------------------------------------------------------------------------


def test_the_same_composition_in_every_form() -> None:
    mask = masks.Causal() & masks.SlidingWindow(64)
    parts = [{"kind": "causal"}, {"kind": "sliding_window", "size": 64}]
    written: list[Any] = [
        mask,
        "Causal() & SlidingWindow(64)",
        {"kind": "and", "parts": parts},
        {"kind": "and", "parts": [masks.Causal(), "SlidingWindow(64)"]},
    ]
    assert {AttentionConfig.model_validate(BASE | {"mask": w}).mask for w in written} == {mask}


def test_a_mapping_yaml_text_a_file_and_a_ready_configuration(tmp_path: Path) -> None:
    text = "{num_heads: 4, head_dim: 8, pse: ALiBi(4)}"
    file = tmp_path / "attention.yaml"
    file.write_text(text)
    config = AttentionConfig(num_heads=4, head_dim=8, pse=pse.ALiBi(4))
    assert AttentionConfig.model_validate(text) == config
    assert AttentionConfig.from_yaml(text) == config
    assert AttentionConfig.from_yaml(file) == config
    assert AttentionConfig.model_validate(config) is config
    assert AttentionConfig.model_validate(BASE | {"version": 1, "pse": "ALiBi(4)"}) == config


def test_names_of_layouts_may_be_the_layouts() -> None:
    assert AttentionConfig.model_validate(BASE | {"layout": BNSD}).layout == "BNSD"
    for stranger in (Layout("STRANGER", "s b n d"), Layout("BNSD", "s b n d"), None, 3):
        assert "layout: is not a registered layout" in fails(BASE | {"layout": stranger})


# -- forms out ---------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS_OF_EVERY_KIND, ids=str)
def test_masks_round_trip(mask: masks.Mask) -> None:
    heads = mask.heads or 4
    round_trip(AttentionConfig(num_heads=heads, head_dim=8, mask=mask))


def test_every_registered_kind_is_among_the_round_trips() -> None:
    def kinds(value: object) -> set[str]:
        if isinstance(value, Mapping):
            return {str(value["kind"])}.union(*map(kinds, value.values()))
        return set().union(*map(kinds, value)) if isinstance(value, list) else set()

    dumps = [
        AttentionConfig(num_heads=m.heads or 4, head_dim=8, mask=m).model_dump()["mask"]
        for m in MASKS_OF_EVERY_KIND
    ]
    assert set().union(*map(kinds, dumps)) == set(masks.MASKS)


@pytest.mark.parametrize("bias", BIASES, ids=str)
def test_biases_round_trip(bias: pse.Pse | None) -> None:
    round_trip(AttentionConfig(num_heads=4, head_dim=8, pse=bias))


@given(
    scale=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    dropout=st.floats(0, 1, exclude_max=True),
    softcap=st.none() | st.floats(0, 1e300, exclude_min=True),
    sink=st.booleans(),
    kv_heads=st.sampled_from([None, 1, 2, 4]),
    layout=st.sampled_from(list(LAYOUTS)),
    backend=st.sampled_from(["auto", "reference"]),
)
def test_scalars_round_trip(
    scale: float | None,
    dropout: float,
    softcap: float | None,
    sink: bool,
    kv_heads: int | None,
    layout: str,
    backend: str,
) -> None:
    config = AttentionConfig(
        num_heads=4,
        head_dim=8,
        num_kv_heads=kv_heads,
        scale=scale,
        dropout=dropout,
        softcap=softcap,
        sink=sink,
        layout=layout,
        backend=backend,
    )
    round_trip(config)


def test_a_layout_may_have_the_name_that_others_give_it() -> None:
    for word, name in (("bshd", "BSND"), ("BHSD", "BNSD"), ("thd", "TND"), ("bsh", "BSH")):
        assert AttentionConfig(num_heads=4, head_dim=8, layout=word).layout == name
    assert MultiHeadAttentionConfig(num_heads=4, dim=8, layout="bhsd").build().attention.layout == (
        "BNSD"
    )


@pytest.mark.parametrize(
    ("config", "module", "beside"),
    [
        (AttentionConfig, Attention, {"score_fn"}),  # a function, which no file holds
        (MultiHeadAttentionConfig, MultiHeadAttention, {"score_fn", "device", "dtype"}),
    ],
)
def test_the_keys_are_the_arguments_of_the_module(
    config: type[AttentionConfig], module: Callable[..., object], beside: set[str]
) -> None:
    arguments = inspect.signature(module).parameters
    assert config.model_fields.keys() - {"version"} == arguments.keys() - beside
    for name, item in config.model_fields.items():
        if name in arguments and name != "mask":  # None and Full() are the same there
            assert item.is_required() == (arguments[name].default is inspect.Parameter.empty)
            assert item.is_required() or item.default == arguments[name].default


def test_the_arguments_of_a_layer_of_today() -> None:
    config = MultiHeadAttentionConfig.from_yaml(
        "{dim: 32, num_heads: 4, v_head_dim: 4, bias: [q, k, v], qk_norm: rms, gate: head}"
    )
    layer = config.build()
    assert [p.bias is not None for p in (layer.q_proj, layer.v_proj, layer.out_proj)] == [
        True,
        True,
        False,
    ]
    assert layer.v_proj.out_features == 16
    assert isinstance(layer.q_norm, torch.nn.RMSNorm)
    assert layer.gate_proj.out_features == 4
    assert MultiHeadAttentionConfig.from_yaml(config.to_yaml()) == config
    with pytest.raises(ConfigError, match=r"bias.*\n  qk_norm: must be 'rms', 'layer' or"):
        MultiHeadAttentionConfig(dim=32, num_heads=4, bias=["o"], qk_norm="l2")


def test_scalings_of_rotary_positions() -> None:
    base = {"dim": 64, "num_heads": 1}
    yarn = Rotary(1e6, scaling=YaRN(4.0, original_max_position_embeddings=32768))
    for rotary in (
        yarn,
        Rotary(scaling=Interpolation(2.0)),
        Rotary(rotary_dim=0.25),
        Rotary(sections=(16, 8, 8)),
    ):
        config = MultiHeadAttentionConfig(**base, rotary=rotary)
        assert MultiHeadAttentionConfig.from_yaml(config.to_yaml()) == config
        assert MultiHeadAttentionConfig.model_validate_json(config.model_dump_json()) == config
        assert config.build().rotary == rotary
    scaling = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    given = base | {"rotary": {"base": 1e6, "scaling": scaling}}
    assert MultiHeadAttentionConfig.model_validate(given).rotary == yarn
    assert "YaRN" in MultiHeadAttentionConfig.model_json_schema()["$defs"]
    for wrong, told in (
        ({"kind": "yran"}, "kind: is not a registered scaling; did you mean 'yarn'"),
        ({"kind": "linear", "factr": 2.0}, "factr: unknown key; did you mean 'factor'"),
        ({"kind": "linear", "factor": "2"}, "factor: must be a number without quotes"),
        ("linear", "is not a mapping such as {kind: linear"),
    ):
        with pytest.raises(ConfigError, match=r"rotary\.scaling") as caught:
            MultiHeadAttentionConfig(**base, rotary={"scaling": wrong})
        assert told in str(caught.value)


def test_yaml_is_1_2() -> None:
    text = "num_heads: 0o10\nhead_dim: 8\nscale: 1e-3\nmask: Causal()\n"
    config = AttentionConfig.from_yaml(text)
    assert (config.num_heads, config.scale) == (8, 1e-3)
    for word in ("no", "on", "yes", "off", "y"):
        assert f"sink: must be a boolean; got {word!r}" in fails(text + f"sink: {word}\n")
    assert AttentionConfig.from_yaml('{"num_heads": 4, "head_dim": 8}').head_dim == 8
    written = AttentionConfig(num_heads=4, head_dim=8, scale=1e-07).to_yaml()
    assert "scale: 1.0e-07" in written  # a number to readers of YAML 1.1, too


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("num_heads: 4\nhead_dim: '8'\n", "head_dim: .*got '8' \\(line 2, column 11\\)"),
        ("num_heads: 4\n", "head_dim: is missing.* \\(line 1, column 1\\)"),
        ("num_heads: 4\nhead_dim: 8\nmaks: 3\n", "maks: unknown key.* \\(line 3, column 7\\)"),
        (
            "num_heads: 4\nhead_dim: 8\nmask:\n  kind: or\n  parts:\n"
            "  - {kind: causal}\n  - {kind: sliding_window, size: x}\n",
            "mask.parts\\[1\\].size: .*got 'x' \\(line 7, column 34\\)",
        ),
        (
            "num_heads: 4\nhead_dim: 8\nmask: Casual()\n",
            "mask: .*did you mean 'Causal'.* \\(line 3, column 7\\)",
        ),
        ("{num_heads: 4, version: 2}", "version: is not one .* \\(line 1, column 25\\)"),
        ("just words", "a configuration is a mapping .* \\(line 1, column 1\\)"),
        (
            "num_heads: 4\n  head_dim: 8\n",
            "the text is not YAML: line 2, column 11: ",
        ),
        ("a: \0", "the text is not YAML: line 1, column 4: special characters"),
    ],
)
def test_every_error_of_a_text_says_line_and_column(text: str, told: str) -> None:
    assert re.search(told, fails(text)), fails(text)


def round_trip(config: AttentionConfig) -> None:
    assert AttentionConfig.model_validate(YAML_1_2.load(config.to_yaml())) == config
    assert AttentionConfig.from_yaml(config.to_yaml()) == config
    assert AttentionConfig.model_validate_json(config.model_dump_json()) == config
    plain = config.model_dump()
    assert json.loads(json.dumps(plain)) == plain == config.model_dump(mode="json")
    assert AttentionConfig.model_validate(plain) == config
    assert validates(plain, AttentionConfig.model_json_schema())
    assert validates(plain, AttentionConfig.model_json_schema(mode="serialization"))


def test_what_is_written_is_short() -> None:
    config = AttentionConfig(
        num_heads=2, head_dim=8, mask=masks.Causal(), pse=pse.ALiBi(2), dropout=0.1
    )
    assert config.to_yaml().splitlines() == [
        "version: 1",
        "num_heads: 2",
        "head_dim: 8",
        "mask: {kind: causal}",
        "pse: {kind: alibi, num_heads: 2}",
        "dropout: 0.1",
    ]
    given_slopes = config.model_copy(update={"pse": pse.ALiBi([0.5, 0.25])})
    assert given_slopes.model_dump()["pse"] == {"kind": "alibi", "slopes": [0.5, 0.25]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mask", masks.Predicate(lambda b, h, i, j: i >= j)),
        ("mask", masks.Causal() & ~masks.Predicate(lambda b, h, i, j: i >= j)),
        ("pse", pse.Dense(torch.zeros(3, 3))),
    ],
)
def test_what_no_text_can_hold_builds_but_is_not_written(key: str, value: Any) -> None:
    config = AttentionConfig.model_validate(BASE | {key: value})
    assert isinstance(config.build(), Attention)
    with pytest.raises(ConfigError, match=r"of no registered kind of .* so no file can hold it"):
        config.to_yaml()
    with pytest.raises(ValueError, match="no file can hold it"):
        config.model_dump_json()


# -- values ------------------------------------------------------------------------------


def test_a_configuration_is_a_value() -> None:
    one, two = (AttentionConfig(num_heads=4, head_dim=8, mask=masks.Causal()) for _ in range(2))
    assert one == two
    assert len({one, two}) == 1
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    assert one != AttentionConfig(num_heads=4, head_dim=8)
    with pytest.raises(ValueError, match="frozen"):
        one.num_heads = 2  # type: ignore[misc]


@pytest.mark.parametrize("kind", [AttentionConfig, MultiHeadAttentionConfig])
def test_layers_of_one_config_train_apart(kind: Any):
    """A bias that trains is no weight that the layers of a model share."""
    width = {"head_dim": 8} if kind is AttentionConfig else {"dim": 16}
    config = kind.model_validate({"num_heads": 2, "pse": "ALiBi(2, learnable=True)", **width})
    one, other = config.build(), config.build()
    slopes = [[p for name, p in m.named_parameters() if "pse" in name] for m in (one, other)]
    assert len(slopes[0]) == len(slopes[1]) == 1
    with torch.no_grad():
        slopes[0][0].add_(1.0)
    assert not torch.equal(slopes[0][0], slopes[1][0])
    fresh = [p for name, p in config.build().named_parameters() if "pse" in name]
    assert torch.equal(slopes[1][0], fresh[0])


def test_build_passes_everything_on() -> None:
    config = AttentionConfig(
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        mask=masks.Causal(),
        pse=pse.ALiBi(4),
        layout="BNSD",
        scale=0.5,
        dropout=0.25,
        sink=True,
        softcap=30.0,
        backend="reference",
    )
    arguments = config.model_dump(exclude={"version", "mask", "pse"})
    direct = Attention(**arguments, mask=config.mask, pse=config.pse)
    module = config.build()
    assert repr(module) == repr(direct)
    assert module.state_dict().keys() == direct.state_dict().keys()
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8)
    key, value = torch.randn(2, 2, 2, 5, 8)
    for training in (False, True):
        outputs = []
        for one in (module, direct):
            torch.manual_seed(1)
            outputs.append(one.train(training)(query, key, value))
        assert torch.equal(*outputs)


# -- errors ------------------------------------------------------------------------------


def test_every_problem_is_listed_with_its_path() -> None:
    message = fails(
        {
            "num_heads": 4,
            "heads": 4,
            "mask": {
                "kind": "and",
                "parts": [
                    {"kind": "causal", "aling": "top_left"},
                    {"kind": "sliding_window", "size": "64"},
                    {"kind": "not", "part": {"kind": "sliding_window", "size": 0}},
                    {"kind": "slidng_window", "size": 64},
                    "Causl()",
                    7,
                ],
            },
            "pse": {"kind": "alibi", "align": "left"},
            "dropout": 1.5,
        }
    )
    first, *lines = message.splitlines()
    assert first == "AttentionConfig: 10 problems"
    told = "\n".join(lines)
    assert "head_dim: is missing" in told
    assert "mask.parts[0].aling: unknown key; did you mean 'align'? Known: kind, align" in told
    assert "mask.parts[1].size: must be an integer without quotes; got '64'" in told
    assert "mask.parts[2].part: SlidingWindow(size=0) is an empty window" in told
    assert "mask.parts[3].kind: is not a registered mask; did you mean 'sliding_window'?" in told
    assert "mask.parts[4]: cannot read the mask 'Causl()'" in told
    assert "mask.parts[5]: must be a mapping such as" in told
    assert "heads: unknown key; did you mean 'num_heads'?" in told
    assert "pse.align: must be 'bottom_right' or 'top_left'; got 'left'" in told
    assert "dropout: must be less than 1; got 1.5" in told
    assert "mask.kind: is missing. Known: full, and" in fails(BASE | {"mask": {"size": 64}})


def test_a_long_list_of_problems_is_cut() -> None:
    message = fails(BASE | {"mask": {"kind": "padding", "lengths": ["1"] * 1000}})
    assert message.startswith("AttentionConfig: 1000 problems")
    assert len(message.splitlines()) == 18
    assert message.endswith("... and 984 more")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"version": 2}, r"version: is not one that this release reads: 1; got 2"),
        ({"version": True}, r"version: .* got True"),
        ({"version": "1"}, r"version: .* got '1'"),
        ({"maks": 1}, r"maks: unknown key; did you mean 'mask'\? Known: num_heads, head_dim, .*"),
        ({"num_heads": 0}, r"num_heads: must be greater than or equal to 1; got 0"),
        ({"num_heads": True}, r"num_heads: must be an integer; got True"),
        ({"num_heads": 4.0}, r"num_heads: must be an integer; got 4.0"),
        ({"num_kv_heads": 3}, r"num_kv_heads: must divide num_heads=4; got 3"),
        ({"dropout": 1}, r"dropout: must be less than 1; got 1"),
        ({"dropout": "1e-3"}, r"dropout: .*to YAML 1\.1 it is a text: write 1\.0e-3.*"),
        ({"scale": float("nan")}, r"scale: must be a finite number; got nan"),
        ({"softcap": 0}, r"softcap: must be greater than 0; got 0"),
        ({"sink": "yes"}, r"sink: must be a boolean; got 'yes'"),
        (
            {"layout": "bsdn"},
            r"layout: is not a registered layout; did you mean 'BSND'\? Known: .*",
        ),
        ({"backend": "refernce"}, r"backend: .* did you mean 'reference'\? Known: auto, .*"),
        ({"mask": None}, r"mask: must be a mapping such as \{kind: full\}.*got None"),
        ({"mask": masks.Causal}, r"mask: must be a mapping such as .*"),
        ({"mask": "causal"}, r"mask: .* for the kind alone write \{kind: causal\}; got 'causal'"),
        ({"mask": "Causal("}, r"mask: cannot read the mask 'Causal\(': .*"),
        ({"mask": {"kind": "Causal"}}, r"mask\.kind: .* did you mean 'causal'\? .*"),
        ({"mask": {"kind": ["causal"]}}, r"mask\.kind: is not a registered mask.*"),
        (
            {"mask": {"kind": "sliding_window"}},
            r"mask\.size: is missing. Known keys: kind, size,.*",
        ),
        ({"mask": {"kind": "prefix", "length": "2"}}, r"mask\.length: must be an integer.* or .*"),
        (
            {"mask": {"kind": "prefix", "length": [2, "3"]}},
            r"mask\.length\[1\]: must be an integer.*",
        ),
        ({"mask": {"kind": "padding", "lengths": []}}, r"mask: Padding lengths is empty.*"),
        (
            {"mask": {"kind": "causal", "align": "left"}},
            r"mask\.align: must be 'bottom_right' or .*",
        ),
        (
            {"mask": {"kind": "per_head", "masks": ["Full()", "Full()"]}},
            r"mask: .* is made for 2 heads, but num_heads=4.*",
        ),
        ({"pse": "ALiBi(6)"}, r"pse: ALiBi\(6\) is made for 6 heads, but num_heads=4.*"),
        ({"pse": {"kind": "causal"}}, r"pse\.kind: is not a registered positional bias.*"),
        ({"pse": {"kind": "alibi"}}, r"pse: ALiBi needs a number of heads or one slope per head"),
        ({3: 4}, r"\[3\]: Keys should be strings.*"),
    ],
    ids=str,
)
def test_one_problem(wrong: dict[Any, Any], told: str) -> None:
    message = fails(BASE | wrong)
    assert re.fullmatch(f"AttentionConfig: 1 problem\n  {told}", message), message


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ("attention.yaml", r"with at least the keys num_heads, head_dim \(is it a file\?"),
        ("", "a configuration is a mapping"),
        ("[1, 2]", "a configuration is a mapping"),
        ("a: [", "is not YAML: line 1, column 5"),
        ("num_heads: 4\nnum_heads: 4", 'line 2, column 1: found duplicate key "num_heads"'),
        ("!!python/object:os.system {}", "is not YAML: line 1, column 1"),
        ("num_heads: 4\nhead_dim: 8\nmask: &a {kind: not, part: *a}", "contains itself"),
    ],
)
def test_documents_that_are_none(document: str, told: str) -> None:
    assert re.search(told, fails(document))


def test_json_that_is_none() -> None:
    for text, told in (("{", "not JSON"), ('{"num_heads": 1, "num_heads": 2}', "appears twice")):
        with pytest.raises(ConfigError, match=told):
            AttentionConfig.model_validate_json(text)


def test_the_constructor_teaches_too() -> None:
    with pytest.raises(ConfigError, match="head_dim: must be greater than or equal to 1; got 0"):
        AttentionConfig(num_heads=4, head_dim=0)
    with pytest.raises(ConfigError, match="maks: unknown key; did you mean 'mask'"):
        AttentionConfig(num_heads=4, head_dim=8, maks=masks.Causal())  # type: ignore[call-arg]


def test_a_yaml_merge_is_no_double_key() -> None:
    text = "<<: {num_heads: 4, head_dim: 8}\nnum_heads: 2"
    assert AttentionConfig.from_yaml(text).num_heads == 2


# -- limits and broken texts ----------------------------------------------------------------


def laughs(levels: int) -> str:
    """Return lists of lists by alias: 9 ** levels entries in as many lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    """Return mappings that merge the one before nine times."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}" for k in range(1, levels)]
    return "\n".join(lines)


def doubled(levels: int) -> dict[str, Any]:
    """Return a mask that holds the one before twice."""
    mask: dict[str, Any] = {"kind": "causal"}
    for k in range(levels):
        mask = {"kind": "and" if k % 2 else "or", "parts": [{"kind": "not", "part": mask}, mask]}
    return mask


def nested(levels: int) -> dict[str, Any]:
    mask: dict[str, Any] = {"kind": "causal"}
    for _ in range(levels):
        mask = {"kind": "not", "part": mask}
    return mask


def endless() -> dict[str, Any]:
    mask: dict[str, Any] = {"kind": "not"}
    mask["part"] = mask
    return mask


def tall(levels: int) -> masks.Mask:
    mask: masks.Mask = masks.Causal()
    for k in range(levels):
        part = masks.SlidingWindow(k + 2)
        mask = mask & part if k % 2 else mask | part
    return mask


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (laughs(9), "more than 20,000 keys and values (an alias counts as a copy)"),
        (laughs(25), "more than 20,000 keys and values"),
        (merges(25), "more than 20,000 keys and values"),
        (write_yaml(BASE | {"mask": doubled(20)}), "more than 20,000 keys and values"),
        (BASE | {"mask": doubled(20)}, "more than 20,000 keys and values"),
        (BASE | {"mask": {"kind": "and", "parts": [{"kind": "x"}] * 20_000}}, "more than 20,000"),
        ("mask: " + "[" * 50_000, "nests deeper than 140 levels"),
        ("\n".join(" " * k + "a:" for k in range(1_200)), "nests deeper than 140 levels"),
        (BASE | {"mask": nested(3_000)}, "nests deeper than 140 levels"),
        (BASE | {"mask": endless()}, "it contains itself"),
        ("a: " + "x" * 1_000_000, "the text has 1,000,003 characters or more"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_is_too_large_is_told_before_it_is_unfolded(data: object, told: str) -> None:
    with at_most(100):
        message = fails(data)
    assert told in message
    assert len(message) < 500


def test_json_that_is_too_large() -> None:
    for text, told in (
        ("[" * 100_000, "nests deeper than 140 levels"),
        ('{"mask": ' * 500 + "1" + "}" * 500, "nests deeper than 140 levels"),
        (json.dumps({f"key {k}": k for k in range(20_000)}), "more than 20,000 keys and values"),
    ):
        with pytest.raises(ConfigError, match=told), at_most(100):
            AttentionConfig.model_validate_json(text)


def test_what_is_large_and_legal_is_read() -> None:
    lengths = tuple(range(1, 9_000))
    config = AttentionConfig(num_heads=4, head_dim=8, mask=masks.Padding(lengths))
    round_trip(config)
    deep = AttentionConfig.model_validate(BASE | {"mask": nested(48)}).mask
    assert deep.region(3, 3) == masks.Causal().region(3, 3)


def test_thousands_of_problems_are_counted_and_few_are_told() -> None:
    many = BASE | {"mask": {"kind": "and", "parts": [{"kind": "x"}] * 5_000}}
    message = fails(many | {f"key {k}": k for k in range(2_000)})
    assert message.startswith("AttentionConfig: 7000 problems")
    assert len(message) <= 2_000
    with pytest.MonkeyPatch.context() as patch:
        compared: list[str] = []
        right = problems.suggestion
        patch.setattr(
            problems, "suggestion", lambda word, *rest: compared.append(word) or right(word, *rest)
        )
        fails(BASE | {f"key {k}": k for k in range(1_000)})
        few = len(compared)
        fails(BASE | {f"key {k}": k for k in range(2_000)})
    assert few > 0
    assert len(compared) == 2 * few  # of what is not told, nothing is worked out


@pytest.mark.parametrize(
    "value",
    [
        *("!!int foo", "!!int ''", "!!float x", "!!bool x", "!!timestamp x", "2001-99-99"),
        *("!!omap x", "!!binary 'x'", "!!python/name:os.system", "9" * 5_000, "*none"),
        *("!" + "x" * 100_000 + " 1", "\0", "{<<: 3}"),
    ],
    ids=lambda value: value[:20],
)
def test_a_value_that_yaml_cannot_read(value: str) -> None:
    message = fails(f"num_heads: {value}")
    assert "the text is not YAML: line 1, column 1" in message
    assert len(message) <= 2_000


@pytest.mark.parametrize("text", [None, 5, [], b"\xff\xfe{", "9" * 5_000, '{"a": ' + "9" * 5_000])
def test_json_that_is_no_text(text: Any) -> None:
    with pytest.raises(ConfigError, match=r": (a JSON text is|the text is not JSON)"):
        AttentionConfig.model_validate_json(text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00num_heads")
    large = tmp_path / "large.yaml"
    large.write_text("a: " + "x" * 1_100_000)
    for source, told in (
        (tmp_path / "none.yaml", "none.yaml': No such file or directory"),
        (tmp_path, "Is a directory"),
        (Path("a\0b"), "embedded null byte"),
        (binary, "is not UTF-8 text"),
        (large, "the text has 1,000,001 characters or more"),
        (None, "comes from a text or a pathlib.Path, not None"),
        (b"num_heads: 4", "not b'num_heads: 4'"),
    ):
        with pytest.raises(ConfigError) as caught:
            AttentionConfig.from_yaml(source)  # type: ignore[arg-type]
        assert told in str(caught.value)


def test_what_a_text_could_not_be_read_back_from_is_not_written() -> None:
    wide = AttentionConfig(num_heads=4, head_dim=8, mask=masks.Padding([3] * 30_000))
    for write in (wide.to_yaml, wide.model_dump, wide.model_dump_json):
        with pytest.raises(ConfigError, match=r"^no file can hold this mask: .*than 20,000 keys"):
            write()


def test_the_deepest_mask_is_written_and_read() -> None:
    config = AttentionConfig(num_heads=4, head_dim=8, mask=tall(62))
    assert AttentionConfig.from_yaml(config.to_yaml()) == config
    assert AttentionConfig.model_validate_json(config.model_dump_json()) == config


@contextlib.contextmanager
def at_most(mebibytes: int) -> Iterator[None]:
    """Fail where Python's objects take more memory than this at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes << 20
    finally:
        tracemalloc.stop()


# -- multi-head attention ------------------------------------------------------------------


def test_multi_head_attention() -> None:
    config = MultiHeadAttentionConfig(
        dim=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        kv_dim=24,
        bias=True,
        mask=masks.Causal(),
        pse=pse.ALiBi(4),
        dropout=0.25,
        scale=0.5,
        softcap=30.0,
        sink=True,
        backend="reference",
    )
    assert MultiHeadAttentionConfig.from_yaml(config.to_yaml()) == config
    arguments = config.model_dump(exclude={"version", "mask", "pse"})
    direct = MultiHeadAttention(**arguments, mask=config.mask, pse=config.pse)
    module = config.build()
    assert repr(module) == repr(direct)
    module.load_state_dict(direct.state_dict())
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 24)
    assert torch.equal(module.eval()(x, context), direct.eval()(x, context))


@pytest.mark.parametrize(
    ("written", "rotary"),
    [
        (False, False),
        (True, True),
        ({}, Rotary()),
        ({"base": 5e5, "pairing": "interleaved"}, Rotary(5e5, pairing="interleaved")),
    ],
)
def test_rotary(written: Any, rotary: bool | Rotary) -> None:
    data = {"dim": 16, "num_heads": 2, "rotary": written}
    config = MultiHeadAttentionConfig.model_validate(data)
    assert config.rotary == rotary
    assert config.model_dump()["rotary"] == written
    assert MultiHeadAttentionConfig.from_yaml(config.to_yaml()) == config
    assert MultiHeadAttentionConfig.model_validate_json(config.model_dump_json()) == config
    assert validates(data, MultiHeadAttentionConfig.model_json_schema())
    assert config.build().rotary == (Rotary() if rotary is True else rotary or None)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rotary": {"bsae": 1.0}}, r"rotary\.bsae: unknown key; did you mean 'base'\? .*"),
        ({"rotary": {"base": "x"}}, r"rotary\.base: must be a number; got 'x'"),
        ({"rotary": {"rotary_dim": 3}}, r"rotary: .*rotary_dim=3; dimensions turn in pairs.*"),
        ({"rotary": 1}, r"rotary: must be a boolean or must be a mapping with the keys base, .*"),
        ({"dim": 17}, r"dim: must be a multiple of num_heads=2, or give head_dim; got 17"),
        ({"causal": True}, r"causal: unknown key\. Known: num_heads, dim, version, .*"),
    ],
    ids=str,
)
def test_what_multi_head_attention_cannot_be(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MultiHeadAttentionConfig.model_validate({"dim": 16, "num_heads": 2} | wrong)
    message = str(caught.value)
    assert re.fullmatch(f"MultiHeadAttentionConfig: 1 problem\n  {told}", message), message


# -- inside the models of others ----------------------------------------------------------


class Training(BaseModel):
    steps: int
    attention: AttentionConfig
    extra: MaskField = masks.Full()


def test_inside_another_model() -> None:
    data = {"steps": 3, "attention": BASE | {"mask": "Causal()"}, "extra": {"kind": "causal"}}
    training = Training.model_validate(data)
    assert training.attention.mask == training.extra == masks.Causal()
    assert Training.model_validate_json(training.model_dump_json()) == training
    assert validates(data, Training.model_json_schema())
    data["attention"] = BASE | {"mask": {"kind": "sliding_window", "size": "x"}}
    with pytest.raises(ValueError, match=r"attention\.mask\.size"):
        Training.model_validate(data)


# -- families of others -------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Stripe(masks.Mask):
    """Every key of a stripe around others.

    This line is not part of the description.
    """

    width: int
    around: masks.Mask | None = None
    weights: tuple[float, ...] = field(default_factory=tuple)
    named: dict[str, int] | None = None

    def __post_init__(self) -> None:
        if self.width > 100:
            raise TypeError("width is {too} large")

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        return Region.of(Slice(0, q_len, 0, kv_len, lo=0, hi=self.width))


@pytest.fixture
def stripe() -> Iterator[None]:
    masks.register("stripe")(Stripe)
    yield
    masks.MASKS.remove("stripe")


@pytest.mark.usefixtures("stripe")
def test_a_family_registered_after_import() -> None:
    written = {"kind": "stripe", "width": 2, "around": {"kind": "causal"}, "weights": [1, 2.5]}
    config = AttentionConfig.model_validate(BASE | {"mask": {"kind": "not", "part": written}})
    assert config.mask == ~Stripe(2, masks.Causal(), (1.0, 2.5))
    assert config.model_dump()["mask"]["part"] == written
    round_trip(config)
    schema = AttentionConfig.model_json_schema()
    assert schema["$defs"]["Stripe"]["description"] == "Every key of a stripe around others."
    assert "mask: width is {too} large" in fails(
        BASE | {"mask": "Full()"} | {"mask": {"kind": "stripe", "width": 101}}
    )


@pytest.mark.usefixtures("stripe")
def test_a_field_that_no_file_can_hold() -> None:
    endless = AttentionConfig(num_heads=4, head_dim=8, mask=Stripe(1, weights=(math.inf,)))
    assert AttentionConfig.from_yaml(endless.to_yaml()) == endless
    assert AttentionConfig.model_validate_json(endless.model_dump_json()) == endless
    config = AttentionConfig(num_heads=4, head_dim=8, mask=Stripe(1, named={"a": 1}))
    with pytest.raises(ConfigError, match=r"stripe\.named of a mask is a dict"):
        config.to_yaml()


def test_a_family_that_went_away() -> None:
    assert "Stripe" not in AttentionConfig.model_json_schema()["$defs"]
    assert "is not a registered mask" in fails(BASE | {"mask": {"kind": "stripe", "width": 1}})


def test_a_family_that_is_no_dataclass() -> None:
    class Plain(pse.ALiBi):
        """Its fields are not its arguments."""

        def __init__(self, power: float) -> None:
            super().__init__(4)
            self.__dict__["power"] = power

    pse.PSE.register("plain")(Plain)
    try:
        assert "pse: " in fails(BASE | {"pse": {"kind": "plain", "num_heads": 4}})
    finally:
        pse.PSE.remove("plain")


# -- JSON schema --------------------------------------------------------------------------


def test_the_schema_describes_itself() -> None:
    schema = AttentionConfig.model_json_schema()
    assert schema["description"].startswith("An `Attention` as a versioned mapping")
    assert "\n" not in schema["description"]
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["num_heads", "head_dim"]
    kinds = schema["$defs"]["Mask"]["anyOf"][0]["discriminator"]
    assert kinds["propertyName"] == "kind"
    assert list(kinds["mapping"]) == sorted(masks.MASKS)
    assert schema["properties"]["layout"]["enum"] == list(LAYOUTS)
    assert schema["properties"]["mask"]["default"] == {"kind": "full"}
    window = schema["$defs"]["SlidingWindow"]
    assert window["description"].startswith("Exactly the last `size` keys")
    assert window["additionalProperties"] is False
    assert all(item.get("description") for item in schema["properties"].values())


@pytest.mark.parametrize(
    ("data", "good"),
    [
        (BASE, True),
        (BASE | {"mask": "Causal()", "pse": None}, True),
        (BASE | {"mask": {"kind": "and", "parts": ["Full()", {"kind": "causal"}]}}, True),
        (
            BASE
            | {"mask": {"kind": "cut", "mask": "Full()", "q_range": [1, None], "kv_range": [0, 3]}},
            True,
        ),
        (BASE | {"version": 2}, False),
        (BASE | {"maks": 1}, False),
        ({"num_heads": 4}, False),
        (BASE | {"mask": {"kind": "nope"}}, False),
        (BASE | {"mask": {"kind": "sliding_window", "size": "3"}}, False),
        (BASE | {"mask": {"kind": "sliding_window", "size": 3, "sizes": 4}}, False),
        (BASE | {"mask": {"kind": "not", "part": {"kind": "sliding_window"}}}, False),
        (BASE | {"mask": {"kind": "prefix", "length": [1, "2"]}}, False),
        (BASE | {"dropout": 1}, False),
        (BASE | {"layout": "bsdn"}, False),
        (BASE | {"num_kv_heads": 0}, False),
    ],
    ids=str,
)
def test_the_schema_agrees_with_the_model(data: dict[str, Any], good: bool) -> None:
    assert validates(data, AttentionConfig.model_json_schema()) is good
    if good:
        AttentionConfig.model_validate(data)
    else:
        fails(data)


TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def validates(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether `value` is valid under the part of JSON Schema 2020-12 that pydantic writes.

    An unknown keyword is an error of the test, so that nothing passes unread.
    """
    root = schema if root is None else root

    def inner(one: Any, sub: Any) -> bool:
        return validates(one, sub, root)

    def typed(name: str) -> bool:
        is_bool = isinstance(value, bool) and name != "boolean"
        return isinstance(value, TYPES[name]) and not is_bool

    def keyword(key: str, said: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        match key:
            case "$ref":
                target = root
                for step in said.removeprefix("#/").split("/"):
                    target = target[step]
                return inner(value, target)
            case "type":
                return typed(said)
            case "const":
                return bool(value == said) and type(value) is type(said)
            case "enum":
                return value in said
            case "anyOf":
                return any(inner(value, sub) for sub in said)
            case "oneOf":
                return sum(inner(value, sub) for sub in said) == 1
            case "properties":
                return not isinstance(value, dict) or all(
                    inner(value[name], sub) for name, sub in said.items() if name in value
                )
            case "required":
                return not isinstance(value, dict) or set(said) <= set(value)
            case "additionalProperties":
                known = schema.get("properties", {})
                extra = [v for k, v in value.items() if k not in known] if typed("object") else []
                return not extra if said is False else all(inner(v, said) for v in extra)
            case "items":
                return not isinstance(value, list) or all(inner(item, said) for item in value)
            case "prefixItems":
                return not isinstance(value, list) or all(map(inner, value, said))
            case "minItems":
                return not isinstance(value, list) or len(value) >= said
            case "maxItems":
                return not isinstance(value, list) or len(value) <= said
            case "minLength":
                return not isinstance(value, str) or len(value) >= said
            case "minimum":
                return not number or value >= said
            case "maximum":
                return not number or value <= said
            case "exclusiveMinimum":
                return not number or value > said
            case "exclusiveMaximum":
                return not number or value < said
            case "$defs" | "default" | "description" | "title" | "discriminator":
                return True
        raise AssertionError(f"the schema uses {key!r}, which this validator does not know")

    return all(keyword(key, said) for key, said in schema.items())
