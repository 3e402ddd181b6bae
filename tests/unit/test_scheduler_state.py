"""The file in which pauses survive."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import DamagedData, StorageUnavailable
from scheduler.job import JobState
from scheduler.state import FileStateStore

SERVED = datetime(2026, 2, 28, 12, 7, 30, 123456, tzinfo=UTC)
STATES = {"vms": JobState(True, SERVED), "naïve näme": JobState(False, None)}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path / "schedule.json")
    assert store.load() == {}
    store.save(STATES)
    assert FileStateStore(store.path).load() == STATES
    store.save({})
    assert store.load() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"version": 2, "jobs": {}}',
        b'{"version": 1}',
        b'{"version": 1, "jobs": []}',
        b'{"version": 1, "jobs": {"vms": 1}}',
        b'{"version": 1, "jobs": {"vms": {"paused": 1, "served": null}}}',
        b'{"version": 1, "jobs": {"vms": {"paused": true, "served": 5}}}',
        b'{"version": 1, "jobs": {"vms": {"paused": true, "served": "yesterday"}}}',
        b'{"version": 1, "jobs": {"vms": {"paused": true, "served": "2026-02-28T12:00:00"}}}',
        b" " * ((16 << 20) + 1),
    ],
)
def test_a_damaged_file_is_refused_and_kept_aside(tmp_path: Path, content: bytes) -> None:
    store = FileStateStore(tmp_path / "schedule.json")
    store.path.write_bytes(content)
    with pytest.raises(DamagedData, match=r"schedule\.json") as caught:
        store.load()
    assert "schedule.json.damaged" in caught.value.hint
    assert (tmp_path / "schedule.json.damaged").read_bytes() == content
    assert store.load() == {}
    store.save(STATES)
    assert store.load() == STATES


@given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 200))
def test_no_bytes_crash_it(tmp_path_factory: pytest.TempPathFactory, junk: bytes, start: int, length: int) -> None:
    store = FileStateStore(tmp_path_factory.mktemp("state") / "schedule.json")
    store.save(STATES)
    raw = store.path.read_bytes()
    store.path.write_bytes(raw[:start] + junk + raw[start + length :])
    try:
        states = store.load()
    except DamagedData:
        return
    assert all(isinstance(state, JobState) for state in states.values())


def test_a_failed_save_leaves_the_old_state(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path / "schedule.json")
    store.save(STATES)
    (tmp_path / ".schedule.json.new").mkdir()
    with pytest.raises(StorageUnavailable, match="cannot write") as caught:
        store.save({})
    assert "state_dir" in caught.value.hint
    assert store.load() == STATES


def test_no_directory(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path / "none" / "schedule.json")
    assert store.load() == {}
    with pytest.raises(StorageUnavailable):
        store.save(STATES)
    (tmp_path / "file").mkdir()
    with pytest.raises(StorageUnavailable, match="cannot read"):
        FileStateStore(tmp_path / "file").load()


def test_a_document_for_people(tmp_path: Path) -> None:
    store = FileStateStore(tmp_path / "schedule.json")
    store.save(STATES)
    document = json.loads(store.path.read_text())
    assert document["jobs"]["vms"] == {"paused": True, "served": "2026-02-28T12:07:30.123456+00:00"}
