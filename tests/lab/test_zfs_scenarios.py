"""What happens to ZFS storages in the field, on real OpenZFS: ``zfs_scenarios.py``, run in a guest."""

from __future__ import annotations

import re

import pytest

from tests.lab import deploy
from tests.lab import pytest as guest_pytest
from tests.lab.guests import SUITES, Lab

NODES = 1
SCENARIOS, PARTS = 17, 8

pytestmark = [pytest.mark.tier("guests"), pytest.mark.timeout(guest_pytest.RUN_SECONDS + 600)]


def test_each_ends_as_documented_and_its_way_out_works(lab: Lab, soak: bool) -> None:
    (node,) = lab.nodes[:1]
    if node.run("zpool", "list", "tank", check=False).status != 0:
        node.run("zpool", "create", "-O", "mountpoint=none", "tank", "/dev/ubdb")
    deploy.deploy(node)
    sample = [] if soak else [f"--part={1 + list(SUITES).index(lab.suite)}/{PARTS}"]
    argv = guest_pytest.command("-q", "--lab", "tests/lab/zfs_scenarios.py", *sample)
    said = node.run(*argv, cwd=deploy.SOURCE, timeout=guest_pytest.RUN_SECONDS, check=False).out
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None, said
    assert int(passed[1]) >= (SCENARIOS if soak else 1), said
    assert "failed" not in said, said
