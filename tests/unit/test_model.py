"""The nouns."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import InvalidName, UsageError
from replicator.model import (
    Lineage,
    Role,
    VersionKind,
    VolumeId,
    format_time,
    hold_tag,
    job_of,
    replica_volume,
    snapshot_name,
)
from replicator.names import check_snapshot
from tests.support.versions import LINEAGE, mark, snap, source_state

words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)
moments = st.datetimes(datetime(1970, 1, 2), datetime(9999, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


def test_a_volume_is_storage_and_name() -> None:
    assert VolumeId.parse("tank:prox1/vm-100") == VolumeId("tank", "prox1/vm-100")
    assert str(VolumeId("tank", "vm")) == "tank:vm"
    assert VolumeId.parse("tank:a:b") == VolumeId("tank", "a:b")
    assert sorted([VolumeId("b", "a"), VolumeId("a", "b")]) == [VolumeId("a", "b"), VolumeId("b", "a")]


@pytest.mark.parametrize("text", ["tank", "", "vm-100"])
def test_a_volume_needs_a_storage(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        VolumeId.parse(text)
    assert "STORAGE:NAME" in caught.value.hint


@pytest.mark.parametrize("text", [":vm", "tank:", "tank:../vm", "ta nk:vm", "tank:/vm", "tank:vm@snap"])
def test_a_volume_of_bad_names(text: str) -> None:
    with pytest.raises(InvalidName):
        VolumeId.parse(text)


def test_a_replica_lives_below_the_name_of_its_source() -> None:
    assert replica_volume("prox1", VolumeId("tank", "vm/a"), "backup") == VolumeId("backup", "prox1/vm/a")


def test_times_in_names() -> None:
    moment = datetime(2026, 11, 20, 9, 17, 10, 123_999, tzinfo=timezone(timedelta(hours=1)))
    assert format_time(moment) == "20261120T081710.123Z"
    assert snapshot_name("vms", moment) == "replicator_vms_20261120T081710.123Z"


@given(words, moments)
def test_a_snapshot_says_which_job_made_it(job: str, moment: datetime) -> None:
    name = snapshot_name(job, moment)
    assert check_snapshot(name) == name
    assert job_of(name) == job


@given(words, moments, st.timedeltas(timedelta(milliseconds=1), timedelta(days=400)))
def test_names_of_a_job_sort_by_time(job: str, moment: datetime, later: timedelta) -> None:
    if moment.year + 2 < 9999:
        assert snapshot_name(job, moment) < snapshot_name(job, moment + later)


@pytest.mark.parametrize(
    "name",
    [
        "daily",
        "replicator_vms",
        "replicator_vms_20261120T081710Z",
        "replicator_vms_20261120T081710.123",
        "replicator_vms_20261120T081710.123Z-renamed",
        "my-replicator_vms_20261120T081710.123Z",
        "replicator__20261120T081710.123Z",
        "Replicator_vms_20261120T081710.123Z",
        "replicator_vms_20261120T081710.123Z\n",
        "diverged-20261120T081710.123Z",
        "",
    ],
)
def test_what_is_not_of_our_making(name: str) -> None:
    assert job_of(name) is None


def test_a_job_name_that_holds_underscores_is_read_whole() -> None:
    assert job_of("replicator_a_20261120T081710.123Z_b_20261120T081710.123Z") == "a_20261120T081710.123Z_b"


def test_a_bad_job_has_no_snapshots() -> None:
    with pytest.raises(InvalidName):
        snapshot_name("a/b", datetime.now(UTC))


def test_hold_tags() -> None:
    assert hold_tag("vms", "prox2", "backup") == "replicator:vms:prox2:backup"
    with pytest.raises(InvalidName):
        hold_tag("v/ms", "prox2", "backup")


@given(words, st.from_regex(r"[a-z0-9]{1,63}", fullmatch=True), words)
def test_every_job_and_target_has_a_tag(job: str, node: str, storage: str) -> None:
    assert hold_tag(job, node, storage)


def test_lineage_is_checked() -> None:
    assert Lineage(LINEAGE, Role.PRIMARY, 1).epoch == 1
    for bad in ("", "no-uuid", LINEAGE + "0"):
        with pytest.raises(InvalidName):
            Lineage(bad, Role.PRIMARY, 1)
    for epoch in (0, -1, 2**63):
        with pytest.raises(InvalidName):
            Lineage(LINEAGE, Role.PRIMARY, epoch)


def test_versions_are_values() -> None:
    version = snap(1)
    assert version == replace(version)
    with pytest.raises(FrozenInstanceError):
        version.name = "other"  # type: ignore[misc]
    assert version.job == "vms"
    assert snap(1, name="foreign").job is None
    assert snap(1, name="diverged-20261120T081710.123Z").is_diverged
    assert not version.is_diverged
    assert (version.ref.name, version.ref.guid, version.ref.kind) == (version.name, "guid1", VersionKind.SNAPSHOT)


def test_finding_versions_in_a_state() -> None:
    state = source_state(mark(1), snap(1), mark(2), snap(3, name="guid1"))
    assert state.by_guid("guid1") == snap(1)
    assert state.by_guid("guid2") == mark(2)
    assert state.by_guid("guid9") is None
    assert state.find("guid1") == snap(3, name="guid1")
    assert state.find("guid2") == mark(2)
    assert state.find("none") is None
    assert [v.guid for v in state.snapshots] == ["guid1", "guid3"]
