"""Requests and answers between nodes: the values of :mod:`replicator.model` as JSON, checked in both directions.

One class here is one request of ``transport/PROTOCOL.md``; its name on the wire is its class name in snake case.
Unknown fields are ignored (a newer node may tell more), missing ones, wrong types, wrong names and integers out of
range are refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from replicator import names
from replicator.endpoint import (
    MAX_DAMAGED,
    MAX_RANGES,
    DigestRequest,
    Head,
    ManifestRequest,
    PruneOutcome,
    PruneRequest,
    Range,
    ReceiveRequest,
    RemoveRequest,
    ScrubRequest,
    SendRequest,
    SnapshotRequest,
    Taken,
    VolumeListing,
)
from replicator.endpoint import Scrub as ScrubState
from replicator.errors import InvalidName, ProtocolError, ReplicatorError, rebuild_error
from replicator.model import (
    Lineage,
    Origin,
    Property,
    ResumeState,
    StorageInfo,
    StreamKind,
    Version,
    VersionKind,
    VersionRef,
    VolumeId,
    VolumeInfo,
    VolumeState,
)
from replicator.streams import KEY_SIZE, MAX_VOLUME_SIZE

REQUEST_CAP = 4 * 1024 * 1024
"""Bytes of a request, at most: ``MAX_RANGES`` ranges and some room."""
RESPONSE_CAP = 64 * 1024 * 1024
"""Bytes of an answer, at most: some 200,000 snapshots of one volume."""
MAX_VOLUMES = 4096
"""Volumes in one request."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Storages:
    """:meth:`Endpoint.storages`"""


@dataclass(frozen=True, slots=True)
class Storage:
    """:meth:`Endpoint.storage`"""

    name: str


@dataclass(frozen=True, slots=True)
class Volumes:
    """:meth:`Endpoint.volumes`"""

    storage: str


@dataclass(frozen=True, slots=True)
class State:
    """:meth:`Endpoint.state`"""

    volume: VolumeId


