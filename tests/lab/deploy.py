"""Puts this checkout into guests: ``python -m tests.lab.deploy 1 2``.

The guests' roots have a Python environment with all dependencies in /opt/replicator, which reads our source from
/opt/replicator/src. So deploying is copying what has changed there, our C extension, and the Python files' byte code:
both are compiled in the suite's root at this host's speed and kept by their content. (A guest takes
many seconds to compile what our daemon imports.)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from tests.lab.guests import SCRIPT, Lab, LabError, Node

PROJECT = Path(__file__).parents[2]
SOURCE = "/opt/replicator/src"
"""Where a guest has the checkout."""
PYTHON = "/opt/replicator/bin/python"
"""A guest's Python that has all dependencies."""

_FOLDERS = ("replicator", "backends", "scheduler", "transport", "tests", "benchmarks")
_FILES = ("pyproject.toml", "README.md", "Makefile")
_COMPILE = "cd /mnt && exec {python} -c 'from setuptools import setup; setup()' build_ext -q -b /mnt/out -t /tmp"
_BYTE_CODE = "exec {python} -m compileall -q -s /mnt -p {source} --invalidation-mode unchecked-hash /mnt"
_COMPILE_SECONDS = 300


def extension(root: Path) -> Path:
    """The folder with our compiled C extension for a root's Python; compiles it where it is not cached.

    :param root: image of the root file system
    :raises LabError: the compiler failed
    """
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    sources = sorted(path for pattern in ("*.c", "*.h") for path in (PROJECT / "transport").glob(pattern))
    key = hashlib.sha256(json.dumps(settings).encode())
    for source in sources:
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    family = f"extension-{root.stem.removeprefix('ready-')}"
    built = root.parent / f"{family}-{key.hexdigest()[:12]}"
    if built.exists():
        return built
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "transport").mkdir()
        for source in sources:
            shutil.copy(source, folder / "transport")
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(PROJECT / name, folder)
        done = subprocess.run(
            [SCRIPT, "inside", root, folder, "/bin/sh", "-c", _COMPILE.format(python=PYTHON)],
            capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise LabError(f"the C extension cannot be compiled in {root}", done.stderr[-4000:])
        for older in root.parent.glob(f"{family}-*"):
            shutil.rmtree(older)
        part = built.with_name(f"{built.name}.{os.getpid()}")
        shutil.copytree(folder / "out" / "transport", part)
        part.rename(built)
    return built


def byte_code(root: Path) -> Path:
    """A folder with this checkout's Python files, compiled for a root's Python; compiles it where it is not cached.

    Byte code that is not checked against its source: it is always copied together with it.

    :raises LabError: the compiler failed
    """
    sources = sorted(path for name in _FOLDERS for path in (PROJECT / name).rglob("*.py"))
    key = hashlib.sha256()
    for source in sources:
        key.update(f"{source.relative_to(PROJECT)}\0".encode() + source.read_bytes())
    family = f"byte-code-{root.stem.removeprefix('ready-')}"
    built = root.parent / f"{family}-{key.hexdigest()[:12]}"
    if built.exists():
        return built
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for source in sources:
            place = folder / source.relative_to(PROJECT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place)
        done = subprocess.run(
            [SCRIPT, "inside", root, folder, "/bin/sh", "-c", _BYTE_CODE.format(python=PYTHON, source=SOURCE)],
            capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise LabError(f"this checkout cannot be compiled in {root}", (done.stdout + done.stderr)[-4000:])
        for older in root.parent.glob(f"{family}-*"):
            shutil.rmtree(older, ignore_errors=True)
        part = built.with_name(f"{built.name}.{os.getpid()}")
        shutil.copytree(folder, part)
        part.rename(built)
    return built


def deploy(node: Node) -> None:
    """Make the guest's copy of this checkout equal to it; under two seconds where little has changed.

    :raises LabError: it failed
    """
    compiled, code = extension(node.lab.root), byte_code(node.lab.root)
    kept = [f"--exclude={pattern}" for pattern in ("__pycache__", "*.so", "*.egg-info", "/benchmarks/results")]
    folders = [f"--include=/{name}/***" for name in _FOLDERS]
    files = [f"--include=/{name}" for name in _FILES]
    node.rsync("--archive", "--delete", *kept, *folders, *files, "--exclude=/*", f"{PROJECT}/", f"node:{SOURCE}/")
    only = ("--exclude=*-pytest-*", "--include=*/", "--include=*.pyc", "--exclude=*")
    node.rsync("--archive", "--chmod=D755,F644", "--checksum", "--delete", *only, f"{code}/", f"node:{SOURCE}/")
    node.rsync("--archive", f"{compiled}/", f"node:{SOURCE}/transport/")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.deploy", description="Put this checkout into guests.")
    parser.add_argument("node", type=int, nargs="*", help="number of a guest; all that are up where none is named")
    parser.add_argument("--lab", default=os.environ.get("LAB", "dev"), help="the lab's name (default: LAB, or dev)")
    wanted = parser.parse_args()
    try:
        lab = Lab.attach(wanted.lab)
        for node in [lab.node(index) for index in wanted.node] or lab.nodes:
            deploy(node)
    except LabError as error:
        print(f"deploy: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
