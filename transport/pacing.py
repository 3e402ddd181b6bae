"""Rate limits: a token bucket that several streams may share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from replicator.cancellation import Cancellation
from replicator.streams import Chunk, ChunkStream, Stream

BURST_SECONDS = 0.25
"""Seconds of the rate that may pass at once after a pause."""
LONGEST_WAIT = 1.0
"""Seconds slept at most before a changed limit is looked at again."""


class TokenBucket:
    """Lets ``rate`` bytes a second pass, shared fairly by the threads that wait on it.

    A stream takes its bytes first and then waits until the debt is paid, so chunks larger than the bucket pass too,
    and streams that share it come to the rate together.

    :param rate: bytes per second, above 0; :meth:`set_rate` changes it while streams run
    """

    def __init__(self, rate: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = clock()
        self._tokens = 0.0
        self._rate = 0.0
        self.set_rate(rate)

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self._rate

    def set_rate(self, rate: float) -> None:
        """Change the limit. :raises ValueError: not above 0"""
        if rate <= 0:
            raise ValueError(f"a rate limit of {rate} bytes/s lets nothing pass; leave it out for no limit")
        with self._lock:
            self._refill()
            self._rate = rate
            self._tokens = min(self._tokens, rate * BURST_SECONDS)

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(self._tokens + (now - self._changed) * self._rate, self._rate * BURST_SECONDS)
        self._changed = now

    def take(self, size: int) -> float:
        """Take ``size`` bytes; seconds to wait before they may count as passed."""
        with self._lock:
            self._refill()
            self._tokens -= size
            return max(0.0, -self._tokens / self._rate)

    def debt(self) -> float:
        """Seconds until what was taken is paid, at the present rate."""
        with self._lock:
            self._refill()
            return max(0.0, -self._tokens / self._rate)

    def wait(self, size: int, cancel: Cancellation) -> None:
        """Return when ``size`` more bytes may pass.

        :raises ReplicatorError: what ``cancel`` was cancelled with
        """
        left = self.take(size)
        while left > 0:
            step = min(left, LONGEST_WAIT)
            if cancel.wait(step):
                cancel.check()
            left = min(left - step, self.debt())


class TimedBucket:
    """A bucket whose rate is asked for whenever bytes are to pass, so that it follows the time of day.

    :param rate: bytes per second now, None for no limit
    """

    def __init__(self, rate: Callable[[], float | None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._bucket: TokenBucket | None = None

    def wait(self, size: int, cancel: Cancellation) -> None:
        """See :meth:`TokenBucket.wait`; who waits already follows a change within :data:`LONGEST_WAIT`."""
        bucket = self._at_rate()
        left = 0.0 if bucket is None else bucket.take(size)
        while left > 0:
            step = min(left, LONGEST_WAIT)
            if cancel.wait(step):
                cancel.check()
            bucket = self._at_rate()
            left = 0.0 if bucket is None else min(left - step, bucket.debt())

    def _at_rate(self) -> TokenBucket | None:
        """The bucket at the present rate; None: there is no limit now."""
        rate = self._rate()
        with self._lock:
            if rate is None:
                return None
            if self._bucket is None:
                self._bucket = TokenBucket(rate, clock=self._clock)
            elif self._bucket.rate != rate:
                self._bucket.set_rate(rate)
            return self._bucket


class PacedStream(ChunkStream):
    """A stream held back to the rate of all its buckets, by the bytes of its chunks."""

    def __init__(self, stream: Stream, buckets: tuple[TokenBucket, ...], cancel: Cancellation) -> None:
        super().__init__(stream.kind, self._paced(stream), estimate=stream.estimate, on_close=stream.close)
        self._buckets = buckets
        self._cancel = cancel

    def _paced(self, stream: Stream) -> Iterator[Chunk]:
        for chunk in stream:
            for bucket in self._buckets:
                bucket.wait(len(chunk.data), self._cancel)
            yield chunk
