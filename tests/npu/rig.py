"""Runs this folder's tests through the real torch_npu, on a machine without an NPU.

    python tests/npu/rig.py [pytest arguments]

It fetches torch_npu into a folder of its own, compiles stand-ins for the CANN libraries beneath
it, and starts pytest on both. torch_npu's own host code runs: schemas, argument checks, output
allocation, autograd, dispatch. Below it, where a kernel would start, attnkit's emulator computes.

torch_npu must not be installed beside torch: without CANN, `import torch` itself would fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path[:0] = [] if __package__ else [str(Path(__file__).parents[2])]

from tests.npu import standins  # noqa: E402 -- found by the line above when run as a script

__all__ = ["TORCH_NPU", "main"]

TORCH_NPU = "2.13.0"
"""The release under test; it needs the torch of the same number."""

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "npu"
PACKAGES, LIBRARIES = HOME / f"torch_npu-{TORCH_NPU}", HOME / "cann"


def main(arguments: list[str]) -> int:
    """Prepare what is missing, and run pytest; returns its exit status."""
    missing = _missing()
    if missing:
        print(f"the NPU tests cannot run here: {missing}", file=sys.stderr)
        return 2
    _fetch()
    standins.build(PACKAGES, LIBRARIES)
    named = any((ROOT / argument.partition("::")[0]).exists() for argument in arguments)
    where = [] if named else [str(Path(__file__).parent)]
    command = [sys.executable, "-m", "pytest", *arguments, *where]
    return subprocess.run(command, cwd=ROOT, env=_environment(), check=False).returncode


def _missing() -> str:
    """Say what the machine lacks; empty if it lacks nothing."""
    if not sys.platform.startswith("linux"):
        return f"torch_npu exists for Linux, this is {sys.platform}"
    for tool, package in (("gcc", "gcc"), ("nm", "binutils")):
        if shutil.which(tool) is None:
            return f"{tool} was not found; it compiles the stand-ins (apt install {package})"
    try:
        torch = version("torch").partition("+")[0]
    except PackageNotFoundError:
        torch = "not installed"
    if torch != TORCH_NPU:
        return f"torch is {torch}; torch_npu {TORCH_NPU} needs torch {TORCH_NPU} (make venv)"
    return ""


def _fetch() -> None:
    """Install torch_npu where only this script looks. Its dependencies are the project's own."""
    if (PACKAGES / "complete").exists():
        return
    shutil.rmtree(PACKAGES, ignore_errors=True)
    print(f"fetching torch_npu {TORCH_NPU} into {PACKAGES.relative_to(ROOT)} (once)", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    where = ["--no-deps", "--target", str(PACKAGES)]
    subprocess.run([*pip, *where, f"torch-npu=={TORCH_NPU}"], check=True)
    # Touched last: a download that was interrupted is started again.
    (PACKAGES / "complete").touch()


def _environment() -> dict[str, str]:
    """Return the environment in which torch_npu finds itself and the stand-ins."""
    paths = {"PYTHONPATH": PACKAGES, "LD_LIBRARY_PATH": LIBRARIES}
    extended = {
        name: os.pathsep.join(filter(None, (str(path), os.environ.get(name))))
        for name, path in paths.items()
    }
    # No queue between the host code and the "device": an error belongs to the line that made it.
    fixed = {"TASK_QUEUE_ENABLE": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return {**os.environ, **extended, **fixed}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
