"""Why a role does not change: values with their evidence.

Each refusal says in ``message`` what was found, and in ``hint`` the way out, as the conflicts of planning do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from replicator.endpoint import Copy
from replicator.errors import ConflictError
from replicator.model import Lineage, Role, VolumeId
from replicator.situations import Silence


class Refusal(ABC):
    """Why a role does not change. Subclasses carry the evidence."""

    kind: ClassVar[str] = "refused"

    @property
    @abstractmethod
    def message(self) -> str:
        """The thing and the cause, one sentence."""

    @property
    @abstractmethod
    def hint(self) -> str:
        """The way out."""

    def to_error(self) -> ConflictError:
        """This refusal as an exception."""
        return ConflictError(self.message, hint=self.hint, kind=self.kind)


@dataclass(frozen=True, slots=True)
class NoCopy(Refusal):
    """The volume was never replicated, so it has no role."""

    kind: ClassVar[str] = "no_copy"
    volume: VolumeId

    @property
    def message(self) -> str:
        return f"{self.volume} is no copy of anything: it was never replicated"

    @property
    def hint(self) -> str:
        return "`replicator status` lists the copies that this node has"


@dataclass(frozen=True, slots=True)
class NothingComplete(Refusal):
    """There is no complete snapshot to go on from.

    :ivar partial: the snapshot that was being received
    """

    kind: ClassVar[str] = "nothing_complete"
    volume: VolumeId
    partial: str

    @property
    def message(self) -> str:
        half = f": only a part of {self.partial} has come" if self.partial else ""
        return f"{self.volume} has no complete snapshot{half}"

    @property
    def hint(self) -> str:
        return "promote another copy; an incomplete one is never made a primary"


@dataclass(frozen=True, slots=True)
class PrimaryAnswers(Refusal):
    """The primary is there, so there is nothing to take over.

    :ivar witness: the node that reaches it, "" where this one does
    """

    kind: ClassVar[str] = "primary_answers"
    volume: VolumeId
    node: str
    primary: Copy
    witness: str = ""

    @property
    def message(self) -> str:
        way = f" (node {self.witness} reaches it)" if self.witness else ""
        return (
            f"{self.volume} has a primary that answers{way}: {self.primary.volume} on {self.node}, "
            f"epoch {self.primary.lineage.epoch}"
        )

    @property
    def hint(self) -> str:
        return (
            f"`replicator switchover` on {self.node} hands over without loss; --force promotes all the same, and what "
            "the primary has beyond this copy is lost until it rejoins"
        )


@dataclass(frozen=True, slots=True)
class Superseded(Refusal):
    """Another copy is of a newer epoch: it was promoted after this one was last brought forward."""

    kind: ClassVar[str] = "superseded"
    volume: VolumeId
    epoch: int
    node: str
    newer: Copy

    @property
    def message(self) -> str:
        return (
            f"{self.volume} is of epoch {self.epoch}, and {self.newer.volume} on {self.node} of epoch "
            f"{self.newer.lineage.epoch}: it was superseded"
        )

    @property
    def hint(self) -> str:
        return f"replicator rejoin {self.volume} --from {self.node} makes it follow; what only it has is kept aside"


@dataclass(frozen=True, slots=True)
class NoWitness(Refusal):
    """A node is silent that may have the primary, and nobody else can say that it is down.

    :ivar silent: those nodes
    """

    kind: ClassVar[str] = "no_witness"
    volume: VolumeId
    silent: tuple[Silence, ...]

    @property
    def message(self) -> str:
        told = "; ".join(f"{silence.node}: {silence.why}" for silence in self.silent)
        return f"whether the primary of {self.volume} is down is not known, as no third node can say so ({told})"

    @property
    def hint(self) -> str:
        nodes = " and ".join(dict.fromkeys(silence.node for silence in self.silent))
        return f"make sure that {nodes} is down or switched off, then give your word for it: --primary-is-down"


@dataclass(frozen=True, slots=True)
class OpenHandover(Refusal):
    """A switch-over from this copy has not come to its end, and both sides are there to finish it.

    :ivar node: the other side
    """

    kind: ClassVar[str] = "open_handover"
    volume: VolumeId
    node: str

    @property
    def message(self) -> str:
        return f"{self.volume} stepped down for {self.node}, which answers: that switch-over is not finished"

    @property
    def hint(self) -> str:
        return f"replicator switchover {self.volume} --to {self.node}, again, finishes it or undoes it"


@dataclass(frozen=True, slots=True)
class NotPrimary(Refusal):
    """Only a primary steps down."""

    kind: ClassVar[str] = "not_primary"
    volume: VolumeId
    lineage: Lineage

    @property
    def message(self) -> str:
        return f"{self.volume} is a {self.lineage.role} already (epoch {self.lineage.epoch})"

    @property
    def hint(self) -> str:
        return "run it on the node that has the primary; `replicator status` says which copies this node has"


@dataclass(frozen=True, slots=True)
class NotACopy(Refusal):
    """Two volumes that are no copies of one another."""

    kind: ClassVar[str] = "not_a_copy"
    volume: VolumeId
    node: str

    @property
    def message(self) -> str:
        return f"{self.node} has no copy of {self.volume}"

    @property
    def hint(self) -> str:
        return "replicate it there first: `replicator sync`"


@dataclass(frozen=True, slots=True)
class NothingToFollow(Refusal):
    """The other side is not a primary that this copy could follow.

    :ivar other: its lineage, with the node
    """

    kind: ClassVar[str] = "nothing_to_follow"
    volume: VolumeId
    lineage: Lineage
    node: str
    other: Lineage

    @property
    def message(self) -> str:
        return (
            f"{self.volume} (epoch {self.lineage.epoch}, {self.lineage.role}) cannot follow the copy on {self.node} "
            f"(epoch {self.other.epoch}, {self.other.role})"
        )

    @property
    def hint(self) -> str:
        if self.other.role is Role.PRIMARY:
            return f"this copy is the newer one: run rejoin on {self.node}"
        return f"promote the copy on {self.node} first, or name the node that has the primary"


@dataclass(frozen=True, slots=True)
class InDoubt(Refusal):
    """A switch-over whose end is not known: the other side may have been told to take over, and does not answer."""

    kind: ClassVar[str] = "handover_in_doubt"
    volume: VolumeId
    node: str
    why: str

    @property
    def message(self) -> str:
        return (
            f"{self.volume} stepped down for {self.node}, which may have taken over or not, and does not answer: "
            f"{self.why}"
        )

    @property
    def hint(self) -> str:
        return (
            f"run it again once {self.node} answers: it is finished then, or undone. If {self.node} is down for good: "
            f"replicator promote {self.volume} --primary-is-down"
        )
