"""``python -m attnkit plan``: the plan of a configuration, without tensors and without code."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attnkit import layouts
from attnkit.backends import BACKENDS, make_plan
from attnkit.config import AttentionConfig, MultiHeadAttentionConfig, load_config
from attnkit.doctor.findings import npu_absence
from attnkit.doctor.screen import GOOD, Screen, UsageError
from attnkit.doctor.suite import make_request
from attnkit.errors import BackendRefused, shown
from attnkit.layouts import SeqLens, Sizes
from attnkit.modules import MultiHeadAttention
from attnkit.parallel import ParallelPlan
from attnkit.parallel.balance import BALANCES
from attnkit.parallel.choices import METHODS, Choices
from attnkit.parallel.whole import spread
from attnkit.planner import Plan, Request
from attnkit.pse import Pse

__all__ = ["add_arguments", "add_request", "check_ranks", "planned", "run"]

Config = AttentionConfig | MultiHeadAttentionConfig

_MOST_BATCH = 4_096
_LONGEST = 2**31 - 1
_MOST_NUMBERS = 2**60  # in one tensor

_CONFIG = (
    "an AttentionConfig or a MultiHeadAttentionConfig (it has `dim`) in YAML; its layout decides "
    "which sizes are needed"
)
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_request(parser)
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw the cells of calls, or of ranks"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def add_request(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say what is planned."""
    for option, metavar, read, told in (
        ("--config", "FILE", Path, _CONFIG),
        ("--at", "KEY", str, "where in the file, such as model.attention"),
        ("--mask", "TEXT", str, "instead of the file's, such as 'Causal() | Columns(0, 4)'"),
        ("--num-heads", "H", _count, "instead of the file's (without one: 8)"),
        ("--head-dim", "D", _count, "instead of the file's (without one: 64)"),
        ("--batch", "B", _batch, "batch elements (default 1)"),
        ("--q-len", "N", _count, "queries of each"),
        ("--kv-len", "M", _count, "keys of each (default: N)"),
        ("--lengths", "3,5,8", _lengths, "packed: queries of each sequence"),
        ("--kv-lengths", "3,5,8", _lengths, "packed: keys of each (default: as many as queries)"),
        ("--ranks", "P", _count, "plan for tokens that are spread over ranks; no group is needed"),
        ("--heads-ways", "U", _count, "with --ranks: neighbours that split the heads"),
        ("--stages", "K", _count, "with --ranks: parts in which needed keys arrive"),
    ):
        parser.add_argument(option, metavar=metavar, type=read, help=told)
    parser.add_argument("--method", choices=METHODS, help="with --ranks: what is exchanged")
    parser.add_argument("--balance", choices=BALANCES, help="with --ranks: who has which tokens")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), help="default: what the file says"
    )
    parser.add_argument(
        "--train", action="store_true", help="plan for training: dropout, and a backward"
    )


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Run the command and return its exit code."""
    check_ranks(arguments)
    if arguments.plot is not None:
        _check_picture(arguments.plot)  # a file that cannot be is known before the plan is made
    plan, note = planned(arguments)
    if arguments.json:
        screen.line(json.dumps(plan.to_dict() | ({"note": note} if note else {}), indent=1))
    else:
        screen.text(plan.explain())
        if note:
            head, rest = f"  {'note':<12}", " " * 16
            screen.line(textwrap.fill(note, 80, initial_indent=head, subsequent_indent=rest))
    if arguments.plot is not None:
        _plot(plan, arguments.plot)
    return GOOD


def planned(arguments: argparse.Namespace) -> tuple[Plan | ParallelPlan, str]:
    """Return the plan that arguments ask for, and what could not be asked here."""
    config = _config(arguments)
    request, bias = _request(config, arguments)
    if arguments.ranks is None:
        return _plan(request, config.backend)
    return _spread(request, bias, config.backend, arguments)


def check_ranks(arguments: argparse.Namespace) -> None:
    """Complain about what is said of ranks where there are none."""
    if arguments.ranks is None and (said := _said_of_ranks(arguments)):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in said)
        raise UsageError(f"{options}: say for how many ranks, --ranks P")


def _said_of_ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what is said of ranks by its name, which is that of an argument of `plan`."""
    names = ("method", "balance", "heads_ways", "stages")
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _config(arguments: argparse.Namespace) -> Config:
    """Return the configuration of the file, with what the command line says instead."""
    names = ("mask", "num_heads", "head_dim", "backend")
    given = ((name, getattr(arguments, name)) for name in names)
    said = {name: value for name, value in given if value is not None}
    if arguments.config is not None:
        config = load_config(arguments.config, arguments.at or "")
        return type(config)(**dict(config) | said) if said else config
    if "mask" not in said:
        raise UsageError("say what to plan: --config FILE, or --mask TEXT")
    layout = "BSND" if arguments.lengths is None else "TND"
    return AttentionConfig(**{"num_heads": 8, "head_dim": 64} | said, layout=layout)


