"""ZFS: a restore that was interrupted is completed, or discarded, by the next; from records."""

from __future__ import annotations

import pytest

from backends.zfs import ZfsBackend, properties
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveMode, ReceiveRequest
from replicator.errors import VolumeBusy
from replicator.model import StreamKind, VolumeId
from replicator.streams import ChunkStream
from tests.support.blocks import KEY
from tests.support.versions import snap
from tests.support.zfs_records import RecordedRunner, listing, row
from transport import checksum

ONE = snap(1, name="one", guid="77")
NEW = "tank/vm/new"


def restore(*rows: str, source: str = "local") -> tuple[list[tuple[str, ...]], str]:
    """What was done to a dataset that is there, and what came of it."""
    runner = RecordedRunner(
        {
            ("zfs", "list"): listing(*rows),
            ("zfs", "get"): f"{source}\n",
            ("zfs", "destroy"): "",
            ("zfs", "inherit"): "",
        }
    )
    store = ZfsBackend("store", "tank/vm", checksums=checksum, runner=runner)
    request = ReceiveRequest(
        VolumeId("store", "new"), None, None, ONE, KEY, mode=ReceiveMode.RESTORE, kind=StreamKind.NATIVE
    )
    try:
        made = store.receive(request, ChunkStream(StreamKind.NATIVE, iter(())), Cancellation())
    except VolumeBusy:
        told = "busy"
    else:
        assert made.guid == ONE.guid
        told = "done"
    return [command[1:] for command in runner.asked if command[1] in ("destroy", "inherit")], told


def volume(of: str) -> str:
    return row(NEW, guid=9, volsize=4096, written=0, replicator__of=of)


def version(name: str, guid: str) -> str:
    return row(f"{NEW}@{name}", "snapshot", guid=guid, createtxg=1, creation=1, userrefs=0)


UNMARK = ("inherit", properties.OF, NEW)


def test_a_restore_that_had_all_its_data_is_completed() -> None:
    mark = f"{properties.RESTORING}:77"
    assert restore(volume(mark), version("one", "77")) == ([("destroy", f"{NEW}@one"), UNMARK], "done")
    assert restore(volume(mark)) == ([UNMARK], "done")
    own = restore(volume(mark), version("own", "5"), version("called otherwise", "77"))
    assert own == ([("destroy", f"{NEW}@called otherwise"), UNMARK], "done"), "and nothing else goes"


def test_one_of_another_snapshot_is_a_volume_that_exists() -> None:
    mark = f"{properties.RESTORING}:5"
    assert restore(volume(mark), version("one", "5")) == ([("destroy", f"{NEW}@one"), UNMARK], "busy")


@pytest.mark.parametrize("of", ["-", "9", "77", "restored:77"])
def test_a_volume_that_exists_is_left_alone(of: str) -> None:
    assert restore(volume(of), version("one", "77")) == ([], "busy")


def test_what_is_below_an_unfinished_restore_is_left_alone() -> None:
    found = restore(volume(f"{properties.RESTORING}:77"), version("one", "77"), source="inherited from tank/vm")
    assert found == ([], "busy")
