"""Builds what would be released, and tries it as somebody who installs it.

    python -m tests.release          build both distributions into dist/
    python -m tests.release --try    and install each into a clean environment, and use it

Both need a package index. They are built by `build`, from a copy of the files that belong to the
tree, so that nothing else gets in. The environment is made anew each time and has what
constraints.txt pins; the first example of the README runs in it, from a folder of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from email import message_from_bytes, message_from_string
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME, DIST = ROOT / "build" / "release", ROOT / "dist"
SOURCE, TOOLS, CLEAN = HOME / "source", HOME / "tools", HOME / "clean"


class Wrong(Exception):
    """What is released is not what it should be."""


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for; returns the exit code."""
    if set(arguments) - {"--try"}:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        sdist, wheel = build()
        print(f"built {sdist.name} and {wheel.name}")
        if arguments:
            attempt(sdist, wheel)
    except Wrong as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 1
    return 0


# -- building ----------------------------------------------------------------------------------


def build() -> tuple[Path, Path]:
    """Build both into dist/, and check what is in them."""
    files = list(belonging())
    for folder in (HOME, DIST):
        shutil.rmtree(folder, ignore_errors=True)
    for name in files:
        (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, SOURCE / name)
    environment(TOOLS, "build", "twine")
    run(TOOLS / "bin/python", "-m", "build", "--outdir", DIST, SOURCE)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    run(TOOLS / "bin/python", "-m", "twine", "check", "--strict", sdist, wheel)
    check_sdist(sdist, files)
    check_wheel(wheel, files)
    return sdist, wheel


def belonging() -> Iterator[str]:
    """Yield the files of the tree, what is new and not ignored among them; all, without git."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if (ROOT / ".git").exists():
        told = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True)
        yield from (name for name in told.stdout.split("\0") if name and (ROOT / name).is_file())
        return
    for path in ROOT.rglob("*"):
        name = path.relative_to(ROOT)
        made = {"build", "dist", "runs", ".venv", "attnkit.egg-info"} & set(name.parts[:1])
        if path.is_file() and not made and "__pycache__" not in name.parts:
            yield str(name)


def check_sdist(sdist: Path, files: Sequence[str]) -> None:
    """Check that a source distribution has every file of the tree, and no other."""
    with tarfile.open(sdist) as held:
        names = {one.name.partition("/")[2] for one in held if one.isfile()}
    made = {"PKG-INFO", "setup.cfg"}  # by setuptools
    others = {name for name in names if not name.startswith("attnkit.egg-info/")} - made
    differ(sdist.name, others, set(files))


def check_wheel(wheel: Path, files: Sequence[str]) -> None:
    """Check that a wheel has the package and its data, and a description without dead links."""
    with zipfile.ZipFile(wheel) as held:
        names = set(held.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = message_from_bytes(held.read(metadata))
    package = {name for name in names if ".dist-info/" not in name}
    differ(wheel.name, package, {name for name in files if name.startswith("attnkit/")})
    text = str(told.get_payload())
    if dead := re.findall(r"\]\((?!https?://|#)[^)]*\)", text):
        raise Wrong(f"{wheel.name}: its description links to {', '.join(dead[:3])}")
    if "## A first example" not in text:
        raise Wrong(f"{wheel.name}: its description is not the README")


def differ(where: str, held: set[str], expected: set[str]) -> None:
    """Raise `Wrong` unless two sets of files are one."""
    lacks, more = sorted(expected - held), sorted(held - expected)
    if lacks or more:
        raise Wrong(f"{where} lacks {lacks[:5]} and has {more[:5]} that are not in the tree")


# -- trying ------------------------------------------------------------------------------------


def attempt(sdist: Path, wheel: Path) -> None:
    """Install each in a clean environment, and use it from a folder that is not the tree."""
    environment(CLEAN, str(wheel))
    use("the wheel")
    # What it needs is there by now, and is what the wheel asks for: the same file says both.
    run(CLEAN / "bin/python", *PIP, "--no-deps", "--force-reinstall", str(sdist))
    run(CLEAN / "bin/python", "-m", "pip", "check")
    use("the source distribution")
    for extra in sorted(extras(wheel)):  # tests/test_release.py imports what they promise
        run(CLEAN / "bin/python", *PIP, "--dry-run", f"{wheel}[{extra}]")
        print(f"extra {extra}: resolves")


def use(what: str) -> None:
    """Run the first example, and the command, and compare what they print."""
    code, printed = first_example()
    python, command = CLEAN / "bin/python", CLEAN / "bin/attnkit"
    where = run(python, "-c", "import attnkit; print(attnkit.__file__)").strip()
    if not Path(where).is_relative_to(CLEAN):
        raise Wrong(f"the package that runs is {where}")
    if (got := run(python, "-c", code)) != printed:
        raise Wrong(f"the README's first example prints, from {what},\n{got}")
    version = run(command, "--version")
    if not version.startswith(f"attnkit {wheel_version()}, "):
        raise Wrong(f"{what}: attnkit --version says {version}")
    given = ("--mask", "Causal() & SlidingWindow(8)", "--q-len", "64", "--backend", "emulated")
    if "proof       the call's set equals the mask's" not in (plan := run(command, "plan", *given)):
        raise Wrong(f"{what}: attnkit plan says\n{plan}")
    if "properties" not in json.loads(run(python, "-m", "attnkit", "schema")):
        raise Wrong(f"{what}: python -m attnkit schema prints no schema")
    page = HOME / "plan.html"
    run(command, "view", *given[:4], "--output", page)
    if not page.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise Wrong(f"{what}: attnkit view writes no page")
    print(f"{what}: {version.strip()}; the first example prints what the README shows")


def first_example() -> tuple[str, str]:
    """Return the first block of Python in the README, and what it shows below."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```\n+```text\n(.*?)^```", text, re.S | re.M)
    if found is None:
        raise Wrong("the README has no block of Python with its output below")
    return found[1], found[2]


def wheel_version() -> str:
    """Return the version in the name of the wheel."""
    (wheel,) = DIST.glob("*.whl")
    return wheel.name.split("-")[1]


def extras(wheel: Path) -> list[str]:
    """Return the extras that a wheel names."""
    with zipfile.ZipFile(wheel) as held:
        (metadata,) = (name for name in held.namelist() if name.endswith(".dist-info/METADATA"))
        told = message_from_string(held.read(metadata).decode())
    return told.get_all("Provides-Extra", [])


# -- environments ------------------------------------------------------------------------------

PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
PIP += ("--constraint", str(ROOT / "constraints.txt"))


def environment(folder: Path, *wanted: str) -> None:
    """Make an environment and install what is wanted, at the versions that CI has."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin/python", *PIP, *wanted)


def run(*command: str | Path) -> str:
    """Run a command outside of the tree, and return what it prints; raises `Wrong` if it fails."""
    HOME.mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(one) for one in command], cwd=HOME, env=kept, capture_output=True, text=True
    )
    if done.returncode:
        told = " ".join(str(one) for one in command)
        raise Wrong(f"{told[:300]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
