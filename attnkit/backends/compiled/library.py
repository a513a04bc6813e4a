"""The kernel's library: built by torch's extension builder, loaded once, called with pointers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnkit.backends.compiled.table import TileTable
from attnkit.errors import BackendRefused, Refusal

__all__ = ["KINDS", "Library"]

SOURCE = Path(__file__).with_name("kernel.cpp")
HEADER = Path(__file__).with_name("vectors.h")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLAGS = [
    *("-O3", "-std=c++17", "-fopenmp", "-Wno-psabi"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
# Full vectors, which the compiler would halve by itself.
NATIVE = {"x86_64": ["-march=native", "-mprefer-vector-width=512"], "aarch64": ["-mcpu=native"]}

_Strides = ctypes.c_int64 * 3


class _Problem(ctypes.Structure):
    """What a call is given: the fields of `Problem` in kernel.cpp, in its order."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "threads", "parts")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "rows", "keys")),
        *((name, ctypes.c_int64) for name in ("width", "value_width", "padded", "value_padded")),
        *((f"{name}_by", _Strides) for name in ("query", "key", "value", "output", "grad")),
        ("to_query_by", _Strides),
        *((name, ctypes.c_void_p) for name in ("matrix", "first", "tiles", "strips", "runs")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "lse", "sink")),
        *((name, ctypes.c_void_p) for name in ("grad", "grad_lse")),
        *((name, ctypes.c_void_p) for name in ("to_query", "to_key", "to_value")),
        ("scale", ctypes.c_double),
    )


class Library:
    """The compiled kernel; the file is built when somebody first asks, and found from then on."""

    def missing(self) -> str | None:
        """Return what the machine lacks to build it, if anything."""
        if sys.platform != "linux" or platform.machine() not in NATIVE:
            return f"it is built on Linux for {' and '.join(NATIVE)}, and this is {sys.platform}"
        if shutil.which("ninja") is None:
            return "torch's extension builder needs ninja: pip install ninja"
        # Not an interface of ours: every build takes its compiler from CXX, torch's builder too,
        # whose own look-up is 0.15 s away, behind the import of setuptools.
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is None:
            return f"there is no C++ compiler {compiler!r}: install one, or name another in CXX"
        return None

    @cached_property
    def _loaded(self) -> ctypes.CDLL:
        try:
            from torch.utils.cpp_extension import load

            # Another kind of processor needs other code, and homes are shared. Another source is
            # another file: one that a process has loaded must not change under it.
            sources = [one.read_text(encoding="utf-8") for one in (SOURCE, HEADER)]
            kind = hashlib.sha256("\n".join([_processor(), *sources]).encode()).hexdigest()[:12]
            path = load(
                f"attnkit_{kind}",
                [str(SOURCE)],
                extra_cflags=[*FLAGS, *NATIVE[platform.machine()]],
                is_python_module=False,
            )
            library = ctypes.CDLL(str(path))
        except (ImportError, OSError, RuntimeError) as error:
            reason = (
                f"the kernel could not be built: {str(error).strip()[-400:]}; "
                "backend='tiled' computes the same and needs no compiler"
            )
            raise BackendRefused(reason, [Refusal("compiled-build", reason, "compiled")]) from error
        library.attnkit_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        library.attnkit_run.restype = None
        return library

    @cached_property
    def height(self) -> int:
        """How many rows its tiles have."""
        return int(self._loaded.attnkit_rows())

    @cached_property
    def lanes(self) -> int:
        """The numbers in one vector."""
        return int(self._loaded.attnkit_lanes())

    def padded(self, width: int) -> int:
        """Return a width, rounded up to whole vectors."""
        return -(-width // self.lanes) * self.lanes

    def run(
        self,
        table: TileTable,
        scale: float,
        tensors: dict[str, Tensor | None],
        parts: int = 0,
    ) -> None:
        """Run a pass: the backward pass, in `parts`, if there are some.

        `tensors` are by the names of the kernel's fields, ``[b n s d]`` with dense rows.
        """
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        if query is None or key is None or value is None:
            raise TypeError("query, key and value are tensors")
        given: dict[str, Any] = {
            "kind": KINDS[query.dtype],
            "threads": torch.get_num_threads(),
            "parts": parts,
            "batch": query.shape[0],
            "heads": query.shape[1],
            "key_heads": key.shape[1],
            "rows": query.shape[2],
            "keys": key.shape[2],
            "width": key.shape[3],
            "value_width": value.shape[3],
            "padded": self.padded(key.shape[3]),
            "value_padded": self.padded(value.shape[3]),
            "scale": scale,
        }
        strides = ("query", "key", "value", "output", "grad", "to_query")
        for name, tensor in [*tensors.items(), *vars(table).items()]:
            if tensor is not None:
                given[name] = tensor.data_ptr()
                if name in strides:
                    given[f"{name}_by"] = _Strides(*tensor.stride()[:3])
        problem = _Problem(**given)
        self._loaded.attnkit_run(ctypes.addressof(problem), len(table.tiles), int(parts > 0))


def _processor() -> str:
    """Return what tells kinds of processors apart, and versions of the compiled code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.startswith(("flags", "Features"))}
    return "\n".join([platform.machine(), *sorted(kinds)])
