"""Planning, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pytest

from replicator.conflicts import (
    Conflict,
    Diverged,
    MixedForms,
    MixedStreams,
    NoCommonBase,
    NotAReplica,
    Recreated,
    Route,
    SourceIsReplica,
    SourceMissing,
    StaleEpoch,
)
from replicator.errors import ConflictError
from replicator.model import (
    Capability,
    Form,
    Origin,
    Role,
    StorageInfo,
    StreamKind,
    Version,
    VersionKind,
    VolumeId,
    VolumeState,
    cursor_name,
)
from replicator.names import check_snapshot
from replicator.planning import (
    CloneBase,
    Common,
    Intermediates,
    Plan,
    SendPolicy,
    Step,
    holds_for,
    newest_common,
    plan,
    protected_guids,
    stale_holds,
)
from tests.support.versions import (
    OTHER_LINEAGE,
    ROUTE,
    SOURCE,
    TAG,
    TARGET,
    mark,
    partial,
    snap,
    source_state,
    target_state,
)

T = TypeVar("T", bound=Conflict)

ALL = SendPolicy()
NEWEST = SendPolicy(Intermediates.NEWEST)
BATCHES = replace(ROUTE, batches=True)
NATIVE = replace(ROUTE, source_stream=StreamKind.NATIVE, target_stream=StreamKind.NATIVE)


def planned(
    source: VolumeState | None, target: VolumeState | None, policy: SendPolicy = ALL, route: Route = ROUTE
) -> Plan:
    found = plan(source, target, policy, route)
    assert isinstance(found, Plan), found
    return found


def shape(found: Plan) -> list[tuple[str | None, str]]:
    """The steps as (guid of the base, guid of the end); checks that they form a chain on both sides."""
    before: Step | None = None
    for step in found.steps:
        if before is not None:
            assert step.base == before.to
            assert step.target_base == before.arriving
        elif step.base is not None:
            assert step.target_base is not None
            assert step.target_base.guid == step.base.guid
        else:
            assert step.target_base is None
        before = step
    return [(step.base.guid if step.base else None, step.to.guid) for step in found.steps]


def conflict(kind: type[T], source: VolumeState | None, target: VolumeState | None, **route: object) -> T:
    found = plan(source, target, ALL, replace(ROUTE, **route))  # type: ignore[arg-type]
    assert isinstance(found, kind), found
    return found


# -- first copies


def test_first_copy_begins_with_the_oldest_snapshot() -> None:
    found = planned(source_state(snap(1), snap(2), snap(3)), None)
    assert shape(found) == [(None, "guid1"), ("guid1", "guid2"), ("guid2", "guid3")]
    assert found.common is None
    assert not found.up_to_date
    assert not found.abort_partial


def test_first_copy_of_the_newest_only_is_one_step() -> None:
    assert shape(planned(source_state(snap(1), snap(2), snap(3)), None, NEWEST)) == [(None, "guid3")]


def test_first_copy_into_a_replica_that_is_still_empty() -> None:
    assert shape(planned(source_state(snap(1)), target_state())) == [(None, "guid1")]


def test_first_copy_in_batches_is_a_full_stream_and_then_one_with_all_intermediates() -> None:
    found = planned(source_state(snap(1), snap(2), snap(3), snap(4)), None, route=BATCHES)
    assert shape(found) == [(None, "guid1"), ("guid1", "guid4")]
    assert [step.intermediates for step in found.steps] == [False, True]


def test_a_source_without_snapshots_has_nothing_to_send() -> None:
    found = planned(source_state(), None)
    assert not found.steps
    assert not found.up_to_date
    assert found.reason == "the source has no snapshot to send yet"


# -- increments


def test_increment_starts_from_the_newest_common_version() -> None:
    found = planned(source_state(snap(1), snap(2), snap(3), snap(4)), target_state(snap(1), snap(2)))
    assert shape(found) == [("guid2", "guid3"), ("guid3", "guid4")]
    assert found.common is not None
    assert (found.common.source, found.common.target) == (snap(2), snap(2))


def test_increment_to_the_newest_only() -> None:
    found = planned(source_state(snap(1), snap(2), snap(3), snap(4)), target_state(snap(1)), NEWEST)
    assert shape(found) == [("guid1", "guid4")]


def test_nothing_to_do() -> None:
    found = planned(source_state(snap(1), snap(2)), target_state(snap(1), snap(2)))
    assert found.up_to_date
    assert not found.steps
    assert found.reason == "up to date"


def test_versions_are_matched_by_identity_and_not_by_name() -> None:
    renamed_here = snap(1, name="renamed-at-the-source")
    renamed_there = snap(1, name="renamed-at-the-target", position=77)
    found = planned(source_state(renamed_here, snap(2)), target_state(renamed_there))
    assert shape(found) == [("guid1", "guid2")]
    assert found.steps[0].base == renamed_here
    assert found.steps[0].target_base == renamed_there


def test_the_same_name_with_another_identity_is_no_common_version() -> None:
    source, target = snap(1, name="daily", guid="a"), snap(1, name="daily", guid="b")
    conflict(NoCommonBase, source_state(source), target_state(target))


def test_positions_order_versions_and_clocks_do_not() -> None:
    late, early = snap(9).created, snap(0).created
    source = source_state(
        snap(1, created=late, name="one"), snap(2, created=early, name="two"), snap(3, created=early, name="three")
    )
    target = target_state(snap(1, position=50, created=early), snap(2, position=60, created=late))
    assert shape(planned(source, target)) == [("guid2", "guid3")]


def test_an_older_snapshot_that_only_the_target_has_is_longer_retention() -> None:
    assert shape(planned(source_state(snap(3), snap(4)), target_state(snap(1), snap(2), snap(3)))) == [
        ("guid3", "guid4")
    ]


def test_a_bookmark_is_a_base_where_the_snapshot_is_gone() -> None:
    found = planned(source_state(mark(1), snap(2)), target_state(snap(1)))
    assert shape(found) == [("guid1", "guid2")]
    base = found.steps[0].base
    assert base is not None
    assert base.kind is VersionKind.BOOKMARK


def test_the_snapshot_is_the_base_where_there_is_a_bookmark_as_well() -> None:
    for source in (source_state(mark(1), snap(1), snap(2)), source_state(snap(1), mark(1), snap(2))):
        base = planned(source, target_state(snap(1))).steps[0].base
        assert base is not None
        assert base.kind is VersionKind.SNAPSHOT


def test_a_bookmark_is_never_sent() -> None:
    assert planned(source_state(snap(1), mark(2)), target_state(snap(1))).up_to_date
    assert not planned(source_state(mark(1)), None).steps


def test_a_bookmark_of_the_target_has_no_data_to_start_from() -> None:
    found = planned(source_state(snap(1)), target_state(mark(1)))
    assert shape(found) == [(None, "guid1")]


# -- which snapshots


def test_foreign_snapshots_go_along_unless_the_policy_is_one_job() -> None:
    source = source_state(snap(1), snap(2, name="before-upgrade"), snap(3, job="other"), snap(4))
    target = target_state(snap(1))
    assert [end for _, end in shape(planned(source, target))] == ["guid2", "guid3", "guid4"]
    assert [end for _, end in shape(planned(source, target, SendPolicy(job="vms")))] == ["guid4"]


def test_a_foreign_snapshot_may_be_the_base_even_if_it_is_not_sent() -> None:
    source = source_state(snap(1, name="before-upgrade"), snap(2))
    assert shape(planned(source, target_state(snap(1, name="x")), SendPolicy(job="vms"))) == [("guid1", "guid2")]


def test_what_a_resync_kept_aside_is_never_sent() -> None:
    found = planned(source_state(snap(1), snap(2, name="diverged-20261120T080000.000Z")), None)
    assert shape(found) == [(None, "guid1")]


def test_a_batch_never_spans_a_snapshot_that_is_not_sent() -> None:
    source = source_state(snap(1), snap(2), snap(3), snap(4, name="foreign"), snap(5), snap(6), snap(7))
    found = planned(source, target_state(snap(1)), SendPolicy(job="vms"), BATCHES)
    assert shape(found) == [("guid1", "guid3"), ("guid3", "guid5"), ("guid5", "guid7")]
    assert [step.intermediates for step in found.steps] == [True, False, True]


def test_a_batch_cannot_start_from_a_bookmark() -> None:
    found = planned(source_state(mark(1), snap(2), snap(3), snap(4)), target_state(snap(1)), route=BATCHES)
    assert shape(found) == [("guid1", "guid2"), ("guid2", "guid4")]
    assert [step.intermediates for step in found.steps] == [False, True]


def test_batches_are_made_where_both_storages_can() -> None:
    can = StorageInfo("tank", "zfs", StreamKind.NATIVE, Capability.NATIVE_INTERMEDIATES | Capability.SEND, 0, 0, "")
    cannot = replace(can, name="backup", capabilities=Capability.RECEIVE)
    assert Route.between(SOURCE, can, "prox2", can).batches
    assert not Route.between(SOURCE, can, "prox2", cannot).batches
    assert Route.between(SOURCE, can, "prox2", cannot).target == "prox2:backup"


# -- names


def test_an_occupied_name_gets_the_identity_appended() -> None:
    old = snap(1, name="latest", guid="0-old")
    new = snap(2, name="latest", guid="0-new")
    found = planned(source_state(replace(mark(1), guid="0-old"), new), target_state(old))
    assert [step.name for step in found.steps] == ["latest.0new"]
    assert found.steps[0].arriving.guid == "0-new"


def test_a_derived_name_is_always_a_name() -> None:
    name = "ä" * 100
    guid = "f" * 64
    source = source_state(snap(1), snap(2, name=name, guid=guid))
    target = target_state(snap(0, name=name, guid="x"), snap(1))
    (step,) = planned(source, target).steps
    assert check_snapshot(step.name) != name
    assert step.name.endswith("f" * 32)


def test_a_derived_name_gives_way_too() -> None:
    source = source_state(snap(3), snap(4, name="a", guid="ff"))
    target = target_state(snap(1, name="a", guid="x"), snap(2, name="a.ff", guid="y"), snap(3))
    (step,) = planned(source, target).steps
    assert step.name == "a.ff.2"


def test_a_snapshot_to_be_renamed_travels_alone() -> None:
    source = source_state(snap(1), snap(2), snap(3, name="latest"), snap(4), snap(5))
    target = target_state(snap(0, name="latest", guid="old"), snap(1))
    found = planned(source, target, route=BATCHES)
    assert shape(found) == [("guid1", "guid2"), ("guid2", "guid3"), ("guid3", "guid5")]
    assert [step.name == step.to.name for step in found.steps] == [True, False, True]


# -- resume


def test_a_partial_state_is_continued_and_the_rest_planned_from_its_end() -> None:
    state = partial(snap(2), snap(1))
    found = planned(source_state(snap(1), snap(2), snap(3)), target_state(snap(1), resume=state))
    assert shape(found) == [("guid1", "guid2"), ("guid2", "guid3")]
    assert found.steps[0].resume == state
    assert found.steps[1].resume is None
    assert not found.abort_partial


def test_a_partial_full_copy_is_continued() -> None:
    state = partial(snap(1), None)
    found = planned(source_state(snap(1), snap(2)), target_state(resume=state))
    assert shape(found) == [(None, "guid1"), ("guid1", "guid2")]
    assert found.steps[0].resume == state


def test_a_partial_state_is_continued_even_if_it_is_not_the_newest_any_more() -> None:
    state = partial(snap(2), snap(1))
    found = planned(source_state(snap(1), snap(2), snap(3)), target_state(snap(1), resume=state), NEWEST)
    assert shape(found) == [("guid1", "guid2"), ("guid2", "guid3")]


def test_a_partial_state_is_continued_from_a_bookmark() -> None:
    state = partial(snap(2), snap(1))
    found = planned(source_state(mark(1), snap(2)), target_state(snap(1), resume=state))
    assert found.steps[0].resume == state


def test_a_first_copy_that_was_not_marked_as_a_replica_yet_is_continued() -> None:
    """The power failed just when its dataset had been made."""
    state = partial(snap(1), None)
    begun = replace(target_state(resume=state), lineage=None)
    (step,) = planned(source_state(snap(1)), begun).steps
    assert step.resume == state
    assert isinstance(plan(source_state(snap(2)), begun, ALL, ROUTE), NotAReplica)
    for somebody_elses in (
        replace(target_state(), lineage=None),
        replace(begun, versions=(snap(7),)),
        replace(begun, head_changed=True),
        replace(begun, resume=partial(snap(1), snap(0))),
    ):
        assert isinstance(plan(source_state(snap(1)), somebody_elses, ALL, ROUTE), NotAReplica)


def test_a_resumed_step_keeps_the_name_under_which_it_began() -> None:
    state = replace(partial(snap(2), snap(1)), to_name="begun-under-this-name")
    (step,) = planned(source_state(snap(1), snap(2)), target_state(snap(1), resume=state)).steps
    assert step.name == "begun-under-this-name"


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (partial(snap(9), snap(1)), "no longer has that snapshot"),
        (partial(snap(2), snap(0)), "base is not the newest snapshot"),
        (partial(snap(2), None), "began as a full copy"),
        (partial(snap(1), snap(1)), "has that snapshot already"),
        (replace(partial(snap(2), snap(1)), kind=StreamKind.NATIVE), "of a native stream"),
        (partial(snap(3), snap(1)), "no longer one to send"),
        (partial(snap(0), snap(1)), "older than what the target has"),
    ],
)
def test_a_stale_partial_state_is_discarded_and_planned_afresh(state: object, why: str) -> None:
    source = source_state(snap(0), snap(1), snap(2), snap(3, name="diverged-x"))
    target = replace(target_state(snap(1)), resume=state)  # type: ignore[arg-type]
    found = planned(source, target)
    assert found.abort_partial
    assert found.stale_resume is not None
    assert why in found.stale_resume.message
    assert shape(found) == [("guid1", "guid2")]
    assert all(step.resume is None for step in found.steps)


def test_a_stale_partial_state_is_discarded_even_when_there_is_nothing_to_send() -> None:
    found = planned(source_state(snap(1)), target_state(snap(1), resume=partial(snap(9), snap(1))))
    assert found.abort_partial
    assert found.up_to_date


# -- conflicts


def test_newer_snapshots_of_the_target_are_a_divergence() -> None:
    found = conflict(Diverged, source_state(snap(1), snap(2)), target_state(snap(1), snap(8), snap(9)))
    assert found.common == snap(1)
    assert found.newer == (snap(8), snap(9))
    assert not found.head_changed
    assert snap(9).name in found.message
    assert "replicator resync tank:vm-100 --target prox2:backup" in found.hint


def test_live_data_beside_the_snapshots_is_a_divergence() -> None:
    for source in (source_state(snap(1)), source_state(snap(1), snap(2))):
        found = conflict(Diverged, source, target_state(snap(1), head_changed=True))
        assert found.head_changed
        assert found.newer == ()
        assert found.message.endswith(f"was written to since {snap(1).name}")
        native = replace(ROUTE, source_stream=StreamKind.NATIVE, target_stream=StreamKind.NATIVE)
        lost = plan(source, target_state(snap(1), head_changed=True), SendPolicy(), native)
        assert isinstance(lost, Diverged)
        assert lost.message.endswith(f"since {snap(1).name}, or snapshots that it had after that were destroyed")
    assert conflict(Diverged, source_state(snap(1)), target_state(head_changed=True)).common is None


@pytest.mark.parametrize("newer", [(), (snap(2),)])
def test_streams_of_another_form_are_refused_before_the_first_byte(newer: tuple[Version, ...]) -> None:
    source = replace(source_state(snap(1), *newer), form="plain")
    found = conflict(MixedForms, source, replace(target_state(snap(1)), form="raw"))
    assert "was made of raw streams, and the source sends plain ones now" in found.message
    assert "set replicator:stream of the source's dataset back to raw" in found.hint
    assert "replicator resync tank:vm-100 --target prox2:backup keeps the whole replica aside" in found.hint


@pytest.mark.parametrize(("ours", "theirs"), [("raw", "raw"), ("plain", "plain"), ("raw", ""), ("", "plain"), ("", "")])
def test_the_same_form_or_one_that_nothing_is_known_of_is_no_conflict(ours: Form, theirs: Form) -> None:
    source = replace(source_state(snap(1), snap(2)), form=ours)
    assert shape(planned(source, replace(target_state(snap(1)), form=theirs))) == [("guid1", "guid2")]


def test_a_first_copy_that_began_in_another_form_is_discarded() -> None:
    source = replace(source_state(snap(1)), form="plain")
    found = planned(source, replace(target_state(resume=partial(snap(1), None)), form="raw"))
    assert found.stale_resume is not None
    assert "it began as a raw stream, and the source sends plain ones now" in found.stale_resume.message
    assert shape(found) == [(None, "guid1")]


def test_a_long_list_in_a_message_is_cut() -> None:
    found = conflict(Diverged, source_state(snap(1)), target_state(*(snap(n) for n in range(1, 30))))
    assert "and 25 more" in found.message


def test_what_a_resync_kept_aside_is_no_divergence_and_no_base() -> None:
    aside = snap(5, name="diverged-20261120T080500.000Z", guid="guid2")
    found = planned(source_state(snap(1), snap(2)), target_state(snap(1), aside))
    assert shape(found) == [("guid1", "guid2")]
    assert shape(planned(source_state(snap(1), snap(2)), target_state(aside)))[0] == (None, "guid1")


def test_no_snapshot_in_common() -> None:
    found = conflict(NoCommonBase, source_state(mark(1), snap(2)), target_state(snap(7), snap(8)))
    assert found.source == (mark(1), snap(2))
    assert found.target == (snap(7), snap(8))
    assert "sends only the blocks that differ" in found.hint
    assert "here there is none" in conflict(NoCommonBase, source_state(), target_state(snap(7))).message


def test_a_source_that_is_gone() -> None:
    assert "does not exist" in conflict(SourceMissing, None, target_state(snap(1))).message
    conflict(SourceMissing, None, None)


def test_streams_of_two_kinds() -> None:
    found = conflict(MixedStreams, source_state(snap(1)), None, source_stream=StreamKind.NATIVE)
    assert "native" in found.message
    assert "blocks" in found.message


def test_a_volume_that_replication_never_made() -> None:
    target = replace(target_state(), lineage=None)
    assert "never made by replication" in conflict(NotAReplica, source_state(snap(1)), target).message


def test_a_volume_that_was_made_anew() -> None:
    found = conflict(Recreated, source_state(snap(1)), target_state(snap(7), snap(8), lineage=OTHER_LINEAGE))
    assert (found.volume, found.lineage, found.newest, found.common) == (TARGET, OTHER_LINEAGE, snap(8), None)
    assert OTHER_LINEAGE in found.message
    assert snap(8).name in found.message
    assert "destroyed and made anew" in found.message
    assert "asks first" in found.hint
    native = conflict(
        Recreated,
        source_state(snap(1)),
        target_state(snap(7), lineage=OTHER_LINEAGE),
        source_stream=StreamKind.NATIVE,
        target_stream=StreamKind.NATIVE,
    )
    assert "prox1/vm-100-diverged-<time>" in native.hint
    assert "costs, and asks" in native.hint
    empty = conflict(Recreated, source_state(snap(1)), target_state(lineage=OTHER_LINEAGE))
    assert "without a snapshot" in empty.message


def test_a_volume_that_was_brought_back_from_a_copy() -> None:
    """Its lineage is new, and its snapshots are not: nothing need be sent in full."""
    for source in (source_state(snap(1), snap(2)), replace(source_state(snap(1), snap(2)), lineage=None)):
        found = conflict(Recreated, source, target_state(snap(1), lineage=OTHER_LINEAGE))
        assert found.common == snap(1)
        assert "without sending all" in found.hint


def test_a_volume_that_took_the_name_of_another() -> None:
    found = conflict(Recreated, source_state(snap(1)), target_state(snap(7), lineage=OTHER_LINEAGE))
    found = replace(found, elsewhere=VolumeId("backup", "prox1/vm-9"))
    assert "backup:prox1/vm-9" in found.message
    assert "rename backup:prox1/vm-100" in found.hint


def test_a_primary_of_another_lineage_is_no_replica() -> None:
    target = target_state(snap(1), lineage=OTHER_LINEAGE, role=Role.PRIMARY)
    found = conflict(NotAReplica, source_state(snap(1)), target)
    assert OTHER_LINEAGE in found.message


def test_a_target_that_is_a_primary_itself() -> None:
    found = conflict(NotAReplica, source_state(snap(1)), target_state(snap(1), role=Role.PRIMARY))
    assert "primary itself (epoch 1)" in found.message


@pytest.mark.parametrize("role", list(Role))
def test_a_target_of_a_newer_epoch(role: Role) -> None:
    found = conflict(StaleEpoch, source_state(snap(1), epoch=2), target_state(snap(1), epoch=3, role=role))
    assert (found.source_epoch, found.target_epoch) == (2, 3)
    assert "superseded" in found.message


def test_a_target_of_an_older_epoch_follows() -> None:
    assert planned(source_state(snap(1), epoch=3), target_state(snap(1), epoch=2)).up_to_date


def test_a_replica_is_no_source() -> None:
    conflict(SourceIsReplica, source_state(snap(1), role=Role.REPLICA), None)


def test_a_source_that_was_never_replicated_can_be_planned_for() -> None:
    assert shape(planned(replace(source_state(snap(1)), lineage=None), None)) == [(None, "guid1")]


def test_every_conflict_becomes_an_error_with_its_kind_and_a_way_out() -> None:
    found: list[Conflict] = [
        SourceMissing(ROUTE),
        SourceIsReplica(ROUTE, 1),
        MixedStreams(ROUTE),
        NotAReplica(ROUTE, TARGET, "why"),
        Recreated(ROUTE, TARGET, OTHER_LINEAGE, snap(1), None),
        StaleEpoch(ROUTE, 1, 2),
        Diverged(ROUTE, snap(1), (snap(2),), True),
        NoCommonBase(ROUTE, (snap(1),), (snap(2),)),
        MixedForms(ROUTE, "plain", "raw"),
    ]
    assert {type(c).__name__ for c in found} == {c.__name__ for c in Conflict.__subclasses__()}
    assert len({c.kind for c in found}) == len(found)
    for each in found:
        error = each.to_error()
        assert isinstance(error, ConflictError)
        assert (error.message, error.hint, error.kind) == (each.message, each.hint, each.kind)
        assert "tank:vm-100" in error.message
        assert error.hint
        assert not error.message.endswith(".")


# -- clones

ORIGIN = Origin(VolumeId("tank", "template"), "base")
BASE = snap(1, name="base")
CLONE = CloneBase(ORIGIN.volume, VolumeId("backup", "prox1/template"), Common(BASE, replace(BASE, name="there")))


def test_a_clone_is_sent_as_the_difference_to_its_origin() -> None:
    source = replace(source_state(snap(5), snap(6), snap(7)), origin=ORIGIN)
    found = plan(source, None, SendPolicy(), replace(NATIVE, batches=True), CLONE)
    assert isinstance(found, Plan)
    assert [(s.base, s.target_base, s.to, s.clone) for s in found.steps] == [
        (BASE, CLONE.common.target, snap(5), CLONE),
        (snap(5), snap(5), snap(7), None),
    ]
    assert "only the difference" in found.notes[0]
    assert holds_for(found.steps[0], TAG).target == ()
    assert found.common is None
    later = plan(source, target_state(snap(5)), SendPolicy(), NATIVE, CLONE)
    assert isinstance(later, Plan)
    assert [s.clone for s in later.steps] == [None, None]
    assert later.notes == ()


def test_a_volume_whose_snapshots_went_to_its_clone() -> None:
    """What zfs promote of a clone leaves: a clone of it, with only what is younger."""
    source = replace(source_state(snap(5)), origin=ORIGIN)
    found = plan(source, target_state(snap(1), snap(2)), SendPolicy(), NATIVE)
    assert isinstance(found, NoCommonBase)
    assert "a clone of tank:template@base now" in found.message
    assert "zfs promote" in found.hint
    assert "resync" in found.hint


def test_a_clone_whose_origin_the_target_does_not_have_is_sent_in_full() -> None:
    found = plan(replace(source_state(snap(5)), origin=ORIGIN), None, SendPolicy(), NATIVE)
    assert isinstance(found, Plan)
    assert [(s.base, s.clone) for s in found.steps] == [(None, None)]
    assert "tank:template@base" in found.notes[0]
    assert "in full" in found.notes[0]


@pytest.mark.parametrize("base", [BASE, None])
def test_a_half_received_clone_is_continued_as_it_began(base: Version | None) -> None:
    source = replace(source_state(snap(5), snap(6)), origin=ORIGIN)
    resume = replace(partial(snap(5), base), kind=StreamKind.NATIVE)
    found = plan(source, target_state(resume=resume), SendPolicy(), NATIVE, CLONE)
    assert isinstance(found, Plan)
    assert not found.abort_partial
    assert found.steps[0].resume == resume
    assert (found.steps[0].base, found.steps[0].clone) == ((BASE, CLONE) if base else (None, None))
    gone = plan(source, target_state(resume=resume), SendPolicy(), NATIVE)
    assert isinstance(gone, Plan)
    assert gone.abort_partial == (base is not None)


# -- protection


def test_holds_protect_both_ends_of_a_step() -> None:
    (step,) = planned(source_state(snap(1), snap(2)), target_state(snap(1, name="x"))).steps
    holds = holds_for(step, TAG)
    assert holds.source == (snap(1), snap(2))
    assert holds.target == (snap(1, name="x"),)
    assert holds.tag == TAG


def test_a_bookmark_is_not_held() -> None:
    (step,) = planned(source_state(mark(1), snap(2)), target_state(snap(1))).steps
    assert holds_for(step, TAG).source == (snap(2),)


def test_our_own_stale_holds_are_found_and_no_others() -> None:
    versions = (snap(1, holds=[TAG]), snap(2, holds=["other"]), snap(3, holds=["other", TAG]), snap(4, holds=[TAG]))
    state = source_state(*versions)
    assert stale_holds(state, TAG, {"guid4"}) == [(versions[0], TAG), (versions[2], TAG)]
    cursors = [mark(n, name=cursor_name(TAG, f"guid{n}")) for n in (2, 4)]
    state = source_state(mark(1), *cursors)
    assert stale_holds(state, TAG, {"guid4"}) == [(cursors[0], TAG)]


def test_the_last_common_version_with_each_target_is_protected() -> None:
    source = source_state(snap(1), snap(2), snap(3), snap(4), snap(5))
    targets = [target_state(snap(1), snap(2)), target_state(snap(3), snap(4)), target_state(), None]
    assert protected_guids(source, targets) == {"guid2", "guid4"}
    resuming = target_state(snap(1), resume=partial(snap(5), snap(1)))
    assert protected_guids(source, [resuming]) == {"guid1", "guid5"}


def test_a_divergence_does_not_lose_the_protection_of_what_was_common() -> None:
    source = source_state(snap(1), snap(2))
    target = target_state(snap(1), snap(9), head_changed=True)
    assert protected_guids(source, [target]) == {"guid1"}
    common = newest_common(source, target)
    assert common is not None
    assert common.source == snap(1)


def test_steps_read_as_a_sentence() -> None:
    state = partial(snap(1), None, 4096)
    found = planned(source_state(snap(1, name="one"), snap(2, name="two")), target_state(resume=state))
    assert [str(step) for step in found.steps] == ["full copy of one (resumed at byte 4096)", "one → two"]
