"""Compiles the stand-ins for CANN's libraries that torch_npu links and loads."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

__all__ = ["build"]

SOURCES = Path(__file__).parent / "cann"
FLAGS = ("-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror")

# torch_npu links these too; what it wants of them is in libascendcl as well.
EMPTY = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")

# Runtime functions by name: what torch_npu links, and what it looks up while it runs. aclnn
# operators are not among them, nor what has a library of its own.
LINKED = re.compile(r"^(acl|rt[A-Z]|Msprof)")
LOOKED_UP = re.compile(
    rb"\0(acl(?!nn|prof|shmem|sk|Create|Destroy|Rfft|Stft|ProfilingI|GetViewShape)[A-Za-z0-9]{3,})"
    rb"(?=\0)"
)
COMPUTES = re.compile(r"CompileAndExecute|ExecuteAsync|Launch|MemcpyBatch|CaptureBegin|GenGraph")


def build(packages: Path, out: Path) -> None:
    """Compile the libraries for the torch_npu in `packages` into `out`, if anything changed."""
    stamp, want = out / "built-from", _fingerprint(packages)
    if stamp.exists() and stamp.read_text() == want:
        return
    out.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    include = packages / "torch_npu/include/third_party/acl/inc"
    with tempfile.TemporaryDirectory() as scratch:
        rest = Path(scratch) / "rest.c"
        rest.write_text(_rest(_names(packages)))
        runtime = SOURCES / "runtime.c"
        _compile(
            out, "ascendcl", f"-I{include}", "-Wno-builtin-declaration-mismatch", runtime, rest
        )
        empty = Path(scratch) / "empty.c"
        empty.write_text("typedef int nothing;\n")
        for name in EMPTY:
            _compile(out, name, "-Wl,--no-as-needed", f"-L{out}", empty, "-lascendcl")
    _compile(out, "opapi", SOURCES / "opapi.c")
    stamp.write_text(want)


def _fingerprint(packages: Path) -> str:
    digest = hashlib.sha256((packages / "torch_npu/version.py").read_bytes())
    for source in (Path(__file__), *sorted(SOURCES.iterdir())):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _compile(out: Path, name: str, *arguments: str | Path) -> None:
    library = f"lib{name}.so"
    command = ["gcc", *FLAGS, f"-Wl,-soname,{library}", "-o", out / library, *arguments]
    subprocess.run([str(part) for part in command], check=True)


def _names(packages: Path) -> set[str]:
    """Return the runtime functions that torch_npu may call."""
    folder = packages / "torch_npu"
    libraries = [*folder.glob("lib/*.so"), *folder.glob("_C*.so")]
    command = ["nm", "-D", "--undefined-only", "--format=just-symbols", *map(str, libraries)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    linked = {name for name in listed.split() if LINKED.match(name)}
    binary = (folder / "lib/libtorch_npu.so").read_bytes()
    return linked | {name.decode() for name in LOOKED_UP.findall(binary)}


def _rest(names: set[str]) -> str:
    """Return C that defines every name; what runtime.c defines takes precedence."""
    lines = ["int rig_refuse(const char *);"]
    for name in sorted(names):
        body = f'rig_refuse("{name}")' if COMPUTES.search(name) else "0"
        lines.append(f"__attribute__((weak)) long {name}(void) {{ return {body}; }}")
    return "\n".join(lines) + "\n"
