"""What goes with a diff: read strictly, and no byte that differs gets past it."""

from __future__ import annotations

import hashlib
import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from replicator.diff_format import DiffHeader
from replicator.diff_identity import SEGMENT, DiffIdentity, Digester, VerifiedReader
from replicator.errors import BadDiff
from replicator.model import Lineage, Role

DATA = bytes(range(256)) * ((SEGMENT + 4096) // 256)


def identity_of(data: bytes, *, base: str | None = "one") -> DiffIdentity:
    digester = Digester()
    for at in range(0, len(data), 1_000_003):
        digester.add(data[at : at + 1_000_003])
    return DiffIdentity(
        Lineage("2b1f2a0e-8f0b-4f0e-9c3c-6f9a1d2c7b41", Role.REPLICA, 7),
        DiffHeader(base, "two", 4096),
        None if base is None else "guid-1",
        "guid-2",
        datetime(2026, 11, 20, 8, 0, 1, 5, tzinfo=UTC),
        digester.length,
        digester.finish(),
    )


@pytest.mark.parametrize("length", [1, 4096, SEGMENT, SEGMENT + 1])
@pytest.mark.parametrize("base", [None, "one"])
def test_what_is_written_is_read(length: int, base: str | None) -> None:
    made = identity_of(DATA[:length], base=base)
    assert DiffIdentity.load(made.encode(), "x") == made
    segments = [DATA[:length][at : at + SEGMENT] for at in range(0, length, SEGMENT)]
    assert made.digests == tuple(hashlib.sha256(segment).digest() for segment in segments)


def read_all(data: bytes, identity: DiffIdentity, step: int = 1 << 20) -> bytes:
    reader = VerifiedReader(io.BytesIO(data).read, identity)
    found = bytearray()
    while part := reader.read(step):
        found += part
    return bytes(found)


@pytest.mark.parametrize("step", [7, 4096, 1 << 20, SEGMENT, 3 * SEGMENT])
def test_what_is_right_goes_through(step: int) -> None:
    data = DATA if step >= 4096 else DATA[:1000]
    assert read_all(data, identity_of(data), step) == data


@pytest.mark.parametrize("place", [0, 4096, SEGMENT - 1, SEGMENT, SEGMENT + 4095])
def test_a_byte_that_differs_stops_it_before_its_segment(place: int) -> None:
    wrong = bytearray(DATA)
    wrong[place] ^= 1
    reader = VerifiedReader(io.BytesIO(wrong).read, identity_of(DATA))
    before = place // SEGMENT * SEGMENT
    assert reader.read(before) == DATA[:before]
    with pytest.raises(BadDiff, match="is not what was exported"):
        reader.read(1)


@pytest.mark.parametrize("data", [DATA[:-1], DATA[:SEGMENT], b"", DATA + b"x"])
def test_one_of_another_length_is_refused(data: bytes) -> None:
    with pytest.raises(BadDiff, match=r"ends before|is longer"):
        read_all(data, identity_of(DATA))


def changed(**changes: Any) -> bytes:
    return json.dumps({**json.loads(identity_of(DATA).encode()), **changes}).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff" * 10,
        changed(format="replicator diff identity 2"),
        changed(lineage="not a uuid"),
        changed(lineage="9" * 1000),
        changed(epoch=0),
        changed(epoch=1 << 63),
        changed(epoch="1"),
        changed(epoch=True),
        changed(base={"name": "one"}),
        changed(snapshot={"name": "two", "guid": "with space"}),
        changed(snapshot={"name": "two", "guid": "x" * 129}),
        changed(snapshot={"name": "", "guid": "x"}),
        changed(created="yesterday"),
        changed(created="2026-11-20T08:00:00"),
        changed(size=-1),
        changed(length=0),
        changed(length=5),
        changed(segment=1),
        changed(sha256=[]),
        changed(sha256=["00"] * 2),
        changed(sha256=["0" * 64]),
        changed(sha256=["0" * 64] * 3),
        changed(more="than that"),
    ],
)
def test_what_is_no_identity_is_refused(text: bytes) -> None:
    with pytest.raises(BadDiff, match=r"vm\.identity is not the identity of a diff") as refused:
        DiffIdentity.load(text, "vm.identity")
    assert "resync" in refused.value.hint
