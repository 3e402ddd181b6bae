"""In which form a dataset's streams are made: what an operator chose, what is pinned, what is the default."""

from __future__ import annotations

import pytest

from backends.zfs import ZfsBackend
from replicator.errors import InvalidName
from replicator.model import Lineage, Role
from tests.support.zfs_records import RecordedRunner, row
from transport import checksum

UUID = "6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00"
NAME = "tank/vm/secret"
PRIMARY = Lineage(UUID, Role.PRIMARY, 1)


def marked(said: str, **values: object) -> tuple[str, ...]:
    """Mark a dataset as a source, ``said`` being what zfs get says of its form; what was set."""
    answers = {
        ("zfs", "list"): row(NAME, "filesystem", guid=7, **values) + "\n",
        ("zfs", "get"): said + "\n",
        ("zfs", "set"): "",
        ("zfs", "holds"): "",
    }
    runner = RecordedRunner(answers)  # type: ignore[arg-type]
    ZfsBackend("store", "tank/vm", checksums=checksum, runner=runner).set_lineage("secret", PRIMARY)
    (done,) = [argv for argv in runner.asked if argv[1] == "set"]
    return done[2:-1]


@pytest.mark.parametrize("form", ["raw", "plain"])
@pytest.mark.parametrize("encryption", ["aes-256-gcm", "off"])
def test_what_was_set_before_the_first_run_is_kept(form: str, encryption: str) -> None:
    found = marked(f"{form}\tlocal", encryption=encryption, replicator__stream=form)
    assert f"replicator:stream={form}" in found
    assert "replicator:of=7" in found


@pytest.mark.parametrize("said", ["-\t-", "plain\tinherited from tank/vm", "plain\treceived", "plain\tdefault"])
def test_what_was_not_set_on_the_dataset_itself_does_not_count(said: str) -> None:
    """A dataset inherits what its parent is pinned to; what a stream brought was another's."""
    value = said.partition("\t")[0]
    assert "replicator:stream=raw" in marked(said, encryption="aes-256-gcm", replicator__stream=value)
    assert "replicator:stream=plain" in marked(said, encryption="off", replicator__stream="raw")


def test_what_is_pinned_stays() -> None:
    pinned = {"replicator__of": 7, "replicator__stream": "plain", "encryption": "aes-256-gcm"}
    assert "replicator:stream=plain" in marked("raw\tlocal", **pinned)


@pytest.mark.parametrize(
    ("role", "pinned", "encryption", "form"),
    [
        ("primary", "raw", "aes-256-gcm", "raw"),
        ("primary", "plain", "aes-256-gcm", "plain"),
        ("primary", "raw", "off", "plain"),  # zfs send -w of what is not encrypted is no raw stream
        ("primary", "-", "aes-256-gcm", "raw"),
        ("replica", "raw", "aes-256-gcm", "raw"),
        ("replica", "plain", "aes-256-gcm", "plain"),  # below an encrypted root
        ("replica", "-", "aes-256-gcm", ""),
    ],
)
def test_the_form_of_streams_is_told(role: str, pinned: str, encryption: str, form: str) -> None:
    values = {"replicator__of": 7, "replicator__lineage": UUID, "replicator__role": role, "replicator__epoch": 1}
    listed = row(NAME, "filesystem", guid=7, encryption=encryption, replicator__stream=pinned, **values) + "\n"
    runner = RecordedRunner({("zfs", "list"): listed})
    state = ZfsBackend("store", "tank/vm", checksums=checksum, runner=runner).state("secret")
    assert state is not None
    assert state.form == form


def test_a_form_that_is_none_is_told_and_not_overwritten() -> None:
    with pytest.raises(InvalidName, match=r"replicator:stream is 'clear'") as raised:
        marked("clear\tlocal", replicator__stream="clear")
    assert "zfs set replicator:stream=plain tank/vm/secret" in raised.value.hint