def _request(config: Config, arguments: argparse.Namespace) -> tuple[Request, Pse | None]:
    """Return the request that a module of this configuration would make, and its bias."""
    layout = layouts.get(config.layout)
    seqlens = _seqlens(config.layout, layout.packed, arguments)
    if seqlens is not None:
        batch, q_len, kv_len = 1, seqlens.total_q, seqlens.total_kv
    else:
        batch, q_len = arguments.batch or 1, arguments.q_len
        kv_len = arguments.kv_len or q_len
    with torch.device("meta"):  # the projections of a large module take no memory
        built = config.model_copy(update={"backend": "auto"}).build()
    module = built.attention if isinstance(built, MultiHeadAttention) else built
    value_dim = built.v_head_dim if isinstance(built, MultiHeadAttention) else built.head_dim
    largest = batch * max(q_len, kv_len) * module.num_heads * module.head_dim
    if largest > _MOST_NUMBERS:
        raise UsageError(
            f"a tensor of {largest:,} numbers (batch {batch}, {max(q_len, kv_len)} tokens, "
            f"{module.num_heads} heads of {module.head_dim}) is more than any device addresses"
        )
    query = Sizes(batch, q_len, module.num_heads, module.head_dim)
    key = Sizes(batch, kv_len, module.num_kv_heads, module.head_dim)
    request = make_request(
        module.composition,
        (query, key, replace(key, dim=value_dim)),
        getattr(torch, arguments.dtype),
        "meta",
        seqlens,
        module.sink,
        arguments.train,
    )
    return request, module.composition.pse


def _seqlens(name: str, packed: bool, arguments: argparse.Namespace) -> SeqLens | None:
    """Return the lengths of packed sequences; complain about sizes that do not belong."""
    dense = {"--batch": arguments.batch, "--q-len": arguments.q_len, "--kv-len": arguments.kv_len}
    given = [option for option, value in dense.items() if value is not None]
    if packed:
        if arguments.lengths is None:
            raise UsageError(f"layout {name} packs sequences: say --lengths 3,5,8")
        if given:
            raise UsageError(f"layout {name} takes --lengths, not {', '.join(given)}")
        return SeqLens(arguments.lengths, arguments.kv_lengths)
    if arguments.lengths is not None or arguments.kv_lengths is not None:
        raise UsageError(f"layout {name} takes --batch, --q-len and --kv-len, not --lengths")
    if arguments.q_len is None:
        raise UsageError(f"layout {name} needs --q-len N (and --batch B, --kv-len M)")
    return None


def _plan(request: Request, name: str) -> tuple[Plan, str]:
    """Return the plan for this machine's device, and what could not be asked here."""
    absence = npu_absence()
    request = replace(request, device="npu" if name == "ascend" or absence is None else "cpu")
    try:
        return make_plan(request, name), ""
    except BackendRefused as error:
        if name != "ascend" or any(reason.code != "torch-npu" for reason in error.refusals):
            raise
    # The calls follow from the kernel's contract alone; only the installed op is not asked.
    plan = BACKENDS[name].plan(request)
    plan.verify()
    return plan, f"{absence}, so no installed op was asked whether it takes these calls"


def _spread(
    request: Request, bias: Pse | None, name: str, arguments: argparse.Namespace
) -> tuple[ParallelPlan, str]:
    """Return the plan for ranks; that of "ascend" has the calls of "emulated" where there is none.

    The calls follow from the kernel's contract alone.
    """
    absence, note = npu_absence(), ""
    if name == "ascend" and absence is not None:
        name, note = "emulated", f"{absence}, so its calls are those that 'emulated' makes"
    request = replace(request, device="npu" if absence is None else "cpu")
    said = _said_of_ranks(arguments)
    balance = said.pop("balance", "auto")
    return spread(request, bias, arguments.ranks, balance, Choices(**said), name), note


def _check_picture(path: Path) -> None:
    """Complain about a picture that cannot be written, or that would get another name."""
    if not path.suffix:
        raise UsageError(f"--plot {path}: name a file with its format, such as plan.png")
    try:
        if path.is_dir():
            raise UsageError(f"--plot {path}: is a directory; name a file in it")
        if not path.parent.is_dir():
            raise UsageError(f"--plot {path}: there is no directory {path.parent}")
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {path}: {error}") from None


def _plot(plan: Plan | ParallelPlan, path: Path) -> None:
    figure = plan.plot()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {path}: {error}") from None


def _batch(text: str) -> int:
    count = _count(text)
    if count > _MOST_BATCH:
        raise argparse.ArgumentTypeError(
            f"{text} batch elements; a plan is shown for at most {_MOST_BATCH:,} of them"
        )
    return count


def _count(text: str) -> int:
    with suppress(ValueError):
        if (count := _whole(text)) > 0:
            return count
    raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from 1 to {_LONGEST}")


def _lengths(text: str) -> Sequence[int]:
    try:
        return [_whole(part.strip()) for part in text.split(",", maxsplit=_MOST_BATCH)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a list of lengths such as 3,5,8 (at most {_MOST_BATCH:,} of "
            f"them, each at most {_LONGEST})"
        ) from None


def _whole(text: str) -> int:
    """Return a number of at most `_LONGEST`; digits are counted before they are read."""
    if not text.isdecimal() or len(text) > len(str(_LONGEST)) or int(text) > _LONGEST:
        raise ValueError(text)
    return int(text)
