"""An alarm ends with what says that both the snapshot and what follows it are right, and with nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicator.mismatches import MAX_KNOWN, settle, told, ways_out
from replicator.model import Version, VolumeState
from replicator.verification import Method, Mismatch, Verification
from tests.support.versions import snap, source_state, target_state

ONE, TWO, THREE = snap(1), snap(2), snap(3)
BOTH = source_state(ONE, TWO, THREE), target_state(ONE, TWO, THREE)
TWO_DIFFERS = Mismatch(TWO.name, 64, TWO.guid)


def looked(at: Version, differing: int = 0, *, method: Method = Method.BLOCKS, repaired: bool = False) -> Verification:
    return Verification(
        "tank:a", "two:backup", at.name, 1000, differing, (), 0, repaired=repaired, method=method, guid=at.guid
    )


def after(*steps: tuple[Verification, tuple[VolumeState, VolumeState]]) -> tuple[Mismatch, ...]:
    known: tuple[Mismatch, ...] = ()
    for found, (source, target) in steps:
        known = settle(known, found, source, target)
    return known


UNTIL_TWO = source_state(ONE, TWO), target_state(ONE, TWO)
WRONG = looked(TWO, 64), UNTIL_TWO
WITHOUT_TWO = source_state(ONE, TWO, THREE), target_state(ONE, THREE)


def test_what_differs_is_known() -> None:
    assert after(WRONG) == (TWO_DIFFERS,)
    assert after(WRONG, (looked(TWO, 5), BOTH)) == (replace(TWO_DIFFERS, differing=5),)


@pytest.mark.parametrize("method", [Method.BLOCKS, Method.FILES])
def test_the_same_snapshot_read_again_and_equal_ends_it(method: Method) -> None:
    assert after(WRONG, (looked(TWO, method=method), BOTH)) == ()


def test_an_older_snapshot_says_nothing() -> None:
    assert after(WRONG, (looked(ONE), UNTIL_TWO)) == (TWO_DIFFERS,)
    assert after(WRONG, (looked(ONE), WITHOUT_TWO)) == (TWO_DIFFERS,)


@pytest.mark.parametrize("at", [ONE, TWO, THREE])
@pytest.mark.parametrize("state", [UNTIL_TWO, BOTH, WITHOUT_TWO])
def test_what_reads_nothing_says_nothing(at: Version, state: tuple[VolumeState, VolumeState]) -> None:
    assert after(WRONG, (looked(at, method=Method.SCRUB), state)) == (TWO_DIFFERS,)


def test_the_newest_does_not_end_it_while_the_older_one_is_there_and_may_be_restored_from() -> None:
    (left,) = after(WRONG, (looked(THREE), BOTH))
    assert left == replace(TWO_DIFFERS, passed=True)
    assert "; the newest snapshot was read since, and is equal" in told((left,))
    assert after(WRONG, (looked(THREE), BOTH), (looked(TWO, 64, repaired=True), BOTH)) == ()
    assert after(WRONG, (looked(THREE), BOTH), (looked(THREE, method=Method.SCRUB), WITHOUT_TWO)) == ()


def test_a_snapshot_that_is_gone_counts_only_with_the_newest() -> None:
    assert after(WRONG, (looked(THREE), WITHOUT_TWO)) == ()
    older = source_state(ONE, TWO, THREE, snap(4)), target_state(ONE, THREE, snap(4))
    assert after(WRONG, (looked(THREE), older)) == (TWO_DIFFERS,)


def test_a_repair_of_an_older_snapshot_says_nothing_of_what_follows_it() -> None:
    (left,) = after(WRONG, (looked(TWO, 64, repaired=True), BOTH))
    assert left.mended
    assert "what follows it was not read since" in told((left,))
    assert "verify tank:a --target two:backup` reads the newest" in ways_out("tank:a", "two:backup", (left,))
    assert after(WRONG, (looked(TWO, 64, repaired=True), BOTH), (looked(THREE), BOTH)) == ()
    assert after(WRONG, (looked(TWO, 64, repaired=True), UNTIL_TWO)) == (), "nothing follows it"


def test_a_repair_after_which_the_newest_was_verified_ends_it() -> None:
    assert settle((TWO_DIFFERS,), looked(TWO, 64, repaired=True), *BOTH, newest=True) == ()


def test_each_snapshot_has_its_own_end() -> None:
    wrong = after(WRONG, (looked(THREE, 7), BOTH))
    assert [each.snapshot for each in wrong] == [TWO.name, THREE.name]
    assert told(wrong) == f"the replica differs from its source: 7 B of {THREE.name}, and 1 more of its snapshots"
    (left,) = settle(wrong, looked(THREE, 7, repaired=True), *BOTH)
    assert left == replace(TWO_DIFFERS, passed=True)


def test_a_finding_of_scrubs_ends_with_a_scrub_that_has_read_that_snapshot_or_with_reading() -> None:
    found = settle((), looked(TWO, 1, method=Method.SCRUB), *BOTH)
    assert not found[0].read
    assert settle(found, looked(ONE, method=Method.SCRUB), *BOTH) == found
    for at in (TWO, THREE):
        assert settle(found, looked(at, method=Method.SCRUB), *BOTH) == ()
    assert settle(found, looked(TWO), *BOTH) == ()
    assert settle(found, looked(THREE), *BOTH) == (replace(found[0], passed=True),)
    assert settle(found, looked(ONE, method=Method.SCRUB), *WITHOUT_TWO) == ()


def test_what_was_found_by_reading_stays_so_when_scrubs_find_it_too() -> None:
    assert after(WRONG, (looked(TWO, 1, method=Method.SCRUB), BOTH))[0].read


def test_where_nobody_can_look_nothing_is_gone() -> None:
    assert settle((TWO_DIFFERS,), looked(THREE), None, None) == (TWO_DIFFERS,)
    assert settle((TWO_DIFFERS,), looked(TWO), None, None) == ()


def test_a_finding_without_identity_is_known_by_its_name() -> None:
    old = Mismatch(TWO.name, 64)
    assert settle((old,), looked(TWO), *BOTH) == ()
    assert settle((old,), looked(THREE), *BOTH) == (replace(old, passed=True),)
    assert settle((old,), looked(THREE), *WITHOUT_TWO) == ()


def test_another_snapshot_of_that_name_is_another() -> None:
    other = replace(TWO, guid="other")
    assert settle((TWO_DIFFERS,), looked(other), source_state(ONE, other, THREE), BOTH[1]) == (TWO_DIFFERS,)


def test_no_more_are_remembered_than_there_is_room_for() -> None:
    many = tuple(Mismatch(f"s{n}", 1, f"g{n}") for n in range(MAX_KNOWN))
    found = settle(many, looked(TWO, 64), None, None)
    assert len(found) == MAX_KNOWN
    assert found[-1] == TWO_DIFFERS
    assert found[0] == many[1]


def test_the_way_out_names_the_snapshot() -> None:
    out = ways_out("tank:a", "two:backup", (TWO_DIFFERS,))
    assert "`replicator resync tank:a --target two:backup`" in out
    assert f"`replicator verify tank:a --target two:backup --snapshot {TWO.name} --repair`" in out
    assert (
        f"once {TWO.name} is not on the target any more, `replicator verify tank:a --target two:backup` ends it" in out
    )