@dataclass(frozen=True, slots=True)
class States:
    """:meth:`Endpoint.states`, of MAX_VOLUMES at most"""

    volumes: tuple[VolumeId, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """:meth:`Endpoint.heads`, of MAX_VOLUMES at most"""

    volumes: tuple[VolumeId, ...]


@dataclass(frozen=True, slots=True)
class EnsurePrimary:
    """:meth:`Endpoint.ensure_primary`"""

    volume: VolumeId


@dataclass(frozen=True, slots=True)
class Snapshot:
    """:meth:`Endpoint.snapshot`"""

    request: SnapshotRequest


@dataclass(frozen=True, slots=True)
class Hold:
    """:meth:`Endpoint.hold`"""

    volume: VolumeId
    version: VersionRef
    tag: str


@dataclass(frozen=True, slots=True)
class Release:
    """:meth:`Endpoint.release`"""

    volume: VolumeId
    version: VersionRef
    tag: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """:meth:`Endpoint.estimate`"""

    volume: VolumeId
    base: VersionRef | None
    to: VersionRef
    intermediates: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """:meth:`Endpoint.send`"""

    request: SendRequest


@dataclass(frozen=True, slots=True)
class Receive:
    """:meth:`Endpoint.receive`; ``estimate`` is the stream's"""

    request: ReceiveRequest
    estimate: int | None


@dataclass(frozen=True, slots=True)
class AbortReceive:
    """:meth:`Endpoint.abort_receive`"""

    volume: VolumeId


@dataclass(frozen=True, slots=True)
class Digests:
    """:meth:`Endpoint.digests`"""

    request: DigestRequest


@dataclass(frozen=True, slots=True)
class Manifest:
    """:meth:`Endpoint.manifest`"""

    request: ManifestRequest


@dataclass(frozen=True, slots=True)
class Scrub:
    """:meth:`Endpoint.scrub`"""

    request: ScrubRequest


@dataclass(frozen=True, slots=True)
class SetAside:
    """:meth:`Endpoint.set_aside`"""

    volume: VolumeId
    name: str


@dataclass(frozen=True, slots=True)
class Adopt:
    """:meth:`Endpoint.adopt`"""

    volume: VolumeId
    lineage: Lineage


@dataclass(frozen=True, slots=True)
class Rename:
    """:meth:`Endpoint.rename`"""

    volume: VolumeId
    new: VolumeId


@dataclass(frozen=True, slots=True)
class Properties:
    """:meth:`Endpoint.properties`"""

    volume: VolumeId


@dataclass(frozen=True, slots=True)
class Prune:
    """:meth:`Endpoint.prune`"""

    request: PruneRequest


@dataclass(frozen=True, slots=True)
class Remove:
    """:meth:`Endpoint.remove`"""

    request: RemoveRequest


@dataclass(frozen=True, slots=True)
class Clone:
    """:meth:`Endpoint.clone`"""

    volume: VolumeId
    version: VersionRef
    new: VolumeId


@dataclass(frozen=True, slots=True)
class GetCrl:
    """The newest revocation list that the peer knows; PEM, "" for none."""


@dataclass(frozen=True, slots=True)
class Renew:
    """A new certificate for the node that asks; only the node with the CA can."""

    csr: str


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The answer to Send, Digests and Manifest (and to Receive, when the stream is wanted): the stream's frames
    follow."""

    kind: StreamKind
    estimate: int | None


@dataclass(frozen=True, slots=True)
class Fault:
    """An error of one volume, as ERROR frames have it for a whole connection."""

    code: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: ReplicatorError | None) -> Fault | None:
        """For sending."""
        return cls(error.code, error.message[:_MAX_TEXT], error.hint[:_MAX_TEXT]) if error is not None else None

    @property
    def error(self) -> ReplicatorError:
        """As it was at the peer."""
        return rebuild_error(self.code, self.message, self.hint)


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """A :class:`~replicator.endpoint.Taken` on the wire: with a version, or else with a fault."""

    volume: VolumeId
    version: Version | None
    fault: Fault | None

    @classmethod
    def of(cls, taken: Taken) -> SnapshotTaken:
        """For sending."""
        return cls(taken.volume, taken.version, Fault.of(taken.error))

    @property
    def taken(self) -> Taken:
        """As it was at the peer."""
        return Taken(self.volume, self.version, self.fault.error if self.fault is not None else None)


@dataclass(frozen=True, slots=True)
class Listed:
    """A :class:`~replicator.endpoint.VolumeListing` on the wire."""

    volume: VolumeId
    state: VolumeState | None
    fault: Fault | None

    @classmethod
    def of(cls, listing: VolumeListing) -> Listed:
        """For sending."""
        return cls(listing.volume, listing.state, Fault.of(listing.error))

    @property
    def listing(self) -> VolumeListing:
        """As it was at the peer."""
        return VolumeListing(self.volume, self.state, self.fault.error if self.fault is not None else None)


@dataclass(frozen=True, slots=True)
class StatesPart:
    """One of the answers to States; the last one has not ``more``."""

    listed: tuple[Listed, ...]
    more: bool


PART_VERSIONS = 20_000
"""Versions in a part of an answer to States: some megabytes."""


def in_parts(listings: Sequence[VolumeListing]) -> Iterator[StatesPart]:
    """A whole answer to States, as parts."""
    part: list[Listed] = []
    size = 0
    for number, listing in enumerate(listings, 1):
        part.append(Listed.of(listing))
        size += len(listing.state.versions) + 1 if listing.state is not None else 1
        if size >= PART_VERSIONS and number < len(listings):
            yield StatesPart(tuple(part), True)
            part, size = [], 0
    yield StatesPart(tuple(part), False)


Request = (
    Storages
    | Storage
    | Volumes
    | State
    | States
    | Heads
    | EnsurePrimary
    | Snapshot
    | Hold
    | Release
    | Estimate
    | Send
    | Receive
    | AbortReceive
    | Digests
    | Manifest
    | Scrub
    | SetAside
    | Adopt
    | Rename
    | Properties
    | Prune
    | Remove
    | Clone
    | GetCrl
    | Renew
)


def _wire_name(kind: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


_REQUESTS: dict[str, type[Request]] = {_wire_name(kind): kind for kind in Request.__args__}

ANSWERS: dict[type[Request], Any] = {
    Storages: tuple[StorageInfo, ...],
    Storage: StorageInfo,
    Volumes: tuple[VolumeInfo, ...],
    State: VolumeState | None,
    States: StatesPart,
    Heads: tuple[Head, ...],
    EnsurePrimary: Lineage,
    Snapshot: tuple[SnapshotTaken, ...],
    Hold: None,
    Release: None,
    Estimate: int | None,
    Send: StreamOpened,
    Receive: Version,
    AbortReceive: None,
    Digests: StreamOpened,
    Manifest: StreamOpened,
    Scrub: ScrubState,
    SetAside: VersionRef | None,
    Adopt: None,
    Rename: None,
    Properties: tuple[Property, ...],
    Prune: tuple[PruneOutcome, ...],
    Remove: None,
    Clone: VolumeInfo,
    GetCrl: str,
    Renew: str,
}
"""What each request is answered with."""


@cache
def _cached_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _adapter(kind: Any) -> TypeAdapter[Any]:
    return _cached_adapter(kind)


@dataclass(frozen=True, slots=True)
class _Envelope:
    op: str


def operation(request: Request) -> str:
    """The request's name on the wire, in logs and in metrics."""
    return _wire_name(type(request))


def encode_request(request: Request) -> bytes:
    """JSON of a request. :raises InvalidName, ProtocolError: this node asks for what may not be asked"""
    check(request)
    kind: Any = type(request)
    body = _adapter(kind).dump_json(request)
    return b'{"op":"' + operation(request).encode() + b'","args":' + body + b"}"


def decode_request(data: bytes) -> Request:
    """:raises ProtocolError: not a request, :raises InvalidName: a name in it that may not be used"""
    op = _parse(_Envelope, data).op
    kind: Any = _REQUESTS.get(op)
    if kind is None:
        raise ProtocolError(
            f"the request {op[:40]!r} is unknown here", hint="install the same version of replicator on both nodes"
        )
    return cast(Request, _parse(_arguments(kind), data).args)


@cache
def _arguments(kind: Any) -> Any:
    return dataclasses.make_dataclass("Arguments", [("args", kind)], frozen=True, slots=True)


def encode_answer(kind: Any, value: object) -> bytes:
    """JSON of an answer of type ``kind``."""
    check(value)
    return _adapter(kind).dump_json(value)


def decode_answer(kind: Any, data: bytes) -> Any:
    """:raises ProtocolError: not of that type, :raises InvalidName: a name in it that may not be used"""
    return _parse(kind, data)


def _parse(kind: Any, data: bytes) -> Any:
    try:
        value = _adapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(
            f"a message cannot be understood: {where or 'JSON'}: {first['msg']}"[:500],
            hint="install the same version of replicator on both nodes",
        ) from None
    except ReplicatorError:
        raise
    except Exception as error:  # noqa: BLE001 - a hostile message must not end anything but its connection
        raise ProtocolError(f"a message cannot be understood: {type(error).__name__}", hint="") from None
    check(value)
    return value


# -- what types alone do not say

_GUID = re.compile(r"[A-Za-z0-9-]{1,64}")
_HEX_KEY = re.compile(rf"[0-9a-f]{{{2 * KEY_SIZE}}}")
_MAX_TEXT = 4096
_MAX_TOKEN = 64 * 1024
_MAX_BLOCK = 16 * 1024 * 1024
_MAX_CSR = 8192
_MAX_PROPERTIES = 64
_PROPERTY = re.compile(r"[a-z0-9][A-Za-z0-9_.:-]{0,255}")


def _refuse(what: str) -> ProtocolError:
    return ProtocolError(f"a message has {what}", hint="see the log of the node that sent it")


def _size(value: int | None, what: str, *, low: int = 0, high: int = MAX_VOLUME_SIZE) -> None:
    if value is not None and not low <= value <= high:
        raise _refuse(f"{what} {value}, outside {low} to {high}")


def _guid(value: str | None) -> None:
    if value is not None and not _GUID.fullmatch(value):
        raise InvalidName(f"version identity {value[:80]!r} is not allowed", hint="")


def _key(value: str) -> None:
    if not _HEX_KEY.fullmatch(value):
        raise _refuse("a digest key of wrong form")


def _text(value: str, what: str, limit: int = _MAX_TEXT) -> None:
    if len(value) > limit:
        raise _refuse(f"a {what} of {len(value)} characters")


def check(value: object) -> None:
    """Check names and ranges in a message, all the way down.

    :raises InvalidName: a name that may not be used; :raises ProtocolError: an integer or text out of range
    """
    if isinstance(value, tuple):
        if value and type(value[0]) is Range:
            _check_ranges(cast(tuple[Range, ...], value))
            return
        for item in value:
            check(item)
        return
    if value is None or isinstance(value, (str, int, float, datetime, Enum, bytes)):
        return
    _check_fields(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            check(getattr(value, field.name))


def _check_ranges(ranges: tuple[Range, ...]) -> None:
    if len(ranges) > MAX_RANGES:
        raise _refuse(f"{len(ranges)} ranges; at most {MAX_RANGES} are allowed")
    end = 0
    for item in ranges:
        if item.offset < end or item.length < 1 or item.end > MAX_VOLUME_SIZE:
            raise _refuse(f"a range at {item.offset} of {item.length} bytes that is empty, out of order or too far")
        end = item.end


def _check_fields(value: object) -> None:  # noqa: PLR0912, PLR0915 - one case a class, nothing nested
    match value:
        case VolumeId():
            names.check_word("storage name", value.storage)
            names.check_volume(value.name)
        case VersionRef():
            names.check_snapshot(value.name)
            _guid(value.guid)
        case Version():
            names.check_snapshot(value.name)
            _guid(value.guid)
            _size(value.size, "a volume size")
            _size(value.position, "a version position", high=2**64 - 1)
            for tag in value.holds:
                _text(tag, "hold tag")  # tags of other programs are listed too
        case ResumeState():
            names.check_snapshot(value.to_name)
            _guid(value.to_guid)
            _guid(value.base_guid)
            _size(value.offset, "a resume offset", high=2**63 - 1)
            _text(value.token, "resume token", _MAX_TOKEN)
        case VolumeState() | VolumeInfo():
            _size(value.size, "a volume size")
        case StorageInfo():
            names.check_word("storage name", value.name)
            _size(value.total, "a storage size", high=2**63 - 1)
            _size(value.free, "free space", high=2**63 - 1)
        case SnapshotRequest():
            names.check_snapshot(value.name)
            if not 1 <= len(value.volumes) <= MAX_VOLUMES:
                raise _refuse(f"{len(value.volumes)} volumes in one snapshot; 1 to {MAX_VOLUMES} are allowed")
        case States() | Heads():
            if not 1 <= len(value.volumes) <= MAX_VOLUMES:
                raise _refuse(f"{len(value.volumes)} volumes to be listed; 1 to {MAX_VOLUMES} are allowed")
        case SnapshotTaken():
            if (value.version is None) == (value.fault is None):
                raise _refuse("a snapshot that was taken and was not")
        case Fault():
            for text in (value.code, value.message, value.hint):
                _text(text, "part of an error")
        case SendRequest():
            _key(value.key)
            if value.ranges is not None and value.base is not None:
                raise _refuse("both ranges and a base")
        case Origin():
            names.check_snapshot(value.snapshot)
        case Property():
            if not _PROPERTY.fullmatch(value.name):
                raise InvalidName(f"property name {value.name[:80]!r} is not allowed", hint="")
            _text(value.value, "property value")
        case ReceiveRequest():
            _key(value.key)
            if len(value.properties) > _MAX_PROPERTIES:
                raise _refuse(f"{len(value.properties)} properties; at most {_MAX_PROPERTIES} are allowed")
            if value.to.kind is not VersionKind.SNAPSHOT:
                raise _refuse("a bookmark as what is to be received")
            if value.hold:
                names.check_tag(value.hold)
            if value.aside:
                names.check_snapshot(value.aside)
        case DigestRequest():
            _key(value.key)
            _size(value.block_size, "a block size", low=512, high=_MAX_BLOCK)
            _size(value.offset, "an offset")
            _size(value.length, "a length")
            if value.offset % value.block_size:
                raise _refuse(f"an offset of {value.offset}, no multiple of the block size {value.block_size}")
        case ManifestRequest():
            _key(value.key)
        case ScrubState():
            _size(value.done, "scrubbed bytes", high=2**63 - 1)
            _size(value.total, "bytes to scrub", high=2**63 - 1)
            _size(value.errors, "a number of errors", high=2**63 - 1)
            _size(value.damaged_elsewhere, "a number of errors", high=2**63 - 1)
            _size(value.position, "a version position", high=2**64 - 1)
            if len(value.damaged) > MAX_DAMAGED:
                raise _refuse(f"{len(value.damaged)} damaged things; at most {MAX_DAMAGED} are named")
            for text in (value.pool, *value.damaged):
                _text(text, "damaged thing's name")
        case PruneRequest():
            names.check_word("job name", value.job)
            _text(value.keep, "retention policy")
            for guid in value.protect:
                _guid(guid)
        case RemoveRequest():
            names.check_word("job name", value.job)
            for guid in value.versions:
                _guid(guid)
        case Hold() | Release():
            names.check_tag(value.tag)
        case SetAside():
            names.check_snapshot(value.name)
        case Storage():
            names.check_word("storage name", value.name)
        case Volumes():
            names.check_word("storage name", value.storage)
        case Estimate() | StreamOpened() | Receive():
            _size(getattr(value, "estimate", None), "an estimate", high=2**63 - 1)
        case Renew():
            _text(value.csr, "signing request", _MAX_CSR)
        case _:
            pass
