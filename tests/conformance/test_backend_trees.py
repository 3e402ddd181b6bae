"""Backends of native streams: what is above, below and behind a volume: parents, clones, new names, properties."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backends.zfs import placeholders
from backends.zfs.properties import StreamForm
from backends.zfs.taking_over import Terms
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveMode, SendRequest
from replicator.errors import (
    ConnectionLost,
    NoSuchSnapshot,
    NotAReplica,
    ProtocolError,
    SnapshotHeld,
    StaleResume,
    Unsupported,
)
from replicator.model import Capability, Lineage, Origin, Property, Role, StreamKind, Version, VolumeId
from replicator.streams import CHUNK_SIZE, Chunk, ChunkStream, NativeChunk, Stream
from tests.conformance.test_backend_native import (
    DATA,
    OTHER,
    PRIMARY,
    REPLICA,
    SIZE,
    asked,
    cut,
    interrupted,
    make,
    opened,
    receive,
    replicate,
    state,
    take,
)
from tests.support.blocks import KEY
from tests.support.zfs_case import ZfsCase, zfs

STREAMS = [StreamKind.NATIVE]
TOP, BELOW = VolumeId("store", "prox1/top"), VolumeId("store", "prox1/top/below")
LINEAGES = {"top": OTHER, "top/below": PRIMARY}


def sent(case: ZfsCase, volume: str, to: Version, base: Version | None = None, **request: object) -> Stream:
    made = SendRequest(VolumeId("store", volume), base.ref if base else None, to.ref, KEY, lineage=PRIMARY)
    return case.backend.send(replace(made, **request), Cancellation())  # type: ignore[arg-type]


def arrive(case: ZfsCase, volume: str, to: Version, base: Version | None = None, **request: object) -> Version:
    """One step of any source volume into ``prox1/VOLUME``."""
    lineage = LINEAGES.get(volume, PRIMARY)
    into = asked(base, to, volume=VolumeId("store", f"prox1/{volume}"), lineage=lineage, **request)
    return receive(case, into, sent(case, volume, to, base))


def volumes(case: ZfsCase) -> list[str]:
    return [volume.id.name for volume in case.backend.volumes()]


def value(case: ZfsCase, name: str, volume: str = REPLICA.name) -> str:
    return zfs("get", "-H", "-o", "value", name, case.dataset(volume)).strip()


# -- above and below


@pytest.fixture
def tree(case: ZfsCase, tmp_path: Path) -> tuple[ZfsCase, Version]:
    """A replica below a placeholder, whose own source is encrypted and comes later."""
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    zfs("create", "-o", "encryption=on", "-o", "keyformat=raw", "-o", f"keylocation=file://{key}", case.dataset("top"))
    zfs("create", "-s", "-b", "8192", "-V", str(SIZE), case.dataset("top/below"))
    case.write("top/below", 0, DATA)
    for volume, lineage in LINEAGES.items():
        case.backend.set_lineage(volume, lineage)
    arrive(case, "top/below", take(case, "one", "top/below"))
    assert volumes(case) == ["prox1/top/below", "top", "top/below"]
    return case, take(case, "one", "top")


def test_an_encrypted_parent_that_arrives_after_its_child(tree: tuple[ZfsCase, Version]) -> None:
    case, one = tree
    assert case.backend.state(TOP.name) is None
    made = arrive(case, "top", one)
    assert state(case, TOP).versions == (made,)
    assert state(case, BELOW).lineage == Lineage(PRIMARY.uuid, Role.REPLICA, 3)
    assert volumes(case) == ["prox1/top", "prox1/top/below", "top", "top/below"]
    two = take(case, "two", "top")
    arrive(case, "top", two, one)
    case.write("top/below", 0, b"more")
    first = state(case, VolumeId("store", "top/below")).versions[0]
    arrive(case, "top/below", take(case, "two", "top/below"), first)
    assert [v.name for v in state(case, BELOW).versions] == ["one", "two"]


def test_a_parent_that_is_cut_on_its_way(tree: tuple[ZfsCase, Version]) -> None:
    case, _ = tree
    zfs("set", f"mountpoint=/mnt/{case.root}/top", case.dataset("top"))
    Path("/mnt", case.root, "top", "file").write_bytes(DATA)
    two = take(case, "two", "top")
    with pytest.raises(ConnectionLost):
        receive(case, asked(None, two, volume=TOP, lineage=OTHER), cut(sent(case, "top", two), 3 << 20))
    case.reopen()
    resume = state(case, TOP).resume
    assert resume is not None
    assert resume.to_guid == two.guid
    assert state(case, BELOW).versions, "the child is where it was"
    assert volumes(case) == ["prox1/top/below", "top", "top/below"]
    into = asked(None, two, volume=TOP, lineage=OTHER, resume=resume)
    receive(case, into, sent(case, "top", two, resume=resume))
    assert [v.guid for v in state(case, TOP).versions] == [two.guid]
    assert state(case, BELOW).versions
    case.backend.destroy(TOP.name, two.ref)


def test_what_is_begun_beside_a_placeholder_can_be_discarded(tree: tuple[ZfsCase, Version]) -> None:
    case, one = tree
    with pytest.raises(ConnectionLost):
        receive(case, asked(None, one, volume=TOP, lineage=OTHER), cut(sent(case, "top", one), 2000))
    case.backend.abort_receive(TOP.name)
    assert case.backend.state(TOP.name) is None
    arrive(case, "top", one)
    assert len(volumes(case)) == 4


def test_a_first_copy_that_has_datasets_below_it_can_be_discarded(case: ZfsCase) -> None:
    mount = case.create_filesystem("top")
    (mount / "file").write_bytes(DATA)
    case.create("top/below", DATA)
    for volume, lineage in LINEAGES.items():
        case.backend.set_lineage(volume, lineage)
    one = take(case, "one", "top")
    with pytest.raises(ConnectionLost):
        receive(case, asked(None, one, volume=TOP, lineage=OTHER), cut(sent(case, "top", one), 3 << 20))
    arrive(case, "top/below", take(case, "one", "top/below"))
    assert state(case, TOP).resume is not None
    case.backend.abort_receive(TOP.name)
    assert case.backend.state(TOP.name) is None
    assert state(case, BELOW).versions
    arrive(case, "top", one)
    assert volumes(case) == ["prox1/top", "prox1/top/below", "top", "top/below"]
    assert [v.guid for v in state(case, TOP).versions] == [one.guid]


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_power_cut_while_a_placeholder_gives_way(tree: tuple[ZfsCase, Version], done: int) -> None:
    """Cut after each command; asked about the parent or the child, all is in its place again."""
    case, one = tree
    dataset, arrival = case.dataset(TOP.name), placeholders.arrival_of(case.dataset(TOP.name))
    settings = ["-o", f"replicator:lineage={OTHER.uuid}", "-o", "replicator:role=replica", "-o", "replicator:epoch=3"]
    settings += ["-o", f"replicator:of={one.guid}", "-o", "replicator:stream=raw"]
    pipe = f"zfs send -Lew {case.dataset('top')}@one | zfs receive -s -u {' '.join(settings)} {arrival}@one"
    assert os.system(pipe) == 0  # noqa: S605 - names of ours
    for command in (["rename", f"{dataset}/below", f"{arrival}/below"], ["destroy", dataset])[:done]:
        zfs(*command)
    case.reopen()
    assert state(case, BELOW).versions if done else state(case, TOP).versions
    assert state(case, TOP).lineage == Lineage(OTHER.uuid, Role.REPLICA, 3)
    assert volumes(case) == ["prox1/top", "prox1/top/below", "top", "top/below"]


def test_a_placeholder_that_somebody_uses_is_not_removed(case: ZfsCase) -> None:
    case.create_filesystem("top", a=b"above")
    case.create("top/below", DATA)
    for volume, lineage in LINEAGES.items():
        case.backend.set_lineage(volume, lineage)
    arrive(case, "top/below", take(case, "one", "top/below"))
    mount = Path("/mnt", case.root)
    zfs("set", f"mountpoint={mount}", "canmount=noauto", case.dataset(TOP.name))
    zfs("mount", case.dataset(TOP.name))
    (mount / "own").write_bytes(os.urandom(3 << 20))
    zfs("umount", case.dataset(TOP.name))
    one = take(case, "one", "top")
    for _ in range(2):
        with pytest.raises(NotAReplica, match="somebody uses it"):
            arrive(case, "top", one)
    zfs("mount", case.dataset(TOP.name))
    assert (mount / "own").stat().st_size == 3 << 20
    zfs("umount", case.dataset(TOP.name))
    zfs("rename", case.dataset(TOP.name), case.dataset("prox1/mine"))
    assert state(case, TOP).versions[0].guid == one.guid


# -- clones


def cloned(case: ZfsCase) -> tuple[Version, Version, Version]:
    """A volume, its replica, and a clone ``copy`` of its first snapshot with two snapshots of its own."""
    one, _ = make(case, "one", "two")
    replicate(case, None, one)
    case.backend.clone("vm", one.ref, "copy")
    case.backend.set_lineage("copy", OTHER)
    case.write("copy", 0, os.urandom(SIZE // 4))
    first = take(case, "first", "copy")
    case.write("copy", 0, os.urandom(SIZE // 4))
    return one, first, take(case, "second", "copy")


COPY = VolumeId("store", "prox1/copy")


def test_a_clone_stays_a_clone(case: ZfsCase) -> None:
    one, first, second = cloned(case)
    assert Capability.ORIGINS in case.backend.capabilities
    found = state(case, VolumeId("store", "copy"))
    assert found.origin == Origin(VolumeId("store", "vm"), "one")
    assert {v.id.name: v.origin for v in case.backend.volumes()}["copy"] == found.origin
    estimate = case.backend.estimate("copy", one.ref, first.ref)
    assert estimate is not None
    assert estimate < SIZE // 2, "only the difference"
    into = asked(one, first, volume=COPY, lineage=OTHER, origin=REPLICA, hold="replicator:a:b:c")
    with pytest.raises(ConnectionLost):
        receive(case, into, cut(sent(case, "copy", first, one), SIZE // 8))
    with pytest.raises(SnapshotHeld, match="clone"):
        case.backend.destroy(REPLICA.name, one.ref)
    resume = state(case, COPY).resume
    assert resume is not None
    assert resume.base_guid == one.guid
    try:
        made = receive(case, replace(into, resume=resume), sent(case, "copy", first, one, resume=resume))
    except StaleResume:  # 2.1, where the replica of the base is in the same pool
        case.backend.abort_receive(COPY.name)
        made = receive(case, into, sent(case, "copy", first, one))
    assert made.holds == ("replicator:a:b:c",)
    receive(case, asked(first, second, volume=COPY, lineage=OTHER), sent(case, "copy", second, first))
    assert value(case, "origin", COPY.name) == f"{case.dataset(REPLICA.name)}@one"
    for version in (first, second):
        assert case.read_snapshot(COPY.name, version) == case.read_snapshot("copy", version)
    assert value(case, "readonly", COPY.name) == "on"
    with pytest.raises(SnapshotHeld, match="clone"):
        case.backend.destroy(REPLICA.name, one.ref)


def test_a_clone_of_what_is_no_replica_is_refused(case: ZfsCase) -> None:
    one, first, _ = cloned(case)
    for origin, base in ((VolumeId("store", "vm"), one), (REPLICA, replace(one, guid="5"))):
        with pytest.raises(NoSuchSnapshot):
            receive(case, asked(base, first, volume=COPY, lineage=OTHER, origin=origin), sent(case, "copy", first, one))
    assert case.backend.state(COPY.name) is None
    zfs("set", "replicator:stream=raw", case.dataset(REPLICA.name))
    with pytest.raises(Unsupported, match="mix"):
        receive(case, asked(one, first, volume=COPY, lineage=OTHER, origin=REPLICA), sent(case, "copy", first, one))


def test_a_promoted_clone(case: ZfsCase) -> None:
    """What the old volume has lost of its snapshots is its origin's now; its cursor is still a base."""
    one, first, _ = cloned(case)
    two = state(case, VolumeId("store", "vm")).versions[1]
    receive(case, asked(one, first, volume=COPY, lineage=OTHER, origin=REPLICA), sent(case, "copy", first, one))
    replicate(case, one, two)
    case.backend.hold("vm", two.ref, "replicator:vms:prox2:backup")
    zfs("promote", case.dataset("copy"))
    found = state(case, VolumeId("store", "vm"))
    assert found.origin == Origin(VolumeId("store", "copy"), "one")
    assert one.guid not in {v.guid for v in found.versions}
    three = take(case, "three")
    replicate(case, two, three)
    assert case.read_snapshot(REPLICA.name, three) == case.read_snapshot("vm", three)
    copy = state(case, VolumeId("store", "copy"))
    third = take(case, "third", "copy")
    receive(case, asked(first, third, volume=COPY, lineage=OTHER), sent(case, "copy", third, first))
    assert one.guid in {v.guid for v in copy.versions}


