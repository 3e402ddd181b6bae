"""A JSON Schema of replicator.toml, for editors that complete and check TOML by one.

Made from the tables of :mod:`replicator.settings`. It knows keys, types and choices; whether a duration or a schedule
can be read, and whether names lead somewhere, only ``replicator check`` knows. What must be there is not demanded of
tables that may be spread over drop-in files.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaWarningKind
from pydantic_core import PydanticUndefined

from replicator import units
from replicator.selection import SnapshotPatterns
from replicator.settings import STORAGE_KINDS, Fence, Job, Limits, Log, Network, Node, Notify, Peer, Table

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SINGLE: Mapping[str, type[Table]] = {
    "node": Node,
    "network": Network,
    "limits": Limits,
    "log": Log,
    "fence": Fence,
    "notify": Notify,
}


class _Generator(GenerateJsonSchema):
    """Defaults are values of ours, and are written anew as the file has them."""

    ignored_warning_kinds: set[JsonSchemaWarningKind] = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012 - as pydantic declares it


def schema() -> dict[str, Any]:
    """The schema."""
    definitions: dict[str, Any] = {}
    tables = {name: _table(model, definitions, named=False) for name, model in _SINGLE.items()}
    kinds = [_table(model, definitions, named=True) for model in STORAGE_KINDS.values()]
    tables["storage"] = _by_name({"anyOf": kinds})
    tables["peer"] = _by_name(_table(Peer, definitions, named=True))
    tables["job"] = _by_name(_table(Job, definitions, named=True))
    return {
        "$schema": DIALECT,
        "title": "replicator.toml",
        "type": "object",
        "properties": tables,
        "additionalProperties": False,
        "$defs": definitions,
    }


def _by_name(table: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": table}


def _table(model: type[BaseModel], definitions: dict[str, Any], *, named: bool) -> dict[str, Any]:
    """One table.

    :param named: its name stands in its heading, not in it
    """
    made = model.model_json_schema(schema_generator=_Generator)
    for name, inner in made.get("$defs", {}).items():
        definitions[name] = {key: value for key, value in _tidy(inner).items() if key != "description"}
    properties = {
        name: _with_default(_tidy(made["properties"][name]), model, name)
        for name in model.model_fields
        if not (named and name == "name")
    }
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    required = [name for name in made.get("required", []) if name in properties]
    return found | ({"required": required} if named and required else {})


def _with_default(field: dict[str, Any], model: type[BaseModel], name: str) -> dict[str, Any]:
    default = model.model_fields[name].get_default(call_default_factory=True)
    if default is not None and default is not PydanticUndefined:
        field["default"] = _written(default)
    return field


def _written(value: Any) -> Any:
    """A value as the file has it."""
    match value:
        case bool() | int() | str():
            return value.value if isinstance(value, Enum) else value
        case timedelta():
            return units.format_setting(value)
        case BaseModel():
            return {name: _written(getattr(value, name)) for name in type(value).model_fields}
        case tuple():
            return [_written(each) for each in value]
        case dict():
            return {key: _written(each) for key, each in value.items()}
        case SnapshotPatterns():
            return []
        case _:
            return str(value)


def _tidy(value: Any) -> Any:
    """Without what pydantic adds that says nothing: titles, its defaults, and ``or null`` (TOML has none)."""
    if isinstance(value, list):
        return [_tidy(each) for each in value]
    if not isinstance(value, dict):
        return value
    choices = value.get("anyOf")
    if isinstance(choices, list) and {"type": "null"} in choices:
        left = [choice for choice in choices if choice != {"type": "null"}]
        rest = {key: inner for key, inner in value.items() if key != "anyOf"}
        return _tidy({**rest, **left[0]} if len(left) == 1 else {**rest, "anyOf": left})
    found = {}
    for key, inner in value.items():
        if key == "properties":
            found[key] = {name: _tidy(each) for name, each in inner.items()}
        elif key not in ("title", "default"):
            found[key] = _tidy(inner)
    return found
