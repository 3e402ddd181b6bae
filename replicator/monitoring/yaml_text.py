"""Writes YAML: maps, lists, texts, numbers. It only ever writes what this package has made.

Every text is written as JSON has it, in double quotes: YAML 1.2 (section 1.3, "relation to JSON") takes such a text as
a double-quoted scalar, so nothing in it can be taken for something else. A YAML library would be a dependency for this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

Value: TypeAlias = "str | int | float | bool | Sequence[Value] | Mapping[str, Value]"


def to_yaml(value: Value) -> str:
    """A document."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Value) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _entry(f"{key}:", inner)
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        for inner in value:
            first, *rest = _lines(inner)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
    else:
        yield json.dumps(value, ensure_ascii=False)


def _entry(key: str, value: Value) -> Iterator[str]:
    lines = list(_lines(value))
    if isinstance(value, str | int | float) or not value:
        yield f"{key} {lines[0]}"
    else:
        yield key
        yield from (f"  {line}" for line in lines)
