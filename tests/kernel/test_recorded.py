"""What an Ascend 910B answered, number by number.

The file holds inputs, arguments, outputs, gradients and statistics that MindSpore's own test of
``ops.speed_fusion_attention`` keeps as expected values, recorded on that device. Outputs are
float16, and the emulator must give every digit of them. Statistics are float32, and gradients are
float16 numbers of differences that nearly cancel: both may differ by the last rounding, which
follows from the order in which a processor sums four products.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnkit.kernel import AttenMask, dropout_bytes, fusion_attention

RECORDED = json.loads((Path(__file__).parent / "recorded" / "ascend_910b.json").read_text())
SLOPES = torch.tensor([0.0625, 0.0039])

# Half of the last decimal that was written down.
WRITTEN: dict[str, Any] = {"rtol": 5e-9, "atol": 5e-9}
SINGLE: dict[str, Any] = {"rtol": 2 * torch.finfo(torch.float32).eps, "atol": 5e-9}
HALF: dict[str, Any] = {"rtol": torch.finfo(torch.float16).eps, "atol": 5e-9}


def inputs(case: dict[str, Any]) -> torch.Tensor:
    np.random.seed(RECORDED["seed"])
    return torch.from_numpy(np.random.randn(*case["shape"]).astype(np.float16))


def arguments(case: dict[str, Any], x: torch.Tensor) -> dict[str, Any]:
    """The call's arguments, its tensors included."""
    b, n, s, _ = (1, *x.shape) if x.dim() == 3 else x.shape
    masks = {
        None: None,
        "zeros of the shape [B, N, Sq, Skv]": torch.zeros(b, n, s, s, dtype=torch.bool),
        "causal 2048 x 2048": AttenMask.causal().build(),
    }
    biases = {None: None, "the input itself": x, "slopes [0.0625, 0.0039] float32": SLOPES}
    given = {"scale": case["scale"], "keep_prob": case["keep_prob"], **case["arguments"]}
    given |= {"atten_mask": masks[case["atten_mask"]], "pse": biases[case["pse"]]}
    if "dropout_keep" in case:
        bits = np.packbits(np.array(case["dropout_keep"], np.uint8), bitorder="little")
        padded = np.zeros(dropout_bytes(b * n * s * s), np.uint8)
        padded[: len(bits)] = bits
        given["dropout_mask"] = torch.from_numpy(padded)
    return given


def same(found: torch.Tensor, recorded: list[float], within: dict[str, Any] = WRITTEN) -> None:
    wanted = torch.tensor(recorded, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double().flatten(), wanted, **within)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"case {case['case']}")
def test_the_device_answered_this(case: dict[str, Any]):
    x = inputs(case)
    q, k, v = (x.clone().requires_grad_() for _ in range(3))
    # Silent rules: a mode without a mask, and decisions given from outside.
    out = fusion_attention(
        q, k, v, case["head_num"], case["input_layout"], allow_silent=True, **arguments(case, x)
    )
    same(out.softmax_max[..., 0], case["softmax_max"], SINGLE)
    same(out.softmax_sum[..., 0], case["softmax_sum"], SINGLE)
    if "attention_out" in case:  # of one there are statistics alone
        same_results(case, (q, k, v), out)


def same_results(case: dict[str, Any], tensors: tuple[torch.Tensor, ...], out: Any) -> None:
    q, k, v = tensors
    same(out.attention_out, case["attention_out"])
    out.attention_out.sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    same(q.grad, case["dq"], HALF)
    same(k.grad, case["dk"], HALF)
    same(v.grad[..., 0], case["dv_per_row"], HALF)
    assert torch.equal(v.grad, v.grad[..., :1].expand_as(v.grad))
