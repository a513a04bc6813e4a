"""One model type, one way: every mode against eager."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.build import Case
from tests.zoo.judge import GRADIENTS, OUTPUTS, STRUCTURE, differences
from tests.zoo.modes import MODES, modes_of
from tests.zoo.ways import WAYS, Calls, counted, environment

__all__ = ["UNSTEADY", "Eager", "checked"]

CHANGING = {"bf16", "dropout", "checkpoint"}  # modes that leave the model another (batch norms)
WITH_GRADIENTS = {"grads", "checkpoint", "dropout", "image_grads"}


UNSTEADY = "eager itself moves when attention is rounded differently"
ROUNDING = 5e-7


def go(case: Case, mode: str, model: nn.Module, **how: Any) -> tuple[dict[str, Tensor], Calls]:
    """Run a mode; return its numbers and who called attention."""
    with counted(model, **how) as calls, torch.set_grad_enabled(mode in WITH_GRADIENTS):
        warnings.simplefilter("ignore")
        return MODES[mode](case, model), calls


def said(error: BaseException) -> str:
    """Return an error in one bounded line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:180]}"


@torch.no_grad()
def shake(model: nn.Module, noise: float) -> None:
    """Round the weights in another way, where attention that a model writes out cannot be."""
    random = torch.Generator().manual_seed(17)
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.mul_(1 + noise * torch.randn(weight.shape, generator=random).to(weight.dtype))


class Eager:
    """What eager attention gives for each mode of a case: computed once, for every way."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.kept: dict[str, Any] = {}

    def of(self, mode: str) -> tuple[dict[str, Tensor], Calls] | str:
        """Return the result and the calls, or why eager itself has none."""
        if mode not in self.kept:
            self.kept[mode] = self._run(mode)
        return self.kept[mode]

    def _run(self, mode: str, **how: Any) -> Any:
        model = copy.deepcopy(self.case.model)
        if how.get("noise") and not self.kept[mode][1].by_module:
            shake(model, how["noise"])
        try:
            found, calls = go(self.case, mode, model, **how)
        except NotImplementedError as error:
            return f"eager has none: {error}"
        except Exception as error:
            return f"eager fails: {said(error)}"
        for name, tensor in found.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return f"eager gives no finite {name}"
        if not found:
            return "eager gives nothing to compare"
        return found, calls

    def calls(self) -> dict[str, int]:
        """Return how often each mode called the interface."""
        return {
            mode: sum(kept[1].by_module.values())
            for mode, kept in self.kept.items()
            if not isinstance(kept, str)
        }

    def moves(self, mode: str, most: float) -> str | None:
        """Return why eager's result is no yardstick here, or None.

        A router that chooses between nearly equal experts, or a quantizer, makes of a rounding
        error another answer. Such a check is repeated with other weights.
        """
        for noise, why in ((0.0, "eager does not repeat itself"), (ROUNDING, UNSTEADY)):
            again = self._run(mode, noise=noise)
            if isinstance(again, str) or differences(self.kept[mode][0], again[0], most):
                return why
        return None

    def with_empty_rows(self, mode: str) -> dict[str, Tensor] | None:
        """Return eager's result with rows without a key as 0, as they are in attnkit.

        Eager gives such a row the mean of all values. Padding is such a row, and nobody reads it,
        but for a few models that pool over it.
        """
        again = self._run(mode, empty_rows=True)
        return None if isinstance(again, str) else again[0]


def checked(eager: Eager, way: str, modes: list[str] | None = None) -> dict[str, str]:
    """Return "ok", "skipped: why" or what is wrong, by mode."""
    with environment(way):
        return in_environment(eager, way, modes)


def in_environment(eager: Eager, way: str, modes: list[str] | None) -> dict[str, str]:
    """Return what `checked` does; transformers is as this way needs it."""
    case = eager.case
    found: dict[str, str] = {}
    try:
        switched = copy.deepcopy(case.model)
        WAYS[way](switched)
    except Exception as error:
        return {
            mode: f"raises {said(error)}" for mode in modes_of(case) if (not modes or mode in modes)
        }
    for mode in modes_of(case):
        if modes and mode not in modes:
            continue
        found[mode] = one(eager, way, mode, switched)
    return found


def one(eager: Eager, way: str, mode: str, switched: nn.Module) -> str:
    """Return how one mode went."""
    with environment("eager"):
        want = eager.of(mode)
    if isinstance(want, str):
        return f"skipped: {want}"
    try:
        model = switched
        if mode in CHANGING:
            model = copy.deepcopy(eager.case.model)
            WAYS[way](model)
        got, calls = go(eager.case, mode, model)
    except Exception as error:
        return f"raises {said(error)}"
    wrong = called(want[1], calls, way)
    if wrong:
        return wrong
    if mode == "bf16":
        return coarse(eager, want[0], got)
    most = GRADIENTS if mode in WITH_GRADIENTS else OUTPUTS
    wrong = differences(want[0], got, most)
    if wrong and mode != "dropout" and not wrong.startswith(STRUCTURE):
        with environment("eager"):
            zeroed = eager.with_empty_rows(mode)
            if zeroed is not None and differences(zeroed, got, most) is None:
                return "ok"
            why = eager.moves(mode, most)
        if why:
            return f"skipped: {why}"
    return f"differs {wrong}" if wrong else "ok"


def called(want: Calls, got: Calls, way: str) -> str | None:
    """Return what is wrong with who called attention, or None."""
    if way == "attnkit" and not got.plans:
        return "attnkit never ran"
    if not got.by_module and (way != "attnkit" or want.by_module):
        return "never calls the interface"
    if got.by_name.get("eager"):
        return f"{got.by_name['eager']} calls are still eager's"
    if want.dropped and not got.dropped:
        return "no call is told of dropout"
    missing = want.by_module.keys() - got.by_module.keys()
    return f"{len(missing)} of {len(want.by_module)} modules do not call" if missing else None


def coarse(eager: Eager, want: dict[str, Tensor], got: dict[str, Tensor]) -> str:
    """Compare in bfloat16: the median error against float32 is at most twice eager's own.

    Some roundings of the numbers themselves are allowed besides; few numbers tell nothing.
    """
    exact = eager.of("plain")
    if isinstance(exact, str):
        return "skipped: " + exact
    for name, right in exact[0].items():
        if not right.is_floating_point() or name not in got or right.numel() < 64:
            continue
        own = (want[name].float() - right).abs().median()
        ours = (got[name].float() - right).abs().median()
        floor = 2**-6 * right.abs().mean()
        if not bool(ours.isfinite()) or float(ours) > 2 * float(own) + float(floor):
            return f"differs {name}: median error {float(ours):.1e}, eager's {float(own):.1e}"
    return "ok"
