"""The target side: what may be received, into which dataset, and what it becomes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from backends.zfs import aside, healing, placeholders, properties, taking_over
from backends.zfs.batches import Batch
from backends.zfs.context import Context
from backends.zfs.failures import Operation
from backends.zfs.listing import Dataset
from backends.zfs.properties import StreamForm
from backends.zfs.receiving import IncomingStream, checked, feed
from backends.zfs.stream_head import StreamHead
from backends.zfs.taking_over import Terms, check_honest, never_taken
from backends.zfs.tokens import read_token
from replicator import names
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveMode, ReceiveRequest
from replicator.errors import (
    NoSuchSnapshot,
    NotAReplica,
    ProtocolError,
    SnapshotExists,
    StaleResume,
    Unsupported,
    UsageError,
    VolumeBusy,
    VolumeChanged,
)
from replicator.model import Lineage, Role, StreamKind, Version, VersionRef, VolumeState
from replicator.roles import check_may_receive
from replicator.streams import NativeChunk, Stream


def receive(
    context: Context, request: ReceiveRequest, stream: Stream, cancel: Cancellation, terms: Terms
) -> tuple[Version, tuple[str, ...]]:
    """See :meth:`replicator.endpoint.Endpoint.receive`; also what of the source's properties could not be taken over.

    :param terms: what this storage insists on
    """
    names.check_snapshot(request.to.name)
    if request.aside:
        names.check_snapshot(request.aside)
    if request.hold:
        names.check_tag(request.hold)
    if request.kind is not StreamKind.NATIVE or stream.kind is not StreamKind.NATIVE:
        raise Unsupported(
            f"storage {context.storage} takes native streams of ZFS, not streams of {stream.kind}",
            hint="choose a target storage of the source's kind",
        )
    if request.mode is ReceiveMode.RESTORE:
        return _Restore(context, request).run(stream, cancel), ()
    if request.mode is ReceiveMode.HEAL:
        return healing.heal(context, request, stream, cancel), ()
    received = _Receive(context, request, terms)
    version = received.run(stream, cancel)
    return version, received.take_over()


class _Receive:
    """One receive of a replica.

    It goes to ``place``: the dataset itself, or beside a placeholder that gives way to it at the end.
    """

    def __init__(self, context: Context, request: ReceiveRequest, terms: Terms) -> None:
        if request.lineage is None:
            raise UsageError(f"no lineage is given for the replica {request.volume}", hint="")
        self._context = context
        self._request = request
        self._volume = request.volume.name
        self._label = context.names.label(self._volume)
        self._dataset = context.names.dataset(self._volume)
        self._place = self._dataset
        self._terms = terms
        self._origin: Dataset | None = None
        self._received: Dataset | None = None
        self._lineage = Lineage(request.lineage.uuid, Role.REPLICA, request.lineage.epoch)
        context.names.snapshot(self._volume, request.to.name)

    def run(self, stream: Stream, cancel: Cancellation) -> Version:
        there = aside.look(self._context, self._volume)
        if there is not None and not there.is_placeholder:
            lineage = self._request.lineage or self._lineage
            check_may_receive(self._request.volume, self._state(there), lineage, self._request.to.guid)
            done = self._there_already(there)
            if done is not None:
                return done
        if self._request.origin is not None:
            self._origin = self._context.require(self._request.origin.name)
        incoming = IncomingStream(stream)
        head = None
        if self._request.mode is ReceiveMode.REBUILD:  # one that fails or is refused must not put anything aside
            head = incoming.head()
            self._check_head(head, there if self._request.base is not None else None)
            self._check_only_step(head)
            if there is not None and self._request.base is None:
                self._check_may_give_way(there, head)
        there = self._ready(there)
        cancel.check()
        if self._request.intermediates:
            return self._batch(stream, there, cancel)
        head = head or incoming.head()
        form = self._check_head(head, there)
        self._check_only_step(head)
        if there is None:
            there = self._made_meanwhile()
        if there is not None and not there.is_placeholder:
            self._place = there.name
            self._pin(there, form)
        elif there is not None:
            self._check_may_give_way(there, head)
            self._place = placeholders.arrival_of(self._dataset)
        try:
            self._feed(head, there, self._request.to.name, incoming, cancel)
        except NotAReplica as error:
            if there is None and self._made_meanwhile() is not None:
                raise self._taken() from error
            raise
        return self._committed(form)

    def _made_meanwhile(self) -> Dataset | None:
        """Have the datasets above it there; and its placeholder, where another receive has made that by now, because
        something arrives below: until the head of this stream had come, nothing had this name."""
        placeholders.make_parents(self._context, self._dataset)
        made = self._context.look(self._volume)
        if made is not None and not made.is_placeholder:
            raise self._taken()
        return made

    def _taken(self) -> VolumeBusy:
        return VolumeBusy(
            f"{self._label} was made by somebody else while it was about to arrive", hint="the next attempt plans again"
        )

    def _batch(self, stream: Stream, there: Dataset | None, cancel: Cancellation) -> Version:
        """Each stream of a batch is a receive of its own: checked like any other, and told what to make."""
        request = self._request
        if there is None or request.base is None or request.resume is not None or self._origin is not None:
            raise ProtocolError(
                f"{self._label} was to get a batch of snapshots, and does not continue from one of its own",
                hint="both nodes must run the same version",
            )
        self._place = there.name
        batch = Batch(map(checked, stream))
        base, last = request.base.guid, False
        while not last:
            incoming = IncomingStream(batch.stream())
            head = incoming.head()
            form = self._check_head(head, there)
            last = head.to_guid == request.to.guid
            self._check_step(head, base, head.to_guid)
            name = request.to.name if last else head.to_name
            self._context.names.snapshot(self._volume, name)
            if there.named(name) is not None:
                raise SnapshotExists(
                    f"{self._label} has another snapshot called {name}",
                    hint="plan again: it is then received under another name",
                )
            self._pin(there, form)
            there = replace(there, lineage=self._lineage, form=form, of=there.guid)
            self._feed(head, there, name, batch.ending(incoming) if last else incoming, cancel)
            base = head.to_guid
        return self._committed(form)

    def take_over(self) -> tuple[str, ...]:
        """Take over those properties of the source that this storage allows; what could not be, a sentence each."""
        there = self._received
        return () if there is None else taking_over.apply(self._context, there, self._request.properties, self._terms)

    def _state(self, there: Dataset) -> VolumeState:
        resume = there.token.resume if there.token is not None else None
        return VolumeState(self._request.volume, there.volsize, there.versions, there.lineage, resume)

    # -- may it, and onto what

    def _there_already(self, there: Dataset) -> Version | None:
        """The version, if it is there: a confirmation was lost."""
        to = self._request.to
        found = there.find(to.guid)
        if found is None:
            return None
        if there.lineage != self._lineage:
            self._pin(there, there.default_form)
        if there.token is not None and there.token.to_guid == to.guid:
            self._discard(there)
        return self._held(found)

    def _ready(self, there: Dataset | None) -> Dataset | None:
        """Check what is there against the request, and have it end with the base; what is to be received onto."""
        request = self._request
        if there is None or there.is_placeholder:
            if request.base is not None:
                self._base(there)
            if request.resume is not None:
                raise self._stale()
            return there
        other = there.named(request.to.name)
        if other is not None and request.mode is not ReceiveMode.REBUILD:
            raise SnapshotExists(
                f"{self._label} has another snapshot called {other.name} (guid {other.guid})",
                hint="plan again: it is then received under another name",
            )
        base = self._base(there)
        if request.resume is not None and request.mode is ReceiveMode.REPLICA:
            self._check_resume(there)
            return there
        if there.token is not None:
            self._discard(there)
            if not there.snapshots:  # it was but the beginning of a first copy
                return self._context.look(self._volume)
        return self._ending_with(there, base)

    def _base(self, there: Dataset | None) -> Version | None:
        """The snapshot that the stream applies to: of the replica, or of what it is to be a clone of."""
        base = self._request.base
        if base is None:
            return None
        if self._origin is not None:
            lineage = self._origin.lineage
            if lineage is None or lineage.role is not Role.REPLICA or (there is not None and there.snapshots):
                raise NoSuchSnapshot(
                    f"{self._origin.name} is no replica that {self._label} can be a clone of", hint="plan again"
                )
            return self._context.snapshot(self._context.names.volume(self._origin.name), self._origin, base)
        if there is None or there.is_placeholder:
            raise NoSuchSnapshot(f"{self._label} is not there, and so not its {base.name}", hint="plan again")
        return self._context.snapshot(self._volume, there, base)

    def _check_may_give_way(self, there: Dataset, head: StreamHead) -> None:
        """A zvol has nothing below it."""
        if head.is_zvol and there.children:
            raise NotAReplica(
                f"{self._label} arrives as a zvol, and there are volumes below it: {there.children[0]}",
                hint="its source was a filesystem: rename or remove those replicas if their sources are gone",
            )

    def _ending_with(self, there: Dataset, base: Version | None) -> Dataset | None:
        newer = [v for v in there.snapshots if base is None or v.position > base.position]
        if not newer and there.written == 0 and base is not None:
            return there
        own = [v for v in newer if not v.is_diverged]
        if self._request.mode is not ReceiveMode.REBUILD:
            if own:
                raise NoSuchSnapshot(
                    f"{self._label} has snapshots after {base.name if base else 'nothing'}: {own[-1].name}",
                    hint="plan again",
                )
            if there.written > 0:
                raise VolumeChanged(
                    f"{self._label} was written to since its newest snapshot",
                    hint="`replicator resync` keeps that aside and makes the replica right again",
                )
        kept = [v.name for v in newer if v.is_diverged]
        name = kept[-1] if kept and there.written == 0 else self._request.aside
        if not name:
            raise UsageError(f"no name is given under which the data of {self._label} is kept aside", hint="")
        aside.detach(self._context, there, base, name)
        return self._context.look(self._volume)

    def _check_resume(self, there: Dataset) -> None:
        resume, request = self._request.resume, self._request
        token = there.token
        fits = (
            resume is not None
            and token is not None
            and resume.kind is StreamKind.NATIVE
            and (resume.to_guid, resume.base_guid) == (token.to_guid, token.base_guid)
            and token.to_guid == request.to.guid
            and token.base_guid == (request.base.guid if request.base is not None else None)
            and read_token(resume.token).received == resume.offset
            and resume.token == token.text
        )
        if not fits:
            raise self._stale()

    def _stale(self) -> StaleResume:
        resume = self._request.resume
        return StaleResume(
            f"the half-received {resume.to_name if resume else ''} of {self._label} is not what the stream continues",
            hint="the next run plans again from what is there now",
        )

    def _discard(self, there: Dataset) -> None:
        abort(self._context, there)

    # -- the stream

    def _check_head(self, head: StreamHead, there: Dataset | None) -> StreamForm:
        """The stream must be what was asked for: the other node may be of another mind, or another's. Its form."""
        request = self._request
        self._terms.check(head, self._label)
        pinned = there.form if there is not None else None
        if self._origin is not None and pinned is None:
            pinned = self._origin.default_form
        if pinned is not None and (pinned is StreamForm.RAW) != head.raw:
            raise Unsupported(
                f"{self._label} was received as {pinned} streams, and now a {'raw' if head.raw else 'plain'} one came: "
                "ZFS cannot mix them",
                hint=f"set {properties.STREAM} of the source's dataset back to {pinned}; or `replicator resync VOLUME "
                "--full` keeps the whole replica aside and sends everything anew",
            )
        if head.resuming != (request.resume is not None):
            raise ProtocolError(
                f"the stream for {self._label} {'continues something' if head.resuming else 'begins anew'}, which was "
                "not asked for",
                hint="both nodes must run the same version",
            )
        return StreamForm.RAW if head.raw else StreamForm.PLAIN

    def _check_only_step(self, head: StreamHead) -> None:
        """:raises ProtocolError: the one stream is not the step that was asked for"""
        base = self._request.base
        self._check_step(head, base.guid if base is not None else None, self._request.to.guid)

    def _check_step(self, head: StreamHead, base: str | None, to: str) -> None:
        if (head.to_guid, head.base_guid) != (to, base):
            raise ProtocolError(
                f"the stream for {self._label} brings snapshot {head.to_guid} on {head.base_guid or 'nothing'}, and "
                f"not {to} on {base or 'nothing'}",
                hint="both nodes must run the same version",
            )

    def _feed(
        self,
        head: StreamHead,
        there: Dataset | None,
        name: str,
        chunks: Iterable[NativeChunk],
        cancel: Cancellation,
    ) -> None:
        """Receive one stream as one snapshot, which is all that zfs receive makes where it is given a name."""
        operation = Operation(self._context.storage, f"{self._dataset}@{name}", "receiving")
        feed(self._context.runner, self._argv(head, there, name), chunks, operation, cancel)

    def _argv(self, head: StreamHead, there: Dataset | None, name: str) -> tuple[str, ...]:
        argv = ["zfs", "receive", "-s", "-u", *self._terms.options(head)]
        argv += aside.options(aside.REPLICA_PROPERTIES)
        if not head.is_zvol:
            argv += aside.options(aside.FILESYSTEM_PROPERTIES)
        if there is None or there.is_placeholder:
            form = StreamForm.RAW if head.raw else StreamForm.PLAIN
            argv += aside.options(properties.settings(self._lineage, form, self._request.to.guid))
        if self._origin is not None and self._request.base is not None:
            base = self._context.snapshot(self._volume, self._origin, self._request.base)
            argv += aside.options((f"origin={self._origin.name}@{base.name}",))
        return (*argv, f"{self._place}@{name}")

    def _pin(self, there: Dataset, form: StreamForm) -> None:
        """Note the sender's lineage and the form of its streams, durably, before any data."""
        if (there.lineage, there.form, there.of) == (self._lineage, form, there.guid):
            return
        settings = (*aside.REPLICA_PROPERTIES, *properties.settings(self._lineage, form, there.guid))
        self._context.change("zfs", "set", *settings, there.name, dataset=there.name, doing="marking as a replica")

    # -- the end

    def _committed(self, form: StreamForm) -> Version:
        if self._place != self._dataset:
            placeholders.settle(self._context, self._dataset)
        there = self._context.require(self._volume, (self._request.to.ref,))
        self._pin(there, form)
        self._received = there
        found = there.find(self._request.to.guid)
        if found is None:
            raise ProtocolError(
                f"the stream for {self._label} was received, and did not bring {self._request.to.name}",
                hint="see the log of the other node",
            )
        return self._held(found)

    def _held(self, version: Version) -> Version:
        if not self._request.hold or self._request.hold in version.holds:
            return version
        hold(self._context, self._dataset, version, self._request.hold)
        return replace(version, holds=tuple(sorted({*version.holds, self._request.hold})))


