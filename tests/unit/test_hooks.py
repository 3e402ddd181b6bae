"""Hooks: argv, environment, timeouts, and that what was frozen is always thawed."""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from replicator import hooks
from replicator.errors import HookFailed

LONG = timedelta(seconds=30)
SHORT = timedelta(milliseconds=300)


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def note(path: Path, word: str, status: int = 0) -> list[str]:
    """A hook that adds a word to a file and ends with a status."""
    code = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + ' '); sys.exit(int(sys.argv[3]))"
    return python(code, path, word, status)


def test_arguments_reach_the_command_as_they_are() -> None:
    odd = "$(touch /tmp/x); `id` *"
    assert hooks.run(["printf", "%s", odd], LONG, name="hook") == odd


def test_environment_and_input() -> None:
    code = "import os, sys; print(os.environ['A'], repr(sys.stdin.read()), os.environ['PATH'])"
    assert hooks.run(python(code), LONG, name="hook", environment={"A": "b"}) == f"b '' {os.environ['PATH']}"


def test_failure_names_command_status_and_last_words() -> None:
    code = "import sys; print('one'); print('device is busy', file=sys.stderr); sys.exit(3)"
    with pytest.raises(HookFailed, match="hook x ended with status 3") as caught:
        hooks.run(python(code), LONG, name="hook x")
    assert str(caught.value).endswith(": device is busy")
    assert caught.value.hint
    with pytest.raises(HookFailed, match="ended by signal 9"):
        hooks.run(python("import os; os.kill(os.getpid(), 9)"), LONG, name="hook x")


def test_a_command_that_does_not_exist() -> None:
    with pytest.raises(HookFailed, match="cannot be started: /no/such: No such file"):
        hooks.run(["/no/such"], LONG, name="hook")


def test_output_is_capped_and_never_blocks() -> None:
    text = hooks.run(python("import sys; sys.stdout.write('x' * 5_000_000 + 'end')"), LONG, name="hook")
    assert len(text) == hooks.MAX_OUTPUT
    assert text.endswith("xend")


def test_what_it_leaves_running_in_the_background_is_not_waited_for(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); open(sys.argv[1], 'w').write(str(p.pid));"
        "print('done')"
    )
    try:
        assert hooks.run(python(code, tmp_path / "pid"), LONG, name="hook") == "done"
    finally:
        os.kill(int((tmp_path / "pid").read_text()), 9)


@pytest.mark.parametrize("stubborn", [False, True])
def test_on_timeout_the_whole_group_is_ended(tmp_path: Path, stubborn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "GRACE", SHORT)
    pipe = tmp_path / "alive"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    code = (
        "import signal, subprocess, sys, time\n"
        "if sys.argv[2] == 'True': signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "alive = open(sys.argv[1], 'wb', 0)\n"
        "alive.write(b'x')\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=alive, pass_fds=[])\n"
        "time.sleep(60)"
    )
    # Long enough for the command to have started its child; the pipe has an end when the last of them is gone.
    with pytest.raises(HookFailed, match="took longer than 2 s and was ended"):
        hooks.run(python(code, pipe, stubborn), timedelta(seconds=2), name="hook")
    os.set_blocking(reader, True)
    assert os.read(reader, 10) == b"x"
    assert os.read(reader, 10) == b""
    os.close(reader)


def test_quiesced(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with hooks.quiesced(note(told, "before"), note(told, "after"), LONG, job="vms"):
        assert told.read_text() == "before "
    assert told.read_text() == "before after "


def test_quiesced_tells_the_hooks(tmp_path: Path) -> None:
    code = (
        "import os, sys; e = os.environ\n"
        "open(sys.argv[1], 'a').write(f\"{e['REPLICATOR_HOOK']} {e['REPLICATOR_JOB']} {e['REPLICATOR_VOLUMES']!r};\")"
    )
    told = tmp_path / "told"
    hook = python(code, told)
    with hooks.quiesced(hook, hook, LONG, job="vms", volumes=["tank:a", "tank:b"]):
        pass
    assert told.read_text() == r"before vms 'tank:a\ntank:b';after vms 'tank:a\ntank:b';"


def test_after_runs_when_the_block_fails(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with pytest.raises(ZeroDivisionError), hooks.quiesced(note(told, "before"), note(told, "after"), LONG, job="vms"):
        raise ZeroDivisionError
    assert told.read_text() == "before after "


def test_after_runs_when_before_failed_and_the_block_does_not(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with (
        pytest.raises(HookFailed, match="hook 'before' of job vms ended with status 1"),
        hooks.quiesced(note(told, "before", 1), note(told, "after"), LONG, job="vms"),
    ):
        raise AssertionError
    assert told.read_text() == "before after "


def test_after_runs_when_before_took_too_long(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with (
        pytest.raises(HookFailed, match="took longer"),
        hooks.quiesced(["sleep", "60"], ["touch", str(told)], SHORT, job="vms"),
    ):
        raise AssertionError
    assert told.exists()


def test_after_does_not_run_when_before_was_never_started(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with (
        pytest.raises(HookFailed, match="cannot be started"),
        hooks.quiesced(["/no/such"], note(told, "after"), LONG, job="vms"),
    ):
        raise AssertionError
    assert not told.exists()


def test_a_failure_of_after_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = tmp_path / "told"
    with (
        pytest.raises(HookFailed, match="hook 'after' of job vms"),
        hooks.quiesced(note(told, "before"), note(told, "after", 1), LONG, job="vms"),
    ):
        pass
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(ZeroDivisionError),
        hooks.quiesced(note(told, "before"), note(told, "after", 1), LONG, job="vms"),
    ):
        raise ZeroDivisionError
    assert "hook failed" in caplog.text
