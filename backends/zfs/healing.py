"""Heals a damaged snapshot: ``zfs receive -c`` (corrective receive, OpenZFS 2.2) writes blocks of a stream over those
that the pool cannot read any more. It changes no other data, and it cannot mend ZFS's own metadata. It leaves the
snapshot marked in a way that only lets it be sent (``reading.check_usable``); later snapshots have the healed blocks
without that."""

from __future__ import annotations

from backends.zfs.context import Context
from backends.zfs.failures import Operation
from backends.zfs.properties import StreamForm
from backends.zfs.receiving import IncomingStream, feed
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveRequest
from replicator.errors import ProtocolError, StorageError, Unsupported
from replicator.model import Version
from replicator.streams import Stream


def heal(context: Context, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
    """Heal one snapshot with a full stream of the same one.

    :raises Unsupported: this OpenZFS cannot
    """
    volume = request.volume.name
    label = context.names.label(volume)
    dataset = context.require(volume)
    version = context.snapshot(volume, dataset, request.to.ref)
    incoming = IncomingStream(stream)
    cancel.check()
    head = incoming.head()
    if head.resuming or (head.to_guid, head.base_guid) != (version.guid, None):
        raise ProtocolError(
            f"the stream for healing {label} is not one of {version.name} alone",
            hint="both nodes must run the same version",
        )
    if (dataset.default_form is StreamForm.RAW) != head.raw:
        raise Unsupported(
            f"{label} was received as {dataset.default_form} streams, and cannot be healed by one of the other form",
            hint="",
        )
    name = f"{dataset.name}@{version.name}"
    try:
        feed(
            context.runner,
            ("zfs", "receive", "-c", name),
            incoming,
            Operation(context.storage, name, "healing"),
            cancel,
        )
    except StorageError as error:
        if "invalid option 'c'" in str(error):
            raise Unsupported(
                f"storage {context.storage} has an OpenZFS older than 2.2, which cannot heal a damaged snapshot",
                hint="upgrade OpenZFS there",
            ) from error
        raise
    return version
