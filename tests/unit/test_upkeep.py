"""What the daemon does besides replicating, where one peer misbehaves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from backends.memory import MemoryBackend
from replicator.control import PeerStatus
from replicator.errors import IdentityError
from replicator.local import LocalEndpoint
from replicator.restoring import Restores
from replicator.upkeep import Upkeep
from transport import checksum


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


def test_what_a_killed_export_holds_is_released(tmp_path: Path) -> None:
    backend = MemoryBackend("store", checksums=checksum)
    backend.create("vm", b"data")
    (version,) = backend.snapshot(("vm",), "one")
    backend.hold("vm", version.ref, "replicator:export:prox1.12ab")
    note = {"volume": "store:vm", "tag": "replicator:export:prox1.12ab", "versions": [[version.name, version.guid]]}
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "12ab.json").write_text(json.dumps(note))
    local = LocalEndpoint("prox1", {"store": backend})
    config = SimpleNamespace(
        node=SimpleNamespace(name="prox1", state_dir=tmp_path), storages={"store": None}, jobs={}, peers={}
    )
    node = SimpleNamespace(
        config=config,
        local=local,
        network=SimpleNamespace(endpoint=lambda _: local),
        runner=SimpleNamespace(tasks=None, turns=None),
        engine=SimpleNamespace(restores=Restores()),
    )
    upkeep = object.__new__(Upkeep)
    upkeep.__dict__.update(_node=node, _cancel=None)
    upkeep._leftovers()
    state = backend.state("vm")
    assert state is not None
    assert [found.holds for found in state.versions] == [()]
    assert list((tmp_path / "exports").iterdir()) == []
