"""Export and import beside the commands of Ceph, on a real cluster: byte for byte, in both directions, and cut off."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.rbd import RbdBackend
from replicator.cancellation import Cancellation
from replicator.diff_format import DiffHeader, DiffReader, encode
from replicator.model import Version, VolumeState
from tests.lab.ceph import Cluster
from tests.support.rbd_case import RbdCase, read

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(600)]
SIZE = 48 << 20
LAYOUTS = {
    "usual": (),
    "small objects": ("--object-size", "64K"),
    "large objects": ("--object-size", "32M"),
    "striped": ("--object-size", "1M", "--stripe-unit", "64K", "--stripe-count", "4"),
    "no maps": ("--image-feature", "layering,exclusive-lock"),
}
Names = list[str]


class Site:
    """A node with three storages, and the commands of Ceph beside it.

    :ivar pool: ``pool:`` and ``backup:`` are namespaces of one cluster, ``images:`` is a folder
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.pool, self.backup = RbdCase(cluster.conf, name="pool"), RbdCase(cluster.conf, name="backup")
        self.config = folder / "replicator.toml"
        (folder / "images").mkdir()
        text = f"""
            [node]
            name = "prox1"
            state_dir = "{folder}/state"
            [network]
            cluster = "127.0.0.0/8"
            listen = "127.0.0.1:8571"
            http = ""
            [storage.images]
            kind = "image"
            path = "{folder}/images"
            [job.vms]
            source = "pool:*"
            targets = ["backup"]
            """
        for case in (self.pool, self.backup):
            text += f"""
            [storage.{case.name}]
            kind = "rbd"
            pool = "rbd"
            namespace = "{case.namespace}"
            conffile = "{cluster.conf}"
            """
        self.config.write_text(text)

    def close(self) -> None:
        self.pool.close()
        self.backup.close()

    def spec(self, case: RbdCase, image: str, snapshot: str = "") -> str:
        """An image as ``rbd`` names it."""
        return f"rbd/{case.namespace}/{image}" + (f"@{snapshot}" if snapshot else "")

    def rbd(self, *words: str, given: bytes | None = None) -> bytes:
        """What ``rbd`` writes."""
        argv = ["rbd", "-c", str(self.cluster.conf), *words]
        return subprocess.run(argv, input=given, capture_output=True, check=True, timeout=300).stdout

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "replicator.cli.main", "--config", str(self.config), *words]

    def run(self, *words: str, given: bytes | None = None, code: int = 0) -> subprocess.CompletedProcess[bytes]:
        """What ``replicator`` does, which must end with that code."""
        done = subprocess.run(self.command(*words), input=given, capture_output=True, check=False, timeout=300)
        assert done.returncode == code, done.stderr.decode()
        assert b"Traceback" not in done.stderr
        return done

    def export_diff(self, case: RbdCase, image: str, base: str | None, to: str) -> bytes:
        since = ("--from-snap", base) if base is not None else ()
        return self.rbd("export-diff", *since, self.spec(case, image, to), "-")

    def content(self, case: RbdCase, image: str, snapshot: str) -> str:
        return hashlib.md5(self.rbd("export", self.spec(case, image, snapshot), "-")).hexdigest()  # noqa: S324

    def held(self, case: RbdCase, image: str) -> list[str]:
        state = case.backend.state(image)
        return [tag for version in state.versions for tag in version.holds] if state is not None else []


@pytest.fixture
def site(ceph: Cluster, tmp_path: Path) -> Iterator[Site]:
    made = Site(ceph, tmp_path)
    yield made
    made.close()