def test_an_encrypted_clone(case: ZfsCase, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    options = ("-o", "encryption=on", "-o", "keyformat=raw", "-o", f"keylocation=file://{key}")
    zfs("create", *options, "-s", "-b", "8192", "-V", str(SIZE), case.dataset("vm"))
    case.write("vm", 0, DATA)
    case.backend.set_lineage("vm", PRIMARY)
    one = take(case, "one")
    replicate(case, None, one)
    case.backend.clone("vm", one.ref, "copy")
    case.backend.set_lineage("copy", OTHER)
    case.write("copy", 0, os.urandom(SIZE // 4))
    first = take(case, "first", "copy")
    receive(case, asked(one, first, volume=COPY, lineage=OTHER, origin=REPLICA), sent(case, "copy", first, one))
    assert value(case, "origin", COPY.name) == f"{case.dataset(REPLICA.name)}@one"
    zfs("load-key", "-L", f"file://{key}", case.dataset(REPLICA.name))
    assert case.read_snapshot(COPY.name, first) == case.read_snapshot("copy", first)


# -- new names


def test_a_replica_gets_another_name(case: ZfsCase) -> None:
    (one,) = make(case, "one")
    replicate(case, None, one, hold="replicator:a:b:c")
    case.backend.rename(REPLICA.name, "prox1/deep/er/new")
    new = VolumeId("store", "prox1/deep/er/new")
    assert [v.holds for v in state(case, new).versions] == [("replicator:a:b:c",)]
    assert state(case, new).lineage == Lineage(PRIMARY.uuid, Role.REPLICA, 3)
    assert volumes(case) == ["prox1/deep/er/new", "vm"]
    two = take(case, "two")
    receive(case, asked(one, two, volume=new), opened(case, one, two))


def test_a_half_received_replica_gets_another_name(case: ZfsCase) -> None:
    (one,) = make(case, "one")
    resume = interrupted(case, None, one)
    new = VolumeId("store", "prox1/new")
    case.backend.rename(REPLICA.name, new.name)
    assert state(case, new).resume == resume
    receive(case, asked(None, one, volume=new, resume=resume), opened(case, None, one, resume=resume))
    assert case.read_snapshot(new.name, one) == case.read_snapshot("vm", one)


def test_a_new_name_that_a_placeholder_has(tree: tuple[ZfsCase, Version]) -> None:
    case, one = tree
    receive(case, asked(None, one, volume=VolumeId("store", "prox1/old"), lineage=OTHER), sent(case, "top", one))
    case.backend.rename("prox1/old", TOP.name)
    assert volumes(case) == ["prox1/top", "prox1/top/below", "top", "top/below"]
    assert [v.guid for v in state(case, TOP).versions] == [one.guid]


def test_snapshots_that_were_renamed_at_the_source(case: ZfsCase) -> None:
    one, two = make(case, "one", "two")
    replicate(case, None, one)
    zfs("rename", f"{case.dataset('vm')}@one", f"{case.dataset('vm')}@other")
    found = state(case, VolumeId("store", "vm"))
    renamed = found.by_guid(one.guid)
    assert renamed is not None
    assert renamed.name == "other"
    receive(case, asked(one, two), opened(case, renamed, two))
    assert [v.name for v in state(case).versions] == ["one", "two"]


# -- what a stream brings


def foreign(case: ZfsCase, command: str) -> Stream:
    """What some other program sends."""

    def chunks() -> Iterator[Chunk]:
        sent = subprocess.run(["sh", "-c", command], capture_output=True, check=True, timeout=60).stdout
        for start in range(0, len(sent), CHUNK_SIZE):
            yield NativeChunk(sent[start : start + CHUNK_SIZE])

    return ChunkStream(StreamKind.NATIVE, chunks())


@pytest.mark.parametrize("options", ["-p", "-R", "-Rw", "-hp"])
def test_packages_with_properties_are_refused(case: ZfsCase, options: str) -> None:
    one, two = make(case, "one", "two")
    vm = case.dataset("vm")
    zfs("set", "compression=gzip", vm)
    zfs("hold", "foreign", f"{vm}@two")
    for base in (None, one):
        into = asked(base, two)
        increment = f"-i @{base.name}" if base else ""
        if base is not None:
            replicate(case, None, one)
        with pytest.raises(ProtocolError):
            receive(case, into, foreign(case, f"zfs send {options} {increment} {vm}@two"))
    assert [v.guid for v in state(case).versions] == [one.guid]
    assert value(case, "compression") != "gzip"


def test_a_package_of_snapshots_is_refused(case: ZfsCase) -> None:
    one, _, three = make(case, "one", "two", "three")
    replicate(case, None, one)
    for batch in (False, True):
        with pytest.raises(ProtocolError):
            into = asked(one, three, intermediates=batch)
            receive(case, into, foreign(case, f"zfs send -I @one {case.dataset('vm')}@three"))
    assert [v.guid for v in state(case).versions] == [one.guid]


def test_what_follows_a_stream_is_not_received(case: ZfsCase) -> None:
    one, two = make(case, "one", "two")
    case.create("other", DATA)
    other, vm = take(case, "one", "other"), case.dataset("vm")
    for base, to, options in ((None, one, f"{vm}@one"), (one, two, f"-i @one {vm}@two")):
        more = f"zfs send {case.dataset('other')}@{other.name}; zfs send -I @one {vm}@two"
        receive(case, asked(base, to), foreign(case, f"zfs send {options}; {more}"))
    assert [v.guid for v in state(case).versions] == [one.guid, two.guid]
    assert [v.id.name for v in case.backend.volumes()] == ["other", REPLICA.name, "vm"]


def test_a_redacted_stream_is_refused(case: ZfsCase) -> None:
    mount = case.create_filesystem("vm", secret=DATA)
    case.backend.set_lineage("vm", PRIMARY)
    one, vm = take(case, "one"), case.dataset("vm")
    clone = f"{case.root}/without"
    zfs("clone", "-o", f"mountpoint={mount}-without", f"{vm}@one", clone)
    Path(f"{mount}-without", "secret").unlink()
    zfs("snapshot", f"{clone}@without")
    zfs("redact", f"{vm}@one", "mark", f"{clone}@without")
    with pytest.raises(ProtocolError, match="redacted"):
        receive(case, asked(None, one), foreign(case, f"zfs send --redact mark {vm}@one"))
    assert case.backend.state(REPLICA.name) is None


def test_large_blocks_are_no_redaction(case: ZfsCase) -> None:
    mount = case.create_filesystem("vm")
    zfs("set", "recordsize=1M", case.dataset("vm"))
    case.backend.set_lineage("vm", PRIMARY)
    (mount / "large").write_bytes(DATA)
    one = take(case, "one")
    assert replicate(case, None, one).guid == one.guid


def test_properties_that_a_replica_takes_over(case: ZfsCase) -> None:
    case.create_filesystem("vm", a=b"1" * 100_000)
    vm = case.dataset("vm")
    zfs("set", "compression=gzip-3", "recordsize=32K", "atime=off", "exec=off", "sync=disabled", "quota=1G", vm)
    case.backend.set_lineage("vm", PRIMARY)
    one, two = take(case, "one"), take(case, "two")
    given = case.backend.properties("vm")
    assert {Property("compression", "gzip-3"), Property("recordsize", "32768"), Property("atime", "off")} <= set(given)
    assert not {"exec", "mountpoint", "sync", "quota", "canmount"} & {p.name for p in given}
    hostile = (Property("mountpoint", "/"), Property("canmount", "on"), Property("compression", "on\n"))
    terms = Terms(override={"setuid": "off", "volmode": "none", "atime": "on"}, exclude=frozenset({"recordsize"}))
    case.terms = terms
    case.reopen()
    replicate(case, None, one, properties=(*hostile, *given))
    wanted = {"compression": "gzip-3", "recordsize": "128K", "atime": "on", "setuid": "off", "readonly": "on"}
    wanted |= {"canmount": "noauto", "mountpoint": "none", "exec": "on", "sync": "standard", "quota": "none"}
    assert {name: value(case, name) for name in wanted} == wanted
    zfs("set", "readonly=off", "canmount=on", case.dataset(REPLICA.name))
    zfs("set", "compression=zstd", vm)
    replicate(case, one, two, properties=case.backend.properties("vm"))
    wanted["compression"] = "zstd"
    assert {name: value(case, name) for name in wanted} == wanted
    assert not state(case).head_changed


def test_a_property_that_cannot_be_set_does_not_stop_replication(case: ZfsCase) -> None:
    (one,) = make(case, "one")
    replicate(case, None, one, properties=(Property("compression", "brotli"), Property("atime", "off")))
    assert any("brotli" in warning for warning in case.backend.info().warnings)
    two = take(case, "two")
    replicate(case, one, two, properties=(Property("compression", "gzip"),))
    assert value(case, "compression") == "gzip"
    assert not any("brotli" in warning for warning in case.backend.info().warnings)


@pytest.mark.parametrize("accept", [StreamForm.RAW, StreamForm.PLAIN])
def test_only_the_form_that_is_accepted(case: ZfsCase, tmp_path: Path, accept: StreamForm) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    options = ("-o", "encryption=on", "-o", "keyformat=raw", "-o", f"keylocation=file://{key}")
    zfs("create", *options, "-s", "-b", "8192", "-V", str(SIZE), case.dataset("vm"))
    case.backend.set_lineage("vm", PRIMARY)
    if accept is StreamForm.RAW:
        zfs("set", "replicator:stream=plain", case.dataset("vm"))
    one = take(case, "one")
    case.terms = Terms(accept=accept)
    case.reopen()
    with pytest.raises(Unsupported, match=f"accepts only {accept}"):
        replicate(case, None, one)
    assert case.backend.state(REPLICA.name) is None
    zfs("set", f"replicator:stream={accept}", case.dataset("vm"))
    replicate(case, None, one)


# -- another volume in its place


def test_a_volume_made_anew_never_reaches_the_old_replica(case: ZfsCase) -> None:
    (one,) = make(case, "one")
    replicate(case, None, one)
    zfs("destroy", "-r", case.dataset("vm"))
    (again,) = make(case, "one")
    case.backend.set_lineage("vm", OTHER)
    for mode in (ReceiveMode.REPLICA, ReceiveMode.REBUILD):
        with pytest.raises(NotAReplica):
            replicate(case, None, again, lineage=OTHER, mode=mode, aside="diverged-now")
    assert [v.guid for v in state(case).versions] == [one.guid]
    case.backend.set_lineage(REPLICA.name, replace(OTHER, role=Role.REPLICA))
    replicate(case, None, again, lineage=OTHER, mode=ReceiveMode.REBUILD, aside="diverged-now")
    assert [v.guid for v in state(case).versions] == [again.guid]
    kept = state(case, VolumeId("store", "prox1/vm-diverged-now"))
    assert kept.versions[0].guid == one.guid
    assert case.read_snapshot(kept.id.name, one)[: len(b"one")] == b"one"
