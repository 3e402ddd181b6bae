"""Three nodes in one process, with everything between them that can go wrong: nodes that are off, cables that are cut,
requests that get lost, come late or come twice, answers that get lost, streams that end in the middle, drivers that die
between two calls, and others who do something between two calls. Each fault happens once, at a call that a test (or
Hypothesis) has chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

from replicator.endpoint import Endpoint, Sighting
from replicator.errors import ConnectionLost, DeadlineExceeded, PeerUnreachable, ReplicatorError, VolumeBusy
from replicator.local import LocalEndpoint, PeerView
from replicator.streams import Chunk, ChunkStream, Stream
from tests.support.faults import Crash

STREAMS = ("send", "receive", "digests")
"""Calls that cannot come late or twice: their streams end with the connection."""
QUESTIONS = ("node", "storage", "storages", "volumes", "copies", "sight", "close")


class Trouble(StrEnum):
    """What happens to one call."""

    CRASH_BEFORE = "the driver dies before it"
    CRASH_AFTER = "the driver dies after it"
    LOST = "the request is lost"
    UNANSWERED = "it is done, and the answer is lost"
    LATE = "the request is delayed, and done long after the driver gave it up"
    TWICE = "the request comes twice"
    CUT = "the stream ends in the middle"
    REFUSED = "the storage is busy"


LOCAL = (Trouble.CRASH_BEFORE, Trouble.CRASH_AFTER, Trouble.REFUSED)
"""What can happen to calls of a driver's own node as well."""


@dataclass(slots=True)
class Fault:
    """One trouble, at the ``nth`` call (from 0) that it can happen to.

    :ivar only: of these calls alone, "" for any
    """

    trouble: Trouble
    nth: int
    only: str = ""

    def hits(self, call: str, remote: bool) -> bool:
        """Whether it is this call's turn."""
        if call in QUESTIONS or (self.trouble not in LOCAL and not remote) or self.only not in ("", call):
            return False
        if (self.trouble is Trouble.CUT) != (call in ("send", "receive")) and self.trouble not in LOCAL:
            return False
        self.nth -= 1
        return self.nth < 0


@dataclass(slots=True)
class Weather:
    """What is between the nodes now.

    :ivar off: nodes without power
    :ivar cut: pairs of nodes without a cable
    :ivar faults: still to come, one after the other
    :ivar calls: made so far that a fault could have hit
    :ivar late: requests that are still on their way
    :ivar meanwhile: what somebody else does before a call of a driver, once ``calls`` has come to that number
    """

    nodes: dict[str, LocalEndpoint] = field(default_factory=dict)
    off: set[str] = field(default_factory=set)
    cut: set[frozenset[str]] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    calls: int = 0
    late: list[Callable[[], object]] = field(default_factory=list)
    meanwhile: tuple[int, Callable[[], object]] | None = None

    def reaches(self, one: str, other: str) -> bool:
        """Whether one node can talk to another, or to itself."""
        return not {one, other} & self.off and frozenset((one, other)) not in self.cut

    def link(self, one: str, other: str) -> Endpoint:
        """A node's endpoint as another one has it."""
        if one == other:
            return cast(Endpoint, Link(self, one, other, self.nodes[other]))
        seen = self.nodes[other].for_peer(PeerView(one), lambda node, family: self.sight(other, node, family))
        return cast(Endpoint, Link(self, one, other, seen))

    def sight(self, witness: str, node: str, family: str) -> Sighting:
        """What a node says of a third one."""
        if not self.reaches(witness, node):
            return Sighting(node, None, f"no way from {witness}")
        return Sighting(node, self.nodes[node].copies(family))

    def deliver(self) -> None:
        """What was on its way arrives."""
        late, self.late = self.late, []
        for call in late:
            try:
                call()
            except ReplicatorError:
                continue

    def clear(self) -> None:
        """Everything works again."""
        self.off.clear()
        self.cut.clear()
        self.faults = []
        self.deliver()

    def take(self, call: str, remote: bool) -> Trouble | None:
        """The trouble of this call, before which somebody else may do something without any."""
        if self.meanwhile is not None and self.calls >= self.meanwhile[0] and call not in QUESTIONS:
            (_, act), self.meanwhile = self.meanwhile, None
            faults, self.faults = self.faults, []
            act()
            self.faults = faults
        self.calls += call not in QUESTIONS
        if not self.faults or not self.faults[0].hits(call, remote):
            return None
        return self.faults.pop(0).trouble


class Link:
    """Passes calls on to an endpoint, with whatever happens to them."""

    def __init__(self, weather: Weather, one: str, other: str, inner: LocalEndpoint) -> None:
        self._weather = weather
        self._one = one
        self._other = other
        self._inner = inner

    @property
    def node(self) -> str:
        return self._inner.node

    def __getattr__(self, call: str) -> Callable[..., Any]:
        inner = getattr(self._inner, call)

        def do(*args: Any, **options: Any) -> Any:
            return self._do(call, inner, args, options)

        return do

    def _do(self, call: str, inner: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        remote = self._one != self._other
        if not self._weather.reaches(self._one, self._other):
            raise PeerUnreachable(f"no way from {self._one} to {self._other}", hint="")
        trouble = self._weather.take(call, remote)
        match trouble:
            case Trouble.CRASH_BEFORE:
                raise Crash("kill -9")
            case Trouble.REFUSED:
                raise VolumeBusy("the storage is busy", hint="")
            case Trouble.LOST:
                raise ConnectionLost("the request was lost", hint="")
            case Trouble.LATE:
                if call not in STREAMS:
                    self._weather.late.append(lambda: inner(*args, **options))
                raise DeadlineExceeded("no answer", hint="")
            case Trouble.TWICE if call not in STREAMS:
                inner(*args, **options)
            case Trouble.CUT if call == "receive":
                request, stream, cancel = args
                args = (request, _cut(stream), cancel)
            case _:
                pass
        found = inner(*args, **options)
        if trouble is Trouble.CUT and call == "send":
            found = _cut(found)
        if trouble is Trouble.CRASH_AFTER:
            raise Crash("kill -9")
        if trouble is Trouble.UNANSWERED:
            raise DeadlineExceeded("no answer", hint="")
        return found


def _cut(stream: Stream) -> Stream:
    def chunks() -> Iterator[Chunk]:
        for number, chunk in enumerate(stream):
            if number == 1:
                break
            yield chunk
        raise ConnectionLost("the stream was cut", hint="")

    return ChunkStream(stream.kind, chunks(), estimate=stream.estimate, on_close=stream.close)
