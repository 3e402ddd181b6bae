"""The ZFS backend on real OpenZFS: the conformance suites, run in a guest."""

from __future__ import annotations

import re

import pytest

from tests.lab import deploy
from tests.lab import pytest as guest_pytest
from tests.lab.guests import Lab

NODES = 1
LEAST = 80
"""Tests of the suites that ZFS takes, at least: none may be lost by a wrong selection."""

pytestmark = [pytest.mark.tier("guests"), pytest.mark.timeout(guest_pytest.RUN_SECONDS + 600)]


def test_the_conformance_suites_pass(lab: Lab) -> None:
    (node,) = lab.nodes[:1]
    if node.run("zpool", "list", "tank", check=False).status != 0:
        node.run("zpool", "create", "-O", "mountpoint=none", "tank", "/dev/vdb")
    deploy.deploy(node)
    argv = guest_pytest.command("-q", "tests/conformance", "-k", "zfs")
    said = node.run(*argv, cwd=deploy.SOURCE, timeout=guest_pytest.RUN_SECONDS).out
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None, said
    assert int(passed[1]) >= LEAST, said
