"""ZFS: looking at many datasets, and destroying many snapshots, in a few commands; zfs answers from a record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from backends.zfs import ZfsBackend, many
from backends.zfs.commands import Finished
from backends.zfs.library import AT_ONCE
from backends.zfs.listing import COLUMNS, SNAPSHOT_COLUMNS
from backends.zfs.many import HEAD_COLUMNS
from replicator.errors import NoSuchSnapshot, ReplicatorError, SnapshotHeld, StorageUnavailable, VolumeBusy
from replicator.model import Lineage, Role, VersionKind, VersionRef, VolumeId
from tests.support.zfs_records import Answer, RecordedRunner, failed, listing, row
from transport import checksum

UUID = "6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00"
PRIMARY = Lineage(UUID, Role.PRIMARY, 3)


def line(columns: tuple[str, ...], name: str, **values: object) -> str:
    given = {"name": name, **{key.replace("__", ":"): str(value) for key, value in values.items()}}
    return "\t".join(given.get(column, "-") for column in columns)


def lineage(of: int) -> dict[str, Any]:
    return {
        "replicator__lineage": UUID,
        "replicator__role": "primary",
        "replicator__epoch": 3,
        "replicator__stream": "plain",
        "replicator__of": of,
    }


def snapshot(name: str, guid: int, **values: object) -> str:
    given = {"type": "snapshot", "createtxg": guid, "creation": 1700000000 + guid, "userrefs": 0, **values}
    return line(SNAPSHOT_COLUMNS, name, guid=guid, **given)


def backend(**answers: Answer) -> tuple[ZfsBackend, RecordedRunner]:
    """A storage with the root tank/vm; what each kind of command answers."""
    datasets = answers.pop("datasets", "")
    record: dict[tuple[str, ...], Answer] = {
        ("zpool", "sync", "tank"): "",
        ("zfs", "holds"): answers.pop("holds", ""),
        ("zfs", "list", "-H", "-p", "-o", ",".join(HEAD_COLUMNS)): answers.pop("heads", ""),
        ("zfs", "list", "-H", "-p", "-o", ",".join(SNAPSHOT_COLUMNS)): answers.pop(
            "snapshots", datasets if callable(datasets) else ""
        ),
        ("zfs", "list", "-H", "-p", "-o", ",".join(COLUMNS)): datasets,
        ("zfs", "list", "-H", "-o", "name"): answers.pop("names", "tank/vm\n"),
        ("zfs", "destroy"): answers.pop("destroy", ""),
    }
    assert not answers
    runner = RecordedRunner(record)
    return ZfsBackend("store", "tank/vm", checksums=checksum, runner=runner), runner


def head(name: str, guid: int, newest: str, **values: object) -> str:
    return line(HEAD_COLUMNS, name, type="volume", guid=guid, written=0, prevsnap=newest, **values)


# -- heads


def test_heads_take_four_commands_whatever_the_number() -> None:
    names = [f"vm {number}" for number in range(60)]
    heads = [head(f"tank/vm/{n}", i + 100, f"tank/vm/{n}@one", **lineage(i + 100)) for i, n in enumerate(names)]
    snapshots = [snapshot(f"tank/vm/{n}@one", i + 1, userrefs=1, volsize=4096) for i, n in enumerate(names)]
    holds = [f"tank/vm/{n}@one\treplicator:vms:b:s\tFri Nov 20" for n in names]
    store, runner = backend(heads="\n".join(heads), snapshots="\n".join(snapshots), holds="\n".join(holds))
    found = store.heads(names)
    assert [each.volume.name for each in found] == names
    assert {(each.changed, each.partial, each.lineage) for each in found} == {(False, False, PRIMARY)}
    newest = found[7].newest
    assert newest is not None
    assert (newest.name, newest.guid, newest.size, newest.holds) == ("one", "8", 4096, ("replicator:vms:b:s",))
    # The pool first: what was written a moment ago has not reached it yet, and would not be counted.
    assert [command[:2] for command in runner.asked] == [
        ("zpool", "sync"), ("zfs", "list"), ("zfs", "list"), ("zfs", "holds")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "changed", "partial"),
    [
        ({}, False, False),
        ({"written": 512}, True, False),
        ({"written": "-"}, True, False),
        ({"receive_resume_token": "1-bad"}, None, None),
        ({"prevsnap": "-"}, True, False),
        ({"prevsnap": "tank/vm/origin@one"}, True, False),  # a clone with no snapshot of its own
        ({"prevsnap": "tank/vm/a@gone"}, None, None),
        ({"prevsnap": "tank/vm/a@bad\x7fname"}, None, None),
        ({"replicator__role": "boss"}, None, None),
        ({"replicator__placeholder": "tank/vm/a", "replicator__of": 5}, None, None),
    ],
)
def test_what_a_head_says(values: dict[str, object], changed: bool | None, partial: bool | None) -> None:
    given = {"type": "volume", "guid": 9, "written": 0, "prevsnap": "tank/vm/a@one", **lineage(9), **values}
    listed = line(HEAD_COLUMNS, "tank/vm/a", **given)
    both = (snapshot("tank/vm/a@one", 1), snapshot("tank/vm/origin@one", 2))
    store, _ = backend(heads=listed, snapshots="\n".join(both))
    found = store.heads(("a",))
    assert [(each.changed, each.partial) for each in found] == ([] if changed is None else [(changed, partial)])


def test_a_volume_that_is_gone_is_left_out() -> None:
    gone = Finished(
        ("zfs",), 1, head("tank/vm/a", 9, "tank/vm/a@one"), "cannot open 'tank/vm/b': dataset does not exist"
    )
    store, _ = backend(heads=gone, snapshots=snapshot("tank/vm/a@one", 1))
    assert [each.volume.name for each in store.heads(("a", "b", "a@not-a-name"))] == ["a"]


def test_a_storage_that_cannot_be_asked() -> None:
    store, runner = backend()
    runner.answers["zpool", "sync", "tank"] = failed("cannot open 'tank': no such pool")
    with pytest.raises(StorageUnavailable):
        store.heads(("a",))
    store, _ = backend(heads=failed("cannot open 'tank/vm/a': dataset does not exist"),
                       datasets=failed("cannot open 'tank/vm': dataset does not exist"))  # fmt: skip
    with pytest.raises(StorageUnavailable):
        store.heads(("a",))
    assert store.heads(()) == ()


def test_names_are_given_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "_ARGUMENTS", 40)
    names = [f"vm-{number:03d}" for number in range(10)]

    def answer(argv: tuple[str, ...]) -> str:
        asked = argv[6:]
        assert sum(len(name) + 1 for name in asked) <= 40
        return "\n".join(head(name, 9, "-") for name in asked)

    store, runner = backend(heads=answer)
    assert [each.volume.name for each in store.heads(names)] == names
    assert len([command for command in runner.asked if command[1] == "list"]) == 5


# -- states


def test_states_are_those_that_state_tells() -> None:
    datasets = [
        row("tank/vm/a", guid=9, volsize=4096, written=0, **lineage(9)),
        row("tank/vm/a#mark", "bookmark", guid=1, createtxg=1, creation=1700000001),
        row("tank/vm/a/below", "filesystem", guid=10),
        row("tank/vm/b", "filesystem", guid=11, written=5),
        row("tank/vm/p", "filesystem", guid=12, replicator__placeholder="tank/vm/p"),
    ]
    snapshots = [
        snapshot("tank/vm/a@two", 2, userrefs=1),
        snapshot("tank/vm/a@one", 1),
        snapshot("tank/vm/b@one", 3),
    ]
    holds = "tank/vm/a@two\treplicator:a\tFri Nov 20\n"
    store, runner = backend(datasets="\n".join(datasets), snapshots="\n".join(snapshots), holds=holds)
    found = {listing.volume.name: listing.get() for listing in store.states(("b", "a", "p", "gone"))}
    assert list(found) == ["b", "a", "p", "gone"]
    assert found["p"] is None
    assert found["gone"] is None
    state = found["a"]
    assert state is not None
    assert (state.id, state.size, state.lineage) == (VolumeId("store", "a"), 4096, PRIMARY)
    assert [(v.name, v.kind, v.holds) for v in state.versions] == [
        ("one", VersionKind.SNAPSHOT, ()),
        ("mark", VersionKind.BOOKMARK, ()),
        ("two", VersionKind.SNAPSHOT, ("replicator:a",)),
    ]
    assert [command[1] for command in runner.asked] == ["list", "list", "holds", "list"]


def test_one_that_may_be_on_its_way_is_looked_at_by_itself() -> None:
    store, runner = backend(names="tank/vm\ntank/vm/a.replicator-rejoin\n", datasets=failed("dataset does not exist"))
    with pytest.raises(StorageUnavailable):  # what looking by itself says in this record: not even the root is there
        store.states(("a",))[0].get()
    assert ("-d", "1") in {command[6:8] for command in runner.asked}


def test_one_that_fails_keeps_nobody_from_the_others() -> None:
    def answer(argv: tuple[str, ...]) -> Finished | str:
        if "tank/vm/bad" in argv:
            return failed("cannot open 'tank/vm/bad': I/O error")
        return row("tank/vm/good", guid=9)

    store, _ = backend(datasets=answer)
    good, bad = store.states(("good", "bad"))
    assert good.get() is not None
    with pytest.raises(ReplicatorError, match="I/O error"):
        bad.get()


def test_a_pool_that_is_gone_is_asked_once() -> None:
    store, runner = backend(datasets=failed("cannot open 'tank': pool I/O is currently suspended"))
    found = store.states([f"vm-{number}" for number in range(50)])
    assert all(isinstance(listing.error, StorageUnavailable) for listing in found)
    assert len(runner.asked) == 1


# -- estimates


def test_a_batch_is_estimated_with_all_that_is_in_it() -> None:
    listed, _ = volume_of(3)
    store, runner = backend(datasets=listed)
    runner.answers["zfs", "send"] = "size\t900\n"
    found = [
        store.estimate("a", base, refs(2)[0], intermediates=batch)
        for base in (refs(0)[0], None)
        for batch in (True, False)
    ]
    asked = [command[5:] for command in runner.asked if command[1] == "send"]
    ends = [(*rest[3:],) for rest in asked]
    assert found == [900] * 4
    assert ends == [
        ("-I", "tank/vm/a@s0", "tank/vm/a@s2"),
        ("-i", "tank/vm/a@s0", "tank/vm/a@s2"),
        ("tank/vm/a@s2",),
        ("tank/vm/a@s2",),
    ]


# -- destroying


def volume_of(count: int, **held: str) -> tuple[Answer, str]:
    rows = [row("tank/vm/a", guid=9)]
    for number in range(count):
        name = f"tank/vm/a@s{number}"
        userrefs = int(f"s{number}" in held)
        rows.append(row(name, "snapshot", guid=number + 1, createtxg=number, creation=1, userrefs=userrefs))
    return listing(*rows), "\n".join(f"tank/vm/a@{name}\t{tag}\tFri Nov 20" for name, tag in held.items())


def refs(*numbers: int) -> list[VersionRef]:
    return [VersionRef(f"s{number}", str(number + 1)) for number in numbers]


def destroyed(runner: RecordedRunner) -> list[str]:
    return [command[2] for command in runner.asked if command[1] == "destroy"]


def test_many_snapshots_go_in_one_command() -> None:
    listed, holds = volume_of(5, s2="replicator:x")
    store, runner = backend(datasets=listed, holds=holds)
    found = store.destroy_all("a", [*refs(0, 1, 2, 4), VersionRef("gone", "77")])
    assert destroyed(runner) == ["tank/vm/a@s0,s1,s4"]
    assert list(found) == refs(2)
    assert isinstance(found[refs(2)[0]], SnapshotHeld)
    assert "replicator:x" in str(found[refs(2)[0]])


def test_a_command_has_its_limits() -> None:
    listed, _ = volume_of(AT_ONCE + 1)
    store, runner = backend(datasets=listed)
    assert store.destroy_all("a", refs(*range(AT_ONCE + 1))) == {}
    assert [len(name.split(",")) for name in destroyed(runner)] == [AT_ONCE, 1]


def in_the_way(*names: str, words: str) -> Callable[[tuple[str, ...]], Finished | str]:
    def answer(argv: tuple[str, ...]) -> Finished | str:
        return failed(words) if set(argv[2].partition("@")[2].split(",")) & set(names) else ""

    return answer


def test_what_stands_in_the_way_is_found() -> None:
    listed, _ = volume_of(16)
    busy = in_the_way("s5", words="cannot destroy snapshot tank/vm/a@s5: dataset is busy")
    store, runner = backend(datasets=listed, destroy=busy)
    found = store.destroy_all("a", refs(*range(16)))
    assert list(found) == refs(5)
    assert isinstance(found[refs(5)[0]], VolumeBusy)
    assert destroyed(runner)[0].count(",") == 15


def test_one_that_went_meanwhile_is_no_failure() -> None:
    listed, _ = volume_of(4)
    gone = in_the_way("s1", words="could not find any snapshots to destroy; check snapshot names.")
    store, _ = backend(datasets=listed, destroy=gone)
    assert store.destroy_all("a", refs(*range(4))) == {}
    assert store.destroy_all("a", []) == {}


def test_what_is_called_like_it_is_not_destroyed_and_what_was_renamed_is() -> None:
    listed, _ = volume_of(3)
    store, runner = backend(datasets=listed)
    other, renamed = VersionRef("s0", "77"), VersionRef("old name", "2")
    assert store.destroy_all("a", [other]) == {}
    store.destroy("a", other)
    assert destroyed(runner) == []
    assert store.destroy_all("a", [renamed]) == {}
    assert destroyed(runner) == ["tank/vm/a@s1"]


def test_a_lineage_that_another_snapshot_tells_is_known() -> None:
    """Of a replica whose first receive was cut off before it got its own mark: it names the snapshot it received."""
    rows = [row("tank/vm/a", guid=9, **lineage(1) | {"replicator__role": "replica"})]
    rows += [row(f"tank/vm/a@s{n}", "snapshot", guid=n + 1, createtxg=n, creation=1, userrefs=0) for n in range(2)]
    store, runner = backend(datasets=listing(*rows))
    found = store.brief("a")
    assert found is not None
    assert found.lineage == Lineage(UUID, Role.REPLICA, 3)
    runner.answers["zfs", "hold"] = runner.answers["zfs", "release"] = ""
    store.hold("a", refs(1)[0], "replicator:vms:b:s")
    assert [command[1] for command in runner.asked if command[1] != "list"] == ["hold"], "a replica has no cursor"
    store.release("a", refs(1)[0], "replicator:vms:b:s")
    with pytest.raises(NoSuchSnapshot):
        store.hold("a", VersionRef("s1", "77"), "replicator:vms:b:s")
