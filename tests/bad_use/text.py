"""Wrong texts, configurations, command lines, registries and names."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attnkit as ak
from attnkit import layouts, masks, pse
from attnkit.__main__ import main
from attnkit.backends import BACKENDS
from attnkit.errors import AttnkitError
from tests.bad_use.values import (
    HUGE,
    NOT_A_COUNT,
    NOT_A_NAME,
    NOT_A_REAL,
    Case,
    Mute,
    Odd,
    Values,
    each,
    without,
)

BASE = {"num_heads": 4, "head_dim": 8}

NOT_A_TEXT: Values = {
    "none": lambda: None,
    "int": lambda: 3,
    "bytes": lambda: b"Causal()",
    "a list": list,
    "a mask": masks.Causal,
    "an object": Odd,
    "an object without repr": Mute,
}

# What no grammar of masks or biases reads; {} is where a good term stands.
BROKEN = [
    "",
    " ",
    "(",
    ")",
    "{}(",
    "{} {}",
    "{} and {}",
    "not {}",
    "{} + 1",
    "{} == {}",
    "{} < {}",
    "{} if 1 else {}",
    "lambda: {}",
    "[{} for x in (1,)]",
    "{{}}: {}",
    "f'{}'",
    "b'x'",
    "3",
    "-3",
    "'Causal()'",
    "None",
    "...",
    "x",
    "x.y",
    "x.y()",
    "__import__('os')",
    "os.system('true')",
    "{}.region(2, 2)",
    "{}[0]",
    "{}[0:1]",
    "{}[0:1:2, 0:1]",
    "{}['a':'b', 0:1]",
    "{}[::, ::][0]",
    "{}()",
    "*{}",
    "**{}",
    "{}; {}",
    "{}\n{}",
    "\0",
    "\ud800",
    "{} @ {}",
    "{} * 2",
    "~3",
    "~'x'",
    "{} & 3",
    "{} | None",
    "{} - 'x'",
    "Unknown()",
    "causal()",
    "Causal(1, 2, 3)",
    "Causal(x=1)",
    "Causal(*[1])",
    "Causal(**{{}})",
    "SlidingWindow()",
    "SlidingWindow(size=3, size=4)",
    "SlidingWindow('3')",
    "SlidingWindow(3.0)",
    "SlidingWindow(True)",
    "SlidingWindow(None)",
    "SlidingWindow(-1)",
    "SlidingWindow(1 + 1j)",
    "SlidingWindow(1e999)",
    "Prefix([])",
    "Prefix({{}})",
    "Padding('abc')",
    "PerHead([])",
    "And(({},))",
    "Dense('')",
    "Dense('x')",
    "Predicate(3)",
    "ALiBi()",
    "ALiBi('2')",
    "ALiBi(-1)",
    "ALiBi(2, slopes=[1.0])",
    "ALiBi(slopes=['a'])",
    "T5Relative()",
    "T5Relative(2, table=3)",
    "Documents([[1], 2])",
    "Band()",
    "Band(1)",
    "Band('a', 'b')",
    "Columns(2, 1)",
    "Rows(-1)",
    "Causal(align='left')",
    "0x",
    "1_",
    "'open",
    '"""',
    "#",
    "{} #\n{}",
    "Causal(" * 20,
    "(" * 300 + ")" * 300,
    "~" * 3000 + "{}",
    "{}" + "[0:, 0:]" * 3000,
    "(" * 90 + "x",
    "9" * 5000,
    "SlidingWindow(" + "9" * 5000 + ")",
    "SlidingWindow(-" + "9" * 400 + ")",
    "x" * (1 << 20),
    "é" * 1000,
    " & ".join(["{}"] * 2) + " &",
    "Causal\u200b()",
]

NOT_YAML = [
    "",
    "3",
    "[1, 2]",
    "a: [",
    "a: {{",
    "\0",
    "\t- a",
    "a: *none",
    "&a [*a]",
    "a: b: c",
    "? [1]\n: 2",
    "!!int foo",
    "!!float x",
    "!!bool maybe",
    "!!timestamp x",
    "!!python/name:os.system",
    "!odd x",
    "num_heads: 2001-99-99",
    "num_heads: !!int ''",
    "num_heads: !!set {{a}}",
    "--- a\n--- b",
    "num_heads: 4\nnum_heads: 4",
    "%YAML 9.9\n---\na: 1",
    "a: !!binary 'x'",
    "<<: 3",
    "a: 'open",
    "attention.yaml",
    "/etc/passwd",
    "a: " + "[" * 20_000,
    "a: " + "9" * 5_000,
    "x" * 1_100_000,
    "\n".join("-" * k for k in range(5)),
    "a: |\n b\n\tc",
    "{a: 1, b",
    "key with: two: colons",
]

