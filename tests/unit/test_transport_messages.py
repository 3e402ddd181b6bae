"""Requests and answers: whole, strict, and checked at the border in both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.endpoint import (
    MAX_DAMAGED,
    MAX_RANGES,
    DigestRequest,
    Head,
    ManifestRequest,
    PruneOutcome,
    PruneRequest,
    Range,
    ReceiveMode,
    ReceiveRequest,
    RemoveRequest,
    Scrub,
    ScrubRequest,
    SendRequest,
    SnapshotRequest,
    VolumeListing,
)
from replicator.errors import InvalidName, NoSpace, ProtocolError, ReplicatorError
from replicator.model import (
    Capability,
    Lineage,
    Origin,
    Property,
    ResumeState,
    Role,
    StorageInfo,
    StreamKind,
    Version,
    VersionKind,
    VolumeId,
    VolumeInfo,
    VolumeState,
)
from transport import messages
from transport.messages import (
    ANSWERS,
    MAX_VOLUMES,
    PART_VERSIONS,
    REQUEST_CAP,
    Fault,
    Listed,
    Request,
    SnapshotTaken,
    StatesPart,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    in_parts,
)

KEY = "ab" * 32
VOLUME = VolumeId("tank", "two/vm-1")
VERSION = Version("v1", "guid-1", datetime(2026, 11, 20, 1, 2, 3, 456789, tzinfo=UTC), 7, size=10, holds=("a:b",))
LINEAGE = Lineage("6f0c9a52-1111-4222-8333-444455556666", Role.REPLICA, 3)
RESUME = ResumeState(StreamKind.NATIVE, "guid-1", "v1", None, 5, "token")
RECEIVE = ReceiveRequest(
    VOLUME, LINEAGE, VERSION.ref, VERSION, KEY, ReceiveMode.REBUILD, StreamKind.NATIVE, "tag", RESUME, "diverged-x"
)
ORIGIN = Origin(VOLUME, "v1")
REQUESTS: list[Request] = [
    messages.Storages(),
    messages.Storage("tank"),
    messages.Volumes("tank"),
    messages.State(VOLUME),
    messages.EnsurePrimary(VOLUME),
    messages.Snapshot(SnapshotRequest((VOLUME, VolumeId("tank", "ü b")), "s")),
    messages.Hold(VOLUME, VERSION.ref, "replicator:a"),
    messages.Release(VOLUME, VERSION.ref, "replicator:a"),
    messages.Estimate(VOLUME, None, VERSION.ref),
    messages.Send(SendRequest(VOLUME, VERSION.ref, VERSION.ref, KEY, LINEAGE, True, RESUME)),
    messages.Send(SendRequest(VOLUME, None, VERSION.ref, KEY, ranges=(Range(0, 5), Range(5, 1)))),
    messages.Receive(RECEIVE, 12),
    messages.AbortReceive(VOLUME),
    messages.Digests(DigestRequest(VOLUME, VERSION.ref, KEY, 65536, 3)),
    messages.SetAside(VOLUME, "diverged-1"),
    messages.Adopt(VOLUME, LINEAGE),
    messages.Prune(PruneRequest(VOLUME, "job", "last=3", ("g",), dry_run=True)),
    messages.Clone(VOLUME, VERSION.ref, VOLUME),
    messages.GetCrl(),
    messages.Renew("csr"),
    messages.Rename(VOLUME, VolumeId("tank", "new")),
    messages.Properties(VOLUME),
    messages.Receive(replace(RECEIVE, origin=VOLUME, properties=(Property("compression", "lz4"),)), None),
    messages.States((VOLUME, VolumeId("tank", "two/vm-2"))),
    messages.Heads((VOLUME,)),
    messages.Manifest(ManifestRequest(VOLUME, VERSION.ref, KEY)),
    messages.Scrub(ScrubRequest(VOLUME, start=True)),
    messages.Remove(RemoveRequest(VOLUME, "job", LINEAGE, ("g",))),
]
SCRUB = Scrub("tank", False, 0, 5, datetime(2026, 11, 20, tzinfo=UTC), 2**64 - 1, 1, ("tank/vm:/a\\x0a",), 2)


@pytest.mark.parametrize("request_", REQUESTS, ids=messages.operation)
def test_requests_come_out_as_they_went_in(request_: Request) -> None:
    assert decode_request(encode_request(request_)) == request_


def test_every_request_has_a_sample_and_an_answer() -> None:
    assert {type(r) for r in REQUESTS} == set(ANSWERS)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (None, None),
        (int | None, 5),
        (
            tuple[StorageInfo, ...],
            (StorageInfo("t", "zfs", StreamKind.NATIVE, Capability.SEND | Capability.CLONE, 2, 1, "d", ("w",)),),
        ),
        (tuple[VolumeInfo, ...], (VolumeInfo(VOLUME, None, LINEAGE), VolumeInfo(VOLUME, 3, None, ORIGIN))),
        (VolumeState | None, VolumeState(VOLUME, None, (), None, origin=ORIGIN)),
        (tuple[Property, ...], (Property("compression", "lz4"),)),
        (
            VolumeState | None,
            VolumeState(VOLUME, 5, (VERSION, replace(VERSION, kind=VersionKind.BOOKMARK)), LINEAGE, RESUME),
        ),
        (tuple[PruneOutcome, ...], (PruneOutcome(VERSION, False, "old", "busy"),)),
        (tuple[Head, ...], (Head(VOLUME, VERSION, True, LINEAGE, partial=True), Head(VOLUME, None, False, None))),
        (
            StatesPart,
            StatesPart((Listed(VOLUME, None, Fault("no_space", "full", "")), Listed(VOLUME, None, None)), more=True),
        ),
        (
            tuple[SnapshotTaken, ...],
            (SnapshotTaken(VOLUME, VERSION, None), SnapshotTaken(VOLUME, None, Fault("no_space", "full", "quota"))),
        ),
        (Scrub, SCRUB),
        (Scrub, replace(SCRUB, finished=None, position=None, damaged=())),
    ],
)
def test_answers_come_out_as_they_went_in(kind: Any, value: Any) -> None:
    assert decode_answer(kind, encode_answer(kind, value)) == value


def listing(versions: int) -> VolumeListing:
    return VolumeListing(VOLUME, VolumeState(VOLUME, 5, (VERSION,) * versions, None))


def test_a_long_listing_is_answered_in_parts() -> None:
    failed = VolumeListing(VOLUME, None, NoSpace("full", hint="make room"))
    listings = [listing(PART_VERSIONS - 2), listing(0), failed, listing(PART_VERSIONS + 5), listing(1)]
    parts = list(in_parts(listings))
    assert [(len(part.listed), part.more) for part in parts] == [(2, True), (2, True), (1, False)]
    back = [listed.listing for part in parts for listed in part.listed]
    assert [each.state for each in back] == [each.state for each in listings]
    error = back[2].error
    assert isinstance(error, NoSpace)
    assert (str(error), error.hint) == (str(failed.error), "make room")
    with pytest.raises(NoSpace):
        back[2].get()
    assert [part.more for part in in_parts([listing(2 * PART_VERSIONS)])] == [False]
    assert list(in_parts([])) == [StatesPart((), more=False)]


@pytest.mark.parametrize("kind", [messages.States, messages.Heads])
def test_how_many_volumes_may_be_asked_for(kind: type[messages.States | messages.Heads]) -> None:
    encode_request(kind((VOLUME,) * MAX_VOLUMES))
    for volumes in ((), (VOLUME,) * (MAX_VOLUMES + 1)):
        with pytest.raises(ProtocolError):
            encode_request(kind(volumes))


def change(request_: Request, path: str, value: object) -> bytes:
    """A request's JSON with one field replaced."""
    facts = json.loads(encode_request(request_))
    place, steps = facts["args"], path.split(".")
    for step in steps[:-1]:
        place = place[int(step)] if step.isdigit() else place[step]
    place[steps[-1]] = value
    return json.dumps(facts).encode()


