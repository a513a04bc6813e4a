"""Why a backend does not run a composition, and what to do then."""

from __future__ import annotations

__all__ = ["TOLD"]

_TILED = 'Leave `backend` at "auto", or ask for "tiled", which computes the same.'

TOLD = {
    "device": (
        "The tensors are not where the backend runs, or those of one call are on several devices.",
        'Move them to one device. Without an NPU, `backend="emulated"` plans and runs the same '
        "fused calls on any device.",
    ),
    "torch-npu": (
        "The tensors are on an NPU and torch_npu cannot be imported.",
        "Install torch_npu with the CANN toolkit it was built for (`pip install attnkit[npu]`); "
        "`python -m attnkit doctor` tells what is there.",
    ),
    "op-version": (
        "The installed torch_npu has no operator or argument that the planned call needs.",
        "Install a newer torch_npu, or leave out what needs it; the reason names the argument.",
    ),
    "softcap": (
        "The composition bends scores by `softcap`, a term that the fused kernel does not have.",
        'Leave `backend` at "auto": tiled, flex and reference have it. For Ascend, a model can be '
        "trained with QK-clip or query and key norms in its place.",
    ),
    "score-function": (
        "The composition calls a function of yours for each score, and the fused kernel runs no "
        "code but its own.",
        "Say the same as a bias (`pse=`) or a mask, which can be planned; tiled, flex and "
        "reference call the function.",
    ),
    "transform": (
        "A transform of torch.func (grad, vjp, jvp, vmap) is at work, and it follows torch's own "
        "operators only.",
        'Use `backend="reference"` inside of it, or torch.autograd outside of it.',
    ),
    "mask-given": (
        "The cells of the mask come with each call, as those of a `StaticCache` do, and the "
        "backend plans by what the cells are.",
        "Infer without gradients on ascend, emulated or reference; elsewhere use `KVCache`, "
        "whose masks are known.",
    ),
    "score-gradient": (
        "`score_fn` reads a tensor that asks for a gradient, which the backend does not pass on.",
        'Write it as a bias (`pse=`), which trains on every backend, or use `backend="reference"`.',
    ),
    "second-derivative": (
        "A gradient of a gradient was asked of a kernel that has only first ones.",
        'Use `backend="tiled"` or "reference" without torch.compile; both have them.',
    ),
    "share": (
        "A process has only some of the keys of its rows, and the backend computes whole rows.",
        "Use tiled, reference, emulated or ascend with `shards=`; of selected blocks no share is "
        "computed.",
    ),
    "share-sink": (
        "A sink would count once for each share of a row.",
        "Nothing: plans over several processes add it where shares are merged. Seen only where a "
        "request with a share was built by hand.",
    ),
    "dropout-positions": (
        "The kernel numbers its dropout within its own call, so shares of an attention cannot "
        "drop what one process would.",
        'Give `parallel.shards` the argument dropout="local", leave dropout out, or use tiled.',
    ),
    "broken": (
        "`attnkit doctor` asked a backend for its reasons, and it raised something else.",
        "The report has the exception; it is a defect of that backend.",
    ),
    # -- cuda --------------------------------------------------------------------------------
    "cuda-device": (
        "The tensors are not on a CUDA device.",
        'Leave `backend` at "auto", which takes tiled on a CPU.',
    ),
    "cuda-unfused": (
        "Torch's fused attention has no flag for the composition; it is told beside why "
        "FlexAttention cannot run it either.",
        'Remove the reason that FlexAttention gives, or use tiled, which is what "auto" does.',
    ),
    # -- compiled ----------------------------------------------------------------------------
    "compiled-device": ("The kernel in C++ is for the CPU.", _TILED),
    "compiled-dtype": ("The kernel computes float32, bfloat16 and float16, not float64.", _TILED),
    "compiled-mask": (
        "The mask is no union of slices, and the kernel reads runs of keys.",
        "Say the mask by families that are regions (`masks.recover` finds them for a dense one), "
        "or use tiled.",
    ),
    "compiled-bias": ("The kernel adds no bias.", _TILED),
    "compiled-dropout": ("The kernel has no dropout.", _TILED),
    "compiled-softcap": ("The kernel has no soft-cap.", _TILED),
    "compiled-score_fn": ("The kernel calls no function of yours.", _TILED),
    "compiled-scale": ("With a scale this large the kernel's products overflow.", _TILED),
    "compiled-toolchain": (
        "The kernel is built once per machine, on Linux, by a C++ compiler and ninja, and one is "
        "missing.",
        "Install both (`pip install ninja`), or use tiled.",
    ),
    "compiled-build": (
        "The compiler refused the kernel; the reason ends with what it said.",
        "Install a C++ compiler that knows OpenMP, or use tiled, which needs none.",
    ),
    "compiled-rows": (
        "There are too few rows to fill a tile of the kernel, so tiled is faster.",
        "Nothing: seen only after `attnkit.backends.compiled.prefer()`, and tiled took over.",
    ),
    # -- flex --------------------------------------------------------------------------------
    "flex-device": ("FlexAttention has kernels for CPU and CUDA.", _TILED),
    "flex-dtype": ("FlexAttention computes in float32 at most, not in float64.", _TILED),
    "flex-dropout": ("FlexAttention has no dropout.", _TILED),
    "flex-empty": ("FlexAttention takes no empty tensors.", _TILED),
    "flex-packed-bias": (
        "The bias is a matrix of one sequence, and a packed batch runs as one long sequence.",
        "Give a bias that follows from distances (ALiBi, T5Relative), or use tiled.",
    ),
    "flex-backward-cpu": (
        "FlexAttention has no backward on the CPU, and a gradient is asked for.",
        "Train with tiled there, or call it under torch.no_grad().",
    ),
    "flex-deterministic": (
        "FlexAttention adds up the gradient of a bias in any order.",
        "Leave out `deterministic=True`, freeze the bias, or use tiled.",
    ),
    "flex-sink-cpu": ("A sink needs the log-sum-exp, which FlexAttention's CPU lacks.", _TILED),
    "flex-stats-cpu": (
        "Statistics were asked for, and FlexAttention on the CPU keeps none.",
        "Use tiled for `return_stats=True` there.",
    ),
    "flex-head-dim": (
        "FlexAttention's CUDA kernel takes heads of 16 dimensions and more.",
        "Use fewer, larger heads, or tiled.",
    ),
}
"""Codes to what they mean and what to do."""
