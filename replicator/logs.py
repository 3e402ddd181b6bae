"""Structured logs: one line an event, as ``key=value`` (logfmt) or as JSON, through the standard library's logging.

::

    time=2026-11-20T08:17:10.123Z level=info logger=replicator.replication event="transfer finished" volume=tank:vm-100
    {"time": "2026-11-20T08:17:10.123Z", "level": "info", "logger": …, "event": "transfer finished", "volume": …}

Whatever a name, a peer or an exception contains, a line stays one line and a field one field: control characters, line
separators and characters that turn the direction of text are escaped.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal, TextIO

MAX_VALUE = 4096
"""Characters of one value, at most; a traceback or a name of a peer may be of any length."""
MAX_FIELDS = 64

_FIELDS = "replicator_fields"
_OWN = ("time", "level", "logger", "event")
_KEY = re.compile(r"[^A-Za-z0-9_.-]")
_BARE = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII but space, '"', '=' and '\'
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_OURS = ("replicator", "backends", "scheduler", "transport")
_STANDARD = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"))
"""What every record has; anything else was given as ``extra`` and is a field, for our own loggers."""

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]


def event(logger: logging.Logger, level: Level | int, message: str, /, **fields: object) -> None:
    """Log an event.

    :param level: by name, or a number of the standard library's
    :param message: what happened, always the same words for the same thing; what varies is in the fields
    :param fields: text, numbers, booleans, times (UTC), durations (become seconds); None is left out; an exception as
        ``error`` becomes its code, message and hint
    """
    number = _LEVELS[level] if isinstance(level, str) else level
    if logger.isEnabledFor(number):
        error = fields.get("error")
        if isinstance(error, BaseException):
            fields = {
                **fields,
                "error": getattr(error, "code", type(error).__name__),
                "message": str(error),
                "hint": getattr(error, "hint", None) or None,
            }
        logger.log(number, "%s", message, extra={_FIELDS: fields}, stacklevel=2)


def setup(format: Format = "text", level: Level = "info", stream: TextIO | None = None) -> logging.Handler:
    """Make the root logger write structured lines to ``stream`` (default: standard error), and only there.

    Libraries log from warnings on. Returns the handler, for whoever wants to take it out again.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(_LEVELS[level], logging.WARNING))
    for ours in _OURS:
        logging.getLogger(ours).setLevel(_LEVELS[level])
    logging.captureWarnings(True)
    return handler


class _Formatter(logging.Formatter):
    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        """All fields of a line, in order; values as JSON has them."""
        line: dict[str, object] = {
            "time": _time(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _plain(record.getMessage()),
        }
        given = getattr(record, _FIELDS, None)
        if given is None and record.name.partition(".")[0] in _OURS:
            given = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if isinstance(given, Mapping):
            for key, value in list(given.items())[:MAX_FIELDS]:
                if value is not None:
                    name = _KEY.sub("_", str(key))[:64] or "_"
                    line[f"field_{name}" if name in _OWN else name] = _plain(value)
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = _plain(self.formatException(record.exc_info))
        return line


class TextFormatter(_Formatter):
    """``key=value`` pairs; values with spaces, quotes or anything unprintable are quoted and escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{key}={_logfmt(value)}" for key, value in self.fields(record).items())


class JsonFormatter(_Formatter):
    """One JSON object a line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.fields(record), ensure_ascii=True, allow_nan=False)


def _time(moment: datetime) -> str:
    moment = moment.astimezone(UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _plain(value: object) -> object:
    """A value as JSON has it."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        # str() of a huge integer raises; nothing that is counted here is that large.
        return int(value) if abs(value) < 2**63 else "out of range"
    if isinstance(value, float):
        return round(value, 6) if abs(value) < float("inf") else str(value)
    if isinstance(value, timedelta):
        return round(value.total_seconds(), 6)
    if isinstance(value, datetime):
        return _time(value)
    if isinstance(value, bytes):
        return value[: MAX_VALUE // 2].hex()
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple, set, frozenset)) else str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}… ({len(text)} characters)"


def _logfmt(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    if _BARE.fullmatch(text):
        return text
    return '"' + "".join(_escape(character) for character in text) + '"'


def _escape(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    # C: control, format (direction marks among them), surrogate, private, unassigned; Zl, Zp: line separators.
    category = unicodedata.category(character)
    if category[0] == "C" or category in ("Zl", "Zp"):
        code = ord(character)
        return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
    return character