NOT_JSON = [
    "",
    "{",
    "[",
    "nul",
    "{'a': 1}",
    '{"a": 1,}',
    '{"num_heads": 1, "num_heads": 2}',
    "3",
    '"x"',
    "[1]",
    "null",
    "true",
    "NaN",
    '{"num_heads": NaN}',
    '{"a": ' * 5000,
    "[" * 100_000,
    '{"num_heads": ' + "9" * 5000 + "}",
    "\0",
    '{"\ud800": 1}',
    "{}",
    '{"num_heads": 1e400}',
    "x" * 1_100_000,
    '{"num_heads": 4.0, "head_dim": 8}',
    '{"num_heads": "4", "head_dim": 8}',
]


def cases() -> Iterator[Case]:
    yield from texts()
    yield from configurations()
    yield from registries()
    yield from command_lines()


def texts() -> Iterator[Case]:
    for name, parse, good in (
        ("masks.parse", masks.parse, "Causal()"),
        ("pse.parse", pse.parse, "ALiBi(2)"),
    ):
        yield from each(name, parse, NOT_A_TEXT)
        for k, text in enumerate(BROKEN):
            written = text.replace("{}", good).replace("{{", "{").replace("}}", "}")
            yield Case(f"{name} {k}: {written[:30]!r}", lambda p=parse, t=written: p(t))
    yield Case("masks.parse of a bias", lambda: masks.parse("ALiBi(2)"))
    yield Case("pse.parse of a mask", lambda: pse.parse("Causal()"))
    chain = " | ".join(f"(Causal() & ~SlidingWindow({k}))" for k in range(1, 60_000))
    yield Case("masks.parse of 2 MB", lambda: masks.parse(chain))
    yield Case("masks.parse of 10 MB", lambda: masks.parse("Causal() & " * 1_000_000 + "Full()"))


