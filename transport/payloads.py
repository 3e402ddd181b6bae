"""The small payloads of a connection: hello, errors, and what heartbeats tell."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

from replicator.errors import ProtocolError, ReplicatorError, rebuild_error
from replicator.streams import Buffer
from transport.frames import CAPS, SUSPICIOUS, VERSION, FrameType

STATES = "states"
"""Answers the requests ``states`` and ``heads``."""
FEATURES = ("zstd", STATES)
PING = struct.Struct("<q")
"""The sender's clock, nanoseconds."""
PONG = struct.Struct("<qqq")
"""That, the clock when it came, the clock when the answer went."""
_SAMPLES = 8
"""Heartbeats of which the quickest counts, as in NTP's clock filter (RFC 5905, section 10)."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says of itself first."""

    node: str
    version: int = VERSION
    features: tuple[str, ...] = FEATURES

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps({"version": self.version, "node": self.node, "features": list(self.features)}).encode()

    @classmethod
    def decode(cls, data: Buffer) -> Hello:
        """:raises ProtocolError: not a hello, or of another version"""
        try:
            facts = json.loads(bytes(data))
            node, version, features = facts["node"], facts["version"], facts["features"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ProtocolError("the peer's hello cannot be read", hint=SUSPICIOUS) from None
        good = isinstance(node, str) and isinstance(features, list) and all(isinstance(f, str) for f in features)
        if not good or not isinstance(version, int):
            raise ProtocolError("the peer's hello has values of wrong types", hint=SUSPICIOUS)
        if version != VERSION:
            raise ProtocolError(
                f"node {node[:80]} speaks version {version} of the protocol, this one version {VERSION}",
                hint="install the same version of replicator on both nodes",
            )
        return cls(node, version, tuple(features))


@dataclass(frozen=True, slots=True)
class Link:
    """What heartbeats tell of the way to a peer, in seconds.

    :ivar round_trip: there and back
    :ivar clock_difference: the peer's clock less ours
    """

    round_trip: float
    clock_difference: float


def encode_error(error: ReplicatorError) -> bytes:
    """An ERROR payload; long texts are cut to fit."""
    facts = {"code": error.code, "message": error.message[:4000], "hint": error.hint[:1500]}
    data = json.dumps(facts, ensure_ascii=False).encode("utf-8", "replace")
    if len(data) > CAPS[FrameType.ERROR]:
        data = json.dumps({"code": error.code, "message": error.message[:500], "hint": ""}).encode()
    return data


def decode_error(payload: Buffer, peer: str) -> ReplicatorError:
    """The error that a peer sent; anything unreadable is a ProtocolError."""
    try:
        facts = json.loads(bytes(payload))
        code, message, hint = (str(facts[key]) for key in ("code", "message", "hint"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return ProtocolError(f"node {peer} sent an error that cannot be read", hint=SUSPICIOUS)
    return rebuild_error(code, message, hint)


class ClockFilter:
    """Round trip and clock difference from the last heartbeats; the quickest of them is the most exact.

    :param longest: seconds; a longer round trip means that a clock was set meanwhile
    """

    def __init__(self, *, longest: float) -> None:
        self._longest = longest
        self._links: list[Link] = []

    def learn(self, times: tuple[int, ...], pinged: int, now: int) -> None:
        """A PONG with its three ``times`` came at ``now``; the last PING went at ``pinged`` (all nanoseconds)."""
        sent, received, answered = times
        if sent != pinged:
            return
        round_trip = (now - sent) - (answered - received)
        if not 0 <= round_trip <= self._longest * 1e9:
            return
        difference = ((received - sent) + (answered - now)) / 2
        self._links = [*self._links[1 - _SAMPLES :], Link(round_trip / 1e9, difference / 1e9)]

    @property
    def best(self) -> Link | None:
        """None before the first answer."""
        return min(self._links, key=lambda link: link.round_trip, default=None)
