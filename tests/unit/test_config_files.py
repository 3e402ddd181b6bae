"""The drop-in directory: files add, and never override; problems name the file that they are in."""

from __future__ import annotations

from pathlib import Path

import pytest

from replicator import config
from replicator.config_files import drop_ins
from replicator.errors import ConfigError, Problem

MAIN = """
[node]
name = "prox1"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
[storage.images]
kind = "image"
path = "/images"
"""
JOB = '[job.{name}]\nsource = "images:*"\ntargets = ["{target}"]\n'
STORAGE = '[storage.{name}]\nkind = "image"\npath = "/{name}"\n'


@pytest.fixture
def main(tmp_path: Path) -> Path:
    path = tmp_path / "replicator.toml"
    path.write_text(MAIN)
    (tmp_path / "replicator.d").mkdir()
    return path


def drop(main: Path, name: str, text: str | bytes) -> str:
    path = main.parent / "replicator.d" / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def problems(main: Path) -> dict[tuple[str, str], Problem]:
    with pytest.raises(ConfigError) as caught:
        config.load(main)
    return {(problem.file, problem.key): problem for problem in caught.value.problems}


def test_files_add(main: Path) -> None:
    drop(main, "20-job.toml", JOB.format(name="vms", target="copies"))
    drop(main, "10-copies.toml", STORAGE.format(name="copies"))
    drop(main, "30-limits.toml", "[limits]\ntransfers = 7\n[network]\nhttp = ''\n")
    drop(main, "31-limits.toml", "[limits]\ntransfers_per_target = 3\n")
    drop(main, ".hidden.toml", "no toml")
    drop(main, "note.txt", "no toml")
    read = config.load(main)
    assert read.path == main
    assert set(read.jobs) == {"vms"}
    assert set(read.storages) == {"images", "copies"}
    assert (read.limits.transfers, read.limits.transfers_per_target, read.network.http) == (7, 3, None)
    assert [path.name for path in drop_ins(main)] == [
        "10-copies.toml",
        "20-job.toml",
        "30-limits.toml",
        "31-limits.toml",
    ]


def test_none_is_needed(main: Path) -> None:
    (main.parent / "replicator.d").rmdir()
    assert config.load(main).jobs == {}
    (main.parent / "replicator.d").write_text("a file")
    assert config.load(main).jobs == {}


def test_the_directory_is_called_as_the_file_is(main: Path) -> None:
    other = main.rename(main.parent / "other.toml")
    drop(main, "job.toml", "no toml")
    (main.parent / "other.d").mkdir()
    (main.parent / "other.d" / "limits.toml").write_text("[limits]\ntransfers = 7\n")
    assert config.load(other).limits.transfers == 7


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        (JOB.format(name="vms", target="images"), JOB.format(name="vms", target="other"), "job.vms"),
        ("[limits]\ntransfers = 7\n", "[limits]\ntransfers = 7\n", "limits.transfers"),
        ('[peer."a.b"]\n', '[peer."a.b"]\n', 'peer."a.b"'),
        ("log = 1\n", "log = 2\n", "log"),
        ("log = 1\n", "[log]\nlevel = 'info'\n", "log"),
    ],
)
def test_what_stands_in_two_files_is_refused(main: Path, first: str, second: str, key: str) -> None:
    where = drop(main, "1.toml", first)
    twice = drop(main, "2.toml", second)
    assert problems(main)[twice, key].message == f"is in {where} already"


def test_what_the_main_file_has_is_not_overridden(main: Path) -> None:
    where = drop(main, "1.toml", '[node]\nname = "other"\n')
    assert problems(main)[where, "node.name"].message == f"is in {main} already"


def test_problems_name_the_file_that_they_are_in(main: Path) -> None:
    main.write_text(MAIN + "[limits]\ntransfers = 0\n")
    job = drop(main, "job.toml", JOB.format(name="vms", target="nowhere") + 'keep = "last=0"\n')
    peer = drop(main, "peer.toml", '[peer.prox2]\naddress = "10.1.0.1"\ncolour = "red"\n[surplus]\n')
    found = problems(main)
    assert set(found) == {
        (str(main), "limits.transfers"), (job, "job.vms.targets"), (job, "job.vms.keep"),
        (peer, "peer.prox2.address"), (peer, "peer.prox2.colour"), (peer, "surplus"),
    }  # fmt: skip


def test_what_is_missing_is_missing_in_the_main_file(main: Path) -> None:
    main.write_text("")
    drop(main, "job.toml", JOB.format(name="vms", target="images"))
    assert (str(main), "network") in problems(main)


def test_all_files_that_cannot_be_read_are_told(main: Path) -> None:
    broken = drop(main, "a.toml", "[node\n")
    binary = drop(main, "b.toml", b"a = 1\n\xff")
    folder = main.parent / "replicator.d" / "c.toml"
    folder.mkdir()
    found = problems(main)
    assert {file for file, _ in found} == {broken, binary, str(folder)}
    assert found[binary, "line 2"].message == "is not UTF-8"


def test_warnings_name_their_file_too(main: Path) -> None:
    main.write_text(MAIN.replace("[storage", 'http = "10.99.0.1:9571"\n[storage'))
    assert [(problem.file, problem.key) for problem in config.load(main).warnings] == [(str(main), "network.http")]
    main.write_text(MAIN)
    where = drop(main, "http.toml", '[network]\nhttp = "10.99.0.1:9571"\n')
    assert [problem.file for problem in config.load(main).warnings] == [where]
