"""A connection between two nodes: frames over TLS, heartbeats, deadlines, one request at a time.

A thread of its own reads: it answers heartbeats, sends ours, notices when the peer falls silent, and hands every other
frame to whoever uses the connection, through a short queue, so that decryption and storage work at the same time and
memory stays bounded. A connection that saw an error is closed and not used again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from replicator.errors import (
    ChecksumMismatch,
    ConnectionLost,
    DeadlineExceeded,
    ProtocolError,
    ReplicatorError,
)
from replicator.handoff import Handoff
from replicator.streams import Buffer
from transport.checksum import crc32c
from transport.frames import (
    CONTROL_PIECE,
    FLAG_COMPRESSED,
    FLAG_MORE,
    SUSPICIOUS,
    BufferPool,
    Frame,
    FrameDecoder,
    FrameType,
    encode_header,
)
from transport.payloads import PING, PONG, ClockFilter, Hello, Link, decode_error, encode_error
from transport.tls import TlsChannel

QUEUED_FRAMES = 2
"""Frames read ahead of their consumer: enough to overlap, few enough to stay in the processor's cache."""
LINGER = 2.0
"""Seconds given to last words, ours or the peer's."""

_COMMON = {FrameType.ERROR, FrameType.PING, FrameType.PONG, FrameType.GOODBYE}
FROM_CLIENT = frozenset({*_COMMON, FrameType.REQUEST, FrameType.DATA, FrameType.BLOCKS, FrameType.END})
FROM_SERVER = frozenset(
    {
        *_COMMON,
        FrameType.RESPONSE,
        FrameType.DATA,
        FrameType.BLOCKS,
        FrameType.DIGESTS,
        FrameType.END,
        FrameType.COMMITTED,
    }
)
BEFORE_HELLO = frozenset({FrameType.HELLO, FrameType.ERROR})


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Bounds of every wait of a connection, in seconds.

    :ivar handshake: from accept() or connect() until both have said HELLO
    :ivar heartbeat: between two of ours
    :ivar silence: without any byte of the peer while we read
    :ivar send: until the peer takes another byte; a slow storage behind it may hold it back for so long
    :ivar answer: until an answer begins; the peer lives (heartbeats), but its storage takes long
    :ivar idle: without a request, on the server
    """

    handshake: float = 10.0
    heartbeat: float = 5.0
    silence: float = 30.0
    send: float = 600.0
    answer: float = 3600.0
    idle: float = 300.0


def _ignore(error: ReplicatorError) -> None:
    pass


class Connection:
    """An established connection.

    Requests and their streams belong to one thread at a time; ``abort`` to any.

    :param channel: after its handshake
    :param peer: the node at the other end, by its verified certificate
    :param accept: the frames that may come from it
    """

    def __init__(
        self,
        channel: TlsChannel,
        peer: str,
        *,
        accept: frozenset[FrameType],
        deadlines: Deadlines,
        wall_clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.peer = peer
        self.deadlines = deadlines
        self.features: tuple[str, ...] = ()
        self._channel = channel
        self._accept = accept
        self._wall_clock = wall_clock
        self._buffers = BufferPool()
        self._decoder = FrameDecoder(BEFORE_HELLO, self._buffers)
        self._inbox: Handoff[Frame] = Handoff(QUEUED_FRAMES)
        self._write = threading.Lock()
        self._sequence = 0
        self._stream = 0
        self._pongs: list[bytes] = []
        self._pinged = 0
        self._clock_filter = ClockFilter(longest=deadlines.silence)
        self._error: ReplicatorError | None = None
        self._aborted: ReplicatorError | None = None
        self._goodbye = False
        self._discard = False
        self._lingering = False
        self._peer_error: ReplicatorError | None = None
        self._reader: threading.Thread | None = None
        self.on_end: Callable[[ReplicatorError], None] = _ignore
        """Called once, in any thread, when the connection ends; must not block."""

    # -- beginning

    def greet(self, node: str, deadline: float, *, check: Callable[[Hello], None] | None = None) -> None:
        """Say HELLO, hear the peer's before ``deadline`` (time.monotonic), and begin to read.

        The name in a hello is for people; it must be the certificate's, which alone counts.

        :raises ProtocolError, DeadlineExceeded, ConnectionLost: or the error that the peer sent instead
        """
        self.send(FrameType.HELLO, (Hello(node).encode(),))
        frame = self._read_frame(deadline)
        if frame.type is FrameType.ERROR:
            raise decode_error(frame.payload, self.peer)
        hello = Hello.decode(frame.payload)
        if hello.node != self.peer:
            raise ProtocolError(f"a node with the certificate of {self.peer} says it is {hello.node[:80]}", hint="")
        if check is not None:
            check(hello)
        self.features = hello.features
        self._decoder.accept = self._accept
        self._reader = threading.Thread(target=self._run, name=f"read-{self.peer}", daemon=True)
        self._reader.start()

    def _read_frame(self, deadline: float) -> Frame:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(f"node {self.peer} did not say hello in time", hint="see its log")
            count = self._channel.recv_into(self._decoder.wanted(), left)
            if not count:
                raise ConnectionLost(f"node {self.peer} closed the connection", hint="see its log")
            frame = self._decoder.advance(count)
            if frame is not None:
                return frame

    # -- the reading thread

    def _run(self) -> None:
        try:
            self._read_all()
        except (ProtocolError, ChecksumMismatch) as error:
            with suppress(ReplicatorError):
                self._try_send(FrameType.ERROR, encode_error(error), wait=LINGER)
            self._lingering = True
            self._end(error)
            self._linger()
            self._channel.abort(error)
        except ReplicatorError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for this thread for ever
            self._fail(
                ConnectionLost(f"reading from node {self.peer} failed: {error!r}", hint="this is a bug; see the log")
            )

    def _read_all(self) -> None:
        deadlines = self.deadlines
        heard = ticked = time.monotonic()
        decoder, channel = self._decoder, self._channel
        self._tick()
        while True:
            now = time.monotonic()
            if now - ticked >= deadlines.heartbeat:
                self._tick()
                ticked = now
            try:
                wait = min(ticked + deadlines.heartbeat, heard + deadlines.silence) - now
                count = channel.recv_into(decoder.wanted(), wait)
            except DeadlineExceeded:
                if time.monotonic() - heard >= deadlines.silence:
                    raise ConnectionLost(
                        f"node {self.peer} has been silent for {deadlines.silence:.0f} s",
                        hint="check that it runs and that the cluster network is up; it is tried again",
                    ) from None
                continue
            if not count:
                if self._goodbye:
                    raise ConnectionLost(
                        f"node {self.peer} said goodbye", hint="it is shutting down or idle; try again"
                    )
                raise ConnectionLost(f"node {self.peer} closed the connection", hint="see its log; it is tried again")
            frame = decoder.advance(count)
            if frame is None:
                heard = now
                continue
            if not self._handle(frame):
                ticked = self._deliver(frame, ticked)
            heard = time.monotonic()

    def _handle(self, frame: Frame) -> bool:
        """Deal with what is not for the consumer; whether that was it."""
        if frame.type is FrameType.PING:
            self._check_size(frame, PING.size)
            received = self._wall_clock()
            self._pongs = [*self._pongs[-3:], bytes(frame.payload) + PING.pack(received)]
            self._send_pending()
        elif frame.type is FrameType.PONG:
            self._check_size(frame, PONG.size)
            self._clock_filter.learn(PONG.unpack(frame.payload), self._pinged, self._wall_clock())
        elif frame.type is FrameType.GOODBYE:
            self._goodbye = True
        elif self._discard:
            frame.release()
        else:
            if frame.type is FrameType.ERROR:
                self._peer_error = decode_error(frame.payload, self.peer)
            return False
        return True

    @staticmethod
    def _check_size(frame: Frame, size: int) -> None:
        if len(frame.payload) != size:
            raise ProtocolError(
                f"a {frame.type.name} frame has {len(frame.payload)} bytes, not {size}", hint=SUSPICIOUS
            )

    def _deliver(self, frame: Frame, ticked: float) -> float:
        while True:
            if self._inbox.put(frame, self.deadlines.heartbeat):
                return ticked
            if self._error is not None:  # its consumer is slow, or gone
                raise self._error
            if self._discard:
                frame.release()
                return ticked
            self._tick()  # tell the peer that we are alive
            ticked = time.monotonic()

    def _tick(self) -> None:
        self._pinged = self._wall_clock()
        self._try_send(FrameType.PING, PING.pack(self._pinged))
        self._send_pending()

    def _send_pending(self) -> None:
        while self._pongs:
            pong = self._pongs[0]
            if not self._try_send(FrameType.PONG, pong + PING.pack(self._wall_clock())):
                return  # somebody is sending, which is as good a sign of life; the next tick tries again
            with suppress(ValueError):
                self._pongs.remove(pong)

    @property
    def link(self) -> Link | None:
        """Round trip and clock difference, None before the first heartbeat was answered."""
        return self._clock_filter.best

    def _linger(self) -> None:
        """Read and drop what the peer still sends, so that no reset overtakes what was said to it."""
        scratch = memoryview(bytearray(64 * 1024))
        until = time.monotonic() + LINGER
        with suppress(ReplicatorError):
            while (left := until - time.monotonic()) > 0 and self._channel.recv_into(scratch, left):
                pass

    def _fail(self, error: ReplicatorError) -> None:
        self._channel.abort(error)
        self._end(error)

    def _end(self, error: ReplicatorError) -> None:
        """Nothing more is sent or delivered; whoever waits is told."""
        first = self._error is None
        if first:
            self._error = error
        self._inbox.end()
        if first:
            self.on_end(error)

    # -- sending

    def _header(
        self, kind: FrameType, parts: Sequence[Buffer], stream: int, flags: int, plain: tuple[int, int] | None
    ) -> tuple[bytes, int]:
        length = sum(len(part) for part in parts)
        if plain is None:
            crc = 0
            for part in parts:
                crc = crc32c(part, crc)
            plain = (length, crc)
        header = encode_header(
            kind, length=length, plain=plain[0], crc=plain[1], stream=stream, sequence=self._sequence, flags=flags
        )
        return header, len(header) + length

    def _send_locked(self, header: bytes, parts: Sequence[Buffer], timeout: float) -> None:
        self._sequence += 1
        small = b"".join((header, *parts[:-1])) if parts else header
        if parts and len(parts[-1]) <= 4096:
            self._channel.send((small + bytes(parts[-1]),), timeout)
        else:
            self._channel.send((small, *parts[-1:]), timeout)

    def send(
        self,
        kind: FrameType,
        parts: Sequence[Buffer] = (),
        *,
        stream: int = 0,
        flags: int = 0,
        plain: tuple[int, int] | None = None,
    ) -> int:
        """Send one frame; its bytes on the wire.

        :param parts: the payload in pieces; the last one is sent without being copied
        :param plain: of a compressed payload: plain size and its CRC32C
        :raises ConnectionLost, DeadlineExceeded:
        """
        with self._write:
            if self._error is not None or self._aborted is not None:
                raise self._aborted or self._peer_error or self._error or ConnectionLost("the connection is closed")
            header, size = self._header(kind, parts, stream, flags, plain)
            try:
                self._send_locked(header, parts, self.deadlines.send)
            except ReplicatorError as error:
                if isinstance(error, ConnectionLost) and self._aborted is None and self._reader is not None:
                    self._reader.join(LINGER)  # the peer may have said why; its words are read before the end is
                self._fail(error)
                raise self._aborted or self._peer_error or error from None
        return size

    def send_packed(self, kind: FrameType, packed: bytes, plain: tuple[int, int], *, stream: int) -> int:
        """Send a frame whose payload was compressed."""
        return self.send(kind, (packed,), stream=stream, flags=FLAG_COMPRESSED, plain=plain)

    def _try_send(self, kind: FrameType, payload: bytes, *, wait: float = 0.0) -> bool:
        """Send a heartbeat, unless somebody is sending or the peer is not reading: this thread must not wait for it."""
        if not self._write.acquire(timeout=wait):
            return False
        try:
            if not self._channel.writable():
                return False
            header, _ = self._header(kind, (payload,), 0, 0, None)
            with suppress(ConnectionLost):  # reading tells why it was lost
                self._send_locked(header, (payload,), self.deadlines.silence)
        finally:
            self._write.release()
        return True

    def next_stream(self) -> int:
        """The number of the next request; they count up from 1 on each connection."""
        self._stream += 1
        return self._stream

    def send_message(self, kind: FrameType, data: bytes, *, stream: int) -> None:
        """Send a REQUEST or RESPONSE, split over frames where it is long."""
        position = 0
        while True:
            piece = data[position : position + CONTROL_PIECE]
            position += len(piece)
            more = FLAG_MORE if position < len(data) else 0
            self.send(kind, (piece,), stream=stream, flags=more)
            if not more:
                return

    # -- receiving

    def receive(self, timeout: float) -> Frame:
        """The next frame.

        :raises ReplicatorError: that the peer sent, or that ended the connection
        :raises DeadlineExceeded: none came in time; the connection is closed then
        """
        if self._aborted is not None:
            raise self._aborted
        try:
            # What came before the end is still delivered.
            frame = self._inbox.get(timeout if self._error is None else 0.0)
        except queue.Empty:
            if self._error is None:
                self._fail(DeadlineExceeded(f"node {self.peer} did not answer for {timeout:.0f} s", hint="see its log"))
            raise self._aborted or self._error or ConnectionLost("the connection is closed") from None
        if self._aborted is not None:
            raise self._aborted
        if frame is None:
            raise self._error or ConnectionLost("the connection is closed")
        if frame.type is FrameType.ERROR:
            error = self._peer_error or decode_error(frame.payload, self.peer)
            self._fail(error)
            raise error
        return frame

    def poll(self, timeout: float) -> Frame | None:
        """As :meth:`receive`, but None where nothing comes in time, and the connection stays open."""
        if self._error is None and self._aborted is None:
            try:
                frame = self._inbox.get(timeout)
            except queue.Empty:
                return None
            if frame is not None and frame.type is not FrameType.ERROR:
                return frame
            if frame is not None:
                self._fail(self._peer_error or decode_error(frame.payload, self.peer))
        return self.receive(timeout)

    def receive_message(self, kind: FrameType, stream: int, cap: int, timeout: float) -> bytes:
        """A whole REQUEST or RESPONSE of at most ``cap`` bytes.

        :raises ProtocolError: another frame, another stream, or too long
        """
        return self.join_message(self.receive(timeout), kind, stream, cap)

    def join_message(self, frame: Frame, kind: FrameType, stream: int, cap: int) -> bytes:
        """As :meth:`receive_message`, where the first frame is here already."""
        pieces: list[bytes] = []
        total = 0
        while True:
            if frame.type is not kind or frame.stream != stream:
                raise self.unexpected(frame)
            total += len(frame.payload)
            if total > cap:
                raise self.refuse(f"a {kind.name} message is longer than {cap} bytes")
            pieces.append(bytes(frame.payload))
            frame.release()
            if not frame.flags & FLAG_MORE:
                return b"".join(pieces)
            if not frame.payload:
                raise self.refuse(f"an empty part of a {kind.name} message came")
            frame = self.receive(self.deadlines.silence)

    def unexpected(self, frame: Frame) -> ProtocolError:
        """The error for a frame that does not belong here."""
        return self.refuse(f"a {frame.type.name} frame of stream {frame.stream} came where it does not belong")

    def refuse(self, what: str) -> ProtocolError:
        """A ProtocolError to raise; whoever catches it closes the connection with it."""
        return ProtocolError(f"node {self.peer}: {what}", hint=SUSPICIOUS)

    def check(self) -> None:
        """Raise what ended the connection, or the error that the peer sent, without waiting."""
        error = self._aborted or self._peer_error or self._error
        if error is not None:
            raise error

    # -- the end

    @property
    def usable(self) -> bool:
        """Whether another request may be made."""
        return self._error is None and self._aborted is None and self._peer_error is None and not self._goodbye

    def abort(self, error: ReplicatorError) -> None:
        """End the connection now, from any thread; whoever waits on it gets ``error``."""
        if self._aborted is None:
            self._aborted = error
        self._fail(error)

    def rest(self) -> None:
        """A request is over and none follows at once: hold no memory for it."""
        self._buffers.clear()

    def close(self, *, error: ReplicatorError | None = None, linger: float = 5.0) -> None:
        """Close; with ``error``, tell the peer first and let it read that (at most ``linger`` seconds). Idempotent."""
        with suppress(ReplicatorError):
            if error is not None and self._error is None and self._aborted is None and self._peer_error is None:
                self._discard = True
                self._inbox.drain(lambda frame: frame.release())
                self.send(FrameType.ERROR, (encode_error(error),))
                if self._reader is not None:
                    self._reader.join(
                        linger
                    )  # what the peer still sends is read and dropped, so no reset eats the error
            elif self.usable:
                self._try_send(FrameType.GOODBYE, b"")
        if self._lingering and self._reader is not None:
            self._reader.join(linger)
        self._fail(ConnectionLost("the connection was closed by this node", hint=""))
        if self._reader is not None and self._reader is not threading.current_thread():
            self._inbox.drain(lambda frame: frame.release())
            self._reader.join(linger)
        self._channel.close()
