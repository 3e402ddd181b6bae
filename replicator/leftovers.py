"""Holds and cursors of ours that nothing needs any more.

What a run leaves of its own (a crash between two steps), the next run of the same job and target tidies up. This is
for those that have no next run: of a job or target that is no longer in the configuration, of a verification or restore
that a power cut ended, on volumes that stand still. Without it a snapshot would be held for ever, and nobody would know
why. A tag names the job, but not the node that runs it; so only what can be nobody else's is released.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from replicator import logs
from replicator.cancellation import Cancellation
from replicator.config import Config
from replicator.endpoint import Endpoint
from replicator.errors import ReplicatorError
from replicator.model import HoldPurpose, HoldTag, Role, Version, VolumeId, VolumeInfo, VolumeState, restored_by
from replicator.planning import idle_holds
from replicator.replication import Pair
from replicator.restoring import Restores
from replicator.settling import places, states_of
from replicator.tasks import Task, Tasks
from replicator.turns import Turns

LOG = logging.getLogger(__name__)


_Idle = tuple[list[tuple[Version, str]], list[tuple[Version, str]]]
"""Holds of a pair that nothing needs: on the source, on the target."""


class Nodes(Protocol):
    """The ways to this node and its peers."""

    def endpoint(self, node: str) -> Endpoint:
        """A node's endpoint."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A hold, with the cursor that goes with it, that nothing needs.

    :ivar why: a clause about the tag
    """

    version: Version
    tag: str
    why: str


def find(state: VolumeState, config: Config) -> Iterator[Leftover]:
    """What removed jobs and targets have left over on a volume of this node."""
    if _may_be_anothers(state, config):
        return
    primary = state.lineage is not None and state.lineage.role is Role.PRIMARY
    for version, tag, parsed in _tags(state):
        job = config.jobs.get(parsed.job)
        elsewhere = primary and job is not None and job.source.node != config.node.name
        why = f"this node has no job {parsed.job}" if elsewhere else _not_wanted(parsed, config)
        if why:
            yield Leftover(version, tag, why)


def _tags(state: VolumeState) -> Iterator[tuple[Version, str, HoldTag]]:
    for version in state.versions:
        for tag in version.tags:
            parsed = HoldTag.parse(tag)
            if parsed is not None:
                yield version, tag, parsed


def _may_be_anothers(state: VolumeState, config: Config) -> bool:
    """Whether a job of another node may protect versions of this volume of ours."""
    if state.lineage is None:
        return True
    if any(state.id.storage in (*peer.may_pull_from, *peer.may_switch) for peer in config.peers.values()):
        return True  # a job of a peer that pulls, or that follows what was handed over to this node
    if state.lineage.role is Role.PRIMARY:
        return False
    above = state.id.name.partition("/")[0]
    if above == config.node.name:
        return False
    # A replica from another node is of a job of that node, if it may push here; else a job of ours has pulled it.
    return any(
        state.id.storage in (peer.same_path if peer.name != above else peer.may_push_to)
        for peer in config.peers.values()
    )


def _not_wanted(tag: HoldTag, config: Config) -> str:
    """Why no job of this node needs what a tag of one of its jobs protects; "" where one may."""
    job = config.jobs.get(tag.job)
    if job is None:
        return f"this node has no job {tag.job}"
    if not any((target.node, target.storage) == (tag.node, tag.storage) for target in job.targets):
        return f"job {tag.job} has no target {tag.node}:{tag.storage}"
    return ""


def release(config: Config, local: Endpoint) -> None:
    """Release what is left over on all volumes of this node; what cannot be is logged, and tried again next time."""
    for storage in config.storages:
        volumes = _listed(local, storage)
        for state in _states(local, [volume.id for volume in volumes if volume.lineage is not None]):
            for found in find(state, config):
                _release(local, state.id, found)


def release_at_peers(config: Config, nodes: Nodes) -> None:
    """The same for replicas of this node's volumes at its peers: there nobody knows which jobs this node has.

    Left alone is what a job of a peer may have pulled from here.
    """
    node = config.node.name
    pulled = {storage for peer in config.peers.values() for storage in peer.may_pull_from}
    local = nodes.endpoint(node)
    own: dict[str, str] = {}
    for storage in config.storages:
        own.update((v.lineage.uuid, storage) for v in _listed(local, storage) if v.lineage is not None)

    def ours(volume: VolumeInfo) -> bool:
        if volume.lineage is None or volume.lineage.role is not Role.REPLICA:
            return False
        source = own.get(volume.lineage.uuid)
        if source is None:
            return volume.id.name.startswith(f"{node}/") and not pulled
        return source not in pulled

    for name in config.peers:
        endpoint = nodes.endpoint(name)
        try:
            storages = [storage.name for storage in endpoint.storages()]
        except ReplicatorError:  # it is not there: its status says so
            continue
        for storage in storages:
            volumes = [volume.id for volume in _listed(endpoint, storage) if ours(volume)]
            for state in _states(endpoint, volumes):
                for version, tag, parsed in _tags(state):
                    here = (parsed.node, parsed.storage) == (name, storage)
                    why = _not_wanted(parsed, config) if here else ""
                    if why:
                        _release(endpoint, state.id, Leftover(version, tag, why))


def release_idle(config: Config, tasks: Tasks, turns: Turns, cancel: Cancellation) -> None:
    """Release what runs and verifications of jobs that still exist have left on volumes that stand still."""
    for job in config.jobs.values():
        try:
            found = tasks.of(job)
        except ReplicatorError:  # its source is not there: its status says so
            continue
        states = states_of([task.pair for task in found])
        for task in found:
            pair = task.pair
            here, there = (states.get(place) for place in places(pair))
            if here is None or there is None or here.error is not None or there.error is not None:
                continue
            if turns.taken(task):
                continue
            idle = _idle(pair, here.state, there.state)
            # What is older than the newest common version no work needs, whatever begins now. A run that met us with
            # the replica to ourselves would be skipped as busy.
            _release_each(pair, idle, lambda purpose: purpose is HoldPurpose.BASE)
            if any(_purpose(tag) is not HoldPurpose.BASE for holds in idle for _, tag in holds):
                _release_works(turns, task, found, cancel)


def _idle(pair: Pair, source: VolumeState | None, target: VolumeState | None) -> _Idle:
    return idle_holds(source, target, pair.tag) if source is not None else ([], [])


def _purpose(tag: str) -> HoldPurpose | None:
    parsed = HoldTag.parse(tag)
    return parsed.purpose if parsed is not None else None


def _release_each(pair: Pair, found: _Idle, wanted: Callable[[HoldPurpose | None], bool]) -> None:
    sides = ((pair.source, pair.source_volume), (pair.target, pair.target_volume))
    for (endpoint, volume), holds in zip(sides, found, strict=True):
        for version, tag in holds:
            if wanted(_purpose(tag)):
                _release(endpoint, volume, Leftover(version, tag, "no work under way needs it"))


def _release_works(turns: Turns, task: Task, tasks: Sequence[Task], cancel: Cancellation) -> None:
    """What a verification or the sending of a clone has left: a work that begins now would use it, so the replica is
    had to ourselves, and looked at again. The origin of a clone that is being sent is left as it is."""
    pair = task.pair
    try:
        with turns.exclusive(task, cancel):
            found = _idle(pair, pair.source.state(pair.source_volume), pair.target.state(pair.target_volume))
            sending = any(
                other.origin == pair.source_volume and other.key.target == task.key.target and turns.taken(other)
                for other in tasks
            )
            over = {HoldPurpose.VERIFY} if sending else {HoldPurpose.VERIFY, HoldPurpose.CLONE}
            _release_each(pair, found, lambda purpose: purpose in over)
    except ReplicatorError as error:
        logs.event(LOG, "warning", "leftover holds not released", volume=pair.source_volume, error=error)


def release_restores(config: Config, nodes: Nodes, tasks: Tasks, restores: Restores) -> None:
    """Release what restores of this node have left over wherever they may have copied from."""
    node = config.node.name
    local = nodes.endpoint(node)
    found: list[tuple[Endpoint, VolumeId, Leftover]] = []

    def look(endpoint: Endpoint, state: VolumeState | None) -> None:
        for version in state.versions if state is not None else ():
            for tag in version.holds:
                if restored_by(tag) == node and state is not None:
                    found.append((endpoint, state.id, Leftover(version, tag, "no restore is under way")))

    for storage in config.storages:
        for state in _states(local, [volume.id for volume in _listed(local, storage)]):
            look(local, state)
    for job in config.jobs.values():
        try:
            pairs = [task.pair for task in tasks.of(job)]
        except ReplicatorError:
            continue
        endpoints = {endpoint.node: endpoint for pair in pairs for endpoint in (pair.source, pair.target)}
        for (name, _), listing in states_of(pairs).items():
            if name != node:
                look(endpoints[name], listing.state)
    with restores.idle() as idle:
        for endpoint, volume, leftover in found if idle else ():
            _release(endpoint, volume, leftover)


# -- asking and doing


def _listed(endpoint: Endpoint, storage: str) -> tuple[VolumeInfo, ...]:
    try:
        return endpoint.volumes(storage)
    except ReplicatorError:  # it is not there: `check` says so
        return ()


def _states(endpoint: Endpoint, volumes: Sequence[VolumeId]) -> Iterator[VolumeState]:
    if not volumes:
        return
    try:
        listings = endpoint.states(volumes)
    except ReplicatorError as error:
        logs.event(LOG, "warning", "leftover holds not looked for", node=endpoint.node, error=error)
        return
    for listing in listings:
        try:
            state = listing.get()
        except ReplicatorError as error:
            logs.event(LOG, "warning", "leftover holds not looked for", volume=listing.volume, error=error)
        else:
            if state is not None:
                yield state


def _release(endpoint: Endpoint, volume: VolumeId, found: Leftover) -> None:
    try:
        endpoint.release(volume, found.version.ref, found.tag)
    except ReplicatorError as error:
        logs.event(LOG, "warning", "leftover holds not released", volume=volume, node=endpoint.node, error=error)
        return
    logs.event(
        LOG, "info", "hold released",
        volume=volume, node=endpoint.node, snapshot=found.version.name, hold=found.tag, why=found.why,
    )  # fmt: skip
