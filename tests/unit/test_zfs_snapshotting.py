"""ZFS: one transaction for all datasets of a pool, without those that cannot be in it. ZFS answers from a record."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from backends.zfs import ZfsBackend
from backends.zfs.commands import Finished
from backends.zfs.listing import COLUMNS
from backends.zfs.snapshotting import _COLUMNS
from replicator.endpoint import SnapshotRequest, Taken
from replicator.errors import InvalidName, NoSpace, NoSuchVolume, SnapshotExists, StorageError, StorageUnavailable
from replicator.local import LocalEndpoint
from replicator.model import VolumeId
from tests.support.zfs_records import RecordedRunner, failed, row
from transport import checksum


class Pool(RecordedRunner):
    """Datasets, some of which no snapshot can be taken of.

    :ivar words: what zfs says of a snapshot, or of a dataset; all that it knows in one answer, as zfs does
    :ivar gone: datasets that are listed with the others, and are not there any more
    :ivar taken: the snapshots of each transaction
    """

    def __init__(self, *datasets: str) -> None:
        super().__init__({})
        self.datasets = datasets
        self.words: dict[str, str] = {}
        self.whole = ""
        self.gone: set[str] = set()
        self.taken: list[tuple[str, ...]] = []
        self.tried = 0

    def run(self, argv: Sequence[str], deadline: float) -> Finished:
        assert deadline > 0
        args = tuple(argv)
        self.asked.append(args)
        match args[1]:
            case "snapshot":
                return self._snapshot(args)
            case "list" if ",".join(_COLUMNS) in args:
                there = {name: txg for txg, names in enumerate(self.taken, 1) for name in names}
                rows = [f"{n}\tsnapshot\t{there[n]}0\t{there[n]}\t1700000000\t-" for n in args[8:] if n in there]
                return Finished(args, 0 if len(rows) == len(args[8:]) else 1, "\n".join(rows), "")
            case "list" if ",".join(COLUMNS) in args:
                below = [d for d in self.datasets if f"{d}/".startswith(f"{args[-1]}/")]
                return Finished(args, 0, "\n".join(row(name) for name in below), "")
            case "list":
                left = [n for n in args if n in self.datasets and n not in self.gone]
                return Finished(args, 1, "\n".join(left), "cannot open 'x': dataset does not exist")
        raise AssertionError(args)

    def _snapshot(self, args: tuple[str, ...]) -> Finished:
        self.tried += 1
        if self.whole:
            return failed(self.whole)
        above = [n for s in args[2:] for n in (s, *(s.partition("@")[0].rsplit("/", i)[0] for i in range(4)))]
        told = [f"cannot create snapshot '{n}': {self.words[n]}" for n in dict.fromkeys(above) if n in self.words]
        told += [f"cannot open '{d}': dataset does not exist" for d in sorted(self.gone) if d in above][:1]
        if told:
            return failed("\n".join([*told, "no snapshots were created"]))
        self.taken.append(args[2:])
        return Finished(args, 0, "", "")


def endpoint(pool: Pool, **roots: str) -> LocalEndpoint:
    """A node with storages by these roots."""
    return LocalEndpoint(
        "prox1", {name: ZfsBackend(name, root, checksums=checksum, runner=pool) for name, root in roots.items()}
    )


def of(*names: str, snapshot: str = "one") -> SnapshotRequest:
    return SnapshotRequest(tuple(VolumeId.parse(name) for name in names), snapshot)


def errors(taken: Sequence[Taken]) -> dict[str, str]:
    for each in taken:
        assert (each.version is None) == (each.error is not None)
    return {str(each.volume): str(each.error) for each in taken if each.error is not None}


VMS = tuple(f"vm:{name}" for name in "abcd")


def node(*more: str) -> tuple[Pool, LocalEndpoint]:
    pool = Pool("tank/vm", *(f"tank/vm/{name}" for name in "abcd"), *more)
    return pool, endpoint(pool, vm="tank/vm")


def test_all_in_one_transaction() -> None:
    pool, here = node()
    taken = here.snapshot(of(*VMS))
    assert errors(taken) == {}
    assert [each.get().name for each in taken] == ["one"] * 4
    assert pool.taken == [tuple(f"tank/vm/{name}@one" for name in "abcd")]
    again = here.snapshot(of(*reversed(VMS)))
    assert [each.get() for each in again] == [each.get() for each in reversed(taken)]
    assert len(pool.taken) == 1


def test_storages_of_one_pool_share_an_instant() -> None:
    pool = Pool("tank/vm", "tank/vm/a", "tank/ct", "tank/ct/b", "fast/vm", "fast/vm/c")
    here = endpoint(pool, vm="tank/vm", ct="tank/ct", fast="fast/vm")
    taken = here.snapshot(of("ct:b", "fast:c", "vm:a", "ct:gone", "nowhere:d"))
    assert sorted(pool.taken) == [("fast/vm/c@one",), ("tank/ct/b@one", "tank/vm/a@one")]
    assert [str(each.volume) for each in taken] == ["ct:b", "fast:c", "vm:a", "ct:gone", "nowhere:d"]
    assert list(errors(taken)) == ["ct:gone", "nowhere:d"]
    assert isinstance(taken[3].error, NoSuchVolume)
    assert isinstance(taken[4].error, StorageUnavailable)


def test_names_that_are_too_long_are_left_out() -> None:
    long = "x" * 199
    pool = Pool("tank/vm", "tank/vm/a", f"tank/vm/{long}")
    taken = endpoint(pool, vm="tank/vm").snapshot(of("vm:a", f"vm:{long}", snapshot="s" * 60))
    assert isinstance(taken[1].error, InvalidName)
    assert list(errors(taken)) == [f"vm:{long}"]
    assert pool.taken == [(f"tank/vm/a@{'s' * 60}",)]


@pytest.mark.parametrize("told", ["tank/vm/b", "tank/vm/b@one"])
def test_what_is_at_its_limit_is_left_out(told: str) -> None:
    pool, here = node()
    pool.words[told] = "disk quota exceeded: quota exceeded"
    taken = here.snapshot(of(*VMS))
    assert list(errors(taken)) == ["vm:b"]
    assert isinstance(taken[1].error, NoSpace)
    assert pool.taken == [tuple(f"tank/vm/{name}@one" for name in "acd")]


def test_a_limit_of_what_is_above() -> None:
    pool, here = node("tank/vm/web", "tank/vm/web/x", "tank/vm/web/y")
    pool.words["tank/vm/web"] = "quota exceeded"
    taken = here.snapshot(of("vm:a", "vm:web/x", "vm:web/y"))
    assert list(errors(taken)) == ["vm:web/x", "vm:web/y"]
    assert pool.taken == [("tank/vm/a@one",)]


def test_datasets_that_go_after_they_were_listed_are_left_out() -> None:
    pool, here = node()
    pool.gone = {"tank/vm/a", "tank/vm/c"}  # one is told at a time
    taken = here.snapshot(of(*VMS))
    assert list(errors(taken)) == ["vm:a", "vm:c"]
    assert all(isinstance(each.error, NoSuchVolume) for each in taken if each.error)
    assert pool.taken == [("tank/vm/b@one", "tank/vm/d@one")]
    assert pool.tried == 3


def test_where_zfs_names_nobody_those_that_are_gone_are_found() -> None:
    pool, here = node()
    pool.gone = {"tank/vm/a"}

    def run(argv: Sequence[str], deadline: float) -> Finished:
        done = Pool.run(pool, argv, deadline)
        return failed("No such file or directory") if argv[1] == "snapshot" and done.status else done

    pool.run = run  # type: ignore[method-assign]
    taken = here.snapshot(of(*VMS))
    assert list(errors(taken)) == ["vm:a"]
    assert isinstance(taken[0].error, NoSuchVolume)
    assert pool.taken == [tuple(f"tank/vm/{name}@one" for name in "bcd")]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("cannot create snapshots: out of space", NoSpace),
        ("cannot create snapshots: permission denied", StorageError),
        ("cannot create snapshots: pool I/O is currently suspended", StorageUnavailable),
    ],
)
def test_what_is_of_all_of_them_is_tried_once(words: str, kind: type[Exception]) -> None:
    pool, here = node()
    pool.whole = words
    taken = here.snapshot(of(*VMS))
    assert list(errors(taken)) == list(VMS)
    assert {type(each.error) for each in taken} == {kind}
    assert pool.tried == 1


def test_one_that_somebody_took_meanwhile_counts() -> None:
    pool, here = node()
    pool.words["tank/vm/b@one"] = "dataset already exists"
    taken = here.snapshot(of(*VMS))
    assert isinstance(taken[1].error, SnapshotExists)
    with pytest.raises(SnapshotExists):
        taken[1].get()
    pool.taken.append(("tank/vm/b@one",))
    assert errors(here.snapshot(of(*VMS))) == {}
