"""What ZFS writes for itself and lists, read by us: resume tokens, stream heads, listings, its words."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.zfs import failures
from backends.zfs.commands import Finished
from backends.zfs.failures import Operation
from backends.zfs.listing import Listing, parse
from backends.zfs.naming import DatasetNames
from backends.zfs.nvlists import unpack
from backends.zfs.properties import StreamForm
from backends.zfs.stream_head import StreamHead, read_head
from backends.zfs.tokens import read_token
from replicator.errors import (
    ChecksumMismatch,
    DamagedData,
    InvalidName,
    NoSpace,
    NoSuchSnapshot,
    NoSuchVolume,
    NotAReplica,
    ProtocolError,
    ReplicatorError,
    SnapshotExists,
    SnapshotHeld,
    StaleResume,
    StorageError,
    StorageUnavailable,
    Unsupported,
    VolumeBusy,
    VolumeChanged,
)
from replicator.model import Lineage, Role, VersionKind
from tests.support.zfs_records import RecordedRunner, failed, listing, make_head, make_token, native_nvlist, row

NAMES = DatasetNames("store", "tank/vm")
UUID = "6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00"
GUID = 2**63 + 5


# -- resume tokens


def test_a_token_says_what_was_being_received() -> None:
    text = make_token(fromguid=7, object=1, offset=4096, bytes=123456, toguid=GUID, toname="tank/vm/a@two", rawok=True)
    token = read_token(text)
    assert (token.to_guid, token.to_name, token.base_guid, token.received) == (str(GUID), "two", "7", 123456)
    assert (token.dataset, token.flags) == ("tank/vm/a", frozenset({"rawok"}))
    assert token.resume.token == text
    assert read_token(make_token(toguid=1, toname="a@b", bytes=0)).base_guid is None


def test_tokens_that_are_refused() -> None:
    right = make_token(toguid=1, toname="a@b", bytes=0)
    version, checksum, length, data = right.split("-")
    for wrong in (
        "",
        "x",
        right + "0",
        right.replace("1-", "2-", 1),
        f"{version}-{checksum}1-{length}-{data}",
        f"{version}-{checksum}-{length}1-{data}",
        f"{version}-{checksum}-0-{data}",
        make_token(toname="a@b", bytes=0),
        make_token(toguid=1, bytes=0),
        make_token({"toguid": 2}, toguid=1, toname="a@b", bytes=0),
        "1-0-10-" + "00" * 40_000,
    ):
        with pytest.raises(StaleResume):
            read_token(wrong)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    for head in (b"", b"\0\1\0\0", b"\1\1\0\0", b"\0\1\0\0" + bytes(8), b"\1\1\0\0" + bytes(8)):
        with contextlib.suppress(ProtocolError):
            unpack(head + data)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_no_damage_breaks_the_reader(place: int, damage: bytes) -> None:
    packed = bytearray(native_nvlist({"toguid": 1, "toname": "tank/a@b", "compressok": True, "bytes": 2**40}))
    packed[place : place + len(damage)] = damage
    with contextlib.suppress(ProtocolError):
        unpack(bytes(packed))


# -- heads


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_head_says_what_the_stream_is(order: str) -> None:
    head = read_head(make_head(GUID, 7, name="tank/vm/a@two", features=1 << 24, order=order) + b"more")
    assert head == StreamHead(True, False, True, str(GUID), "7", "two")
    assert read_head(make_head(1, zvol=False, order=order)) == StreamHead(False, False, False, "1", None)
    assert read_head(make_head(1, features=1 << 20, order=order)).resuming
    assert read_head(make_head(1, features=1 << 21, order=order)).redacted
    assert read_head(make_head(1, features=1 << 26, order=order)).holds


@pytest.mark.parametrize(
    ("name", "snapshot"),
    [("", ""), ("a", ""), ("a@b@c", "b@c"), ("a@b\0@c", "b"), ("@", ""), ("a@" + "b" * 300, "b" * 254)],
)
def test_what_a_head_calls_its_snapshot(name: str, snapshot: str) -> None:
    assert read_head(make_head(1, name=name)).to_name == snapshot


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("form", [0, 2, 3])
def test_all_but_one_stream_is_a_package_for_libzfs(form: int, order: str) -> None:
    with pytest.raises(ProtocolError, match="package"):
        read_head(make_head(1, form=form, order=order) + make_head(1, order=order))


@pytest.mark.parametrize("wrong", [b"", b"\0" * 311, b"\0" * 312, b"\xff" * 400, b"\1" + make_head(1)[1:]])
def test_what_is_no_stream(wrong: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_head(wrong)


# -- names


def test_names() -> None:
    for volume in ("vm-100", "prox1.example/vm 1/disk:0", "a" * 200):
        assert NAMES.volume(NAMES.dataset(volume)) == volume
    assert NAMES.snapshot("a/b", "replicator_vms_20261120T081710.123Z").endswith(
        "a/b@replicator_vms_20261120T081710.123Z"
    )
    for wrong in ("ü", "a%b", "a@b", "a//b", "../a", "a+b", "", "a" * 120 + "/" + "b" * 140):
        with pytest.raises(InvalidName):
            NAMES.dataset(wrong)
    for wrong in ("tank/vm", "tank/vmx/a", "tank", "tank/vm/ a"):
        with pytest.raises(InvalidName):
            NAMES.volume(wrong)
    with pytest.raises(InvalidName):
        NAMES.snapshot("a" * 200, "b" * 60)


# -- listings


def lineage(of: object, role: str = "replica") -> dict[str, Any]:
    return {
        "replicator__lineage": UUID,
        "replicator__role": role,
        "replicator__epoch": 3,
        "replicator__stream": "raw",
        "replicator__of": of,
    }


def listed(*rows: str, holds: str = "") -> Listing:
    runner = RecordedRunner({("zfs", "list"): listing(*rows), ("zfs", "holds"): holds})
    return Listing(NAMES, runner)


def test_a_dataset_with_its_versions() -> None:
    name = "tank/vm/a b"
    listing = listed(
        row(name, guid=11, volsize=1 << 20, written=0, encryption="off", **lineage(11)),
        row(f"{name}@two", "snapshot", guid=22, createtxg=20, creation=1700000100, userrefs=1, volsize=1 << 20),
        row(f"{name}@one", "snapshot", guid=21, createtxg=10, creation=1700000000, userrefs=0, volsize=1 << 19),
        row(f"{name}#one", "bookmark", guid=21, createtxg=10, creation=1700000000),
        row(f"{name}/child", "filesystem", guid=12),
        holds=f"{name}@two\treplicator:vms:n:s\tFri Nov 20\n{name}@two\ta\tb\tFri Nov 20\n",
    )
    found = listing.dataset(name)
    assert found is not None
    assert found.lineage == Lineage(UUID, Role.REPLICA, 3)
    assert found.form is StreamForm.RAW
    assert [(v.name, v.guid, v.position, v.kind, v.size) for v in found.versions] == [
        ("one", "21", 10, VersionKind.SNAPSHOT, 1 << 19),
        ("one", "21", 10, VersionKind.BOOKMARK, None),
        ("two", "22", 20, VersionKind.SNAPSHOT, 1 << 20),
    ]
    assert found.versions[2].holds == ("a\tb", "replicator:vms:n:s")
    assert found.children == (f"{name}/child",)
    assert not found.head_changed


def test_inherited_properties_are_not_the_childs() -> None:
    listing = listed(
        row("tank/vm", "filesystem", guid=1),
        row("tank/vm/a", "filesystem", guid=2, **lineage(2, "primary")),
        row("tank/vm/a/b", "filesystem", guid=3, **lineage(2, "primary")),
        row("tank/vm/p", "filesystem", guid=4, replicator__placeholder="tank/vm/p"),
        row("tank/vm/p/c", guid=5, replicator__placeholder="tank/vm/p"),
        row("tank/vm/ü", "filesystem", guid=6),
    )
    found, problems = listing.all()
    assert [(name, d.lineage and d.lineage.role) for name, d in found] == [
        ("a", Role.PRIMARY), ("a/b", None), ("p/c", None), ("ü", None)
    ]  # fmt: skip
    assert problems == []


def test_lineage_is_a_replicas_own_by_what_it_receives() -> None:
    token = make_token(toguid=77, toname="tank/vm/a@one", bytes=5)
    found = listed(row("tank/vm/r", guid=9, written=5, receive_resume_token=token, **lineage(77))).quick("tank/vm/r")
    assert found is not None
    assert found.lineage == Lineage(UUID, Role.REPLICA, 3)
    assert found.token is not None
    assert not found.head_changed
    snapshot = row("tank/vm/r@one", "snapshot", guid=77, createtxg=1, creation=1)
    found = listed(row("tank/vm/r", guid=9, written=5, **lineage(77)), snapshot).dataset("tank/vm/r")
    assert found is not None
    assert found.lineage is not None
    assert found.head_changed


def test_unusable_properties_are_a_problem_and_not_an_end() -> None:
    wrong = {**lineage(9), "replicator__role": "boss"}
    listing = listed(row("tank/vm", "filesystem", guid=1), row("tank/vm/r", guid=9, **wrong))
    found, problems = listing.all()
    assert found[0][1].lineage is None
    assert "'boss'" in problems[0]


def test_lines_of_another_shape_are_left_out() -> None:
    assert [r.name for r in parse(row("a") + "\nodd\tline\n\n" + row("b") + "\n")] == ["a", "b"]


def test_a_root_that_is_gone() -> None:
    runner = RecordedRunner({("zfs", "list"): failed("cannot open 'tank/vm': dataset does not exist")})
    with pytest.raises(StorageUnavailable, match="tank/vm"):
        Listing(NAMES, runner).all()
    assert Listing(NAMES, runner).dataset("tank/vm/a") is None


# -- zfs's words

WORDS: list[tuple[str, type[ReplicatorError]]] = [
    ("cannot open 'tank/vm/a': dataset does not exist", NoSuchVolume),
    ("cannot receive new filesystem stream: destination 'tank/vm/a' exists\nmust specify -F to overwrite it",
     NotAReplica),
    ("cannot receive incremental stream: destination tank/vm/a has been modified\nsince most recent snapshot",
     VolumeChanged),
    ("cannot receive incremental stream: most recent snapshot of tank/vm/a does not\nmatch incremental source",
     NoSuchSnapshot),
    ("cannot receive new filesystem stream: out of space", NoSpace),
    ("cannot receive incremental stream: destination tank/a space quota exceeded.", NoSpace),
    ("cannot resume send: 'tank/vm/a@one' used in the initial send no longer exists", StaleResume),
    ("warning: cannot send 'tank/vm/a@one': Invalid cross-device link", StaleResume),
    ("cannot resume send: 'tank/vm/a@one' is no longer the same snapshot used in the initial send", StaleResume),
    ("cannot receive resume stream: checksum mismatch or incomplete stream.\nPartially received snapshot is saved.",
     ChecksumMismatch),
    ("cannot receive: destination tank/a contains partially-complete state from \"zfs receive -s\".", StaleResume),
    ("cannot create snapshot 'tank/vm/a@one': dataset already exists", SnapshotExists),
    ("cannot destroy snapshot tank/vm/a@one: it's being held. Run 'zfs holds -r tank/vm/a@one' to see holders.",
     SnapshotHeld),
    ("cannot destroy 'tank/vm/a@one': snapshot has dependent clones\nuse '-R' to destroy them", SnapshotHeld),
    ("cannot destroy 'tank/vm/a': dataset is busy", VolumeBusy),
    ("cannot send 'tank/vm/a@one': permission denied", StorageError),
    ("The ZFS modules are not loaded.\nTry running '/sbin/modprobe zfs' as root to load them.", StorageUnavailable),
    ("cannot open 'tank': pool I/O is currently suspended", StorageUnavailable),
    ("cannot receive: IV set guid mismatch.", Unsupported),
    ("cannot receive: stream has unsupported feature, feature flags = 1", Unsupported),
    ("cannot send 'tank/a@b': encryption key not loaded", StorageError),
    ("cannot send 'tank/a@b': Input/output error", DamagedData),
    ("something new", StorageError),
]  # fmt: skip


@pytest.mark.parametrize(("said", "expected"), WORDS)
def test_what_zfs_says_becomes_an_error(said: str, expected: type[ReplicatorError]) -> None:
    error = failures.failure(failed(said), Operation("store", "tank/vm/a", "doing"))
    assert isinstance(error, expected)
    assert " ".join(said.split()) in str(error)
    assert "doing tank/vm/a failed" in str(error)
    assert error.hint


NAMED_BADLY = (
    "os-upgrade", "held", "raw send", "not found", "does not exist", "in use", "too long", "out of space", "is busy",
    "load-key", "unencrypted", "permission denied", "already exists", "I:O error",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMED_BADLY)
@pytest.mark.parametrize(("said", "expected"), WORDS)
def test_names_are_not_taken_for_words(said: str, expected: type[ReplicatorError], name: str) -> None:
    dataset = f"tank/vm/{name}"
    named = said.replace("tank/vm/a", dataset).replace("@one", f"@{name.replace(' ', '-')}")
    assert type(failures.failure(failed(named), Operation("store", dataset, "doing"))) is expected
    done = Finished(("zfs", "destroy", dataset), 1, "", f"cannot destroy {dataset}: dataset is busy")
    assert not failures.is_missing(done)
    assert not failures.says(done, name) or name == "is busy"
    assert failures.says(done, "is busy")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("cannot receive: pool must be upgraded to receive this stream.", Unsupported),
        ("pool 'tank' is not up to date; run 'zpool upgrade tank'", Unsupported),
        ("destination tank/vm/os-upgrade/other has been modified\nsince most recent snapshot", VolumeChanged),
        ("cannot destroy 'tank/vm/a@x': snapshot has dependent clones\ntank/vm/upgrade\ntank/vm/load-key",
         SnapshotHeld),
        ("cannot destroy snapshot tank/vm/a@load-key: it's being held. See 'zfs holds -r tank/vm/a@load-key'.",
         SnapshotHeld),
    ],
)  # fmt: skip
def test_names_of_others_are_not_taken_for_words(said: str, expected: type[ReplicatorError]) -> None:
    assert isinstance(failures.failure(failed(said), Operation("store", "tank/vm/a", "doing")), expected)


def test_a_missing_snapshot_is_told_from_a_missing_volume() -> None:
    said = failed("could not find any snapshots to destroy; check snapshot names.")
    assert isinstance(failures.failure(said, Operation("store", "tank/vm/a@x", "destroying")), NoSuchSnapshot)
    assert failures.is_missing(said)
    assert not failures.is_missing(failed("dataset is busy"))
    assert "signal 9" in str(failures.failure(failed("", -9), Operation("store", "a", "sending")))