RECEIVING, SENDING, RANGED = REQUESTS[11], REQUESTS[9], REQUESTS[10]


@pytest.mark.parametrize(
    ("request_", "path", "value"),
    [
        (REQUESTS[3], "volume.name", "../etc"),
        (REQUESTS[3], "volume.name", "/etc"),
        (REQUESTS[3], "volume.name", "a@b"),
        (REQUESTS[3], "volume.name", "a\x00b"),
        (REQUESTS[3], "volume.storage", "a/b"),
        (REQUESTS[3], "volume.name", 5),
        (REQUESTS[3], "volume", None),
        (REQUESTS[6], "tag", "a b"),
        (REQUESTS[6], "version.name", "x/y"),
        (REQUESTS[6], "version.guid", "../x"),
        (REQUESTS[6], "version.kind", "tape"),
        (RECEIVING, "request.key", KEY[:-1]),
        (RECEIVING, "request.key", KEY.upper()),
        (RECEIVING, "request.to.size", -1),
        (RECEIVING, "request.to.size", 2**56 + 1),
        (RECEIVING, "request.to.size", "5"),
        (RECEIVING, "request.to.size", 1.5),
        (RECEIVING, "request.to.kind", "bookmark"),
        (RECEIVING, "request.to.created", "yesterday"),
        (RECEIVING, "request.lineage.epoch", 0),
        (RECEIVING, "request.lineage.epoch", True),
        (RECEIVING, "request.resume.offset", -1),
        (RECEIVING, "request.resume.token", "x" * 70000),
        (RECEIVING, "request.aside", "a/b"),
        (RECEIVING, "request.mode", "force"),
        (RECEIVING, "estimate", -1),
        (RANGED, "request.ranges", [{"offset": 5, "length": 5}, {"offset": 9, "length": 1}]),
        (RANGED, "request.ranges", [{"offset": 0, "length": 0}]),
        (RANGED, "request.ranges", [{"offset": 2**56, "length": 1}]),
        (RANGED, "request.ranges", [{"offset": i * 2, "length": 1} for i in range(MAX_RANGES + 1)]),
        (SENDING, "request.ranges", []),
        (REQUESTS[5], "request.volumes", []),
        (REQUESTS[13], "request.block_size", 0),
        (REQUESTS[13], "request.block_size", 2**30),
        (REQUESTS[13], "request.offset", 65537),
        (REQUESTS[16], "request.job", "../job"),
        (REQUESTS[16], "request.protect", ["../g"]),
        (REQUESTS[19], "csr", "x" * 10000),
        (REQUESTS[20], "new.name", "../x"),
        (REQUESTS[22], "request.origin.name", "a@b"),
        (REQUESTS[22], "request.properties", [{"name": "a b", "value": "c"}]),
        (REQUESTS[22], "request.properties", [{"name": "-o", "value": "c"}]),
        (REQUESTS[22], "request.properties", [{"name": "a", "value": "c" * 5000}]),
        (REQUESTS[22], "request.properties", [{"name": "a", "value": "c"}] * 65),
        (REQUESTS[25], "request.key", "no key"),
        (REQUESTS[26], "request.start", 1),
        (REQUESTS[27], "request.job", "../job"),
        (REQUESTS[27], "request.versions", ["../g"]),
        (REQUESTS[27], "request.lineage", None),
        (REQUESTS[27], "request.volume.name", "../etc"),
    ],
)
def test_what_is_out_of_range_is_refused(request_: Request, path: str, value: object) -> None:
    with pytest.raises((ProtocolError, InvalidName)):
        decode_request(change(request_, path, value))