def configurations() -> Iterator[Case]:
    config = ak.AttentionConfig
    heads = ak.MultiHeadAttentionConfig
    for k, text in enumerate(NOT_YAML):
        yield Case(f"YAML {k}: {text[:30]!r}", lambda t=text: config.model_validate(t))
    for k, text in enumerate(NOT_JSON):
        yield Case(f"JSON {k}: {text[:30]!r}", lambda t=text: config.model_validate_json(t))
    yield from each("AttentionConfig", config.model_validate, without(NOT_A_TEXT, "a mask"))
    yield from each(
        "AttentionConfig JSON", config.model_validate_json, without(NOT_A_TEXT, "bytes")
    )
    files: Values = {
        "missing": lambda: Path("/no/such/file.yaml"),
        "a directory": lambda: Path(tempfile.gettempdir()),
        "NUL": lambda: Path("a\0b"),
        "too long": lambda: Path("x" * 5_000),
        "no UTF-8": binary,
        "none": lambda: None,
        "int": lambda: 3,
        "bytes": lambda: b"num_heads: 4",
        "an object": Odd,
    }
    yield from each("AttentionConfig.from_yaml", config.from_yaml, files)
    count = [NOT_A_COUNT, HUGE]
    flag: Values = {"a string": lambda: "no", "int": lambda: 1, "none": lambda: None, "list": list}
    keys: dict[str, list[Values]] = {
        "num_heads": count,
        "head_dim": count,
        "num_kv_heads": [without(NOT_A_COUNT, "none"), HUGE, {"3": lambda: 3}],
        "scale": [without(NOT_A_REAL, "none")],
        "dropout": [NOT_A_REAL, {"1.0": lambda: 1.0, "-0.1": lambda: -0.1}],
        "softcap": [without(NOT_A_REAL, "none"), {"0": lambda: 0.0, "-1": lambda: -1.0}],
        "sink": [flag],
        "layout": [NOT_A_NAME],
        "backend": [NOT_A_NAME],
        "version": [NOT_A_COUNT, {"2": lambda: 2}],
        "mask": [part_values("causal")],
        "pse": [without(part_values("alibi"), "none")],
    }
    for key, tables in keys.items():
        yield from each(
            f"AttentionConfig {key}",
            lambda bad, k=key: config.model_validate({**BASE, k: bad}),
            *tables,
        )
        yield from each(
            f"AttentionConfig({key}=)", lambda bad, k=key: config(**{**BASE, k: bad}), *tables
        )
    more: dict[str, list[Values]] = {
        "dim": [*count, {"17": lambda: 17}],
        "kv_dim": [without(NOT_A_COUNT, "none"), HUGE],
        "bias": [without(flag, "list")],
        "rotary": [
            without(flag, "int"),
            {
                "1": lambda: 1,
                "odd": lambda: {"rotary_dim": 3},
                "unknown": lambda: {"bsae": 1.0},
                "nan": lambda: {"base": float("nan")},
                "10**400": lambda: {"base": 10**400},
            },
        ],
    }
    for key, tables in more.items():
        yield from each(
            f"MultiHeadAttentionConfig {key}",
            lambda bad, k=key: heads.model_validate({"dim": 16, "num_heads": 4, k: bad}),
            *tables,
        )
    yield Case(
        "AttentionConfig, unknown keys",
        lambda: config.model_validate({**BASE, **{f"k{k}": k for k in range(9_000)}}),
    )
    yield Case(
        "AttentionConfig, JSON of 20,000 keys",
        lambda: config.model_validate_json(json.dumps({f"k{k}": k for k in range(20_000)})),
    )
    yield Case(
        "AttentionConfig, 6,000 bad parts",
        lambda: config.model_validate(
            {**BASE, "mask": {"kind": "and", "parts": [{"kind": "x"}] * 6_000}}
        ),
    )
    yield Case("AttentionConfig, laughs", lambda: config.model_validate(laughs()))
    yield Case("AttentionConfig, cyclic", lambda: config.model_validate({**BASE, "mask": cyclic()}))
    yield Case(
        "to_yaml of a function",
        lambda: config(**BASE, mask=masks.Predicate(lambda b, h, i, j: i > j)).to_yaml(),
    )
    yield Case(
        "model_dump_json of a function",
        lambda: config(**BASE, mask=masks.Predicate(lambda b, h, i, j: i > j)).model_dump_json(),
    )
    for path in ("to_yaml", "model_dump", "model_dump_json"):
        yield Case(
            f"{path} of 30,000 lengths",
            lambda p=path: getattr(config(**BASE, mask=masks.Padding([3] * 30_000)), p)(),
        )


def part_values(kind: str) -> Values:
    """Return what is no mask (or bias) in a file."""
    return {
        "none": lambda: None,
        "int": lambda: 3,
        "bool": lambda: True,
        "a list": list,
        "an object": Odd,
        "an object without repr": Mute,
        "empty": dict,
        "a broken text": lambda: f"{kind}(",
        "the kind": lambda: kind,
        "an unknown kind": lambda: {"kind": "nope"},
        "a kind that is a list": lambda: {"kind": [kind]},
        "a kind that is a number": lambda: {"kind": 10**5000},
        "an unknown key": lambda: {"kind": kind, "aling": "top_left"},
        "a wrong word": lambda: {"kind": kind, "align": "left"},
        "a wrong type": lambda: {"kind": kind, "align": 3},
        "a huge text": lambda: {"kind": kind, "align": "x" * 1_000_000},
        "keys that are no strings": lambda: {"kind": kind, 3: 4},
        "bytes": lambda: kind.encode(),
        "the other family": lambda: pse.ALiBi(4) if kind == "causal" else masks.Causal(),
        "cyclic": cyclic,
    }


def binary() -> Path:
    path = Path(tempfile.mkdtemp()) / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    return path


def cyclic() -> dict[str, Any]:
    mask: dict[str, Any] = {"kind": "not"}
    mask["part"] = mask
    return mask


def laughs() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 25)]
    return "\n".join(lines)


def registries() -> Iterator[Case]:
    known: dict[str, Any] = {
        "MASKS": masks.MASKS,
        "PSE": pse.PSE,
        "LAYOUTS": layouts.LAYOUTS,
        "BACKENDS": BACKENDS,
    }
    for name, registry in known.items():
        yield from each(f"{name}[]", registry.__getitem__, NOT_A_NAME)
        yield from each(f"{name}.remove", registry.remove, NOT_A_NAME)
        yield from each(
            f"{name}.add name",
            lambda bad, r=registry: r.add(bad, next(iter(r.items()))[1]),
            without(NOT_A_NAME, "empty", "mistyped", "a megabyte"),
        )
        (first, _), (_, second), *_ = registry.items()
        yield Case(f"{name}.add taken", lambda r=registry, n=first, e=second: r.add(n, e))