class _Restore:
    """A snapshot of somewhere as a new volume here."""

    def __init__(self, context: Context, request: ReceiveRequest) -> None:
        self._context = context
        self._request = request
        self._dataset = context.names.dataset(request.volume.name)

    def run(self, stream: Stream, cancel: Cancellation) -> Version:
        context, request = self._context, self._request
        there = context.look(request.volume.name)
        if there is not None and self._is_unfinished(there):
            if there.token is None and self._finish(there):  # all of it had come
                return replace(request.to, holds=())
            if there.token is not None and not there.snapshots:  # it was cut off
                abort(context, there)
                there = context.look(request.volume.name)
        if there is not None:
            raise VolumeBusy(f"volume {request.volume} exists already", hint="name a volume that does not exist yet")
        incoming = IncomingStream(stream)
        head = incoming.head()
        check_honest(head, str(request.volume))
        if head.resuming or (head.to_guid, head.base_guid) != (request.to.guid, None):
            raise ProtocolError(f"the stream for {request.volume} is not one of {request.to.name} alone", hint="")
        snapshot = f"{self._dataset}@{request.to.name}"
        mark = f"{properties.OF}={properties.RESTORING}:{request.to.guid}"
        settings = [mark, *(() if head.is_zvol else aside.FILESYSTEM_PROPERTIES)]
        placeholders.make_parents(context, self._dataset)
        excluded = never_taken(head)
        argv = ("zfs", "receive", "-s", "-u", *excluded, *aside.options(settings), snapshot)
        operation = Operation(context.storage, snapshot, "restoring")
        try:
            feed(context.runner, argv, incoming, operation, cancel)
        except BaseException:  # nothing can continue it
            found = context.listing.dataset(self._dataset)
            if found is not None and properties.restored_from(found.of) is not None:
                abort(context, found)
            raise
        self._unmark(snapshot)
        return replace(request.to, holds=())

    def _is_unfinished(self, there: Dataset) -> bool:
        """Whether an earlier restore was interrupted. What is below such a dataset has its mark as well, inherited."""
        if properties.restored_from(there.of) is None:
            return False
        argv = ("zfs", "get", "-H", "-o", "source", properties.OF, there.name)
        return self._context.change(*argv, dataset=there.name, doing="looking at").output.strip() == "local"

    def _finish(self, there: Dataset) -> bool:
        """Remove what an interrupted restore has left beside the data; whether it was of the same snapshot."""
        guid = properties.restored_from(there.of) or ""
        snapshot = there.find(guid)
        self._unmark(self._context.full_name(there.name, snapshot) if snapshot is not None else "")
        return guid == self._request.to.guid

    def _unmark(self, snapshot: str) -> None:
        """The snapshot goes first: the mark tells that it is to go."""
        for error in self._context.library.destroy([snapshot] if snapshot else []).values():
            raise error
        argv = ("zfs", "inherit", properties.OF, self._dataset)
        self._context.change(*argv, dataset=self._dataset, doing="restoring")


def abort(context: Context, there: Dataset) -> None:
    """Discard what an interrupted receive has brought."""
    if there.token is None:
        return
    name = there.name
    if there.children and not there.snapshots:  # of a first copy nothing remains, and there are datasets below it
        name = placeholders.vacate(context, there)
    context.change_if_there("zfs", "receive", "-A", name, dataset=name, doing="discarding what was received of")


def hold(context: Context, dataset: str, version: Version | VersionRef, tag: str) -> None:
    """Hold a snapshot. Nothing happens if that tag holds it already."""
    context.library.hold(context.full_name(dataset, version), tag)
