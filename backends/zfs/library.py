"""What is done to snapshots, holds and bookmarks, by libzfs_core or by the zfs command.

:class:`Library` has two implementations that nobody can tell apart but by their speed: :class:`CommandLibrary` here,
and ``BindingLibrary`` in ``binding.py``. There is no rollback: a replica is put back to a snapshot by way of a clone
(``aside.py``), because a rollback destroys what came after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from backends.zfs.commands import CHANGE_DEADLINE, Runner
from backends.zfs.failures import Operation, failure, failure_of, is_missing, says
from replicator.errors import ReplicatorError, StorageUnavailable

ESTIMATE_DEADLINE = 30.0
"""Seconds; an estimate that takes longer is none."""
_NAMED = re.compile(r"^cannot [a-z ]+ '([^']+)'")
"""How the zfs command tells what it could not do something with."""
AT_ONCE = 100
"""Snapshots destroyed by one command: it names them in one argument, which the kernel limits to 128 KiB."""


class Library(Protocol):
    """Changes of one storage's datasets. Names are full ones: ``DATASET@SNAPSHOT``, ``DATASET#BOOKMARK``.

    Everything is durable when a method returns. All raise errors of :mod:`replicator.errors` with the storage, the
    name, what was being done, and ZFS's own words; StorageUnavailable also where ZFS does not answer in time.
    """

    def describe(self) -> str:
        """Which of the two it is, for people: ``libzfs_core 2.3.9``."""

    def warning(self) -> str:
        """What an operator should know of the choice, "" for nothing."""

    def snapshot(self, snapshots: Sequence[str]) -> None:
        """Take snapshots of datasets of one pool in one transaction: all or none. :raises SnapshotExists:"""

    def try_snapshot(self, snapshots: Sequence[str]) -> dict[str, ReplicatorError]:
        """The same.

        :return: {} where all were taken; else what kept all of them from it, by the snapshot or the dataset that is
            named (a limit may be of one above it), or by "" where none is
        """

    def destroy(self, names: Sequence[str]) -> dict[str, ReplicatorError]:
        """Destroy snapshots and bookmarks of one pool, as many at once as can go; those that are gone are done.

        :return: those that could not be destroyed, each with its reason; they never keep the others
        """

    def hold(self, snapshot: str, tag: str) -> None:
        """Hold a snapshot; nothing happens if that tag holds it already. :raises NoSuchSnapshot:"""

    def release(self, snapshot: str, tag: str) -> None:
        """Remove a hold, if it is there."""

    def bookmark(self, snapshot: str, bookmark: str) -> None:
        """Make a bookmark of a snapshot; nothing happens if there is one of that name. :raises NoSuchSnapshot:"""

    def send_space(self, snapshot: str, base: str | None, flags: Sequence[str]) -> int | None:
        """Bytes that zfs send would write; None where that is not said, or not in time.

        :param base: a snapshot
        :param flags: options of zfs send: ``-L``, ``-e``, ``-c``, ``-w``
        """


class CommandLibrary:
    """By the zfs command.

    :param storage: the storage's name, for messages
    :param why: why it is not libzfs_core
    :param warning: that in full, where an operator should do something about it
    """

    def __init__(self, storage: str, runner: Runner, why: str = "", warning: str = "") -> None:
        self._storage = storage
        self._runner = runner
        self._why = why
        self._warning = warning

    def describe(self) -> str:
        """See :class:`Library`."""
        return f"the zfs command ({self._why})" if self._why else "the zfs command"

    def warning(self) -> str:
        """See :class:`Library`."""
        return self._warning

    def snapshot(self, snapshots: Sequence[str]) -> None:
        """See :class:`Library`."""
        for error in self.try_snapshot(snapshots).values():
            raise error

    def try_snapshot(self, snapshots: Sequence[str]) -> dict[str, ReplicatorError]:
        """See :class:`Library`."""
        if not snapshots:
            return {}
        done = self._runner.run(("zfs", "snapshot", *snapshots), CHANGE_DEADLINE)
        if done.status == 0:
            return {}
        failed: dict[str, ReplicatorError] = {}
        for line in done.errors.split("\n"):
            if (named := _NAMED.search(line)) is not None:
                failed[named[1]] = failure_of(line.strip(), Operation(self._storage, named[1], "taking the snapshot"))
        return failed or {"": failure(done, Operation(self._storage, snapshots[0], "taking the snapshot"))}

    def destroy(self, names: Sequence[str]) -> dict[str, ReplicatorError]:
        """See :class:`Library`. zfs destroy takes several snapshots of one dataset, and none of them where one cannot
        go: then they are destroyed one by one."""
        failed: dict[str, ReplicatorError] = {}
        for group in _groups(names):
            dataset, _, first = group[0].partition("@")
            if len(group) > 1:
                listed = ",".join([first, *(name.partition("@")[2] for name in group[1:])])
                if self._runner.run(("zfs", "destroy", f"{dataset}@{listed}"), CHANGE_DEADLINE).status == 0:
                    continue
            for name in group:
                done = self._runner.run(("zfs", "destroy", name), CHANGE_DEADLINE)
                if done.status != 0 and not is_missing(done):
                    failed[name] = failure(done, Operation(self._storage, name, "destroying"))
        return failed

    def hold(self, snapshot: str, tag: str) -> None:
        """See :class:`Library`."""
        self._must("zfs", "hold", tag, snapshot, name=snapshot, doing="holding", fine="tag already exists")

    def release(self, snapshot: str, tag: str) -> None:
        """See :class:`Library`."""
        done = self._runner.run(("zfs", "release", tag, snapshot), CHANGE_DEADLINE)
        if done.status != 0 and not is_missing(done) and not says(done, "no such tag"):
            raise failure(done, Operation(self._storage, snapshot, "releasing"))

    def bookmark(self, snapshot: str, bookmark: str) -> None:
        """See :class:`Library`."""
        self._must(
            "zfs", "bookmark", snapshot, bookmark, name=bookmark, doing="making the bookmark", fine="bookmark exists"
        )

    def send_space(self, snapshot: str, base: str | None, flags: Sequence[str]) -> int | None:
        """See :class:`Library`."""
        source = ("-i", base) if base is not None else ()
        return command_space(self._runner, (*flags, *source, snapshot))

    def _must(self, *argv: str, name: str, doing: str, fine: str = "") -> None:
        done = self._runner.run(argv, CHANGE_DEADLINE)
        if done.status != 0 and not (fine and says(done, fine)):
            raise failure(done, Operation(self._storage, name, doing))


def command_space(runner: Runner, arguments: tuple[str, ...]) -> int | None:
    """Bytes that zfs send with these arguments would write; None where it does not say so in time."""
    try:
        done = runner.run(("zfs", "send", "-n", "-v", "-P", *arguments), ESTIMATE_DEADLINE)
    except StorageUnavailable:
        return None
    for line in reversed((done.output + "\n" + done.errors).split("\n")):
        word, _, number = line.partition("\t")
        if word == "size" and number.strip().isdecimal():
            return int(number)
    return None


def _groups(names: Iterable[str]) -> list[list[str]]:
    """What one command can destroy: a bookmark, or some snapshots of one dataset."""
    groups: list[list[str]] = []
    places: dict[str, list[str]] = {}
    for name in names:
        dataset, mark, _ = name.partition("@")
        group = places.get(dataset) if mark else None
        if group is None or len(group) >= AT_ONCE:
            group = []
            groups.append(group)
            if mark:
                places[dataset] = group
        group.append(name)
    return groups
