"""Every backend: volumes, snapshots, holds, digests, and what is kept aside. Streams have files of their own."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import pytest

from replicator.cancellation import Cancellation
from replicator.endpoint import DigestRequest, Head
from replicator.errors import (
    Cancelled,
    InvalidName,
    NoSuchSnapshot,
    NoSuchVolume,
    SnapshotHeld,
    Unsupported,
    VolumeBusy,
)
from replicator.model import Capability, Lineage, Role, StreamKind, Version, VersionRef, VolumeId
from replicator.streams import BLOCK_SIZE, DIGEST_SIZE
from tests.support.blocks import KEY, OTHER_KEY, changed, digests_of, pattern
from tests.support.cases import BackendCase

SIZE = 5 * BLOCK_SIZE
DATA = changed(pattern(SIZE), [(BLOCK_SIZE, BLOCK_SIZE)])
PRIMARY = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 1)
GONE = VersionRef("gone", "0" * 32)
BAD_SNAPSHOTS = ["", ".", "..", ".hidden", "a/b", "a@b", "a#b", "a\0b", "a\nb", "../../escaped", "x" * 201, "a\\b"]
BAD_VOLUMES = ["", ".", "..", "../x", "/etc/passwd", "a//b", "a/../b", "a\0b", "a@b", "x" * 201, "a/"]


def take(case: BackendCase, name: str = "one", volume: str = "vm") -> Version:
    (version,) = case.backend.snapshot((volume,), name)
    return version


def versions(case: BackendCase, volume: str = "vm") -> tuple[Version, ...]:
    state = case.backend.state(volume)
    assert state is not None
    return state.versions


# -- the storage and its volumes


def test_it_says_what_it_is(case: BackendCase) -> None:
    info = case.backend.info()
    assert info.name == case.backend.name == "store"
    assert info.kind == case.backend.kind
    assert info.stream is case.backend.stream
    assert info.capabilities == case.backend.capabilities
    assert Capability.SEND | Capability.RECEIVE in info.capabilities
    assert Capability.DIGESTS in info.capabilities or info.stream is StreamKind.NATIVE
    assert info.detail
    assert all(info.warnings)


def test_an_empty_storage(case: BackendCase) -> None:
    assert case.backend.volumes() == ()
    assert case.backend.state("vm") is None


def test_volumes_are_listed_by_name(case: BackendCase) -> None:
    for name in ("vm-2", "prox1/vm-3", "vm-1"):
        case.create(name, DATA)
    found = case.backend.volumes()
    assert [v.id for v in found] == [VolumeId("store", n) for n in ("prox1/vm-3", "vm-1", "vm-2")]
    assert {v.size for v in found} == {SIZE}
    assert {v.lineage for v in found} == {None}


def test_the_state_of_a_new_volume(case: BackendCase) -> None:
    case.create("vm", DATA)
    state = case.backend.state("vm")
    assert state is not None
    assert (state.id, state.size, state.versions) == (VolumeId("store", "vm"), SIZE, ())
    assert (state.lineage, state.resume, state.head_changed) == (None, None, False)


def test_lineage_is_stored(case: BackendCase) -> None:
    case.create("vm", DATA)
    for lineage in (PRIMARY, Lineage(PRIMARY.uuid, Role.REPLICA, 2**40)):
        case.backend.set_lineage("vm", lineage)
        case.reopen()
        state = case.backend.state("vm")
        assert state is not None
        assert state.lineage == lineage
        assert case.backend.volumes()[0].lineage == lineage


def test_lineage_needs_a_volume(case: BackendCase) -> None:
    with pytest.raises(NoSuchVolume):
        case.backend.set_lineage("vm", PRIMARY)


def test_the_states_of_many_volumes(case: BackendCase) -> None:
    names = ("vm-2", "prox1/vm-3", "vm-1")
    for name in names:
        case.create(name, DATA)
    case.backend.set_lineage("vm-2", PRIMARY)
    one = take(case, "one", "vm-1")
    case.backend.hold("vm-1", one.ref, "replicator:a")
    take(case, "two", "vm-1")
    take(case, "one", "vm-2")
    if Capability.BOOKMARKS in case.backend.capabilities:
        case.bookmark("vm-1", one)
    wanted = ("vm-1", "missing", "prox1/vm-3", "vm-2", "prox1")
    found = case.backend.states(wanted)
    assert [(each.volume, each.error) for each in found] == [(VolumeId("store", name), None) for name in wanted]
    assert [each.state for each in found] == [case.backend.state(name) for name in wanted]
    assert [each.state is None for each in found] == [False, True, False, False, True]
    assert case.backend.states(()) == ()


def test_the_heads_of_volumes(case: BackendCase) -> None:
    """Not every storage can tell; what one tells must be right."""
    for name in ("vm", "other", "empty"):
        case.create(name, DATA)
    take(case, "one")
    two = take(case, "two")
    take(case, "one", "other")
    case.backend.hold("vm", two.ref, "replicator:a")
    case.backend.set_lineage("vm", PRIMARY)
    heads = {head.volume.name: head for head in case.backend.heads(("vm", "missing", "other", "empty"))}
    if case.backend.kind == "image":  # a file does not say whether it was written to
        assert not heads
        return
    assert heads["vm"] == Head(VolumeId("store", "vm"), versions(case)[-1], False, PRIMARY)
    assert versions(case)[-1].holds == ("replicator:a",)
    assert (heads["other"].changed, heads["other"].lineage) == (False, None)
    assert (heads["empty"].changed, heads["empty"].newest) == (True, None)
    assert "missing" not in heads
    case.write("other", case.unit, b"changed".ljust(case.unit, b"."))
    assert [head.changed for head in case.backend.heads(("vm", "other"))] == [False, True]
    case.reopen()
    assert [head.changed for head in case.backend.heads(("vm", "other"))] == [False, True]
    newest = take(case, "two", "other")
    (head,) = case.backend.heads(("other",))
    assert (head.newest, head.changed) == (newest, False)


@pytest.mark.parametrize("name", BAD_VOLUMES)
def test_volume_names_that_are_refused(case: BackendCase, name: str) -> None:
    with pytest.raises(InvalidName):
        case.backend.state(name)
    with pytest.raises(InvalidName):
        case.backend.set_lineage(name, PRIMARY)
    with pytest.raises(InvalidName):
        case.backend.snapshot((name,), "one")


# -- snapshots


def test_a_snapshot_keeps_the_bytes_of_its_moment(case: BackendCase) -> None:
    case.create("vm", DATA)
    before = datetime.now(UTC) - timedelta(seconds=5)
    one = take(case, "one")
    case.write("vm", 100, b"changed")
    two = take(case, "two")
    cut = max(100, case.unit)
    case.resize("vm", cut)
    case.reopen()
    assert case.read_snapshot("vm", one) == DATA
    assert case.read_snapshot("vm", two) == changed(DATA, [(100, b"changed")])
    assert case.read("vm") == changed(DATA, [(100, b"changed")])[:cut]
    assert before < one.created < datetime.now(UTC) + timedelta(seconds=5)


def test_a_snapshot_is_listed_as_it_was_returned(case: BackendCase) -> None:
    case.create("vm", DATA)
    made = [take(case, name) for name in ("c", "a", "b")]
    assert versions(case) == tuple(made)
    case.reopen()
    assert versions(case) == tuple(made)
    assert [v.name for v in made] == ["c", "a", "b"]
    assert [v.size for v in made] == [SIZE] * 3
    assert len({v.guid for v in made}) == 3
    positions = [v.position for v in made]
    assert positions == sorted(set(positions))
    assert all(v.holds == () for v in made)


def test_a_snapshot_that_exists_is_returned_unchanged(case: BackendCase) -> None:
    case.create("vm", DATA)
    one = take(case)
    case.write("vm", 0, b"changed")
    assert take(case) == one
    assert case.read_snapshot("vm", one) == DATA
    assert len(versions(case)) == 1


def test_an_empty_volume_has_a_snapshot_too(case: BackendCase) -> None:
    if case.unit > 1:
        return
    case.create("vm", b"")
    assert take(case).size == 0


def test_snapshots_of_several_volumes(case: BackendCase) -> None:
    for name in ("a", "b", "c"):
        case.create(name, DATA)
    (already,) = case.backend.snapshot(("b",), "one")
    made = case.backend.snapshot(("c", "b", "a"), "one")
    assert len(made) == 3
    assert made[1] == already
    assert [versions(case, name)[0] for name in ("c", "b", "a")] == list(made)


def test_a_snapshot_needs_a_volume(case: BackendCase) -> None:
    case.create("vm", DATA)
    one = take(case)
    with pytest.raises(NoSuchVolume):
        case.backend.snapshot(("vm", "missing"), "one")
    assert versions(case) == (one,)
    assert case.backend.state("missing") is None


@pytest.mark.parametrize("name", BAD_SNAPSHOTS)
def test_snapshot_names_that_are_refused(case: BackendCase, name: str) -> None:
    case.create("vm", DATA)
    with pytest.raises(InvalidName):
        case.backend.snapshot(("vm",), name)
    assert versions(case) == ()


# -- destroying and holding


def test_destroying(case: BackendCase) -> None:
    case.create("vm", DATA)
    made = [take(case, name) for name in ("one", "two", "three")]
    for _ in range(2):  # the second time there is nothing to do
        case.backend.destroy("vm", made[1].ref)
        case.reopen()
        assert versions(case) == (made[0], made[2])
    assert case.read_snapshot("vm", made[2]) == DATA
    case.backend.destroy("vm", GONE)
    case.backend.destroy("missing", GONE)


def test_a_position_is_not_used_again(case: BackendCase) -> None:
    case.create("vm", DATA)
    one, two = take(case, "one"), take(case, "two")
    case.backend.destroy("vm", one.ref)
    assert take(case, "three").position > two.position


def test_the_identity_counts_and_not_the_name(case: BackendCase) -> None:
    case.create("vm", DATA)
    one, two = take(case, "one"), take(case, "two")
    case.backend.destroy("vm", VersionRef(two.name, one.guid))
    assert versions(case) == (two,)
    case.backend.destroy("vm", VersionRef(two.name, "f" * 32))
    assert versions(case) == (two,)
    case.backend.hold("vm", VersionRef("renamed", two.guid), "tag")
    assert versions(case)[0].holds == ("tag",)


def test_destroying_many(case: BackendCase) -> None:
    case.create("vm", DATA)
    made = [take(case, f"s{number}") for number in range(7)]
    case.backend.hold("vm", made[2].ref, "replicator:a")
    failed = case.backend.destroy_all("vm", [version.ref for version in made[:6]] + [GONE])
    assert list(failed) == [made[2].ref]
    assert isinstance(failed[made[2].ref], SnapshotHeld)
    assert failed[made[2].ref].hint
    assert [version.name for version in versions(case)] == ["s2", "s6"]
    case.backend.release("vm", made[2].ref, "replicator:a")
    case.reopen()
    assert case.backend.destroy_all("vm", [version.ref for version in made]) == {}
    assert versions(case) == ()
    assert case.backend.destroy_all("vm", []) == case.backend.destroy_all("missing", [GONE]) == {}


def test_what_is_held_is_not_destroyed(case: BackendCase) -> None:
    case.create("vm", DATA)
    one = take(case)
    case.backend.hold("vm", one.ref, "a")
    case.backend.hold("vm", one.ref, "replicator:vms:prox2:backup")
    case.backend.hold("vm", one.ref, "a")
    case.reopen()
    assert sorted(versions(case)[0].holds) == ["a", "replicator:vms:prox2:backup"]
    with pytest.raises(SnapshotHeld, match="one"):
        case.backend.destroy("vm", one.ref)
    case.backend.release("vm", one.ref, "a")
    with pytest.raises(SnapshotHeld):
        case.backend.destroy("vm", one.ref)
    case.backend.release("vm", one.ref, "replicator:vms:prox2:backup")
    case.reopen()
    assert versions(case) == (one,)
    case.backend.destroy("vm", one.ref)
    assert versions(case) == ()


def test_holding_needs_a_snapshot_and_releasing_needs_nothing(case: BackendCase) -> None:
    case.create("vm", DATA)
    one = take(case)
    with pytest.raises(NoSuchSnapshot):
        case.backend.hold("vm", GONE, "tag")
    case.backend.release("vm", one.ref, "tag")
    case.backend.release("vm", GONE, "tag")
    case.backend.release("missing", GONE, "tag")
    with pytest.raises(InvalidName):
        case.backend.hold("vm", one.ref, "../tag")
    assert versions(case) == (one,)


# -- clones


def test_a_clone_is_a_volume_of_its_own(case: BackendCase) -> None:
    case.create("vm", DATA)
    case.backend.set_lineage("vm", PRIMARY)
    one = take(case)
    case.write("vm", 0, b"changed")
    if Capability.CLONE not in case.backend.capabilities:
        with pytest.raises(Unsupported):
            case.backend.clone("vm", one.ref, "restored/vm")
        return
    info = case.backend.clone("vm", one.ref, "restored/vm")
    assert (info.id, info.size, info.lineage) == (VolumeId("store", "restored/vm"), SIZE, None)
    case.reopen()
    assert case.read("restored/vm") == DATA
    case.write("restored/vm", 0, b"its own")
    assert case.read_snapshot("vm", one) == DATA
    state = case.backend.state("restored/vm")
    assert state is not None
    assert (state.versions, state.lineage) == ((), None)
    with pytest.raises(VolumeBusy):
        case.backend.clone("vm", one.ref, "restored/vm")
    with pytest.raises(NoSuchSnapshot):
        case.backend.clone("vm", GONE, "other")
    with pytest.raises(InvalidName):
        case.backend.clone("vm", one.ref, "../other")


# -- digests


def no_digests(case: BackendCase) -> bool:
    """Whether the storage has none; it must say so then."""
    if Capability.DIGESTS in case.backend.capabilities:
        return False
    case.create("vm", DATA)
    with pytest.raises(Unsupported):
        list(case.backend.digests(DigestRequest(VolumeId("store", "vm"), take(case).ref, KEY), Cancellation()))
    return True


def digested(case: BackendCase, version: VersionRef, **request: object) -> tuple[list[int], bytes]:
    """The batches' offsets and all their digests; checks that there is no gap."""
    made = DigestRequest(VolumeId("store", "vm"), version, **{"key": KEY, **request})  # type: ignore[arg-type]
    batches = list(case.backend.digests(made, Cancellation()))
    for batch, following in itertools.pairwise(batches):
        assert following.offset == batch.offset + len(batch) * batch.block_size
    assert all(batch.block_size == made.block_size for batch in batches)
    assert all(len(batch.digests) % DIGEST_SIZE == 0 for batch in batches)
    return [batch.offset for batch in batches], b"".join(batch.digests for batch in batches)


