"""Makes a replica of a native storage right again: puts it back to what both sides have, and continues from there.

A native stream brings the difference between two snapshots and nothing else, so a replica that went its own way cannot
be compared and mended block by block. Its storage puts it back to the newest common snapshot instead, keeping what it
had after that aside, and the next difference is sent.

That helps only where what both have can be continued from. Where nothing is common, where the streams of the source are
of another form than those that made the replica, or where a verification found that what should be equal is not, the
whole replica is kept aside and everything is sent anew. Such a copy that was cut off is an ordinary first copy from
then on: whatever runs next continues it.

The target is asked only once the source has begun to send. Until then, and where there is no room for a second copy, it
has its replica in its place, with what it had half received.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from replicator.cancellation import Cancellation
from replicator.errors import NoSpace, NoSuchSnapshot, ReplicatorError, VolumeChanged
from replicator.mismatches import told
from replicator.model import DIVERGED_PREFIX, Lineage, Version, VolumeState
from replicator.planning import Step, mixes_forms, newest_common
from replicator.replication import Observer, Options, Pair, Replication
from replicator.units import format_size
from replicator.verification import Mismatch, Resync, aside_name


@dataclass(frozen=True, slots=True)
class Manner:
    """How a replica is made right again.

    :ivar why_all: why the whole replica is kept aside and everything sent anew; "": it continues from what both have
    :ivar made_anew: since a verification found a difference, everything was sent anew already
    """

    why_all: str = ""
    made_anew: bool = False


def manner(
    pair: Pair, source: VolumeState | None, target: VolumeState, *, full: bool, known: tuple[Mismatch, ...]
) -> Manner:
    """What a resync of a replica that has something does; for what is shown beforehand, and again when it is done.

    :param full: everything is to be sent anew in any case
    :param known: what is known to differ
    """
    left = tuple(each for each in known if not _was_kept_aside(pair, target, each.snapshot))
    made_anew = bool(known) and not left
    why = ""
    if source is None or newest_common(source, target) is None:
        why = "nothing is common"
    elif mixes_forms(source, target):
        why = f"it was made of {target.form} streams and the source sends {source.form} ones now, which cannot be mixed"
    elif full:
        why = "everything is to be sent anew"
    elif left:
        why = told(left)
    return Manner(why, made_anew)


def _was_kept_aside(pair: Pair, target: VolumeState, snapshot: str) -> bool:
    """Whether a snapshot is no longer in the replica, but in what was kept aside of it as a whole: so a resync that was
    cut off before it could tell is not begun again from the start. (What was kept when the replica was only put back is
    a clone of it, and has what came later.)"""
    if any(version.name == snapshot for version in target.snapshots):
        return False
    for volume in pair.target.volumes(pair.target_volume.storage):
        of_it = volume.id.name.startswith(f"{pair.target_volume.name}-{DIVERGED_PREFIX}")
        if not of_it or (volume.origin is not None and volume.origin.volume == pair.target_volume):
            continue
        kept = pair.target.state(volume.id)
        if kept is not None and any(version.name == snapshot for version in kept.snapshots):
            return True
    return False


def rejoin(
    pair: Pair, to: Version, options: Options, *, observer: Observer, cancel: Cancellation, anew: bool = False
) -> Resync:
    """Bring the target to ``to`` of the source, whatever was done to it. The caller has asked for consent.

    :param to: a snapshot that was taken just now
    :param anew: keep the whole replica aside and send everything, also where something is common

    :raises NoSuchSnapshot: one of the two volumes is gone
    :raises NoSpace: everything would be sent, and does not fit; nothing was changed
    """
    aside = aside_name()
    source, target = pair.source.state(pair.source_volume), pair.target.state(pair.target_volume)
    replication = Replication(pair, options, observer=observer, cancel=cancel)
    kept: tuple[str, ...] = ()
    whole = False
    if source is None:
        raise NoSuchSnapshot(f"{pair.source_volume} is gone", hint="")
    common = newest_common(source, target) if not anew else None
    base = common.target if common is not None else None
    own = [v for v in target.snapshots if base is None or v.position > base.position] if target is not None else []
    named = [version.name for version in own if version.is_diverged]
    if target is not None and named and not target.head_changed:
        aside = named[-1]  # its live data was kept already, and the storage names the dataset after that
    if target is not None and (own or target.head_changed):
        step = Step(common.source if common else None, base, to, to.name)
        whole = base is None
        if whole:
            _check_room(pair, to)
            _send_all(replication, pair, step, aside, cancel)
        else:
            replication.put_back(step, aside, partial(_prepare, pair))
        kept = (f"{pair.target_volume}-{aside}",)
    else:
        _prepare(pair, pair.source.ensure_primary(pair.source_volume))
    outcome = replication.run()
    made_equal = whole and sent_whole(pair)
    return Resync(str(pair.source_volume), pair.target_text, to.name, 0, outcome.done, outcome.sent, kept, made_equal)


def _prepare(pair: Pair, lineage: Lineage) -> None:
    """Have the target be a replica of the source, without partial state."""
    pair.target.adopt(pair.target_volume, lineage)
    pair.target.abort_receive(pair.target_volume)


def _check_room(pair: Pair, to: Version) -> None:
    """The replica stays, beside its successor, so there must be room for both.

    :raises NoSpace: as far as both figures are known, there is not
    """
    size = pair.source.estimate(pair.source_volume, None, to.ref)
    there = pair.target.storage(pair.target_volume.storage)
    if size is not None and there.total and size > there.free:
        raise NoSpace(
            f"all of {pair.source_volume} takes about {format_size(size)}, and only {format_size(there.free)} are free "
            f"in {pair.target_text}: the replica there stays as it is",
            hint="the replica is kept beside the new one: make room there, or remove what was kept before as "
            "…-diverged-<time>; if you need nothing of the replica, destroy it there by hand, and sync",
        )


def _send_all(replication: Replication, pair: Pair, step: Step, aside: str, cancel: Cancellation) -> None:
    """Keep the replica aside and send everything. A cut in the middle is left to the run that follows, which continues
    what came so far; where nothing was kept aside yet, it must not, as it would continue the old replica."""
    begun = False

    def prepare(lineage: Lineage) -> None:
        nonlocal begun
        begun = True
        _prepare(pair, lineage)
        target = pair.target.state(pair.target_volume)
        if target is not None and target.by_guid(step.to.guid) is not None:
            raise VolumeChanged(f"{pair.target_volume} got {step.to.name} meanwhile", hint="run the resync again")

    try:
        replication.put_back(step, aside, prepare)
    except ReplicatorError as error:
        if not begun or cancel.cancelled or not error.retryable:
            raise
        left = pair.target.state(pair.target_volume)
        if left is not None and left.snapshots and left.by_guid(step.to.guid) is None:
            raise


def sent_whole(pair: Pair) -> bool:
    """Whether what the target has now is its own, and not for a part that of a volume that it is a clone of."""
    target = pair.target.state(pair.target_volume)
    return target is not None and target.origin is None
