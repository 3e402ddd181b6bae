"""The token bucket, with a clock that moves only when somebody waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.cancellation import Cancellation
from replicator.errors import Cancelled
from replicator.model import StreamKind
from replicator.streams import Chunk, ChunkStream, NativeChunk
from transport.pacing import BURST_SECONDS, PacedStream, TimedBucket, TokenBucket


class Clock(Cancellation):
    """Waiting on it passes time; it counts how much."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.cancelled

    def read(self) -> float:
        return self.now


@given(st.lists(st.integers(1, 5_000_000), min_size=1, max_size=50), st.integers(1000, 10_000_000))
def test_the_rate_holds_over_any_sequence(sizes: list[int], rate: int) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, clock=clock.read)
    for size in sizes:
        bucket.wait(size, clock)
    spent = clock.now - 100.0
    assert sum(sizes) <= rate * spent + rate * BURST_SECONDS + 1
    assert spent <= sum(sizes) / rate + 1e-6


def test_a_pause_allows_a_burst_and_no_more() -> None:
    clock = Clock()
    bucket = TokenBucket(1000, clock=clock.read)
    clock.now += 3600
    assert bucket.take(250) == 0
    assert bucket.take(1000) == pytest.approx(1.0)


def test_streams_that_share_a_bucket_share_the_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(1000, clock=clock.read)
    assert bucket.take(1000) == pytest.approx(1.0)
    assert bucket.take(1000) == pytest.approx(2.0)


def test_a_raised_limit_counts_at_once() -> None:
    clock = Clock()
    bucket = TokenBucket(1000, clock=clock.read)
    bucket.take(10_000)
    bucket.set_rate(1_000_000)
    assert bucket.debt() == pytest.approx(0.01)


def test_waiting_ends_when_cancelled() -> None:
    cancel = Cancellation()
    cancel.cancel()
    with pytest.raises(Cancelled):
        TokenBucket(1).wait(1_000_000, cancel)


@pytest.mark.parametrize("rate", [0, -1])
def test_a_rate_that_lets_nothing_pass_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="lets nothing pass"):
        TokenBucket(rate)


def test_a_paced_stream_has_all_its_chunks_and_takes_its_time() -> None:
    clock = Clock()
    chunks: list[Chunk] = [NativeChunk(bytes(500)) for _ in range(4)]
    closed = []
    stream = ChunkStream(StreamKind.NATIVE, iter(chunks), estimate=7, on_close=lambda: closed.append(True))
    with PacedStream(stream, (TokenBucket(1000, clock=clock.read),), clock) as paced:
        assert list(paced) == chunks
        assert paced.estimate == 7
    assert clock.now == pytest.approx(102.0)
    assert closed == [True]


def test_a_timed_bucket_follows_its_rate() -> None:
    clock = Clock()
    rates: list[float | None] = [1000, None, 100, 1000]
    bucket = TimedBucket(lambda: rates[0], clock=clock.read)
    spent = []
    for _ in range(4):
        before = clock.now
        bucket.wait(1000, clock)
        spent.append(clock.now - before)
        del rates[0]
        rates.append(None)
    assert spent == pytest.approx([1.0, 0.0, 10.0, 1.0])


@pytest.mark.parametrize("then", [1e6, None])
def test_who_waits_already_follows_a_change(then: float | None) -> None:
    clock = Clock()
    bucket = TimedBucket(lambda: 1.0 if clock.now < 103.0 else then, clock=clock.read)
    bucket.wait(1000, clock)
    assert clock.now == pytest.approx(103.0, abs=0.01)
