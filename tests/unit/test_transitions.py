"""Whether a copy may be promoted, handed over or follow, by what is known of all of them; and the words for it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from replicator.endpoint import Copies, Copy, Sighting
from replicator.model import Lineage, ResumeState, Role, StreamKind, Version, VolumeId, VolumeState, handover_tag
from replicator.role_refusals import (
    InDoubt,
    NoCopy,
    NotACopy,
    NothingComplete,
    NothingToFollow,
    NotPrimary,
    NoWitness,
    OpenHandover,
    PrimaryAnswers,
    Refusal,
    Superseded,
)
from replicator.roles import EPOCH_STEP, MAX_EPOCH, next_epoch
from replicator.situations import Answer, Silence, Situation
from replicator.transitions import Move, Promotion, Rejoin, Switch, plan_promotion, plan_rejoin, plan_switchover
from tests.support.versions import LINEAGE, OTHER_LINEAGE, snap

MINE = VolumeId("backup", "prox1/vm")
THEIRS = VolumeId("tank", "vm")
DRAW = 77


def lineage(role: Role, epoch: int = 1, uuid: str = LINEAGE) -> Lineage:
    return Lineage(uuid, role, epoch)


def state(
    role: Role | None, *versions: Version, epoch: int = 1, volume: VolumeId = MINE, **more: object
) -> VolumeState:
    found = lineage(role, epoch) if role is not None else None
    return replace(VolumeState(volume, 1, versions, found), **more)  # type: ignore[arg-type]


def copy(role: Role, epoch: int = 1, newest: Version | None = None) -> Copy:
    return Copy(THEIRS, lineage(role, epoch), newest)


def answer(node: str, *copies: Copy, unseen: tuple[str, ...] = ()) -> Answer:
    return Answer(node, Copies(copies, unseen))


def silent(node: str, **witnesses: Copies | None) -> Silence:
    seen = tuple((name, Sighting(node, copies, "no way")) for name, copies in witnesses.items())
    return Silence(node, "no route", seen)


REPLICA = state(Role.REPLICA, snap(1), snap(2))
PRIMARY_THERE = answer("prox1", copy(Role.PRIMARY, 1, snap(3)))
DOWN = silent("prox1", prox3=None)


def plan(
    *answers: Answer,
    silences: tuple[Silence, ...] = (),
    mine: VolumeState = REPLICA,
    node: str = "prox2",
    **how: bool,
) -> object:
    return plan_promotion(Situation(node, mine, answers, silences), draw=DRAW, **how)


promotion = plan
MARKED = replace(snap(2), holds=(handover_tag("prox2"),))


def test_a_promotion_whose_primary_is_down_for_a_witness() -> None:
    found = promotion(answer("prox3", copy(Role.REPLICA, 1, snap(2))), silences=(DOWN,))
    assert isinstance(found, Promotion)
    assert found.lineage == lineage(Role.PRIMARY, EPOCH_STEP + DRAW)
    assert found.at == snap(2)
    assert found.holds == ("replicator:rejoin:prox3", "replicator:rejoin:prox1")
    assert found.fence
    assert not found.warnings
    assert any("prox3 does not reach prox1 either" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("answers", "silences", "refusal"),
    [
        ((PRIMARY_THERE,), (), PrimaryAnswers),
        ((answer("prox3"),), (silent("prox1", prox3=Copies((copy(Role.PRIMARY),))),), PrimaryAnswers),
        ((answer("prox3", copy(Role.REPLICA, 2)),), (DOWN,), Superseded),
        ((answer("prox2", copy(Role.REPLICA)),), (), OpenHandover),
        ((), (silent("prox1"),), NoWitness),
        ((answer("prox3"),), (DOWN, silent("prox4")), NoWitness),
        ((answer("prox1", unseen=("tank",)),), (), NoWitness),
    ],
)
def test_what_speaks_against_a_promotion_and_force(
    answers: tuple[Answer, ...], silences: tuple[Silence, ...], refusal: type[Refusal]
) -> None:
    mine = state(Role.REPLICA, snap(1), MARKED, volume=VolumeId("tank", "vm")) if refusal is OpenHandover else REPLICA
    promotion = partial(plan, mine=mine, node="prox1" if refusal is OpenHandover else "prox2")
    found = promotion(*answers, silences=silences)
    assert isinstance(found, refusal)
    assert found.message
    assert found.hint
    assert found.to_error().kind == found.kind
    word = promotion(*answers, silences=silences, primary_is_down=True)
    assert isinstance(word, Promotion) == (refusal is NoWitness), "the operator's word is about silent nodes only"
    forced = promotion(*answers, silences=silences, force=True)
    assert isinstance(forced, Promotion)
    assert found.message in forced.warnings
    assert forced.fence


def test_a_promotion_where_all_answer_and_nobody_is_the_primary() -> None:
    found = promotion(answer("prox1", copy(Role.REPLICA)), answer("prox3"))
    assert isinstance(found, Promotion)
    assert not found.fence
    assert found.holds == ("replicator:rejoin:prox1",)


def test_an_older_primary_that_was_superseded_does_not_stop_the_newest_copy() -> None:
    found = promotion(PRIMARY_THERE, mine=state(Role.REPLICA, snap(1), epoch=5))
    assert isinstance(found, Promotion)


def test_how_much_is_lost_and_where_less_would_be() -> None:
    found = promotion(PRIMARY_THERE, force=True)
    assert isinstance(found, Promotion)
    assert "prox1 has a snapshot that is" in found.beyond
    none = promotion(answer("prox1", copy(Role.PRIMARY, 1, snap(2))), force=True)
    assert isinstance(none, Promotion)
    assert "no newer snapshot" in none.beyond
    fresher = promotion(answer("prox3", copy(Role.REPLICA, 1, snap(9))), silences=(DOWN,))
    assert isinstance(fresher, Promotion)
    assert any("promoted there, less would be lost" in warning for warning in fresher.warnings)


def test_what_cannot_be_promoted() -> None:
    assert isinstance(promotion(mine=state(None, snap(1))), NoCopy)
    half = ResumeState(StreamKind.BLOCKS, "g", "two", None, 7)
    nothing = promotion(mine=state(Role.REPLICA, resume=half), force=True)
    assert isinstance(nothing, NothingComplete)
    assert "two" in nothing.message
    aside = promotion(mine=state(Role.REPLICA, snap(1, name="diverged-x")), force=True)
    assert isinstance(aside, NothingComplete)
    again = promotion(mine=state(Role.PRIMARY, snap(1), epoch=7))
    assert isinstance(again, Promotion)
    assert again.done_already
    old = promotion(answer("prox1", copy(Role.PRIMARY, 9)), mine=state(Role.PRIMARY, snap(1), epoch=7), force=True)
    assert isinstance(old, Superseded)


def test_a_partial_and_what_somebody_wrote_are_told() -> None:
    half = ResumeState(StreamKind.BLOCKS, "g", "three", None, 7)
    found = promotion(mine=replace(REPLICA, resume=half, head_changed=True), silences=(DOWN,))
    assert isinstance(found, Promotion)
    assert (found.partial, found.aside) == ("three", True)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (state(Role.PRIMARY, snap(2)), state(Role.REPLICA, snap(1)), Move.REPLICATE),
        (state(Role.PRIMARY, MARKED), state(Role.REPLICA, snap(2)), Move.REPLICATE),
        (state(Role.REPLICA, MARKED), state(Role.REPLICA, snap(2)), Move.TAKE_OVER),
        (state(Role.REPLICA, MARKED), state(Role.REPLICA, snap(1)), Move.TAKE_BACK),
        (state(Role.REPLICA, MARKED), state(Role.REPLICA, snap(2), epoch=2), Move.TAKE_BACK),
        (state(Role.REPLICA, MARKED), state(Role.PRIMARY, snap(2), epoch=2), Move.DONE),
        (state(Role.PRIMARY, MARKED), state(Role.PRIMARY, snap(2), epoch=2), Superseded),
        (state(Role.REPLICA, snap(2)), state(Role.REPLICA, snap(2)), NotPrimary),
        (state(Role.PRIMARY, snap(2)), state(Role.REPLICA, snap(2), epoch=2), Superseded),
        (state(Role.PRIMARY, snap(2), epoch=3), state(Role.PRIMARY, snap(2), epoch=2), NothingToFollow),
        (state(Role.PRIMARY, snap(2)), None, NotACopy),
        (state(Role.PRIMARY, snap(2)), state(None, snap(2)), NotACopy),
        (state(None, snap(2)), state(Role.REPLICA, snap(2)), NoCopy),
    ],
)
def test_the_moves_of_a_switchover(
    source: VolumeState, target: VolumeState | None, expected: Move | type[Refusal]
) -> None:
    found = plan_switchover(source, "prox2", target)
    if isinstance(expected, Move):
        assert isinstance(found, Switch)
        assert found.move is expected
        return
    assert isinstance(found, expected)
    assert found.message
    assert found.hint


@pytest.mark.parametrize(
    ("mine", "primary", "expected"),
    [
        (state(Role.PRIMARY, snap(1), snap(3)), state(Role.PRIMARY, snap(1), epoch=2), Rejoin),
        (state(Role.REPLICA, snap(1)), state(Role.PRIMARY, snap(1)), Rejoin),
        (state(Role.PRIMARY, snap(1)), state(Role.PRIMARY, snap(1)), NothingToFollow),
        (state(Role.REPLICA, snap(1), epoch=3), state(Role.PRIMARY, snap(1), epoch=2), NothingToFollow),
        (state(Role.PRIMARY, snap(1)), state(Role.REPLICA, snap(1), epoch=2), NothingToFollow),
        (state(None, snap(1)), state(Role.PRIMARY, snap(1)), NoCopy),
        (state(Role.PRIMARY, snap(1)), None, NotACopy),
        (state(Role.PRIMARY, snap(1)), state(None, lineage=lineage(Role.PRIMARY, 2, OTHER_LINEAGE)), NotACopy),
    ],
)
def test_who_may_follow_whom(mine: VolumeState, primary: VolumeState | None, expected: type[object]) -> None:
    found = plan_rejoin(mine, "prox2", primary)
    assert isinstance(found, expected)
    if isinstance(found, Refusal):
        assert found.message
        assert found.hint


def test_a_rejoin_knows_what_only_it_has() -> None:
    mine = state(Role.PRIMARY, snap(1), snap(3), snap(4))
    found = plan_rejoin(mine, "prox2", state(Role.PRIMARY, snap(1), snap(9), epoch=2))
    assert isinstance(found, Rejoin)
    assert found.common == (snap(1), snap(1))
    assert found.own == (snap(3), snap(4))
    assert found.aside
    apart = plan_rejoin(mine, "prox2", state(Role.PRIMARY, snap(9), epoch=2))
    assert isinstance(apart, Rejoin)
    assert apart.common is None
    assert apart.own == mine.versions


def test_a_doubt_names_the_ways_out() -> None:
    found = InDoubt(THEIRS, "prox2", "no route")
    assert "prox2" in found.message
    assert "--primary-is-down" in found.hint


def test_epochs_count_promotions_and_are_drawn() -> None:
    first = next_epoch([1], DRAW)
    assert first == EPOCH_STEP + DRAW
    assert next_epoch([1, first], 0) == 2 * EPOCH_STEP
    assert next_epoch([], 5) == EPOCH_STEP + 5
    assert next_epoch([first], EPOCH_STEP + 3) == 2 * EPOCH_STEP + 3
    with pytest.raises(Exception, match="there is no epoch after"):
        next_epoch([MAX_EPOCH], 0)
