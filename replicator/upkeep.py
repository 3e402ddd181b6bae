"""What the daemon does besides replicating: looks after peers, revocations and its certificate, lists replicas anew."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable

from replicator import leftovers, logs
from replicator.assembly import Node
from replicator.cancellation import Cancellation
from replicator.errors import IdentityError, ReplicatorError
from replicator.export_holds import FOLDER, ExportHolds
from transport.identity import Identity
from transport.server import Server

LOG = logging.getLogger(__name__)

WATCH_FILES = 2.0
"""Seconds between two looks at whether `cluster revoke` or `join` changed this node's identity on disk."""
PROBE = 5.0
"""Seconds between two questions to every peer: is it up, how far, what its clock says, what it knows to be revoked."""
REFRESH = 600.0
"""Seconds between two listings of all replicas; runs list their own anyway."""
RENEW = 6 * 3600.0
HISTORY = 24 * 3600.0
STORAGES = 30.0
"""Seconds between two looks at how full the storages are."""
LEFTOVERS = 6 * 3600.0
"""Seconds between two searches of all volumes for holds that nothing needs any more."""
TRIM = 15.0
"""Seconds between two times that memory which transfers have used and freed is given back to the system."""


class Upkeep:
    """Threads that repeat something until they are stopped; what one of them meets is logged and tried again."""

    def __init__(self, node: Node, server: Server | None) -> None:
        self._node = node
        self._server = server
        self._stop = threading.Event()
        self._cancel = Cancellation()
        self._threads: list[threading.Thread] = []
        self._stamp = self._files()
        self._revoked = _serials(node.identity)

    def start(self) -> None:
        """Begin."""
        self._repeat("refresh", REFRESH, self._node.engine.refresh)
        self._repeat("history", HISTORY, self._node.history.prune)
        self._repeat("leftovers", LEFTOVERS, self._leftovers)
        self._repeat("memory", TRIM, _trim_memory)
        self._repeat("storages", STORAGES, self._measure)
        identity = self._node.identity
        if identity is not None:
            self._repeat("probe", PROBE, lambda: self._probe(identity))
            self._repeat("identity", WATCH_FILES, lambda: self._watch(identity))
            self._repeat("renewal", RENEW, lambda: self._renew(identity))

    def stop(self, deadline: float) -> None:
        """End; a thread that is busy is waited for at most ``deadline`` seconds in all."""
        self._stop.set()
        self._cancel.cancel()
        until = time.monotonic() + deadline
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _repeat(self, name: str, seconds: float, work: Callable[[], object]) -> None:
        def run() -> None:
            while not self._stop.is_set():
                try:
                    work()
                except ReplicatorError as error:
                    logs.event(LOG, "warning", "upkeep failed", what=name, error=error)
                except Exception:
                    LOG.exception("upkeep of %s failed unexpectedly", name)
                self._stop.wait(seconds)

        thread = threading.Thread(target=run, name=f"upkeep-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _measure(self) -> None:
        """Not at each scrape: a storage in trouble may take long to answer."""
        self._node.metrics.set_storages(self._node.local.storages())

    def _leftovers(self) -> None:
        node = self._node
        leftovers.release(node.config, node.local)
        leftovers.release_at_peers(node.config, node.network)
        leftovers.release_idle(node.config, node.runner.tasks, node.runner.turns, self._cancel)
        leftovers.release_restores(node.config, node.network, node.runner.tasks, node.engine.restores)
        ExportHolds(node.local, node.config.node.state_dir / FOLDER).release_abandoned()

    def _probe(self, identity: Identity) -> None:
        came = False
        before = {peer.node: peer.up for peer in self._node.network.peers(probe=False)}
        for peer in self._node.network.peers(probe=True):
            if peer.up != before.get(peer.node) or (not peer.up and not peer.message):
                level: logs.Level = "info" if peer.up else "warning"
                logs.event(
                    LOG, level, "peer up" if peer.up else "peer down", peer=peer.node, message=peer.message or None
                )
            if peer.up and not self._stop.is_set():
                self._take_revocations(identity, peer.node)
                came = came or not before.get(peer.node, False)
        if came:  # its replicas could not be listed until now
            self._node.engine.refresh()

    def _take_revocations(self, identity: Identity, peer: str) -> None:
        try:
            taken = bool(pem := self._node.network.cluster_endpoint(peer).crl()) and identity.take_crl(pem)
        except ReplicatorError as error:  # what one peer says must not keep the others' lists from being taken
            logs.event(LOG, "warning", "revocation list not taken", peer=peer, error=error)
            return
        if taken:
            logs.event(LOG, "info", "revocation list taken", peer=peer)
            self._end_revoked(identity)

    def _files(self) -> tuple[int, ...]:
        folder = self._node.config.node.state_dir / "cluster"
        if self._node.identity is not None:
            folder = self._node.identity.folder
        found = []
        for name in ("node.pem", "crl.pem"):
            path = folder / name
            found.append(path.stat().st_mtime_ns if path.exists() else 0)
        return tuple(found)

    def _watch(self, identity: Identity) -> None:
        stamp = self._files()
        if stamp != self._stamp:
            identity.reload()
            self._stamp = stamp
            self._node.metrics.certificate_expires(identity.expires)
            logs.event(LOG, "info", "identity read anew", expires=identity.expires)
            self._end_revoked(identity)

    def _end_revoked(self, identity: Identity) -> None:
        """Where more is revoked than before, connections are checked again: those from revoked nodes end, ours to
        others are made anew."""
        serials = _serials(identity)
        if serials <= self._revoked:
            return
        self._revoked = serials
        self._node.network.reset()
        if self._server is not None:
            self._server.disconnect_revoked()

    def _renew(self, identity: Identity) -> None:
        if identity.has_ca:
            identity.refresh_crl()
        if not identity.needs_renewal():
            return
        key, request = identity.renewal_request()
        if identity.has_ca:
            identity.install(key, identity.sign(identity.node, request))
        else:
            identity.install(key, self._ask_for_renewal(request))
        self._node.metrics.certificate_expires(identity.expires)
        logs.event(LOG, "info", "certificate renewed", expires=identity.expires)

    def _ask_for_renewal(self, request: bytes) -> bytes:
        reasons = []
        for peer in self._node.config.peers:
            try:
                return self._node.network.cluster_endpoint(peer).renew(request)
            except ReplicatorError as error:
                reasons.append(f"{peer}: {error}")
        raise IdentityError(
            f"this node's certificate could not be renewed ({'; '.join(reasons) or 'there is no peer'})",
            hint="list the node that made the cluster as a [peer], and see that it runs",
        )


def _trim_memory() -> None:
    """malloc_trim(3): glibc keeps what threads have freed, tens of megabytes after a few transfers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # another C library
        trim(0)


def _serials(identity: Identity | None) -> frozenset[int]:
    revoked = identity.revoked if identity is not None else None
    return frozenset(revoked.serials) if revoked is not None else frozenset()
