"""Labs that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.guests import SUITES, Lab


@pytest.fixture(scope="module", params=list(SUITES))
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Two guests of each suite with nothing on their disks; the module's ``NODES`` says if it wants another number.

    With ``--lab-attach`` those that are up, whatever is on their disks.
    """
    count = getattr(request.module, "NODES", 2)
    if name := request.config.getoption("--lab-attach"):
        attached = Lab.attach(name)
        if attached.suite != request.param or len(attached.nodes) < count:
            pytest.skip(f"lab {name} has {len(attached.nodes)} nodes of {attached.suite}")
        yield attached
        return
    with Lab(request.param, f"test-{request.param}") as made:
        made.up(count)
        yield made
