"""Serves the requests of one authenticated connection."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from replicator.cancellation import Cancellation
from replicator.endpoint import Endpoint
from replicator.errors import IdentityError, NotAuthorized, RemoteError, ReplicatorError
from replicator.model import StreamKind, Version
from replicator.streams import Chunk, ChunkStream
from transport import messages
from transport.authorization import Authority
from transport.compression import AdaptiveCompressor
from transport.connection import Connection
from transport.frames import FrameType
from transport.identity import Identity
from transport.messages import ANSWERS, REQUEST_CAP, Request, StreamOpened
from transport.tls import Refusal
from transport.wirestream import StreamBinding, StreamReceiver, StreamSender

log = logging.getLogger(__name__)

Observer = Callable[[Refusal, str], None]
"""Told of every refusal: why, and the peer ("" while unknown)."""


class Session:
    """One peer's connection, one request after the other, each authorised by itself.

    :param endpoint: this node's storages, as this peer is to see them
    :param authority: asked anew for every request, so a changed configuration counts at once
    """

    def __init__(
        self,
        connection: Connection,
        endpoint: Endpoint,
        identity: Identity,
        authority: Callable[[], Authority],
        refused: Observer,
    ) -> None:
        self._connection = connection
        self._endpoint = endpoint
        self._identity = identity
        self._authority = authority
        self._refused = refused
        self._cancel = Cancellation()
        connection.on_end = self._cancel.cancel

    def run(self) -> None:
        """Serve until the peer has gone, has been idle too long, or something failed; closes the connection."""
        connection, idle = self._connection, self._connection.deadlines.idle
        error: ReplicatorError | None = None
        stream = 0
        try:
            while (frame := connection.poll(idle)) is not None:
                stream += 1
                raw = connection.join_message(frame, FrameType.REQUEST, stream, REQUEST_CAP)
                self._serve(stream, raw)
                connection.rest()
        except ReplicatorError as raised:
            error = raised
        except Exception as raised:
            log.exception("a request of a peer failed", extra={"peer": connection.peer})
            error = RemoteError(f"node {self._identity.node} failed: {type(raised).__name__}", hint="see its log")
        finally:
            connection.close(error=error)

    def _serve(self, stream: int, raw: bytes) -> None:
        request = messages.decode_request(raw)
        authority = self._authority()
        try:
            authority.check(request)
        except NotAuthorized as error:
            log.warning("request refused: %s", error, extra={"peer": authority.peer, "reason": "unauthorized"})
            self._refused(Refusal.UNAUTHORIZED, authority.peer)
            raise
        match request:
            case messages.Send():
                self._send(stream, raw, request)
            case messages.Digests():
                self._digests(stream, raw, request)
            case messages.Manifest():
                self._manifest(stream, raw, request)
            case messages.Receive():
                self._receive(stream, raw, request)
            case messages.States():
                self._states(stream, request)
            case _:
                self._answer(stream, ANSWERS[type(request)], self._perform(request, authority))

    def _answer(self, stream: int, kind: Any, value: object) -> None:
        self._connection.send_message(FrameType.RESPONSE, messages.encode_answer(kind, value), stream=stream)

    def _states(self, stream: int, request: messages.States) -> None:
        """In parts, each of some megabytes at most, unless a single volume has more."""
        for part in messages.in_parts(self._endpoint.states(request.volumes)):
            self._answer(stream, messages.StatesPart, part)

    def _perform(self, request: Request, authority: Authority) -> object:
        endpoint = self._endpoint
        match request:
            case messages.Storages():
                return tuple(found for found in endpoint.storages() if authority.rights.sees(found.name))
            case messages.Storage(name):
                return endpoint.storage(name)
            case messages.Volumes(storage):
                volumes = endpoint.volumes(storage)
                visible = authority.visible_volumes(storage, (volume.id for volume in volumes))
                return tuple(volume for volume in volumes if volume.id in visible)
            case messages.State(volume):
                return endpoint.state(volume)
            case messages.Heads(volumes):
                return endpoint.heads(volumes)
            case messages.Estimate(volume, base, to, intermediates):
                return endpoint.estimate(volume, base, to, intermediates=intermediates)
            case messages.Scrub(request=scrub):
                return endpoint.scrub(scrub)
            case messages.GetCrl():
                revoked = self._identity.revoked
                return revoked.pem.decode() if revoked is not None else ""
            case messages.Renew(csr):
                return self._renew(authority.peer, csr)
            case _:
                return self._change(request)

    def _change(self, request: Request) -> object:
        endpoint = self._endpoint
        match request:
            case messages.EnsurePrimary(volume):
                return endpoint.ensure_primary(volume)
            case messages.Snapshot(snapshot):
                return tuple(messages.SnapshotTaken.of(taken) for taken in endpoint.snapshot(snapshot))
            case messages.SetAside(volume, name):
                return endpoint.set_aside(volume, name)
            case messages.Prune(prune):
                return endpoint.prune(prune)
            case messages.Clone(volume, version, new):
                return endpoint.clone(volume, version, new)
            case messages.Remove(remove):
                endpoint.remove(remove)
            case messages.Hold(volume, version, tag):
                endpoint.hold(volume, version, tag)
            case messages.Release(volume, version, tag):
                endpoint.release(volume, version, tag)
            case messages.AbortReceive(volume):
                endpoint.abort_receive(volume)
            case messages.Adopt(volume, lineage):
                endpoint.adopt(volume, lineage)
            case messages.Rename(volume, new):
                endpoint.rename(volume, new)
            case messages.Properties(volume):
                return endpoint.properties(volume)
            case _:
                raise AssertionError(f"{messages.operation(request)} is not answered here")
        return None

    def _renew(self, peer: str, csr: str) -> str:
        """The name is the verified certificate's; the request gives the key and nothing else."""
        if not self._identity.has_ca:
            raise IdentityError(
                f"node {self._identity.node} does not have the cluster's CA key", hint="ask the node that has it"
            )
        return self._identity.sign(peer, csr.encode()).decode()

    # -- streams

    def _send(self, stream: int, raw: bytes, request: messages.Send) -> None:
        with self._endpoint.send(request.request, self._cancel) as source:
            self._answer(stream, StreamOpened, StreamOpened(source.kind, source.estimate))
            binding = StreamBinding(bytes.fromhex(request.request.key), "pull", source.kind, raw)
            StreamSender(self._connection, stream, binding, AdaptiveCompressor()).send_all(source)

    def _digests(self, stream: int, raw: bytes, request: messages.Digests) -> None:
        batches = self._endpoint.digests(request.request, self._cancel)
        try:
            opened = StreamOpened(StreamKind.BLOCKS, None)
            self._answer(stream, StreamOpened, opened)
            binding = StreamBinding(bytes.fromhex(request.request.key), "pull", opened.kind, raw)
            StreamSender(self._connection, stream, binding, None).send_digests(batches)
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()

    def _manifest(self, stream: int, raw: bytes, request: messages.Manifest) -> None:
        with self._endpoint.manifest(request.request, self._cancel) as source:
            self._answer(stream, StreamOpened, StreamOpened(source.kind, source.estimate))
            binding = StreamBinding(bytes.fromhex(request.request.key), "pull", source.kind, raw)
            StreamSender(self._connection, stream, binding, AdaptiveCompressor()).send_all(source)

    def _receive(self, stream: int, raw: bytes, request: messages.Receive) -> None:
        binding = StreamBinding(bytes.fromhex(request.request.key), "push", request.request.kind, raw)
        receiver = StreamReceiver(self._connection, stream, binding)
        kind = request.request.kind
        wanted = False

        def chunks() -> Iterator[Chunk]:
            # The peer sends nothing before the storage asks: a version that is there already, or a target that may
            # not take it, costs no transfer.
            nonlocal wanted
            wanted = True
            self._answer(stream, StreamOpened, StreamOpened(kind, request.estimate))
            yield from receiver.chunks(kind, count)

        def count(size: int) -> None:
            source.wire_bytes += size

        source = ChunkStream(kind, chunks(), estimate=request.estimate)
        with source:
            committed: Version = self._endpoint.receive(request.request, source, self._cancel)
        if wanted and not receiver.ended:
            raise RemoteError(f"{request.request.volume} was committed before its stream had ended", hint="")
        payload = messages.encode_answer(Version, committed)
        self._connection.send(FrameType.COMMITTED, (payload,), stream=stream)
