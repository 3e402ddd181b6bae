"""Clones that are there only for reading: whose they are, and which are left-overs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from backends.zfs import clones
from backends.zfs.commands import Finished
from backends.zfs.context import Context
from backends.zfs.library import CommandLibrary
from backends.zfs.listing import Listing
from backends.zfs.naming import DatasetNames
from replicator.model import Version

NAMES = DatasetNames("store", "tank/vm")
VERSION = Version("a", "1", datetime(2026, 11, 30, tzinfo=UTC), 1)
DATASET = "tank/vm/disk"


@dataclass
class Pool:
    """Datasets by name; clones are made, listed and destroyed."""

    there: list[str] = field(default_factory=lambda: [DATASET])

    def run(self, argv: Sequence[str], deadline: float) -> Finished:
        assert deadline > 0
        if argv[1] == "clone":
            self.there.append(argv[-1])
        elif argv[1] == "destroy":
            self.there.remove(argv[-1])
        return Finished(tuple(argv), 0, "".join(f"{name}\n" for name in self.there), "")


def context(pool: Pool) -> Context:
    return Context(NAMES, pool, Listing(NAMES, pool), lambda: CommandLibrary("store", pool))  # type: ignore[arg-type]


def test_a_clone_is_there_while_it_is_read() -> None:
    pool = Pool()
    with clones.temporary(context(pool), DATASET, VERSION, clones.ZVOL) as clone:
        assert pool.there == [DATASET, clone]
        assert clones.is_temporary(clone)
    assert pool.there == [DATASET]


def test_two_who_read_one_dataset_leave_each_other_their_clones() -> None:
    pool = Pool()
    with (
        clones.temporary(context(pool), DATASET, VERSION, clones.ZVOL) as one,
        clones.temporary(context(pool), DATASET, VERSION, clones.ZVOL) as two,
    ):
        assert pool.there == [DATASET, one, two]
    assert pool.there == [DATASET]


def test_what_a_process_left_that_is_gone_goes() -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        another = f"{DATASET}{clones.MARK}{clones.owner(process.pid)}-0000"
        same_number = f"{DATASET}{clones.MARK}{os.getpid():x}.1-0000"
        of_a_release_before = f"{DATASET}{clones.MARK}12345678"
        pool = Pool([DATASET, another, same_number, of_a_release_before])
        clones.discard_leftovers(context(pool), DATASET)
        assert pool.there == [DATASET, another]
    finally:
        process.kill()
        process.wait(60)
    clones.discard_leftovers(context(pool), DATASET)
    assert pool.there == [DATASET]
