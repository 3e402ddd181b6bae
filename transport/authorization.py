"""What a peer may ask of this node. Decided for every request, at the node that has the storage.

A peer that may *push* to a storage works below its own name there (``<peer>/…``) and sees nothing else of it. A peer
that may *pull* from a storage reads it, takes snapshots, protects what it reads and prunes by policy; it writes no
data. Nothing else is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from replicator.errors import NotAuthorized
from replicator.model import SNAPSHOT_PREFIX, HoldTag, VolumeId, is_rejoin_tag, restored_by, role_tag_of
from transport import messages
from transport.messages import Request


@dataclass(frozen=True, slots=True)
class PeerRights:
    """``[peer.X]`` of the configuration.

    :ivar may_push_to: storages that it may write replicas into, below its own name
    :ivar may_pull_from: storages that it may read
    :ivar may_switch: of ``may_push_to``: where it may make its own replicas primaries, and them replicas again, and
        have third nodes follow them
    :ivar same_path: of ``may_push_to``: where it may write replicas under any name (that no volume has which is not a
        replica: that is for the endpoint to see)
    """

    may_push_to: frozenset[str] = frozenset()
    may_pull_from: frozenset[str] = frozenset()
    same_path: frozenset[str] = frozenset()
    may_switch: frozenset[str] = frozenset()

    def sees(self, storage: str) -> bool:
        """Whether the storage exists for the peer at all."""
        return storage in self.may_push_to or storage in self.may_pull_from


@dataclass(frozen=True, slots=True)
class Authority:
    """The rights of one peer at this node.

    :ivar peer: by its verified certificate
    :ivar node: this node
    """

    peer: str
    node: str
    rights: PeerRights

    def may_write(self, volume: VolumeId) -> bool:
        """A replica of the peer's own, in a storage that it may push to."""
        if volume.storage not in self.rights.may_push_to:
            return False
        return volume.storage in self.rights.same_path or volume.name.startswith(f"{self.peer}/")

    def may_read(self, volume: VolumeId) -> bool:
        """Anything of a storage that it may pull from, and its own replicas."""
        return volume.storage in self.rights.may_pull_from or self.may_write(volume)

    def check(self, request: Request) -> None:
        """:raises NotAuthorized: the peer has no right to this"""
        match request:
            case messages.Storages() | messages.GetCrl() | messages.Renew():
                return
            case messages.FindCopies() | messages.Sight():
                return  # who knows a family's uuid has a copy of it
            case messages.Storage(name=name) | messages.Volumes(storage=name):
                self._require(self.rights.sees(name), request, f"storage {name}", "may_push_to or may_pull_from")
            case messages.Receive() | messages.AbortReceive() | messages.SetAside() | messages.Adopt():
                volume = request.request.volume if isinstance(request, messages.Receive) else request.volume
                self._require_write(request, volume)
                if isinstance(request, messages.Receive) and request.request.origin is not None:
                    self._require_write(request, request.request.origin)
            case messages.Clone() | messages.Rename():
                self._require_write(request, request.volume)
                self._require_write(request, request.new)
            case messages.Remove():
                self._require_write(request, request.request.volume)
            case messages.ChangeRole():
                self._require_switch(request, request.change.volume)
            case messages.EnsurePrimary():
                pulled = request.volume.storage in self.rights.may_pull_from
                self._require(pulled, request, f"volume {request.volume}", "may_pull_from")
            case messages.Snapshot():
                for volume in request.request.volumes:
                    pulled = volume.storage in self.rights.may_pull_from or self.may_switch(volume)
                    self._require(pulled, request, f"volume {volume}", "may_pull_from")
            case messages.Hold() | messages.Release():
                self._require_read(request, request.volume)
                self._require_tag(request, request.tag, self.may_switch(request.volume))
            case messages.State() | messages.Estimate() | messages.Properties():
                self._require_read(request, request.volume)
            case messages.States() | messages.Heads():
                for volume in request.volumes:
                    self._require_read(request, volume)
            case messages.Send() | messages.Digests() | messages.Manifest() | messages.Scrub() | messages.Prune():
                self._require_read(request, request.request.volume)

    def _require(self, allowed: bool, request: Request, what: str, right: str) -> None:
        if not allowed:
            raise NotAuthorized(
                f"node {self.peer} has no right to {messages.operation(request)} on {what} of node {self.node}",
                hint=f"to allow it, name the storage in {right} of [peer.{self.peer}] on {self.node}",
            )

    def _require_write(self, request: Request, volume: VolumeId) -> None:
        what = f"volume {volume}"
        if volume.storage in self.rights.may_push_to and not self.may_write(volume):
            what += f" (only volumes below {self.peer}/ are its own)"
        self._require(self.may_write(volume), request, what, "may_push_to")

    def may_switch(self, volume: VolumeId) -> bool:
        """A replica of the peer's own, or what it became when it was promoted, where the peer may hand over."""
        return self.may_write(volume) and volume.storage in self.rights.may_switch

    def _require_switch(self, request: Request, volume: VolumeId) -> None:
        self._require_write(request, volume)
        self._require(self.may_switch(volume), request, f"volume {volume}", "may_switch")

    def _require_read(self, request: Request, volume: VolumeId) -> None:
        right = "may_push_to" if volume.name.startswith(f"{self.peer}/") else "may_pull_from"
        self._require(self.may_read(volume), request, f"volume {volume}", right)

    def _require_tag(self, request: Request, tag: str, switches: bool) -> None:
        """Only holds of ours, and none of a job that replicates to a third node, of a third node's restore, or for a
        third node to follow. But where the peer hands over what is its own, third nodes follow that by its jobs."""
        parsed, restoring = HoldTag.parse(tag), restored_by(tag) or role_tag_of(tag)
        mine = tag.partition(":")[0] == SNAPSHOT_PREFIX
        if switches and (parsed is not None or is_rejoin_tag(tag)):
            return
        if parsed is not None:
            mine = parsed.node in (self.peer, self.node)
        elif restoring is not None:
            mine = restoring == self.peer
        if not mine:
            raise NotAuthorized(
                f"node {self.peer} may not {messages.operation(request)} under the tag {tag} on node {self.node}",
                hint=f"a peer uses tags that begin with {SNAPSHOT_PREFIX}: and do not name a third node",
            )

    def visible_volumes(self, storage: str, volumes: Iterable[VolumeId]) -> frozenset[VolumeId]:
        """Those volumes of a storage that the peer may know of."""
        return frozenset(volume for volume in volumes if volume.storage == storage and self.may_read(volume))
