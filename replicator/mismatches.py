"""What verifications found to differ in a replica, and what ends it. Pure.

A finding has two halves. The snapshot that differed may be restored from; and the replica continues from it: what is
newer was made of the same blocks. Each half ends by itself, and the alarm with both:

- The *snapshot* is right once a verification that read all of it found it equal, a repair made it so, or it is not on
  the target any more.
- What *follows* it is right once the newest snapshot that both sides have was read in full and found equal, or made so:
  both kinds of replicas, images and ZFS, read whole contents and not only what changed, and whatever comes later is
  added to that one. The same holds if the snapshot itself was read again and is equal after all. A repair of an older
  snapshot says nothing of what follows it.

So the newest snapshot, found equal, does not end an alarm while the older one is still there and differs. An older one
says nothing at all, nor does a comparison that reads nothing (``Method.SCRUB``), unless the finding came from such a
one: pools read all blocks of all snapshots that were there when the scrub began.

A resync that sent everything anew, or compared all data, ends all findings. It is the operator's decision, who was told
what it leaves as it is (see ``mending.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from replicator import units
from replicator.model import Version, VolumeState
from replicator.planning import newest_common
from replicator.verification import Method, Mismatch, Verification

MAX_KNOWN = 1000
"""Findings that are remembered of one replica; of more, the last ones."""


def settle(
    known: Iterable[Mismatch],
    found: Verification,
    source: VolumeState | None,
    target: VolumeState | None,
    *,
    newest: bool = False,
) -> tuple[Mismatch, ...]:
    """What is known to differ after a verification, in the order in which it was found.

    :param source, target: both sides as they are now; None: not known, and so nothing is gone
    :param newest: the newest snapshot of both sides is equal as well, found in the same way
    """
    right = found.equal or found.repaired
    reads = found.method is not Method.SCRUB
    newest = newest or _is_newest(found, source, target)
    left = [each for each in known if not (each.is_of(found.snapshot, found.guid) and not right)]
    if right:
        left = [_after(each, found, target, newest=newest) for each in left]
    left = [each for each in left if not (each.passed and (each.mended or _gone(each, target)))]
    if not right:
        was_read = any(each.read for each in known if each.is_of(found.snapshot, found.guid))
        left.append(Mismatch(found.snapshot, found.differing, found.guid, reads or was_read))
    return tuple(left[-MAX_KNOWN:])


def _after(each: Mismatch, found: Verification, target: VolumeState | None, *, newest: bool) -> Mismatch:
    """What a verification that found or made a snapshot equal says of an earlier finding."""
    if found.method is Method.SCRUB:
        if each.read:
            return each
        if _gone(each, target) or _is_covered(each, found, target):
            return replace(each, mended=True, passed=True)
    if each.is_of(found.snapshot, found.guid):
        return replace(each, mended=True, passed=each.passed or newest or not found.repaired)
    return replace(each, passed=each.passed or newest)


def _is_newest(found: Verification, source: VolumeState | None, target: VolumeState | None) -> bool:
    common = newest_common(source, target) if source is not None else None
    return common is not None and common.target.guid == found.guid


def _version(target: VolumeState, name: str, guid: str) -> Version | None:
    wanted = (v for v in target.snapshots if (v.guid == guid if guid else v.name == name))
    return next(wanted, None)


def _gone(each: Mismatch, target: VolumeState | None) -> bool:
    return target is not None and _version(target, each.snapshot, each.guid) is None


def _is_covered(each: Mismatch, found: Verification, target: VolumeState | None) -> bool:
    """Whether the scrub that has read one snapshot has read the other."""
    if target is None:
        return False
    mine = _version(target, each.snapshot, each.guid)
    scrubbed = _version(target, found.snapshot, found.guid)
    return mine is not None and scrubbed is not None and mine.position <= scrubbed.position


def told(known: tuple[Mismatch, ...]) -> str:
    """What is known to differ, in a sentence; "" for nothing."""
    if not known:
        return ""
    more = f", and {len(known) - 1} more of its snapshots" if len(known) > 1 else ""
    last = known[-1]
    if last.mended:
        return f"{last.snapshot} of the replica differed from its source, and what follows it was not read since{more}"
    since = "; the newest snapshot was read since, and is equal" if last.passed else ""
    size = units.format_size(last.differing)
    return f"the replica differs from its source: {size} of {last.snapshot}{more}{since}"


def ways_out(volume: str, target: str, known: tuple[Mismatch, ...]) -> str:
    """What to do about the last finding."""
    verify = f"`replicator verify {volume} --target {target}"
    resync = f"`replicator resync {volume} --target {target}` makes it right, and says first what that takes"
    if known and known[-1].mended:
        return f"{verify}` reads the newest snapshot; {resync}"
    name = known[-1].snapshot if known else ""
    which = f" --snapshot {name}" if name else ""
    gone = f"; once {name} is not on the target any more, {verify}` ends it" if name else ""
    return f"{resync}; {verify}{which} --repair` tries to mend it where it is{gone}"
