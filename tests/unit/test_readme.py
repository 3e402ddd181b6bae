"""The README says what is true: its metrics, verbs, keys and exit codes are those of the program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from replicator import metrics, settings
from replicator.cli.main import main

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_the_metrics_table_is_the_generated_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert metrics.main(["--table"]) == 0
    assert capsys.readouterr().out.strip() in TEXT


def test_every_verb_is_in_the_command_line_section() -> None:
    section = TEXT.split("## Command line")[1].split("## Metrics")[0]
    listed = set(re.findall(r"(?:replicator|·) ([a-z]+)", section))
    shown = CliRunner().invoke(main, ["--help"]).output
    verbs = set(re.findall(r"^  ([a-z]+)  ", shown, re.MULTILINE))
    assert verbs
    assert verbs <= listed


def test_every_key_is_in_the_configuration_table() -> None:
    section = TEXT.split("## Configuration")[1].split("## Command line")[0]
    tables = (settings.Node, settings.Network, settings.ImageStorage, settings.ZfsStorage, settings.RbdStorage)
    for table in (*tables, settings.Peer, settings.Job, settings.Limits, settings.Log, settings.Notify):
        for key in table.model_fields:
            assert key == "name" or f"`{key}`" in section, f"{table.__name__}.{key} is not described"


def test_files_that_it_names_exist() -> None:
    root = README.parent
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (root / link).exists(), link
    picture = TEXT.split("## Architecture")[1]
    names = re.findall(r"^      ([a-z_]+\.py)", picture, re.MULTILINE)
    assert names
    for name in names:
        assert (root / "replicator" / name).exists() or (root / "backends" / name).exists(), name
