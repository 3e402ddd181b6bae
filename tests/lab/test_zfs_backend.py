"""The ZFS backend on real OpenZFS: the conformance suites, run in a guest; a part of them, or with --soak all."""

from __future__ import annotations

import re

import pytest

from tests.lab import deploy
from tests.lab import pytest as guest_pytest
from tests.lab.guests import SUITES, Lab

NODES = 1
PARTS = 16
LEAST = 280
"""Tests of the suites that ZFS takes, at least: none may be lost by a wrong selection."""

pytestmark = [pytest.mark.tier("guests"), pytest.mark.timeout(guest_pytest.RUN_SECONDS + 600)]


def test_the_conformance_suites_pass(lab: Lab, soak: bool) -> None:
    (node,) = lab.nodes[:1]
    if node.run("zpool", "list", "tank", check=False).status != 0:
        node.run("zpool", "create", "-O", "mountpoint=none", "tank", "/dev/ubdb")
    deploy.deploy(node)
    part = 1 + list(SUITES).index(lab.suite)
    sample = [] if soak else [f"--part={part}/{PARTS}"]
    argv = guest_pytest.command("-q", "tests/conformance", "-k", "zfs", *sample)
    said = node.run(*argv, cwd=deploy.SOURCE, timeout=guest_pytest.RUN_SECONDS).out
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None, said
    assert int(passed[1]) >= (LEAST if soak else LEAST // PARTS // 2), said
