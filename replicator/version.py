"""The version that is installed."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """As in pyproject.toml; ``unknown`` where the project runs without being installed."""
    try:
        return metadata.version("replicator")
    except metadata.PackageNotFoundError:
        return "unknown"
