"""Whether a pool takes requests, known without asking it.

With ``failmode=wait``, the default, a pool whose disks are gone is suspended: whatever touches it waits in the kernel,
for days where need be, and cannot be killed. So no command is started for such a pool, and none is waited for. The
state stands in a file that the kernel fills without taking a lock of the pool (``spa_state_addr`` in
``module/zfs/spa_stats.c`` of OpenZFS, since 0.8).
"""

from __future__ import annotations

from pathlib import Path

from replicator.errors import StorageUnavailable

STATES = Path("/proc/spl/kstat/zfs")


class PoolState:
    """The state of one pool, as often as it is asked for."""

    def __init__(self, pool: str, states: Path = STATES) -> None:
        self._pool = pool
        self._file = states / pool / "state"

    def check(self) -> None:
        """:raises StorageUnavailable: the pool is suspended"""
        try:
            state = self._file.read_text().strip()
        except OSError:  # not imported: what is done to it says so
            return
        if state == "SUSPENDED":
            pool = self._pool
            raise StorageUnavailable(
                f"pool {pool} is suspended: its disks do not answer, and everything that touches it waits for them",
                hint=f"see `zpool status {pool}`; when the disks are back: zpool clear {pool}; then the next run goes "
                "on where this one ended",
            )
