"""Talks to the service manager that started the daemon: that it is ready, alive, reloading, stopping. See sd_notify(3).

The protocol is one datagram of lines ``KEY=value`` to the Unix socket that ``NOTIFY_SOCKET`` names. A manager that
cannot be told is none of the daemon's problems. The variables are taken out of the environment: hooks do not get them.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress

TIMEOUT = 1.0
"""Seconds to wait for a manager that does not take its datagrams."""


class ServiceManager:
    """The service manager, or nobody.

    :param environment: of the process; the manager's variables are taken out of it
    :ivar watchdog: seconds within which it wants to hear that the daemon is alive; None: it does not
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        # An abstract address is written with @ for the NUL byte that it begins with.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        microseconds = environment.pop("WATCHDOG_USEC", "")
        watched = environment.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog = int(microseconds) / 1e6 if watched and microseconds.isdecimal() and int(microseconds) else None

    def ready(self, status: str) -> None:
        """It is up, and does what ``status`` says."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """It reads its configuration anew; :meth:`ready` ends that."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def alive(self) -> None:
        """It still does."""
        self._tell("WATCHDOG=1")

    def stopping(self) -> None:
        """It comes to its end."""
        self._tell("STOPPING=1", "STATUS=ending transfers where the next run continues")

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.settimeout(TIMEOUT)
            to.sendto("\n".join(lines).encode(), self._address)


class Watchdog:
    """Tells the manager that the daemon is alive, for as long as it is; the manager restarts one that says nothing.

    :param alive: whether the daemon does its work; must not block
    """

    def __init__(self, manager: ServiceManager, alive: Callable[[], bool]) -> None:
        self._manager = manager
        self._alive = alive
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin, if the manager wants to hear of it."""
        if self._manager.watchdog is not None:
            self._thread.start()

    def stop(self) -> None:
        """End; from then on the manager counts."""
        self._stop.set()

    def _run(self) -> None:
        seconds = self._manager.watchdog or 0.0
        while True:
            if self._alive():
                self._manager.alive()
            # Three times as often as it has to be, so that one that is late is not the end.
            if self._stop.wait(seconds / 3):
                return
