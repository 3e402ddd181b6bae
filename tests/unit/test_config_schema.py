"""The JSON Schema: what is right by it is what the program reads, as far as a schema can tell."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from replicator import config, settings
from replicator.cli.main import main
from replicator.config_schema import schema
from replicator.config_template import render_template
from replicator.errors import ConfigError
from tests.unit.test_config import FULL

README = Path(__file__).parents[2] / "README.md"
SCHEMA = schema()
BASE = """
[node]
name = "prox1"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
[storage.images]
kind = "image"
path = "/images"
[job.vms]
source = "images:*"
targets = ["images"]
"""


def check(text: str) -> None:
    jsonschema.validate(tomllib.loads(text), SCHEMA, cls=jsonschema.Draft202012Validator)


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    result = CliRunner().invoke(main, ["config", "schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == SCHEMA


def test_what_the_program_reads_is_right() -> None:
    check(FULL)
    check(BASE)
    template = render_template("prox1")
    check(template)
    check(re.sub(r"^#(?! )", "", template, flags=re.MULTILINE))
    check("[limits]\ntransfers = 2\n")  # a drop-in
    for example in re.findall(r"(?:^    .*\n|^\n)+", README.read_text(), re.MULTILINE):
        if "    [node]" in example:
            check(example.replace("\n    ", "\n"))


@pytest.mark.parametrize(
    "wrong",
    [
        "[surplus]\n",
        "[limits]\ncolour = 1\n",
        "[limits]\ntransfers = 0\n",
        '[limits]\ntransfers = "2"\n',
        '[log]\nlevel = "loud"\n',
        '[storage.x]\nkind = "tape"\npath = "/x"\n',
        '[storage.x]\nkind = "image"\n',
        '[storage.x]\nkind = "zfs"\nroot = "tank"\npath = "/x"\n',
        '[storage.x]\nkind = "image"\npath = "/x"\nname = "y"\n',
        "[peer.prox2]\n",
        '[job.x]\nsource = "images:*"\n',
        '[job.x]\nsource = {node = "prox2"}\ntargets = ["images"]\n',
        '[job.x]\nsource = "images:*"\ntargets = "images"\n',
        '[job.x]\nsource = "images:*"\ntargets = ["images"]\nquiesce = {before = ["a"]}\n',
        '[job.x]\nsource = "images:*"\ntargets = ["images"]\nkeep = {source = "last=1", other = "last=1"}\n',
        '[job.x]\nsource = "images:*"\ntargets = ["images"]\nenabled = "no"\n',
    ],
)
def test_what_is_wrong_by_it_is_refused_by_the_program_as_well(wrong: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(BASE + wrong)
    with pytest.raises(ConfigError):
        config.parse(BASE + wrong)


def test_every_key_is_in_it_with_what_to_write() -> None:
    tables = SCHEMA["properties"]
    kinds = tables["storage"]["additionalProperties"]["anyOf"]
    pairs: list[tuple[type[settings.Table], Any]] = [
        (settings.Node, tables["node"]), (settings.Network, tables["network"]), (settings.Limits, tables["limits"]),
        (settings.Log, tables["log"]), (settings.Fence, tables["fence"]),
        (settings.Peer, tables["peer"]["additionalProperties"]), (settings.Job, tables["job"]["additionalProperties"]),
        *zip(settings.STORAGE_KINDS.values(), kinds, strict=True),
    ]  # fmt: skip
    for model, table in pairs:
        wanted = set(model.model_fields) - ({"name"} if model is not settings.Node else set())
        assert set(table["properties"]) == wanted
        for name, field in table["properties"].items():
            assert field.get("description") or name == "kind", name


def test_defaults_are_written_as_the_file_has_them() -> None:
    job = SCHEMA["properties"]["job"]["additionalProperties"]["properties"]
    limits = SCHEMA["properties"]["limits"]["properties"]
    assert limits["stall_timeout"]["default"] == "2min"
    assert job["verify_by"]["default"] == "auto"
    assert job["foreign_snapshots"]["default"] == []
    lines = [
        f"[limits]\n{name} = {json.dumps(field['default'])}\n" for name, field in limits.items() if "default" in field
    ]
    for line in lines:
        assert config.parse(BASE + line).limits == config.parse(BASE).limits
    written = [
        f"{name} = {json.dumps(field['default'])}\n"
        for name, field in job.items()
        if "default" in field and name != "keep"
    ]
    assert config.parse(BASE + "".join(written)).jobs == config.parse(BASE).jobs
