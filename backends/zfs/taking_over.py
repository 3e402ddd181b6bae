"""What a replica has from its source beside the data, and what it has from the receiver alone.

The table of properties, with reasons, is in :mod:`replicator.zfs_properties`. A stream is taken only if it carries
nothing but one snapshot: what zfs send -p, -R, -h, -b or --redact put into one is refused, whoever sent it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from backends.zfs.commands import LIST_DEADLINE
from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure, says, words
from backends.zfs.listing import Dataset
from backends.zfs.properties import StreamForm
from backends.zfs.stream_head import StreamHead
from replicator.errors import ProtocolError, Unsupported
from replicator.model import Property
from replicator.zfs_properties import FILESYSTEMS_ONLY, FOR_ZVOLS, TAKEN_OVER, ZVOLS_ONLY

NEVER = ("mountpoint", "sharenfs", "sharesmb")
"""Never from a stream. What our own sender makes has no properties, and others are refused; this is the second lock."""
_VALUE = re.compile(r"[A-Za-z0-9._+-]{1,64}")
"""Values of the properties that are taken over."""
_SET_BY_SOMEBODY = re.compile(r"local|received|inherited from .*")


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms a storage takes replicas.

    :ivar accept: the form of streams that it takes; None: both
    :ivar override: properties that every replica gets, whatever its source has
    :ivar exclude: of what is taken over, what is not
    """

    accept: StreamForm | None = None
    override: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    exclude: frozenset[str] = frozenset()

    def check(self, head: StreamHead, label: str) -> None:
        """:raises Unsupported, ProtocolError: a stream that this storage does not take"""
        check_honest(head, label)
        form = StreamForm.RAW if head.raw else StreamForm.PLAIN
        if self.accept is not None and form is not self.accept:
            why = (
                "encrypt the source, or set replicator:stream=raw there"
                if self.accept is StreamForm.RAW
                else "set replicator:stream=plain on the source (its key must be loaded there)"
            )
            raise Unsupported(
                f"{label} arrives as a {form} stream, and its storage accepts only {self.accept} ones",
                hint=f"{why}; or change accept in [storage.{label.partition(':')[0]}] of the receiving node",
            )

    def options(self, head: StreamHead) -> tuple[str, ...]:
        """Options of zfs receive: nothing dangerous from the stream, and what this storage insists on."""
        wanted = self._for(head.is_zvol)
        excluded = never_taken(head, but=wanted)
        return (*excluded, *(word for name, value in wanted.items() for word in ("-o", f"{name}={value}")))

    def _for(self, zvol: bool) -> dict[str, str]:
        foreign = FILESYSTEMS_ONLY if zvol else ZVOLS_ONLY
        return {name: value for name, value in self.override.items() if name not in foreign}


def never_taken(head: StreamHead, *, but: Iterable[str] = ()) -> tuple[str, ...]:
    """``-x`` for what must not come from a stream, except what is set anyway. A zvol has none of it, and zfs says so
    each time."""
    if head.is_zvol:
        return ()
    return tuple(word for name in NEVER if name not in but for word in ("-x", name))


def check_honest(head: StreamHead, label: str) -> None:
    """:raises ProtocolError: the stream has more in it than a snapshot, or less"""
    what = ""
    if head.holds:
        what = "brings holds of another node"
    elif head.redacted:
        what = "is redacted: it leaves out data"
    if what:
        raise ProtocolError(
            f"the stream for {label} {what}, and is not just a snapshot",
            hint="both nodes must run the same version",
        )


def offered(context: Context, dataset: str) -> tuple[Property, ...]:
    """What a source has of :data:`~replicator.zfs_properties.TAKEN_OVER` that is not the default."""
    return tuple(Property(name, value) for name, (value, mine) in _values(context, dataset).items() if mine)


def apply(context: Context, there: Dataset, properties: Iterable[Property], terms: Terms) -> tuple[str, ...]:
    """Set what the source has and the storage allows, where it is not so already.

    A property that cannot be set (an older OpenZFS, a missing right) does not keep the data from being replicated: it
    is told, a sentence each.
    """
    wanted = {
        given.name: given.value
        for given in properties
        if given.name in (FOR_ZVOLS if there.is_zvol else TAKEN_OVER)
        and given.name not in terms.exclude
        and given.name not in terms.override
        and _VALUE.fullmatch(given.value)
    }
    if not wanted:
        return ()
    now = _values(context, there.name)
    settings = [f"{name}={wanted[name]}" for name in TAKEN_OVER if name in wanted and now[name][0] != wanted[name]]
    if not settings:
        return ()
    done = context.attempt("zfs", "set", *settings, there.name)
    if done.status == 0:
        return ()
    if says(done, "permission denied"):
        rights = ",".join(setting.partition("=")[0] for setting in settings)
        return (f"{there.name} does not take over {rights} of its source: that needs zfs allow USER {rights}",)
    told = []
    for setting in settings:
        done = context.attempt("zfs", "set", setting, there.name)
        if done.status != 0:
            told.append(f"{there.name} does not take over {setting} of its source: {words(done)}")
    return tuple(told)


def _values(context: Context, dataset: str) -> dict[str, tuple[str, bool]]:
    """Each property with its value, and whether somebody set that (here or above)."""
    argv = ("zfs", "get", "-H", "-p", "-o", "property,value,source", ",".join(TAKEN_OVER), dataset)
    done = context.attempt(*argv, deadline=LIST_DEADLINE)
    if done.status != 0:
        raise failure(done, Operation(context.storage, dataset, "reading the properties of"))
    found = dict.fromkeys(TAKEN_OVER, ("-", False))
    for line in done.output.split("\n"):
        name, _, rest = line.partition("\t")
        value, _, source = rest.partition("\t")
        if name in found:
            found[name] = (value, bool(_SET_BY_SOMEBODY.fullmatch(source)))
    return found
