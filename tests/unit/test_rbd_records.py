"""What is kept in the metadata of RBD images, and what is there instead after a copy or a mishap."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.fields import BadRecord
from backends.rbd import records
from backends.rbd.records import HeadRecord, Identity, Partial, Replaced, SnapshotRecord, Stage, Taken
from replicator.endpoint import ReceiveMode
from replicator.errors import InvalidName
from replicator.model import Lineage, Role
from replicator.streams import MAX_VOLUME_SIZE

TAKEN = Taken("10185167", 4, datetime(2026, 11, 20, 8, 0, 7, tzinfo=UTC))
OTHERS = [replace(TAKEN, image="x"), replace(TAKEN, time=TAKEN.time + timedelta(seconds=1))]
LINEAGE = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.REPLICA, 3)

guids = st.text(min_size=1, max_size=128)
snapshot_names = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_.: -]{0,40}[A-Za-z0-9])?", fullmatch=True)
positions = st.integers(0, 2**63 - 1)
sizes = st.integers(0, MAX_VOLUME_SIZE)
times = st.datetimes(timezones=st.just(UTC))
identities = st.builds(Identity, guids, snapshot_names, times, positions)
snapshot_records = st.builds(
    SnapshotRecord, identities, st.none() | st.builds(Replaced, positions, guids, snapshot_names, positions)
)
partials = st.builds(
    Partial,
    guids,
    snapshot_names,
    st.none() | guids,
    sizes,
    st.sampled_from(ReceiveMode),
    st.sampled_from(Stage),
    sizes,
)


@given(snapshot_records)
def test_records_of_snapshots(record: SnapshotRecord) -> None:
    text = record.encode(TAKEN)
    assert SnapshotRecord.load(text, TAKEN) == record
    for other in OTHERS:
        with pytest.raises(BadRecord):
            SnapshotRecord.load(text, other)


@given(partials)
def test_partial_state(partial: Partial) -> None:
    text = partial.encode("10185167")
    assert Partial.load(text, "10185167") == partial
    with pytest.raises(BadRecord):
        Partial.load(text, "another")
    resumable = partial.mode is ReceiveMode.REPLICA and partial.stage is Stage.WRITE
    assert (partial.resume is not None) == resumable


@given(st.text(max_size=128))
def test_records_of_heads(guid: str) -> None:
    record = HeadRecord(TAKEN, guid)
    assert HeadRecord.load(record.encode(), TAKEN.image) == record
    with pytest.raises(BadRecord):
        HeadRecord.load(record.encode(), "another")


def test_lineage() -> None:
    text = records.encode_lineage(LINEAGE, "10185167")
    assert records.load_lineage(text, "10185167") == LINEAGE
    assert records.load_lineage(text, "a copy") is None
    for field, value in (("uuid", "x"), ("role", "king"), ("epoch", 0), ("epoch", True), ("image", "")):
        with pytest.raises(BadRecord):
            records.load_lineage(json.dumps({**json.loads(text), field: value}), "10185167")


def test_marks() -> None:
    text = records.encode_mark(TAKEN)
    records.load_mark(text, TAKEN)
    for other in OTHERS:
        with pytest.raises(BadRecord):
            records.load_mark(text, other)


def test_holds() -> None:
    good, foreign = records.encode_mark(TAKEN), records.encode_mark(OTHERS[0])
    metadata = {
        records.hold_key(4, "replicator:a.b:c"): good,
        records.hold_key(4, "a"): good,
        records.hold_key(44, "b"): good,
        records.hold_key(4, "copied"): foreign,
        "replicator.hold.4.": good,
        "replicator.hold.4.a/b": good,
    }
    assert records.holds_in(metadata, TAKEN) == ("a", "replicator:a.b:c")
    with pytest.raises(InvalidName):
        records.hold_key(4, "../x")


def test_which_snapshot_a_key_is_about() -> None:
    for key in (records.snapshot_key(12), records.hold_key(12, "a.b"), records.protected_key(12)):
        assert records.snapshot_of(key) == 12
    for key in (
        records.LINEAGE,
        "replicator.hold.x.a",
        "replicator.snapshot.",
        "other.12",
        "replicator.snapshot.\u0661",
    ):
        assert records.snapshot_of(key) is None


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "null", "{}", '{"format": 2}', '{"format": 1}', "[" * 5000, '{"format":1,"image":5}', " " * 20000],
)
def test_what_is_no_record(text: str) -> None:
    for load in (
        lambda: SnapshotRecord.load(text, TAKEN),
        lambda: Partial.load(text, "10185167"),
        lambda: HeadRecord.load(text, "10185167"),
        lambda: records.load_lineage(text, "10185167"),
        lambda: records.load_mark(text, TAKEN),
    ):
        with pytest.raises(BadRecord):
            load()


def test_numbers_that_are_out_of_range() -> None:
    partial = Partial("g", "one", None, 5, ReceiveMode.REPLICA, Stage.WRITE, 3)
    fields = json.loads(partial.encode("i"))
    for field, value in (
        ("size", -1),
        ("size", MAX_VOLUME_SIZE + 1),
        ("offset", 1.5),
        ("offset", None),
        ("to_name", ".."),
        ("to_guid", "x" * 129),
        ("mode", "no mode"),
        ("stage", ""),
    ):
        with pytest.raises(BadRecord):
            Partial.load(json.dumps({**fields, field: value}), "i")
