"""Log lines: one event, one line, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator import logs
from replicator.errors import NoSpace
from replicator.model import VolumeId

LOGGER = logging.getLogger("replicator.test")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for ours in ("replicator", "backends", "scheduler", "transport"):
        logging.getLogger(ours).setLevel(logging.NOTSET)
    logging.captureWarnings(False)


def written(format: logs.Format, **fields: object) -> str:
    stream = io.StringIO()
    logs.setup(format, "info", stream)
    logs.event(LOGGER, "info", "transfer finished", **fields)
    return stream.getvalue()


def test_text() -> None:
    line = written(
        "text", volume=VolumeId("tank", "vm-100"), bytes=123, took=timedelta(seconds=1.5), full=True, no=None
    )
    start, _, rest = line.partition(" level=")
    assert start.startswith("time=20")
    assert start.endswith("Z")
    assert rest == (
        'info logger=replicator.test event="transfer finished" volume=tank:vm-100 bytes=123 took=1.5 full=true\n'
    )


def test_json() -> None:
    line = json.loads(written("json", volume="a b", at=datetime(2026, 11, 20, 8, 17, 10, 123000, tzinfo=UTC), n=3))
    assert line["event"] == "transfer finished"
    assert (line["volume"], line["at"], line["n"]) == ("a b", "2026-11-20T08:17:10.123Z", 3)
    assert line["level"] == "info"


@pytest.mark.parametrize("format", ["text", "json"])
def test_names_cannot_forge_lines_or_fields(format: logs.Format) -> None:
    name = 'x\ntime=2026 level=error event="all lost"\r\u2028\u202e\x1b[2J\\" y=1'
    line = written(format, volume=name, time="never")
    assert line.count("\n") == 1
    assert line.isascii()
    assert all(c.isprintable() for c in line[:-1])
    if format == "text":
        assert r'volume="x\ntime=2026 level=error event=\"all lost\"\r\u2028\u202e\u001b[2J\\\" y=1"' in line
        assert " field_time=never" in line
    else:
        assert json.loads(line)["volume"] == name


@given(st.text(max_size=200), st.sampled_from(["text", "json"]))
def test_any_value_is_one_line(value: str, format: logs.Format) -> None:
    line = written(format, **{"odd key\n": value, "value": value})
    assert len(line.splitlines()) == 1
    assert "odd_key_" in line


def test_errors() -> None:
    stream = io.StringIO()
    logs.setup("text", "info", stream)
    logs.event(LOGGER, "error", "run failed", job="vms", error=NoSpace("storage is full", hint="make room"))
    assert 'event="run failed" job=vms error=no_space message="storage is full" hint="make room"' in stream.getvalue()
    logs.event(LOGGER, logging.WARNING, "odd", error="plain words")
    assert stream.getvalue().endswith('level=warning logger=replicator.test event=odd error="plain words"\n')
    try:
        raise ValueError("a\nb")
    except ValueError:
        LOGGER.exception("surprise")
    last = stream.getvalue().splitlines()[-1]
    assert stream.getvalue().count("\n") == 3
    assert 'exception="Traceback (most recent call last):\\n' in last


def test_levels() -> None:
    stream = io.StringIO()
    logs.setup("text", "debug", stream)
    logs.event(LOGGER, "debug", "seen")
    logging.getLogger("apscheduler").info("not seen")
    logging.getLogger("apscheduler").warning("odd")
    assert [line.split("event=")[1] for line in stream.getvalue().splitlines()] == ["seen", "odd"]


def test_long_values_are_cut() -> None:
    assert len(written("text", value="x" * 10**6, many=list(range(10**5)))) < 4 * logs.MAX_VALUE


def test_what_our_loggers_give_as_extra_is_a_field_and_what_libraries_give_is_not() -> None:
    stream = io.StringIO()
    logs.setup("text", "info", stream)
    logging.getLogger("transport.server").warning("refused", extra={"peer": "prox 2", "reason": "unlisted"})
    logging.getLogger("somebody.else").warning("hello", extra={"peer": "prox2"})
    ours, theirs = stream.getvalue().splitlines()
    assert ours.endswith('event=refused peer="prox 2" reason=unlisted')
    assert theirs.endswith("event=hello")
