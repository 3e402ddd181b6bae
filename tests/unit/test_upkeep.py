"""What the daemon does besides replicating, where one peer misbehaves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from replicator.control import PeerStatus
from replicator.errors import IdentityError
from replicator.upkeep import Upkeep


class _Identity:
    def __init__(self) -> None:
        self.taken: list[bytes] = []

    def take_crl(self, pem: bytes) -> bool:
        if pem == b"forged":
            raise IdentityError("not signed by this CA", hint="")
        self.taken.append(pem)
        return False


def test_a_peer_with_a_forged_list_does_not_keep_the_others_lists_out() -> None:
    lists = {"liar": b"forged", "silent": b"", "honest": b"signed"}
    statuses = tuple(PeerStatus(name, "10.99.0.9:8571", True) for name in lists)
    network = SimpleNamespace(
        peers=lambda **_: statuses, cluster_endpoint=lambda name: SimpleNamespace(crl=lambda: lists[name])
    )
    identity = _Identity()
    upkeep = object.__new__(Upkeep)
    upkeep.__dict__.update(_node=SimpleNamespace(network=network), _stop=SimpleNamespace(is_set=lambda: False))
    upkeep._probe(cast(Any, identity))
    assert identity.taken == [b"signed"]
