"""Holds and cursors of ours that nothing needs any more: of a job or target that is no longer in the configuration.

What a run leaves of its own (a crash between two steps), the next run of the same job and target tidies up. This is
for those that have no next run: without it a snapshot would be held for ever, and nobody would know why. A tag names
the job, but not the node that runs it; so only what can be nobody else's is released.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from replicator import logs
from replicator.config import Config
from replicator.errors import ReplicatorError
from replicator.local import LocalEndpoint
from replicator.model import HoldTag, Role, Version, VolumeState

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Leftover:
    """A hold, with the cursor that goes with it, that nothing needs.

    :ivar why: a clause about the tag
    """

    version: Version
    tag: str
    why: str


def find(state: VolumeState, config: Config) -> Iterator[Leftover]:
    """What is left over on a volume of this node."""
    for version in state.versions:
        for tag in version.tags:
            parsed = HoldTag.parse(tag)
            why = _why(parsed, state, config) if parsed is not None else ""
            if why:
                yield Leftover(version, tag, why)


def _why(tag: HoldTag, state: VolumeState, config: Config) -> str:
    """Why nothing needs what this tag protects; "" where something may."""
    node = config.node.name
    primary = state.lineage is not None and state.lineage.role is Role.PRIMARY
    if not primary and state.id.name.partition("/")[0] != node:
        return ""  # a replica from another node: its job is there
    if any(state.id.storage in peer.may_pull_from for peer in config.peers.values()):
        return ""  # it may be of a job of a peer that pulls
    job = config.jobs.get(tag.job)
    if job is None or job.source.node != node:
        return f"this node has no job {tag.job}"
    if not any((target.node, target.storage) == (tag.node, tag.storage) for target in job.targets):
        return f"job {tag.job} has no target {tag.node}:{tag.storage}"
    return ""


def release(config: Config, local: LocalEndpoint) -> None:
    """Release what is left over on all volumes of this node; what cannot be is logged, and tried again next time."""
    for storage in config.storages:
        try:
            volumes = local.volumes(storage)
        except ReplicatorError:  # it is not there: `check` says so
            continue
        for listing in local.states([volume.id for volume in volumes if volume.lineage is not None]):
            volume = listing.volume
            try:
                state = listing.get()
                for found in find(state, config) if state is not None else ():
                    local.release(volume, found.version.ref, found.tag)
                    logs.event(
                        LOG, "info", "hold released",
                        volume=volume, snapshot=found.version.name, hold=found.tag, why=found.why,
                    )  # fmt: skip
            except ReplicatorError as error:
                logs.event(LOG, "warning", "leftover holds not released", volume=volume, error=error)
