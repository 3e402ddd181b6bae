"""Sends what :mod:`replicator.notices` has to say: by a command, by mail, or both.

The command is started as all hooks are (:mod:`replicator.hooks`), with the text on its standard input and with
``REPLICATOR_NODE``, ``REPLICATOR_SUBJECT`` and ``REPLICATOR_TEXT``. Mail goes to one server by SMTP (RFC 5321), which
is authenticated by its certificate where TLS is used.
"""

from __future__ import annotations

import logging
import smtplib
import ssl
import threading
import time
from collections.abc import Callable
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path

from replicator import hooks, logs, notices
from replicator.control import Status
from replicator.errors import HookFailed, ReplicatorError
from replicator.notices import Message
from replicator.settings import Notify, Smtp

LOG = logging.getLogger(__name__)

LOOK = 5.0
"""Seconds between two looks at the states."""
MAX_TEXT = 64 * 1024
"""Characters in an environment variable at most; the standard input has all."""


def send(settings: Notify, node: str, message: Message) -> None:
    """Send a message by all ways that are set.

    :raises HookFailed: a way failed; the others were tried all the same
    """
    failed: list[str] = []
    if settings.command is not None:
        environment = {
            "REPLICATOR_HOOK": "notify",
            "REPLICATOR_NODE": node,
            "REPLICATOR_SUBJECT": message.subject,
            "REPLICATOR_TEXT": message.text[:MAX_TEXT],
        }
        try:
            hooks.run(
                settings.command, settings.timeout, name="[notify] command", environment=environment, text=message.text
            )
        except HookFailed as error:
            failed.append(str(error))
    if settings.smtp is not None:
        try:
            mail(settings.smtp, settings.timeout.total_seconds(), message)
        except (OSError, smtplib.SMTPException) as error:
            failed.append(f"mail by {settings.smtp.server}: {error}")
    if failed:
        raise HookFailed("; ".join(failed), hint="try the command, or the mail server, by hand")


def mail(settings: Smtp, timeout: float, message: Message) -> None:
    """Send a mail. :raises OSError, SMTPException: why it could not be sent"""
    letter = EmailMessage()
    letter["From"], letter["To"] = settings.sender, ", ".join(settings.to)
    letter["Subject"] = message.subject
    letter["Date"], letter["Message-ID"] = formatdate(), make_msgid(domain=settings.sender.rpartition("@")[2])
    letter["Auto-Submitted"] = "auto-generated"  # RFC 3834: no answers of those who are away
    letter.set_content(message.text)
    host, _, port = settings.server.rpartition(":")
    host = host.strip("[]")
    if settings.tls == "implicit":
        context = ssl.create_default_context()
        server: smtplib.SMTP = smtplib.SMTP_SSL(host, int(port), timeout=timeout, context=context)
    else:
        server = smtplib.SMTP(host, int(port), timeout=timeout)
    with server:
        if settings.tls == "starttls":
            server.starttls(context=ssl.create_default_context())
        if settings.user is not None and settings.password_file is not None:
            server.login(settings.user, settings.password_file.read_text(encoding="utf-8").strip())
        server.send_message(letter)


class Notifier:
    """A thread that looks at the states and tells people of changes.

    :param status: what every replica is like now
    :param state_dir: where what was told is kept
    """

    def __init__(
        self,
        settings: Notify,
        node: str,
        status: Callable[[], Status],
        state_dir: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._node = node
        self._status = status
        self._path = state_dir / notices.FILE_NAME
        self._clock = clock
        self._told = notices.load(self._path)
        self._not_before = clock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; a message that is on its way is not waited for."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(LOOK):
            try:
                self.look()
            except ReplicatorError as error:
                logs.event(LOG, "error", "people could not be notified", error=error)
            except Exception:
                LOG.exception("notifying failed unexpectedly")

    def look(self) -> None:
        """Send what there is to say, if it is time to.

        :raises HookFailed: it could not be sent, and is tried again when it is time to
        """
        if self._clock() < self._not_before:
            return
        status = self._status()
        found = notices.changes(status, self._told)
        if not found:
            return
        self._not_before = self._clock() + self._settings.every.total_seconds()
        message = notices.compose(self._node, found)
        send(self._settings, self._node, message)
        logs.event(LOG, "info", "people were notified", subject=message.subject)
        self._told = notices.after(self._told, status, found)
        try:
            notices.save(self._path, self._told)
        except OSError as error:
            logs.event(
                LOG, "warning", "what people were told could not be kept", path=str(self._path), error=str(error)
            )
