"""What a hostile peer may try: resume tokens of its own making."""

from __future__ import annotations

from typing import Any

import pytest

from backends.zfs.context import Context
from backends.zfs.library import CommandLibrary
from backends.zfs.listing import Listing
from backends.zfs.naming import DatasetNames
from backends.zfs.sending import open_stream
from replicator.cancellation import Cancellation
from replicator.endpoint import SendRequest
from replicator.errors import StaleResume
from replicator.model import ResumeState, StreamKind, VersionRef, VolumeId
from tests.support.zfs_records import RecordedRunner, Values, make_token, row

NAMES = DatasetNames("store", "tank/vm")
UUID = "6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00"


# -- resume tokens: zfs send -t takes all that it does from one


def continue_with(token: str, *, encryption: str, form: str, base: int | None) -> list[tuple[str, ...]]:
    """What zfs send is asked when a peer asks for tank/vm/a@two to be continued so."""
    pinned: dict[str, Any] = {
        "replicator__lineage": UUID, "replicator__role": "primary", "replicator__epoch": 1, "replicator__of": 1,
        "replicator__stream": form,
    }  # fmt: skip
    listed = (
        row("tank/vm/a", guid=1, encryption=encryption, **(pinned if form else {})),
        row("tank/vm/a@one", "snapshot", guid=2, createtxg=10, creation=1),
        row("tank/vm/a@two", "snapshot", guid=3, createtxg=20, creation=1),
    )
    runner = RecordedRunner({("zfs", "list"): "\n".join(listed), ("zfs", "send", "-n"): "size\t10\n"})
    context = Context(NAMES, runner, Listing(NAMES, runner), lambda: CommandLibrary("store", runner))
    resume = ResumeState(StreamKind.NATIVE, "3", "two", str(base) if base else None, 0, token)
    request = SendRequest(
        VolumeId("store", "a"), VersionRef("one", str(base)) if base else None, VersionRef("two", "3"), "00" * 32,
        resume=resume,
    )  # fmt: skip
    open_stream(context, request, Cancellation()).close()
    return [argv for argv in runner.asked if argv[1] == "send"]


def token(*more: Values, **values: int | str | bool | None) -> str:
    """A token for tank/vm/a@two."""
    given = {"object": 1, "offset": 0, "bytes": 0, "toguid": 3, "toname": "tank/vm/a@two", **values}
    return make_token(*more, **given)


RAW, PLAIN = {"compressok": True, "rawok": True}, {"compressok": True}
ENCRYPTED, NOT = "aes-256-gcm", "off"


@pytest.mark.parametrize(
    ("encryption", "form", "flags"),
    [
        (ENCRYPTED, "", RAW),
        (ENCRYPTED, "raw", RAW),
        (ENCRYPTED, "raw", RAW | {"largeblockok": True}),
        (ENCRYPTED, "plain", PLAIN),
        (NOT, "", PLAIN | {"embedok": True, "largeblockok": True}),
        (NOT, "raw", PLAIN),  # zfs send -w of what is not encrypted is no raw stream
    ],
)
@pytest.mark.parametrize("base", [None, 2])
def test_a_token_of_the_form_that_is_sent_is_continued(
    encryption: str, form: str, flags: dict[str, bool], base: int | None
) -> None:
    honest = token(**flags, **({"fromguid": base} if base else {}))
    asked = continue_with(honest, encryption=encryption, form=form, base=base)
    assert asked == [("zfs", "send", "-n", "-v", "-P", "-t", honest)]


@pytest.mark.parametrize(
    ("encryption", "form", "forged"),
    [
        (ENCRYPTED, "", token(**PLAIN)),  # the whole dataset, decrypted
        (ENCRYPTED, "raw", token(**PLAIN, embedok=True, largeblockok=True)),
        (ENCRYPTED, "plain", token(**RAW)),
        (NOT, "", token(**RAW)),
        (NOT, "", token()),
        (ENCRYPTED, "", token(**RAW, savedok=True)),  # what a receive has left of another one
        (ENCRYPTED, "", token(**RAW, savedok=None)),  # of whatever type: its presence counts
        (ENCRYPTED, "", token(**RAW, redact_snaps=1)),
        (ENCRYPTED, "", token(**RAW, book_redact_snaps=None)),
        (ENCRYPTED, "", token({"toguid": 4}, **RAW)),
        (ENCRYPTED, "", token(**RAW, toguid=4)),
        (ENCRYPTED, "", token(**RAW, fromguid=2)),
        (ENCRYPTED, "", token(**RAW, toname="tank/plain/copy@two")),  # the same snapshot, kept in another form
    ],
)
def test_a_token_of_another_form_or_source_is_not_continued(encryption: str, form: str, forged: str) -> None:
    with pytest.raises(StaleResume):
        continue_with(forged, encryption=encryption, form=form, base=None)
