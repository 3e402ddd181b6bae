"""Labs that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.guests import SUITES, Lab


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --soak a module's tests run on those suites only that its ``SAMPLED`` names."""
    if config.getoption("--soak"):
        return

    def taken(item: pytest.Item) -> bool:
        suite = (
            item.callspec.params.get("lab") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
        )
        return suite is None or suite in getattr(getattr(item, "module", None), "SAMPLED", SUITES)

    left_out = [item for item in items if not taken(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if taken(item)]


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
