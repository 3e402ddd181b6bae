"""Makes a replica of a native storage right again: puts it back to what both sides have, and continues from there.

A native stream brings the difference between two snapshots and nothing else, so a replica that went its own way cannot
be compared and mended block by block. Its storage puts it back to the newest common snapshot instead, keeping what it
had after that aside, and the next difference is sent. Where nothing is common, everything is.
"""

from __future__ import annotations

from replicator.cancellation import Cancellation
from replicator.errors import NoSuchSnapshot
from replicator.model import Version
from replicator.planning import Step, newest_common
from replicator.replication import Observer, Options, Pair, Replication
from replicator.verification import Resync, aside_name


def rejoin(pair: Pair, to: Version, options: Options, *, observer: Observer, cancel: Cancellation) -> Resync:
    """Bring the target to ``to`` of the source, whatever was done to it. The caller has asked for consent.

    :raises NoSuchSnapshot: one of the two volumes is gone
    """
    aside = aside_name()
    pair.target.adopt(pair.target_volume, pair.source.ensure_primary(pair.source_volume))
    pair.target.abort_receive(pair.target_volume)
    source, target = pair.source.state(pair.source_volume), pair.target.state(pair.target_volume)
    replication = Replication(pair, options, observer=observer, cancel=cancel)
    kept: tuple[str, ...] = ()
    if source is None:
        raise NoSuchSnapshot(f"{pair.source_volume} is gone", hint="")
    if target is not None:
        common = newest_common(source, target)
        base = common.target if common is not None else None
        own = [v for v in target.snapshots if base is None or v.position > base.position]
        if own or target.head_changed:
            step = Step(common.source if common else None, base, to, to.name)
            replication.put_back(step, aside)
            kept = (f"{pair.target_volume}-{aside}",)
    outcome = replication.run()
    return Resync(str(pair.source_volume), pair.target_text, to.name, 0, outcome.done, outcome.sent, kept)
