"""Changes of role on real daemons and real images that are killed at random moments, client or daemon: run again, the
command finishes or undoes its work. And what is written all the while is there after a switch-over."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from replicator.demo.node import DemoNode
from tests.support.cluster import JOB, MIB, VOLUME, Pair, change, cluster, fill

SWITCHING = 'may_push_to = ["replicas"]\nmay_switch = ["replicas"]'
UNFINISHED = 4
"""How often a command is run again: what was under way when its client died may still be."""
RECORD = 512


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Side:
    """A node and its copy."""

    node: DemoNode
    volume: str
    live: Path

    @property
    def name(self) -> str:
        return self.node.name

    def role(self) -> str:
        shown = json.loads(self.node.run("status", "--json").stdout)  # exit 3: a volume without a primary is late
        return next(str(copy["role"]) for copy in shown["copies"] if copy["volume"] == self.volume)


@dataclass
class Scene:
    """Two sides; the first one's node has the job."""

    pair: Pair
    random: random.Random
    took: dict[str, float]

    def __post_init__(self) -> None:
        a = Side(self.pair.a, VOLUME, self.pair.image)
        b = Side(self.pair.b, "replicas:a/disk.raw", self.pair.replicas / "a" / "disk.raw")
        self.sides = (a, b)

    def other(self, side: Side) -> Side:
        return self.sides[1 - self.sides.index(side)]

    def killed(self, node: DemoNode, words: tuple[str, ...], victims: tuple[DemoNode, ...]) -> str:
        """Run a command and kill it, or the daemon of one of the nodes, at a random moment; it runs again afterwards.
        Who was killed, for messages."""
        victim = self.random.choice([None, *victims])
        usual = self.took.get(words[0], 2.0)
        client = subprocess.Popen(
            node.argv(*words, "--yes"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        began = time.monotonic()
        try:
            client.wait(self.random.uniform(0.2, 1.1) * usual)
            self.took[words[0]] = time.monotonic() - began
        except subprocess.TimeoutExpired:
            self.took[words[0]] = usual * 1.1
        if victim is None:
            client.kill()
        else:
            victim.kill()
        client.wait(120)
        if victim is not None:
            victim.start()
        return f"{' '.join(words)}, killed: {victim.name if victim else 'the client'}"

    def again(self, node: DemoNode, *words: str, done: Callable[[], bool] | None = None) -> None:
        """Run it again, until it has finished, or ``done`` says that it had before."""
        last = None
        for _ in range(UNFINISHED):
            last = node.run(*words, "--yes")
            if last.returncode == 0 or (done is not None and done()):
                return
        raise AssertionError(f"{words} does not come to its end: {last}")

    def assert_one_primary(self, side: Side, content: str, what: str) -> None:
        assert side.role() == "primary", what
        assert self.other(side).role() == "replica", what
        assert digest(side.live) == content, what
        assert not self.other(side).live.exists(), what


@contextmanager
def scene(folder: Path, seed: int) -> Iterator[Scene]:
    with cluster(folder, rights=SWITCHING, job='schedule = "1d"\n') as pair:
        fill(pair.image, 4 * MIB)
        pair.a.must("sync", JOB)
        yield Scene(pair, random.Random(seed), {})


@pytest.mark.timeout(3600)
def test_a_switchover_that_is_killed_is_finished_or_undone(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    with scene(tmp_path, seed=11) as here:
        primary, replica = here.sides
        for number in range(count(3, 30)):
            change(primary.live, seed=number)
            content = digest(primary.live)
            words = ("switchover", VOLUME, "--to", replica.name)
            what = here.killed(here.pair.a, words, (here.pair.a, here.pair.b))
            here.again(here.pair.a, *words)
            here.assert_one_primary(replica, content, f"{number}: {what}")
            primary, replica = replica, primary


@pytest.mark.timeout(3600)
def test_a_promotion_and_a_rejoin_that_are_killed_are_finished(
    tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    with scene(tmp_path, seed=12) as here:
        old, new = here.sides
        for number in range(count(2, 30)):
            change(old.live, seed=number)
            old.node.must("sync", JOB)
            replicated = digest(old.live)
            change(old.live, seed=1000 + number)
            only_there = digest(old.live)
            old.node.kill()
            words: tuple[str, ...] = ("promote", new.volume, "--primary-is-down")
            what = here.killed(new.node, words, (new.node,))
            here.again(new.node, *words)
            assert new.role() == "primary", what
            assert digest(new.live) == replicated, what

            change(new.live, seed=2000 + number)
            content = digest(new.live)
            old.node.start()
            words = ("rejoin", old.volume, "--from", new.name)
            what = here.killed(old.node, words, (old.node, new.node))
            here.again(old.node, *words)
            here.assert_one_primary(new, content, f"{number}: {what}")
            kept = {digest(folder / "image") for folder in here.pair.source_snapshots().values()}
            assert {only_there, content} <= kept, what
            words = (*words, "--fail-back")
            what = here.killed(old.node, words, (old.node, new.node))
            here.again(old.node, *words)
            here.assert_one_primary(old, content, f"{number}: {what}")


@pytest.mark.timeout(3600)
def test_a_demotion_that_is_killed_is_finished(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    with scene(tmp_path, seed=13) as here:
        side, other = here.sides
        for number in range(count(2, 30)):
            change(side.live, seed=number)
            content = digest(side.live)
            what = here.killed(side.node, ("demote", side.volume), (side.node,))
            here.again(side.node, "demote", side.volume, done=lambda: side.role() == "replica")
            assert (side.role(), other.role()) == ("replica", "replica"), what
            assert not side.live.exists(), what
            here.again(side.node, "promote", side.volume)
            here.assert_one_primary(side, content, f"{number}: {what}")


class Writer:
    """A guest that writes numbered records, each made durable before it is acknowledged, to whichever copy is live. It
    rests while the file ``pause`` is there."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.places = (pair.image, pair.replicas / "a" / "disk.raw")
        self.pause, self.paused = folder / "pause", folder / "paused"
        self.acknowledged: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)

    def _write(self) -> None:
        numbers = itertools.count()
        number = next(numbers)
        while not self._stop.is_set():
            if self.pause.exists():
                self.paused.touch()
                continue
            self.paused.unlink(missing_ok=True)
            for place in self.places:
                try:
                    fd = os.open(place, os.O_WRONLY)
                except FileNotFoundError:
                    continue
                try:
                    os.pwrite(fd, number.to_bytes(8, "little") * (RECORD // 8), number * RECORD % (4 * MIB))
                    os.fsync(fd)
                finally:
                    os.close(fd)
                self.acknowledged.append(number)
                number = next(numbers)
                break

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def until(self, more: int) -> None:
        """Wait until it has written so many more."""
        aim = len(self.acknowledged) + more
        deadline = time.monotonic() + 120
        while len(self.acknowledged) < aim:
            assert time.monotonic() < deadline, "nobody lets it write"
            self._stop.wait(0.01)


def test_a_switchover_under_load_loses_nothing(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_text(f'#!/bin/sh\ntouch "{tmp_path}/pause"\nwhile ! [ -e "{tmp_path}/paused" ]; do sleep 0.02; done\n')
    after.write_text(f'#!/bin/sh\nrm -f "{tmp_path}/pause"\n')
    for hook in (before, after):
        hook.chmod(0o755)
    job = f'schedule = "1d"\nquiesce = {{before = ["{before}"], after = ["{after}"], timeout = "60s"}}\n'
    with cluster(tmp_path, rights=SWITCHING, job=job) as pair:
        fill(pair.image, 4 * MIB)
        with Writer(pair, tmp_path) as writer:
            pair.a.must("sync", JOB)
            writer.until(50)
            done = pair.a.run("switchover", VOLUME, "--to", "b", "--yes")
            assert done.returncode == 0, done.stderr
            assert "there was no writable copy" in done.stdout
            written = len(writer.acknowledged)
            writer.until(50)
        assert not pair.image.exists()
        assert written > 50
        data = writer.places[1].read_bytes()
        newest = {number * RECORD % (4 * MIB): number for number in writer.acknowledged}
        for offset, number in newest.items():
            assert int.from_bytes(data[offset : offset + 8], "little") >= number, f"record {number} is lost"
            assert data[offset : offset + RECORD] == data[offset : offset + 8] * (RECORD // 8)
