"""Hypothesis strategies for the project's dataclasses, from their type hints."""

from __future__ import annotations

import dataclasses
import types
import typing
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from hypothesis import strategies as st

from replicator.model import Lineage, Role


def of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type as it may cross the wire: times in UTC, finite numbers."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(of(arg) for arg in args))
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return st.lists(of(args[0]), max_size=3).map(tuple)
        return st.tuples(*(of(arg) for arg in args))
    if hint is Lineage:  # which takes no other
        return st.builds(Lineage, st.uuids().map(str), st.sampled_from(Role), st.integers(1, 2**63 - 1))
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        fields = {field.name: of(hints[field.name]) for field in dataclasses.fields(hint)}
        return st.builds(typing.cast(Any, hint), **fields)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(list(hint))
    plain: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(max_size=20),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        type(None): st.none(),
        datetime: st.datetimes(timezones=st.just(UTC)),
    }
    return plain[hint]
