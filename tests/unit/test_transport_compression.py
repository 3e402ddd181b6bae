"""Compression is used where it gains time, and only there."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import ProtocolError
from transport.compression import MAX_WINDOW, REPROBE_BYTES, AdaptiveCompressor, decompress

MIB = 1024 * 1024
TEXT = b"the quick brown fox jumps over the lazy dog " * (MIB // 44)
NOISE = random.Random(1).randbytes(MIB)


class Clock:
    """Each reading is ``step`` after the one before: what compressing one payload takes."""

    def __init__(self, step: float) -> None:
        self.step, self.now = step, 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def run(payload: bytes, *, wire: float, compress: float, frames: int = 20, limit: float | None = None) -> list[bool]:
    """Which of the frames were compressed, where the wire takes ``wire`` s a MiB and compressing ``compress`` s."""
    compressor = AdaptiveCompressor(rate_limit=limit, clock=Clock(compress))
    done = []
    for _ in range(frames):
        packed = compressor.pack(payload) if compressor.wants(len(payload)) else None
        done.append(packed is not None)
        sent = len(packed or payload)
        compressor.sent(sent, wire * sent / MIB)
    return done


def test_slow_wire_and_text_compresses() -> None:
    assert run(TEXT, wire=0.01, compress=0.001) == [False] + [True] * 19


def test_fast_wire_stays_plain_after_the_probes() -> None:
    assert not any(run(TEXT, wire=0.0005, compress=0.001)[3:])


def test_noise_stays_plain_on_any_wire() -> None:
    assert not any(run(NOISE, wire=1.0, compress=0.001))


def test_a_rate_limit_makes_the_wire_slow() -> None:
    assert all(run(TEXT, wire=0.0005, compress=0.001, limit=100 * MIB)[1:])


def test_compressibility_is_looked_at_again() -> None:
    compressor = AdaptiveCompressor(clock=Clock(0.001))
    compressor.sent(MIB, 0.01)
    while compressor.wants(MIB):
        assert compressor.pack(NOISE) is None
    plain = 0
    while not compressor.wants(MIB):
        plain += MIB
    assert REPROBE_BYTES <= plain <= 4 * REPROBE_BYTES
    assert compressor.pack(TEXT) is not None
    compressor.pack(TEXT)
    compressor.pack(TEXT)
    assert compressor.active


def test_small_payloads_are_left_alone() -> None:
    compressor = AdaptiveCompressor(rate_limit=1)
    compressor.sent(MIB, 1.0)
    assert not compressor.wants(100)


@given(st.binary(max_size=3000))
def test_unpacking_anything_only_raises_typed_errors(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decompress(data, 5000)


def test_a_window_beyond_the_cap_is_refused() -> None:
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=True, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=MAX_WINDOW * 4)
    data = packer.compress(bytes(MAX_WINDOW * 4)) + packer.flush()
    with pytest.raises(ProtocolError):
        decompress(data, MAX_WINDOW * 4)
