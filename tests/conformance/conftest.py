"""The cases that each conformance suite runs through."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cases import BackendCase, MemoryCase


@pytest.fixture(params=["memory"])
def case(request: pytest.FixtureRequest) -> Iterator[BackendCase]:
    """A fresh, empty storage of each kind."""
    made = MemoryCase()
    yield made
    made.backend.close()