@pytest.mark.parametrize("size", [0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, SIZE, SIZE + 512])
def test_digests_are_those_of_the_bytes(case: BackendCase, size: int) -> None:
    if no_digests(case):
        return
    if case.unit > 1:
        size = max(-(-size // case.unit), 1) * case.unit
    data = DATA.ljust(size, b"x")[:size]
    case.create("vm", data)
    one = take(case)
    case.write("vm", 0, b"changed")
    offsets, digests = digested(case, one.ref)
    assert digests == b"".join(digests_of(data[n : n + BLOCK_SIZE]) for n in range(0, size, BLOCK_SIZE))
    assert offsets[:1] == ([0] if size else [])
    assert size == 0 or digested(case, one.ref, key=OTHER_KEY)[1] != digests


def test_digests_of_a_part(case: BackendCase) -> None:
    if no_digests(case):
        return
    case.create("vm", DATA + b"tail".ljust(case.unit, b"."))
    one = take(case)
    _, whole = digested(case, one.ref)
    offsets, part = digested(case, one.ref, offset=BLOCK_SIZE, length=2 * BLOCK_SIZE)
    assert (offsets[0], part) == (BLOCK_SIZE, whole[DIGEST_SIZE : 3 * DIGEST_SIZE])
    assert digested(case, one.ref, offset=4 * BLOCK_SIZE)[1] == whole[4 * DIGEST_SIZE :]
    assert digested(case, one.ref, offset=4 * BLOCK_SIZE, length=1 << 40)[1] == whole[4 * DIGEST_SIZE :]
    assert digested(case, one.ref, offset=100 * BLOCK_SIZE)[1] == b""
    _, small = digested(case, one.ref, block_size=4096)
    assert small[:DIGEST_SIZE] == digests_of(DATA[:4096])
    assert len(small) == DIGEST_SIZE * (SIZE // 4096 + 1)


def test_digests_of_holes_are_those_of_zeros(case: BackendCase) -> None:
    if no_digests(case):
        return
    case.create("vm", bytes(case.unit))
    case.resize("vm", 40 * BLOCK_SIZE)
    case.write("vm", 39 * BLOCK_SIZE, b"data")
    _, digests = digested(case, take(case).ref)
    assert digests[: 39 * DIGEST_SIZE] == digests_of(bytes(BLOCK_SIZE)) * 39


def test_digests_are_read_and_not_remembered(case: BackendCase) -> None:
    if no_digests(case):
        return
    if not case.damageable:
        pytest.skip("nobody can change its snapshots; damaged disks are in test_zfs_verification.py")
    case.create("vm", DATA)
    one = take(case)
    _, before = digested(case, one.ref)
    case.damage("vm", one, 2 * BLOCK_SIZE + 5, b"\xff\x00\xff")
    _, after = digested(case, one.ref)
    assert [n for n in range(5) if before[n * 16 : n * 16 + 16] != after[n * 16 : n * 16 + 16]] == [2]


def test_digests_need_a_snapshot(case: BackendCase) -> None:
    if no_digests(case):
        return
    case.create("vm", DATA)
    with pytest.raises(NoSuchSnapshot):
        digested(case, GONE)


def test_digests_can_be_stopped(case: BackendCase) -> None:
    if no_digests(case):
        return
    case.create("vm", DATA)
    cancel = Cancellation()
    request = DigestRequest(VolumeId("store", "vm"), take(case).ref, KEY)
    cancel.cancel()
    with pytest.raises(Cancelled):
        list(case.backend.digests(request, cancel))


# -- what is kept aside


def test_live_data_is_kept_aside(case: BackendCase) -> None:
    case.create("vm", DATA)
    one = take(case)
    case.backend.set_lineage("vm", PRIMARY)
    case.write("vm", 0, b"only here")
    kept = case.backend.set_aside("vm", "diverged-now")
    assert kept is not None
    case.reopen()
    state = case.backend.state("vm")
    assert state is not None
    assert [v.name for v in state.versions] == [one.name, "diverged-now"]
    assert state.versions[1].ref == kept
    assert case.read_snapshot("vm", kept) == changed(DATA, [(0, b"only here")])
    assert state.lineage is not None
    assert (state.lineage.uuid, state.lineage.role, state.lineage.epoch) == (PRIMARY.uuid, Role.REPLICA, 1)
    assert not state.head_changed
    assert case.backend.set_aside("vm", "diverged-later") is None
    assert len(versions(case)) == 2


def test_a_volume_of_its_own_is_no_primary_when_its_data_is_kept_aside(case: BackendCase) -> None:
    case.create("vm", DATA)
    kept = case.backend.set_aside("vm", "diverged-now")
    assert kept is not None
    state = case.backend.state("vm")
    assert state is not None
    assert state.lineage is None or state.lineage.role is Role.REPLICA
    assert not state.head_changed
    assert case.read_snapshot("vm", kept) == DATA
    assert case.backend.set_aside("vm", "diverged-later") is None


def test_setting_nothing_aside(case: BackendCase) -> None:
    assert case.backend.set_aside("vm", "diverged-now") is None
    assert case.backend.state("vm") is None
    case.create("vm", DATA)
    with pytest.raises(InvalidName):
        case.backend.set_aside("vm", "../diverged")
    assert case.read("vm") == DATA
