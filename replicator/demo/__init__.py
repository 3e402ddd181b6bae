"""The main job on this machine, from nothing to a proof: ``replicator demo``."""

from replicator.demo.story import run

__all__ = ["run"]