def mix(image: Any, rnd: random.Random, size: int = SIZE) -> None:
    """What guests and operators do to an image: writes of all sizes, zeros written, discards, resizes."""
    for _ in range(rnd.randrange(20, 60)):
        now = image.size()
        length = rnd.choice([512, 4096, 4096, 4096, 65536, 100_000, 1 << 20, 4 << 20, 9 << 20])
        offset = rnd.randrange(max(1, now - length))
        offset -= offset % rnd.choice([1, 512, 4096, 4 << 20])
        length = min(length, now - offset)
        if length < 1:
            continue
        what = rnd.random()
        if what < 0.5:
            image.write(rnd.randbytes(length), offset)
        elif what < 0.6:
            image.write(bytes(length), offset)
        elif what < 0.66:
            image.write(bytes(length // 2) + rnd.randbytes(length - length // 2), offset)
        elif what < 0.8:
            image.discard(offset, length)
        elif what < 0.94:
            image.write_zeroes(offset, length)
        else:
            image.resize(rnd.choice([size // 3 + 12345, size, size // 2, size + 777 * 512]))


def written(case: RbdCase, image: str, seed: int, count: int) -> Names:
    """Snapshots of an image that was written to before each."""
    rnd = random.Random(seed)
    names = [f"s{number}" for number in range(count)]
    with case.image(image) as opened:
        for name in names:
            mix(opened, rnd)
            opened.create_snap(name)
    return names


def the(state: VolumeState | None, name: str) -> Version:
    found = state.find(name) if state is not None else None
    assert found is not None
    return found


def ours(case: RbdCase, image: str, base: str | None, to: str) -> bytes:
    """An export, without the command line around it."""
    state = case.backend.state(image)
    assert isinstance(case.backend, RbdBackend)
    earlier, later = (the(state, base) if base is not None else None), the(state, to)
    header = DiffHeader(base, to, later.size or 0)
    with case.backend.diff(image, earlier.ref if earlier else None, later.ref, Cancellation()) as pieces:
        return b"".join(bytes(part) for part in encode(header, pieces))


def assert_same_bytes(site: Site, case: RbdCase, image: str, names: Names) -> None:
    """Every difference that there is, in order and across."""
    for number, to in enumerate(names):
        for base in (None, *names[:number]):
            theirs = site.export_diff(case, image, base, to)
            mine = ours(case, image, base, to)
            assert hashlib.sha256(mine).digest() == hashlib.sha256(theirs).digest(), (base, to)
            reader = DiffReader(io.BytesIO(theirs).read)
            again = b"".join(bytes(part) for part in encode(reader.header, reader))
            assert again == theirs, "read and written again it is the same"


# -- byte for byte


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_exports_are_those_of_rbd_byte_for_byte(site: Site, layout: str, count: Callable[[int, int], int]) -> None:
    for seed in range(count(1, 20)):
        image = f"vm{seed}"
        site.rbd("create", "--size", f"{SIZE}B", *LAYOUTS[layout], site.spec(site.pool, image))
        assert_same_bytes(site, site.pool, image, written(site.pool, image, 1000 + seed, 3))


def test_those_of_a_clone_are_too(site: Site) -> None:
    site.rbd("create", "--size", f"{SIZE}B", site.spec(site.pool, "parent"))
    written(site.pool, "parent", 5, 2)
    site.rbd("snap", "protect", site.spec(site.pool, "parent", "s1"))
    site.rbd("clone", site.spec(site.pool, "parent", "s1"), site.spec(site.pool, "vm"))
    assert_same_bytes(site, site.pool, "vm", written(site.pool, "vm", 6, 3))


def test_those_of_a_replica_are_too(site: Site) -> None:
    site.rbd("create", "--size", f"{SIZE}B", site.spec(site.pool, "vm"))
    rnd = random.Random(77)
    names = []
    for _ in range(3):
        with site.pool.image("vm") as image:
            mix(image, rnd)
        site.run("sync", "vms")
        state = site.backup.backend.state("prox1/vm")
        assert state is not None
        names.append(state.versions[-1].name)
    replica = "prox1%2Fvm"
    for base, to in ((None, names[0]), (names[0], names[1]), (names[1], names[2]), (None, names[2])):
        theirs = site.export_diff(site.backup, replica, base, to)
        words = ("--from", base) if base is not None else ()
        assert site.run("export", "backup:prox1/vm", *words, "--to", to).stdout == theirs
    # Leaving: what nothing but Ceph's own command reads, is the source.
    site.rbd("create", "--size", "1", site.spec(site.pool, "left"))
    for base, to in ((None, names[0]), (names[0], names[1]), (names[1], names[2])):
        words = ("--from", base) if base is not None else ()
        diff = site.run("export", "backup:prox1/vm", *words, "--to", to).stdout
        site.rbd("import-diff", "-", site.spec(site.pool, "left"), given=diff)
        assert site.content(site.pool, "left", to) == site.content(site.pool, "vm", to)


def test_a_base_that_was_rebuilt_later_is_none(site: Site) -> None:
    site.pool.create("vm", bytes(1 << 20))
    one, _ = (site.pool.backend.snapshot(("vm",), name)[0] for name in ("one", "two"))
    site.pool.damage("vm", one, 0, b"x")
    refused = site.run("export", "pool:vm", "--from", "one", "--to", "two", code=1)
    assert (refused.stdout[:11], site.held(site.pool, "vm")) == (b"", [])
    assert b"without --from" in refused.stderr
    assert site.run("export", "pool:vm", "--to", "two").stdout == site.export_diff(site.pool, "vm", None, "two")


# -- in both directions


@pytest.mark.parametrize("layout", ["usual", "striped"])
def test_what_we_export_rbd_imports(site: Site, layout: str) -> None:
    site.rbd("create", "--size", f"{SIZE}B", *LAYOUTS[layout], site.spec(site.pool, "vm"))
    site.rbd("create", "--size", "1", site.spec(site.pool, "copy"))
    before: str | None = None
    for name in written(site.pool, "vm", 8, 4):
        words = ("--from", before) if before is not None else ()
        path = site.folder / name
        site.run("export", "pool:vm", *words, "--to", name, "--output", str(path))
        assert path.read_bytes() == site.export_diff(site.pool, "vm", before, name)
        site.rbd("import-diff", str(path), site.spec(site.pool, "copy"))
        assert site.content(site.pool, "copy", name) == site.content(site.pool, "vm", name)
        before = name


@pytest.mark.parametrize("target", ["backup", "images"])
def test_what_rbd_exports_we_import(site: Site, target: str) -> None:
    site.rbd("create", "--size", f"{SIZE}B", site.spec(site.pool, "vm"))
    names = written(site.pool, "vm", 9, 4)
    before: str | None = None
    for name in names:
        diff = site.export_diff(site.pool, "vm", before, name)
        done = site.run("import", f"{target}:copy", "--json", given=diff)
        assert json.loads(done.stdout)["snapshot"] == name
        before = name
    for name in names:
        assert snapshot_content(site, target, "copy", name) == site.content(site.pool, "vm", name)
    again = site.run("import", f"{target}:copy", given=site.export_diff(site.pool, "vm", names[0], names[1]), code=1)
    assert b"hint: " in again.stderr


def snapshot_content(site: Site, storage: str, volume: str, name: str) -> str:
    if storage == "backup":
        return site.content(site.backup, volume.replace("/", "%2F"), name)
    site.run("restore", f"{storage}:{volume}@{name}", "--to", f"{storage}:look-{name}")
    path = site.folder / "images" / f"look-{name}"
    found = hashlib.md5(path.read_bytes()).hexdigest()  # noqa: S324
    path.unlink()
    return found


def test_from_rbd_to_images_and_back_by_files(site: Site) -> None:
    site.rbd("create", "--size", f"{SIZE}B", site.spec(site.pool, "vm"))
    names = written(site.pool, "vm", 10, 3)
    for source, volume, copy in (("pool", "vm", "images:there"), ("images", "there", "backup:back")):
        before: str | None = None
        for name in names:
            path = site.folder / f"{source}-{name}"
            words = ("--from", before) if before is not None else ()
            site.run("export", f"{source}:{volume}", *words, "--to", name, "--output", str(path))
            site.run("import", copy, str(path))
            before = name
    for name in names:
        assert site.content(site.backup, "back", name) == site.content(site.pool, "vm", name)
    guids = [
        [version.guid for version in state.versions]
        for state in (site.pool.backend.state("vm"), site.backup.backend.state("back"))
        if state is not None
    ]
    assert guids[0] == guids[1], "they are the same snapshots wherever they are"


# -- seeding


def test_a_job_goes_on_from_a_copy_that_came_by_disk(site: Site) -> None:
    site.rbd("create", "--size", f"{SIZE}B", site.spec(site.pool, "vm"))
    written(site.pool, "vm", 11, 1)
    disk = site.folder / "seed"
    seed = ("export", "pool:vm", "--to", "s0", "--output", str(disk), "--for")
    assert b"no jobs replicate pool:vm to prox1:images" in site.run(*seed, "images", code=2).stderr
    assert (site.held(site.pool, "vm"), list(site.folder.glob("seed*"))) == ([], [])
    told = site.run(*seed, "prox1:backup").stdout.decode()
    assert "replicator import backup:prox1/vm seed" in told
    assert site.held(site.pool, "vm") == ["replicator:vms:prox1:backup"]
    wrong = bytearray(disk.read_bytes())
    wrong[-100] ^= 1
    bad = site.folder / "bad"
    bad.write_bytes(wrong)
    refused = site.run("import", "backup:prox1/vm", str(bad), "--identity", f"{disk}.identity", code=1)
    assert b"is not what was exported" in refused.stderr
    assert site.backup.backend.state("prox1/vm") is None
    site.run("import", "backup:prox1/vm", str(disk))
    assert b"already" in site.run("import", "backup:prox1/vm", str(disk)).stdout
    with site.pool.image("vm") as image:
        image.write(b"new", 4096)
    (report,) = json.loads(site.run("sync", "vms", "--json").stdout)
    assert (report["outcome"], report["steps"]) == ("ok", 1)
    assert report["done"] <= 64 << 10, "not all of it, but what changed"
    site.run("verify", "pool:vm")
    assert site.held(site.pool, "vm") == ["replicator:vms:prox1:backup"], "now of the newest that both have"


def test_a_copy_that_came_without_identity_becomes_a_replica_by_comparing(site: Site) -> None:
    site.rbd("create", "--size", f"{SIZE}B", site.spec(site.pool, "vm"))
    written(site.pool, "vm", 12, 1)
    site.run("import", "backup:prox1/vm", given=site.export_diff(site.pool, "vm", None, "s0"))
    (report,) = json.loads(site.run("sync", "vms", "--json", code=1).stdout)
    assert report["outcome"] == "conflict"
    (result,) = json.loads(site.run("resync", "pool:vm", "--yes", "--json").stdout)
    assert result["changed"] == 0, "it was equal"
    site.run("verify", "pool:vm")
    (report,) = json.loads(site.run("sync", "vms", "--json").stdout)
    assert report["outcome"] == "ok"


# -- cut off


def stalled(site: Site, *words: str) -> tuple[subprocess.Popen[bytes], bytes]:
    """An export whose reader has taken its first bytes and does nothing more."""
    process = subprocess.Popen(site.command("export", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    return process, os.read(process.stdout.fileno(), 4096)


@pytest.fixture
def full(site: Site) -> Site:
    """With 32 MiB to export: more than a pipe and all buffers take."""
    site.rbd("create", "--size", f"{SIZE}B", site.spec(site.pool, "vm"))
    with site.pool.image("vm") as image:
        image.write(random.Random(3).randbytes(32 << 20), 0)
        image.create_snap("one")
    return site


def test_snapshots_are_held_while_a_reader_takes_its_time(full: Site) -> None:
    process, first = stalled(full, "pool:vm", "--to", "one")
    assert first.startswith(b"rbd diff v1\n")
    (tag,) = full.held(full.pool, "vm")
    assert tag.startswith("replicator:export:prox1.")
    with full.pool.image("vm") as image, pytest.raises(Exception, match=r"(?i)busy|protected"):
        image.remove_snap("one")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, full.held(full.pool, "vm")) == (1, [])
    assert b"error: stopped on request" in said
    assert b"Traceback" not in said


def test_a_reader_that_has_enough_ends_it_quietly(full: Site) -> None:
    process, _ = stalled(full, "pool:vm", "--to", "one")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 1
    assert b"error" not in said and b"Traceback" not in said
    assert full.held(full.pool, "vm") == []


def test_what_a_killed_export_holds_the_next_one_releases(full: Site) -> None:
    process, _ = stalled(full, "pool:vm", "--to", "one")
    process.kill()
    process.communicate(timeout=60)
    assert len(full.held(full.pool, "vm")) == 1
    path = full.folder / "diff"
    (full.folder / "diff.partial").write_bytes(b"x" * 100)
    full.run("export", "pool:vm", "--to", "one", "--output", str(path))
    assert full.held(full.pool, "vm") == []
    assert path.read_bytes() == full.export_diff(full.pool, "vm", None, "one")
    assert sorted(found.name for found in full.folder.glob("diff*")) == ["diff", "diff.identity"]
    assert b"exists" in full.run("export", "pool:vm", "--to", "one", "--output", str(path), code=2).stderr


@pytest.mark.parametrize("target", [pytest.param("backup", marks=pytest.mark.long), "images"])
def test_an_import_that_was_killed_is_done_again(full: Site, target: str) -> None:
    diff = full.export_diff(full.pool, "vm", None, "one")
    process = subprocess.Popen(
        full.command("import", f"{target}:copy"), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    process.stdin.write(diff[: 20 << 20])
    process.stdin.flush()
    until = time.monotonic() + 60
    listed = ["snapshots", f"{target}:copy", "--json"]
    while subprocess.run(full.command(*listed), capture_output=True, check=False, timeout=60).returncode:
        assert time.monotonic() < until, "the volume never appeared"
    process.kill()
    process.wait(60)
    (side,) = json.loads(full.run(*listed).stdout)
    assert side["versions"] == []
    until = time.monotonic() + 120  # the lock of the one that was killed lasts a minute
    while (code := subprocess.run(full.command("import", f"{target}:copy"), input=diff, capture_output=True,
                                  check=False, timeout=300)).returncode:  # fmt: skip
        assert b"in use" in code.stderr or b"another" in code.stderr, code.stderr
        assert time.monotonic() < until
    assert snapshot_content(full, target, "copy", "one") == full.content(full.pool, "vm", "one")


def test_a_diff_that_is_cut_short_leaves_what_was_there(full: Site) -> None:
    full.run("import", "backup:copy", given=full.export_diff(full.pool, "vm", None, "one"))
    with full.pool.image("vm") as image:
        image.write(random.Random(4).randbytes(8 << 20), 1 << 20)
        image.create_snap("two")
    diff = full.export_diff(full.pool, "vm", "one", "two")
    for wrong, why in ((diff[:-1], b"cut short"), (diff[: 5 << 20], b"cut short"), (diff + diff, b"more behind")):
        assert why in full.run("import", "backup:copy", given=wrong, code=1).stderr
        state = full.backup.backend.state("copy")
        assert state is not None and [version.name for version in state.versions] == ["one"]
        assert state.resume is None and not state.head_changed
        with full.backup.image("copy", read_only=True) as image:
            assert hashlib.md5(read(image)).hexdigest() == full.content(full.pool, "vm", "one")  # noqa: S324
    full.run("import", "backup:copy", given=diff)
    with full.backup.image("copy") as image:
        image.write(b"mine", 0)
    with full.pool.image("vm") as image:
        image.create_snap("three")
    late = full.run("import", "backup:copy", given=full.export_diff(full.pool, "vm", "two", "three"), code=1)
    assert b"was written to since two" in late.stderr


def test_a_terminal_gets_no_diff(full: Site) -> None:
    main, terminal = pty.openpty()
    try:
        done = subprocess.run(
            full.command("export", "pool:vm", "--to", "one"),
            stdout=terminal, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2
        assert b"add --output FILE" in done.stderr
        done = subprocess.run(
            full.command("import", "backup:new"), stdin=terminal, capture_output=True, check=False, timeout=60
        )
        assert done.returncode == 2
        assert b"name a FILE" in done.stderr
    finally:
        os.close(main)
        os.close(terminal)
