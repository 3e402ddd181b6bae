"""``init``, ``serve``, ``demo``, ``cluster``: the verbs that need no Control, on real files."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import replicator.daemon
import replicator.demo
from replicator.cli import connect, output
from replicator.cli.main import App, main
from replicator.cli.output import DONE, FAILED, MISSED, USAGE
from replicator.client import SOCKET_NAME
from replicator.config import Config, load
from replicator.control import Status
from replicator.web.api import make_api
from replicator.web.server import HttpServer
from tests.support.control import FakeControl

NETWORK = ("--cluster", "127.61.7.0/24")


def run(*words: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, list(words), input=answer)


def make_node(folder: Path, name: str, listen: str) -> Path:
    path = folder / name / "replicator.toml"
    done = run("--config", str(path), "init", "--node", name, *NETWORK, "--listen", listen)
    assert done.exit_code == DONE, done.output
    text = path.read_text()
    path.write_text(text.replace('"/var/lib/replicator"', f'"{folder / name / "state"}"'))
    return path


def test_init_writes_a_configuration_that_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "new" / "replicator.toml"
    result = run("--config", str(path), "init")
    assert result.exit_code == DONE
    assert "replicator cluster create" in result.stdout
    load(path)
    before = path.read_bytes()
    again = run("init", "--config", str(path))
    assert again.exit_code == USAGE
    assert "exists already" in again.stderr
    assert path.read_bytes() == before


def test_init_refuses_what_could_not_be_used(tmp_path: Path) -> None:
    path = tmp_path / "replicator.toml"
    result = run("--config", str(path), "init", "--cluster", "10.3.3.4")
    assert result.exit_code == USAGE
    assert not path.exists()
    (tmp_path / "file").write_text("")
    result = run("--config", str(tmp_path / "file" / "replicator.toml"), "init")
    assert result.exit_code == FAILED
    assert "--config PATH" in result.stderr


def test_no_configuration_names_the_way_to_one(tmp_path: Path) -> None:
    for words in (("status",), ("serve",), ("cluster", "create")):
        result = run("--config", str(tmp_path / "none.toml"), *words)
        assert result.exit_code == USAGE
        assert "replicator init" in result.stderr


def test_serve_ends_with_the_daemon_s_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_node(tmp_path, "prox1", "127.61.7.1:8571")
    seen: list[str] = []

    def daemon(config: Config) -> int:
        seen.append(config.node.name)
        return FAILED

    monkeypatch.setattr(replicator.daemon, "run", daemon)
    assert run("--config", str(path), "serve").exit_code == FAILED
    assert seen == ["prox1"]


def test_demo_takes_an_image_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path | None] = []

    def show(image: Path | None, _console: Console) -> int:
        seen.append(image)
        return DONE

    monkeypatch.setattr(replicator.demo, "run", show)
    image = tmp_path / "disk.raw"
    image.write_bytes(b"")
    assert run("demo").exit_code == DONE
    assert run("demo", str(image)).exit_code == DONE
    assert run("demo", str(tmp_path / "none")).exit_code == USAGE
    assert seen == [None, image]


def test_a_cluster_from_its_first_node_to_a_revoked_one(tmp_path: Path) -> None:
    first = make_node(tmp_path, "prox1", "127.61.7.1:8571")
    second = make_node(tmp_path, "prox2", "127.61.7.2:8571")
    assert run("--config", str(first), "cluster", "create").exit_code == DONE
    again = run("--config", str(first), "cluster", "create")
    assert again.exit_code == FAILED
    assert "in a cluster already" in again.stderr
    invited = run("--config", str(first), "cluster", "invite", "prox2", "--valid", "2h")
    assert invited.exit_code == DONE
    token = invited.stdout.strip()
    assert token.startswith("rj1-")
    assert "\n" not in token
    assert "cluster join" in invited.stderr
    nodes = run("--config", str(first), "cluster", "nodes", "--json")
    assert [item["node"] for item in json.loads(nodes.stdout)] == ["prox1"]
    assert "1 node in the cluster of prox1." in run("--config", str(first), "cluster", "nodes").stdout
    assert run("--config", str(second), "cluster", "nodes").exit_code == FAILED
    # Nobody listens on the first node; for another node the token is refused before anybody is asked.
    assert run("--config", str(second), "cluster", "join", token).exit_code == FAILED
    assert run("--config", str(second), "cluster", "join", "-", answer="nonsense").exit_code == FAILED
    stranger = make_node(tmp_path, "prox3", "127.61.7.3:8571")
    refused = run("--config", str(stranger), "cluster", "join", token)
    assert refused.exit_code == USAGE
    assert "invite prox3" in refused.stderr


def test_revoking_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_node(tmp_path, "prox1", "127.61.7.1:8571")
    run("--config", str(path), "cluster", "create")
    assert run("--config", str(path), "cluster", "revoke", "prox2").exit_code == USAGE
    monkeypatch.setattr(output, "interactive", lambda: True)
    assert run("--config", str(path), "cluster", "revoke", "prox2", answer="n\n").exit_code == FAILED
    unknown = run("--config", str(path), "cluster", "revoke", "prox2", "--yes")
    assert unknown.exit_code == FAILED
    assert "no certificate" in unknown.stderr


# -- whom a verb talks to


def test_a_verb_asks_the_daemon_that_answers(tmp_path: Path) -> None:
    path = make_node(tmp_path, "prox1", "127.61.7.1:8571")
    state = tmp_path / "prox1" / "state"
    state.mkdir()
    now = Status("from-the-daemon", "1", True, datetime.now(UTC), ())
    server = HttpServer(make_api(FakeControl(answers={"status": now}), metrics=lambda: b""), unix=state / SOCKET_NAME)
    server.start()
    try:
        result = run("--config", str(path), "status")
    finally:
        server.stop()
    assert result.exit_code == DONE
    assert "from-the-daemon has no replicas yet" in result.stdout


def test_a_verb_works_alone_where_no_daemon_answers(tmp_path: Path) -> None:
    path = make_node(tmp_path, "prox1", "127.61.7.1:8571")
    state = tmp_path / "prox1" / "state"
    state.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(state / SOCKET_NAME))
    result = run("--config", str(path), "status")
    assert result.exit_code in (DONE, MISSED), result.output
    assert "No daemon runs here" in result.stdout


def test_working_alone_is_said_where_it_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_node(tmp_path, "prox1", "127.61.7.1:8571")
    with connect.open_control(App(path), tell=True):
        pass
    assert capsys.readouterr().err == "no daemon runs here: working alone\n"
