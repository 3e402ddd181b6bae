"""Runs pytest in a guest on this checkout: ``python -m tests.lab.pytest 1 tests/conformance -k zfs``.

The first word is the guest's number (of the lab that LAB names, default dev), all others go to pytest there.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

from tests.lab.deploy import PYTHON, SOURCE, deploy
from tests.lab.guests import SCRIPT, Lab, LabError

TEST_SECONDS = 600
"""Of one test: system calls are some ten times slower in a guest than on the machine under it."""
RUN_SECONDS = 3 * 3600


def command(*arguments: str) -> list[str]:
    """The command line in a guest's ``SOURCE`` that runs pytest with these arguments."""
    return [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}", *arguments]


def main() -> int:
    if len(sys.argv) < 2 or not sys.argv[1].isdecimal():
        print("usage: python -m tests.lab.pytest NODE PYTEST-ARGUMENT…", file=sys.stderr)  # noqa: T201
        return 2
    name = os.environ.get("LAB", "dev")
    try:
        node = Lab.attach(name).node(int(sys.argv[1]))
        deploy(node)
    except LabError as error:
        print(f"pytest: {error}", file=sys.stderr)  # noqa: T201
        return 1
    line = ["env", f"--chdir={SOURCE}", "timeout", str(RUN_SECONDS), *command(*sys.argv[2:])]
    # Its output goes straight to this terminal, as it comes.
    return subprocess.run(
        [SCRIPT, "sh", str(node.index), shlex.join(line)], env={**os.environ, "LAB": name}, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
