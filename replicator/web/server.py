"""Serves an HTTP application in a thread: on a TCP address, or on a Unix socket that only its owner can open.

Starting and stopping have deadlines, signals are left alone, and what cannot be bound is a typed error.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from replicator.errors import DeadlineExceeded, TransportError
from replicator.web.api import works_of

if TYPE_CHECKING:
    from asyncio.transports import Transport

START_SECONDS = 10.0
STOP_SECONDS = 20.0
REQUEST_SECONDS = 10.0
"""From accept() to the end of the first request's head, at most."""
PROBE_SECONDS = 2.0
MAX_CONNECTIONS = 64
BACKLOG = 64
MAX_SOCKET_PATH = 107
"""Bytes of sun_path without its end, unix(7)."""

_log = logging.getLogger(__name__)


class _Protocol(H11Protocol):
    """Drops who connects and asks nothing."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting = self.loop.call_later(REQUEST_SECONDS, self._drop_silent)

    def _drop_silent(self) -> None:
        asked: object = self.cycle  # None until then, whatever its annotation says
        if asked is None and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    """Says when it has started."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


class HttpServer:
    """One application on one listener.

    :param tcp: host and port; port 0 takes a free one, see :attr:`address`
    :param unix: path of a socket, made with mode 0600
    """

    def __init__(self, app: FastAPI, *, tcp: tuple[str, int] | None = None, unix: Path | None = None) -> None:
        if (tcp is None) == (unix is None):
            raise ValueError("either tcp or unix")
        self._app = app
        self._tcp = tcp
        self._unix = unix
        self._socket: socket.socket | None = None
        self._identity: tuple[int, int] | None = None
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def address(self) -> str:
        """Where it listens, for people."""
        if self._unix is not None:
            return str(self._unix)
        host, port = self._socket.getsockname()[:2] if self._socket is not None else self._tcp or ("", 0)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def start(self, seconds: float = START_SECONDS) -> None:
        """Listen, and return once requests are answered.

        :raises TransportError: the address or the path cannot be listened on
        :raises DeadlineExceeded: the server did not start in time
        """
        listener = self._listen_unix(self._unix) if self._unix is not None else self._listen_tcp()
        self._socket = listener
        config = uvicorn.Config(
            self._app,
            loop="asyncio",
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            backlog=BACKLOG,
            timeout_graceful_shutdown=5,
        )
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._thread.start()
        if not self._server.up.wait(seconds) or self._failure is not None:
            self.stop(seconds)
            raise DeadlineExceeded(
                f"the HTTP server on {self.address} did not start within {seconds:g} s", hint="see the log"
            ) from self._failure

    def _serve(self) -> None:
        server = self._server
        if server is None or self._socket is None:
            return
        try:
            server.run(sockets=[self._socket])
        except BaseException as error:  # noqa: BLE001  a thread's end must not go unseen; uvicorn raises SystemExit
            self._failure = error
            _log.error("the HTTP server on %s ended: %s", self._unix or self._tcp, error)
        finally:
            server.up.set()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Stop the work of clients at resumable points, close all connections and the listener.

        Nothing happens if it does not run. What does not end in time is left behind, and logged.
        """
        if self._server is None or self._thread is None:
            return
        works = works_of(self._app)
        works.stop()
        if not works.wait(seconds / 2):
            _log.warning("work of a client did not stop within %g s", seconds / 2)
        self._server.should_exit = True
        self._thread.join(seconds / 2)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join(1.0)
        if self._socket is not None:
            self._socket.close()
        self._remove_own_socket()
        self._server = self._thread = None

    def _listen_tcp(self) -> socket.socket:
        host, port = self._tcp or ("", 0)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except (OSError, OverflowError) as error:
            listener.close()
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise TransportError(
                f"cannot listen for HTTP on {host} port {port}: {reason}",
                hint="choose another address or port under [network] http, or leave it empty to have none; "
                "`ss -ltnp` shows who listens",
            ) from error
        return listener

    def _listen_unix(self, path: Path) -> socket.socket:
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise TransportError(
                f"the path of the socket {path} is longer than {MAX_SOCKET_PATH} bytes",
                hint="choose a shorter [node] state_dir",
            )
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(path))
            # Before listen(): until then nobody can connect, so there is no moment with other permissions.
            path.chmod(stat.S_IRUSR | stat.S_IWUSR)
            listener.listen(BACKLOG)
            found = path.stat()
        except OSError as error:
            listener.close()
            raise TransportError(
                f"cannot make the socket {path}: {error.strerror}",
                hint="the daemon must be able to write to [node] state_dir",
            ) from error
        self._identity = (found.st_dev, found.st_ino)
        return listener

    def _remove_own_socket(self) -> None:
        if self._unix is None:
            return
        try:
            found = self._unix.lstat()
            if (found.st_dev, found.st_ino) == self._identity:
                self._unix.unlink()
        except FileNotFoundError:
            return


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody answers on.

    :raises TransportError: somebody does, or the path is something else
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise TransportError(f"{path} exists and is no socket", hint="remove it, or choose another state_dir")
    except FileNotFoundError:
        return
    except OSError as error:
        raise TransportError(
            f"cannot look at the socket {path}: {error.strerror}", hint="check [node] state_dir"
        ) from error
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.settimeout(PROBE_SECONDS)
    try:
        probe.connect(os.fspath(path))
    except (ConnectionRefusedError, FileNotFoundError):
        path.unlink(missing_ok=True)
    except OSError as error:
        raise TransportError(
            f"cannot tell who has the socket {path}: {error}", hint="is another daemon running on this state_dir?"
        ) from error
    else:
        raise TransportError(
            f"another daemon answers on {path}",
            hint="stop it first (systemctl stop replicator), or give this one a state_dir of its own",
        )
    finally:
        probe.close()