class _Told(AttnkitError):
    """What a command line that fails with one line counts as."""


def command_lines() -> Iterator[Case]:
    folder = Path(tempfile.gettempdir())
    lines: dict[str, Callable[[], list[str]]] = {
        "nothing": list,
        "an unknown command": lambda: ["operate"],
        "an unknown option": lambda: ["plan", "--fast"],
        "no file": lambda: ["plan", "--config", "/no/such.yaml", "--q-len", "8"],
        "a directory": lambda: ["plan", "--config", str(folder), "--q-len", "8"],
        "NUL in a path": lambda: ["plan", "--config", "a\0b", "--q-len", "8"],
        "a long path": lambda: ["plan", "--config", "x" * 5_000, "--q-len", "8"],
        "no UTF-8": lambda: ["plan", "--config", str(binary()), "--q-len", "8"],
        "an endless file": lambda: ["plan", "--config", "/dev/zero", "--q-len", "8"],
        "no sizes": lambda: ["plan", "--config", good()],
        "a plot without a format": lambda: sized("--plot", "plan"),
        "a plot over a directory": lambda: sized("--plot", str(folder)),
        "a plot in no directory": lambda: sized("--plot", "/no/such/plan.png"),
        "a plot of an odd format": lambda: sized("--plot", str(folder / "plan.odd")),
        "a plot with NUL": lambda: sized("--plot", "a\0.png"),
        "lengths of a dense layout": lambda: sized("--lengths", "3"),
        "an unknown dtype": lambda: sized("--dtype", "int8"),
        "an unknown backend": lambda: sized("--backend", "nope"),
        "a batch that does not end": lambda: sized("--batch", "10000000"),
        "an unknown case": lambda: ["doctor", "--only", "mode-33"],
        "a huge case": lambda: ["doctor", "--only", "x" * 1_000_000],
        "an unknown dtype of a case": lambda: ["doctor", "--only", "mode-3@int8"],
        "two levels": lambda: ["doctor", "--quick", "--full"],
        "a report over a directory": lambda: ["doctor", "--out", str(folder)],
        "a report in no directory": lambda: ["doctor", "--out", "/no/such/report.json"],
        "a report without a name": lambda: ["doctor", "--out", ""],
        "a report with NUL": lambda: ["doctor", "--out", "a\0b"],
        "a report under a file": lambda: ["doctor", "--out", "/dev/null/report.json"],
        "no such device": lambda: ["doctor", "--device", "abacus"],
        "a device of meta": lambda: ["doctor", "--device", "meta"],
        "no such backend to test": lambda: ["doctor", "--device", "cpu", "--backend", "nope"],
    }
    counts = [
        "0",
        "-1",
        "1.5",
        "",
        "x",
        "9" * 30,
        "9" * 5_000,
        "2147483648",
        "1e3",
        "0x8",
        "\u00bd",
    ]
    for option in ("--q-len", "--kv-len", "--batch"):
        for count in counts:
            lines[f"{option} {count[:12]}"] = lambda o=option, c=count: sized(o, c)
    for text in ("", ",", "3,", "a", "3;5", "-1", "1.5", "9" * 30, "1," * 9_999 + "1"):
        lines[f"--lengths {text[:12]}"] = lambda t=text: [
            "plan",
            "--config",
            good("{num_heads: 2, head_dim: 8, layout: TND}"),
            "--lengths",
            t,
        ]
    for name, make in lines.items():
        yield Case(f"command line, {name}", lambda m=make: command_line(m()))


def command_line(arguments: list[str]) -> None:
    """Run it; raise what was written if it failed as documented: code 2 and one line."""
    import contextlib
    import io

    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    told = err.getvalue()
    if code == 2 and told.startswith("error: ") and told.count("\n") == 1:
        raise _Told(told)


def good(text: str = "{num_heads: 2, head_dim: 8, mask: Causal()}") -> str:
    path = Path(tempfile.mkdtemp()) / "good.yaml"
    path.write_text(text)
    return str(path)


def sized(*more: str) -> list[str]:
    return ["plan", "--config", good(), "--q-len", "8", *more]