@pytest.mark.parametrize(
    "changed",
    [
        {"done": -1},
        {"total": 2**63},
        {"position": 2**64},
        {"errors": -1},
        {"damaged": ["x"] * (MAX_DAMAGED + 1)},
        {"damaged": ["x" * 5000]},
        {"pool": "x" * 5000},
        {"damaged_elsewhere": -1},
    ],
)
def test_what_a_peer_says_of_its_pool_is_bounded(changed: dict[str, Any]) -> None:
    facts = json.loads(encode_answer(Scrub, SCRUB)) | changed
    with pytest.raises(ProtocolError):
        decode_answer(Scrub, json.dumps(facts).encode())


def test_names_are_checked_on_the_way_out_and_in_listings_too() -> None:
    bad = VolumeId("tank", "../etc")
    with pytest.raises(InvalidName):
        encode_request(messages.State(bad))
    listing = encode_answer(tuple[VolumeInfo, ...], (VolumeInfo(VOLUME, None, None),)).replace(b"two/vm-1", b"../etc")
    with pytest.raises(InvalidName):
        decode_answer(tuple[VolumeInfo, ...], listing)


def test_unknown_fields_are_ignored_and_missing_ones_are_not() -> None:
    facts = json.loads(encode_request(REQUESTS[3]))
    facts["args"]["later"] = 1
    assert decode_request(json.dumps(facts).encode()) == REQUESTS[3]
    del facts["args"]["volume"]
    with pytest.raises(ProtocolError, match="volume"):
        decode_request(json.dumps(facts).encode())


def test_the_longest_request_fits_its_cap() -> None:
    ranges = tuple(Range(2**55 + i * 2**20, 2**19) for i in range(MAX_RANGES))
    assert len(encode_request(messages.Send(SendRequest(VOLUME, None, VERSION.ref, KEY, ranges=ranges)))) < REQUEST_CAP


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
def test_arbitrary_messages_only_raise_typed_errors(data: bytes) -> None:
    with pytest.raises(ReplicatorError):
        decode_request(data)


@given(st.sampled_from(REQUESTS), st.data())
def test_changed_requests_are_valid_or_refused(request_: Request, data: st.DataObject) -> None:
    facts = json.loads(encode_request(request_))
    place = facts["args"]
    while isinstance(place, dict) and place:
        name = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[name], dict) and data.draw(st.booleans()):
            place = place[name]
            continue
        place[name] = data.draw(json_values)
        break
    try:
        found = decode_request(json.dumps(facts).encode())
    except ReplicatorError:
        return
    messages.check(found)
