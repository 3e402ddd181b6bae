"""What the demo does, step by step, each one checked; it exits 0 only if all of it held."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from replicator import units
from replicator.cli.tables import status_table
from replicator.control import ReplicaStatus, State
from replicator.demo import disk
from replicator.demo.node import DemoNode, join, loopback_network
from replicator.errors import ReplicatorError, UsageError

JOB = "demo"
SCHEDULE = "5s"
ROUND_TIMEOUT = 60.0
VOLUME = "images:disk.raw"
REPLICA = "replicas:alpha/disk.raw"


class Failed(Exception):
    """A step of the demo did not hold."""


def run(image: Path | None, console: Console) -> int:
    """Run the demo; 0 if everything held, 1 otherwise.

    :param image: a disk image to work on a copy of; None: a file system is made and filled
    """
    folder = Path(tempfile.mkdtemp(prefix="replicator-demo-", dir="/var/tmp"))
    story = Story(folder, console)
    began = time.monotonic()
    try:
        story.tell(image)
    except (Failed, ReplicatorError) as error:
        console.print()
        console.print(Text(f"The demo failed: {error}", style="bold red"))
        if isinstance(error, ReplicatorError) and error.hint:
            console.print(Text(f"hint: {error.hint}"))
        console.print(Text(f"Everything is kept for a look in {folder}"))
        return 1
    finally:
        story.stop()
    shutil.rmtree(folder)
    console.print()
    console.print(Text(f"Everything held. {time.monotonic() - began:.0f} seconds.", style="bold green"))
    return 0


class Story:
    """The two nodes and what happens to them."""

    def __init__(self, folder: Path, console: Console) -> None:
        self._console = console
        self._folder = folder
        self._scratch = folder / "scratch"
        self._scratch.mkdir()
        self._alpha = DemoNode("alpha", folder / "alpha")
        self._beta = DemoNode("beta", folder / "beta")
        self._image = folder / "alpha" / "images" / "disk.raw"
        self._ext4 = True
        self._changed = 0
        self._done = 0
        self._sent = 0
        self._lags: list[float] = []

    def tell(self, given: Path | None) -> None:
        """The whole story. :raises Failed: a step did not hold"""
        self._set_up(given)
        self._first_copy()
        self._rounds()
        self._damage_and_mend()
        self._prove()
        self._figures()

    def stop(self) -> None:
        """End both daemons."""
        for node in (self._alpha, self._beta):
            node.stop()

    # -- the steps

    def _title(self, text: str) -> None:
        self._console.print()
        self._console.print(Text(text, style="bold"))

    def _say(self, text: str) -> None:
        self._console.print(Padding(Text(text), (0, 0, 0, 2), expand=False))

    def _show(self, node: DemoNode, *words: str, expect: int = 0) -> None:
        """Run a command as an operator would, and show it with what it prints."""
        self._console.print(Text(f"  {node.name}$ replicator {' '.join(words)}", style="cyan"))
        done = node.run(*words)
        for line in done.stdout.splitlines():
            self._say(line)
        if done.returncode != expect:
            raise Failed(
                f"`replicator {' '.join(words)}` ended with {done.returncode} instead of {expect}: {done.stderr}"
            )

    def _set_up(self, given: Path | None) -> None:
        self._title("1. A disk image")
        self._image.parent.mkdir(parents=True)
        (self._folder / "beta" / "replicas").mkdir(parents=True)
        if given is None:
            files = disk.make_image(self._image, self._scratch)
            self._say(f"a file system (ext4, {units.format_size(self._image.stat().st_size)}) with {files} real files")
        else:
            if not given.is_file():
                raise UsageError(f"{given} is not a file", hint="name a raw disk image")
            disk.tool("cp", "--sparse=auto", "--reflink=auto", str(given), str(self._image))
            self._ext4 = disk.is_ext4(self._image)
            self._say(f"a copy of {given} ({units.format_size(self._image.stat().st_size)})")

        self._title("2. Two nodes, one cluster")
        prefix = loopback_network()
        cluster = f"{prefix}.0/24"
        self._alpha.configure(
            f"{prefix}.1:8571",
            cluster=cluster,
            http=f"{prefix}.1:9571",
            rest=f'[storage.images]\nkind = "image"\npath = "{self._image.parent}"\n\n'
            f'[peer.beta]\naddress = "{prefix}.2:8571"\n\n'
            f'[job.{JOB}]\nsource = "images:disk.raw"\ntargets = ["beta:replicas"]\nschedule = "{SCHEDULE}"\n'
            'keep = {source = "last=3", target = "last=5"}\nmax_lag = "30s"\n',
        )
        self._beta.configure(
            f"{prefix}.2:8571",
            cluster=cluster,
            http=f"{prefix}.2:9571",
            rest=f'[storage.replicas]\nkind = "image"\npath = "{self._folder / "beta" / "replicas"}"\n\n'
            f'[peer.alpha]\naddress = "{prefix}.1:8571"\nmay_push_to = ["replicas"]\n',
        )
        join(self._alpha, self._beta)
        self._beta.start()
        self._say(f"alpha ({prefix}.1) made the cluster, beta ({prefix}.2) joined it with a one-time token;")
        self._say(
            "each has its own daemon, directory and certificate; all that crosses is TLS 1.3, both sides verified"
        )
        self._say(f"metrics: http://{prefix}.1:9571/metrics while this runs")

    def _first_copy(self) -> None:
        self._title(f"3. The first copy, then one every {SCHEDULE}")
        row = self._until(lambda row: row.snapshot != "", "the first copy")
        self._count(row)
        self._say(
            f"{units.format_size(row.done)} of {units.format_size(self._image.stat().st_size)} hold data; "
            f"{units.format_size(row.sent)} crossed the network in {row.duration or 0:.1f} s"
        )

    def _rounds(self) -> None:
        self._title("4. Three rounds of changes inside the file system")
        fingerprint = disk.Fingerprint(self._image)
        changes = disk.rounds(self._scratch) if self._ext4 else iter([None] * 3)
        for change in changes:
            if change is None:
                disk.scribble(self._image)
                title = "random blocks overwritten"
            else:
                disk.apply_round(self._image, change, self._scratch)
                title = change.title
            changed = fingerprint.changed()
            moment = datetime.now(UTC)
            row = self._until(partial(_after, moment=moment), title)
            self._changed += changed
            self._count(row)
            self._say(
                f"{title}: {units.format_size(changed)} changed, {units.format_size(row.done)} brought over, "
                f"{units.format_size(row.sent)} sent, on the replica {row.lag or 0:.1f} s after the snapshot"
            )

    def _damage_and_mend(self) -> None:
        self._title("5. The replica is damaged, and mended")
        self._show(self._alpha, "pause", JOB)
        self._until(lambda row: row.state is not State.RUNNING, "the last run")
        newest = max(
            self._folder.glob("beta/replicas/.replicator/**/snapshots/*/image"), key=lambda path: path.parent.name
        )
        places = disk.damage(newest)
        self._say(f"{places} bits flipped on beta's disk, in {newest.parent.name}")
        self._show(self._alpha, "verify", VOLUME, expect=3)
        self._show(self._alpha, "resync", VOLUME, "--yes")
        self._show(self._alpha, "verify", VOLUME)
        self._show(self._alpha, "resume", JOB)

    def _prove(self) -> None:
        self._title("6. Proof")
        with self._alpha.control() as control:
            sides = control.snapshots(VOLUME)
        guids = [{v.guid: v for v in side.versions or () if not v.is_diverged} for side in sides]
        common = [v for v in guids[0].values() if v.guid in guids[1]]
        newest = max(common, key=lambda v: v.position)
        self._alpha.must("restore", f"{VOLUME}@{newest.name}", "--to", "images:proof.raw")
        self._beta.must("restore", f"{REPLICA}@{newest.name}", "--to", "replicas:proof.raw")
        source, replica = self._image.parent / "proof.raw", self._folder / "beta" / "replicas" / "proof.raw"
        if not disk.same_bytes(source, replica):
            raise Failed(f"snapshot {newest.name} is not the same on both nodes")
        self._say(f"{newest.name}: all {units.format_size(source.stat().st_size)} compared byte by byte: equal")
        if self._ext4:
            disk.tool("e2fsck", "-f", "-n", str(replica))
            self._say("e2fsck finds the replica's file system clean")

    def _figures(self) -> None:
        self._title("7. Figures")
        table = Table(show_header=False, box=None, padding=(0, 2))
        table.add_row("changed inside the file system", units.format_size(self._changed))
        table.add_row("brought over, first copy included", units.format_size(self._done))
        table.add_row("sent over the network (compressed)", units.format_size(self._sent))
        table.add_row("lag after a round, at most", f"{max(self._lags, default=0.0):.1f} s")
        table.add_row("rate of the first copy", self._first_rate)
        self._console.print(table)

    # -- watching

    def _count(self, row: ReplicaStatus) -> None:
        if not self._done:
            self._first_rate = units.format_rate(row.done / row.duration) if row.duration else "-"
        self._done += row.done
        self._sent += row.sent
        if row.lag is not None:
            self._lags.append(row.lag)

    def _until(self, holds: Callable[[ReplicaStatus], bool], what: str) -> ReplicaStatus:
        """Show the live table until ``holds`` says so. :raises Failed: it does not in time"""
        deadline = time.monotonic() + ROUND_TIMEOUT
        with (
            self._alpha.control() as control,
            Live(console=self._console, auto_refresh=False, transient=True) as live,
        ):
            while True:
                status = control.status()
                live.update(status_table(status, width=self._console.width), refresh=True)
                rows = [row for row in status.replicas if row.volume == VOLUME]
                if rows and holds(rows[0]):
                    return rows[0]
                if time.monotonic() > deadline:
                    message = rows[0].message if rows else "no replica is listed"
                    raise Failed(f"{what} was not replicated within {ROUND_TIMEOUT:.0f} s: {message}")
                time.sleep(0.25)


def _after(row: ReplicaStatus, moment: datetime) -> bool:
    """Whether the replica has a snapshot taken after ``moment``, and its run has ended."""
    if row.lag is None or row.state is State.RUNNING:
        return False
    return (datetime.now(UTC) - moment).total_seconds() > row.lag + 0.5
