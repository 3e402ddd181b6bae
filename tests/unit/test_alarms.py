"""What a verification found stays in status and metrics until something ends it, also over restarts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from replicator import config
from replicator.cancellation import Cancellation
from replicator.control import State
from replicator.engine import Engine
from replicator.history import History
from replicator.metrics import Metrics
from replicator.model import Version
from replicator.recording import Recording
from replicator.verification import Verification
from tests.unit.test_unchanged import CONFIG, World

VOLUME, REPLICA = "store:vm-1", "a/vm-1"


class Site:
    """A daemon on node a that can be started again."""

    def __init__(self, folder: Path) -> None:
        self.world = World()
        self.folder = folder
        self.start()

    def start(self) -> None:
        world = self.world
        world.tracker.keep_only("vms", frozenset())  # what a process has known
        self.metrics = Metrics(clock=lambda: world.now)
        parsed = config.parse(CONFIG.format(targets='["b:store"]', rest=""))
        history = History(self.folder / "history.sqlite", clock=lambda: world.now)
        recording = Recording(parsed, history, self.metrics, clock=lambda: world.now)
        nodes = cast(Any, world)
        nodes.peers = lambda *, probe: () if not probe else None
        timetable = SimpleNamespace(paused=lambda _: False, next_run=lambda _: None)
        self.engine = Engine(
            parsed, nodes, world.runner, cast(Any, timetable), recording, daemon=True, check=lambda: (),
            clock=lambda: world.now,
        )  # fmt: skip

    def sync(self) -> None:
        self.world.memory["a"].write("vm-1", 0, str(self.world.now).encode())
        self.world.run()

    def newest(self) -> Version:
        state = self.world.memory["b"].state(REPLICA)
        assert state is not None
        return state.snapshots[-1]

    def damage(self, version: Version) -> None:
        self.world.memory["b"].damage(REPLICA, version.ref, 0, b"damage")

    def verify(self, snapshot: str | None = None, *, repair: bool = False) -> Verification:
        (found,) = self.engine.verify(VOLUME, None, snapshot, repair, False, lambda _: None, Cancellation())
        return found

    def alarm(self) -> bool:
        """In all places, now and after a restart."""
        found = [*self._alarms()]
        self.start()
        self.engine.refresh()
        found += self._alarms()
        assert len(set(found)) == 1, found
        return found[0]

    def _alarms(self) -> tuple[bool, ...]:
        row = next(row for row in self.engine.status().replicas if row.volume == VOLUME)
        lines = self.metrics.render().decode().splitlines()
        gauge = [line for line in lines if line.startswith("replicator_replica_mismatched_bytes{") and VOLUME in line]
        return row.state is State.FAILED, "differs" in row.message, bool(gauge) and not gauge[0].endswith(" 0.0")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    made.sync()
    return made


def test_a_damaged_snapshot_is_known_until_it_is_right_itself(site: Site) -> None:
    wrong = site.newest()
    site.damage(wrong)
    assert not site.verify().equal
    assert site.alarm()
    site.verify(wrong.name, repair=True)
    assert not site.alarm()


def test_an_older_snapshot_that_is_equal_ends_nothing(site: Site) -> None:
    older = site.newest()
    site.sync()
    site.damage(site.newest())
    site.verify()
    found = site.verify(older.name)
    assert found.equal
    assert len(found.standing) == 1
    assert site.alarm()


def test_a_newer_one_ends_it_once_the_damaged_one_is_gone(site: Site) -> None:
    site.sync()
    wrong = site.newest()
    site.damage(wrong)
    site.verify()
    site.sync()  # overwrites the damaged place
    assert site.verify().equal
    assert site.alarm()
    assert site.alarm(), "twice restarted"
    site.world.memory["b"].destroy(REPLICA, wrong.ref)
    assert site.alarm(), "nobody has looked"
    assert site.verify().standing == ()
    assert not site.alarm()


def test_a_resync_ends_it_and_says_what_it_leaves(site: Site) -> None:
    wrong = site.newest()
    site.damage(wrong)
    site.verify()
    (preview,) = site.engine.preview_resync(VOLUME, None, False)
    assert any(f"{wrong.name} stays as it is, and differs; `replicator verify" in effect for effect in preview.effects)
    site.engine.resync(VOLUME, None, False, lambda _: None, Cancellation())
    assert not site.alarm()


def test_what_was_found_before_this_process_counts_though_it_has_seen_a_run(site: Site) -> None:
    older = site.newest()
    site.sync()
    site.damage(site.newest())
    site.verify()
    site.start()
    site.sync()  # before anything was recalled
    assert len(site.verify(older.name).standing) == 1
    assert site.alarm()
