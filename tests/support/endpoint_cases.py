"""The endpoints that the conformance suite holds to their contract: near and far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from replicator.endpoint import Endpoint
from replicator.local import LocalEndpoint
from replicator.model import VolumeId
from tests.support.cases import BackendCase
from tests.support.transport import remote_endpoint
from transport.authorization import PeerRights

NODE = "one"
SOURCE = VolumeId("store", "vm")
"""A volume of the node itself."""
REPLICA = VolumeId("store", "two/vm")
"""Where the node that asks, ``two``, may write."""


@dataclass
class EndpointCase:
    """An endpoint of node ``one`` under test.

    :ivar endpoint: as node ``two`` has it
    :ivar storage: its storage ``store``, with hands
    :ivar local: the same node without anything between
    :ivar remote: whether there is a network between
    """

    endpoint: Endpoint
    storage: BackendCase
    local: LocalEndpoint
    remote: bool


@contextmanager
def open_endpoint(storage: BackendCase, remote: bool, folder: Path) -> Iterator[EndpointCase]:
    """An endpoint over that storage, far or near; node two may also use ``absent``, a storage that is not there."""
    local = LocalEndpoint(NODE, {"store": storage.backend})
    if not remote:
        yield EndpointCase(local, storage, local, False)
        return
    usable = frozenset({"store", "absent"})
    rights = PeerRights(usable, usable, may_switch=usable)
    with remote_endpoint(folder, local, rights) as endpoint:
        yield EndpointCase(endpoint, storage, local, True)
