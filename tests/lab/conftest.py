"""Labs that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.guests import SUITES, Lab


@pytest.fixture(scope="module", params=list(SUITES))
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Two guests of each suite with nothing on their disks; the module's ``NODES`` says if it wants another number."""
    with Lab(request.param) as made:
        made.up(getattr(request.module, "NODES", 2))
        yield made
