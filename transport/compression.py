"""Zstandard on the wire, where it gains.

Each payload is compressed by itself, so nothing about one frame can be learnt from another's length, and a damaged one
does not spoil the next. Whether it is worth it is measured: some frames are tried, and tried again now and then.

The format is RFC 8878; one zstd frame with its content size declared.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import zstandard

from replicator.errors import ProtocolError
from replicator.streams import CHUNK_SIZE, Buffer

LEVEL = 1
MAX_WINDOW = 8 * 1024 * 1024
"""Bytes; what a decoder must hold at most (RFC 8878, 3.1.1.1.2 recommends 8 MiB)."""
PROBES = 2
"""Frames tried at the beginning and at each new look."""
REPROBE_BYTES = 64 * 1024 * 1024
"""After so many bytes, compressibility is looked at again: a disk has text and video."""
REPROBE_LIMIT = 1024 * 1024 * 1024
"""Without any gain the looks become rarer, up to one in so many bytes."""
MIN_SIZE = 4096
"""Smaller payloads are not worth the call."""
MIN_GAIN = 0.03
"""Part of the bytes that must be saved to bother the receiver with unpacking."""


def decompress(data: Buffer, plain: int) -> bytes:
    """Unpack one zstd frame to exactly ``plain`` bytes; nothing larger is ever allocated.

    :raises ProtocolError: not a zstd frame, or of another size than was told
    """
    try:
        # Asked first, because the library allocates what the frame declares, whatever limit it is given.
        parameters = zstandard.get_frame_parameters(data)
        if parameters.content_size != plain or parameters.window_size > max(MAX_WINDOW, CHUNK_SIZE):
            raise ProtocolError(
                f"a compressed frame declares {parameters.content_size} bytes where {plain} were told",
                hint="see the peer's log",
            )
        unpacked = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompress(
            data, max_output_size=plain, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ProtocolError(f"a compressed frame cannot be unpacked: {error}", hint="see the peer's log") from None
    if len(unpacked) != plain:
        raise ProtocolError(f"a frame unpacks to {len(unpacked)} bytes, not {plain}", hint="see the peer's log")
    return unpacked


class AdaptiveCompressor:
    """Decides for one stream, frame by frame, whether compressing it makes it faster.

    Compressing a byte costs its time at the compressor, and saves ``1 - ratio`` of its time on the wire. It is done
    when it saves more than it costs; on a fast link that is seldom, on a slow or limited one nearly always.

    :param rate_limit: bytes per second that something else holds the wire to, None for nothing
    """

    def __init__(
        self, *, rate_limit: float | None = None, level: int = LEVEL, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self._compressor = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
        self._floor = 1.0 / rate_limit if rate_limit else 0.0
        self._wire_cost: float | None = None
        self._cost = 0.0
        self._ratio = 1.0
        self._probes_left = PROBES
        self._until_probe = 0
        self._interval = REPROBE_BYTES
        self.active = False

    def wants(self, size: int) -> bool:
        """Whether a payload of ``size`` bytes is to be given to :meth:`pack`."""
        if size < MIN_SIZE or self._wire_cost is None:  # the first frame tells what the wire takes
            return False
        if not self.active and self._probes_left == 0:
            self._until_probe -= size
            if self._until_probe > 0:
                return False
            self._probes_left = PROBES
        return True

    def pack(self, payload: Buffer) -> bytes | None:
        """The compressed payload, or None when it is to be sent as it is."""
        size = len(payload)
        begun = self._clock()
        packed = self._compressor.compress(payload)
        self._learn((self._clock() - begun) / size, min(1.0, len(packed) / size))
        if self._probes_left:
            self._probes_left -= 1
        self._decide()
        return packed if len(packed) < size * (1 - MIN_GAIN) else None

    def sent(self, size: int, seconds: float) -> None:
        """``size`` bytes took ``seconds`` to go out."""
        if size < MIN_SIZE:
            return
        cost = seconds / size
        self._wire_cost = cost if self._wire_cost is None else self._wire_cost + 0.2 * (cost - self._wire_cost)

    def _learn(self, cost: float, ratio: float) -> None:
        weight = 1.0 if self._cost == 0.0 else 0.4
        self._cost += weight * (cost - self._cost)
        self._ratio += weight * (ratio - self._ratio)

    def _decide(self) -> None:
        wire = max(self._wire_cost or 0.0, self._floor)
        saves = (1.0 - self._ratio) * wire
        was = self.active
        self.active = self._ratio <= 1 - MIN_GAIN and saves > self._cost
        if self.active:
            self._interval = REPROBE_BYTES
        elif not self._probes_left:
            self._interval = REPROBE_BYTES if was else min(self._interval * 2, REPROBE_LIMIT)
            self._until_probe = self._interval
