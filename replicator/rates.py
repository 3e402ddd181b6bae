"""The rate limits in force now: by the time of day, and by the configuration that was read last."""

from __future__ import annotations

from datetime import datetime

from replicator.config import Config
from replicator.settings import Job
from scheduler.schedule import system_zone


class Rates:
    """Answers for every chunk of every transfer, so that each change counts at once. Thread-safe."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def use(self, config: Config) -> None:
        """From now on those of this configuration count."""
        self._config = config

    def of_node(self) -> int | None:
        """Bytes per second of all transfers together; None: no limit."""
        limit = self._config.limits.rate_limit
        return None if limit is None else limit.at(datetime.now(system_zone()))

    def of_job(self, name: str) -> int | None:
        """Bytes per second of the job's transfers together, by the clocks of its time zone; None: no limit."""
        job = self._config.jobs.get(name)
        if job is None or job.rate_limit is None:
            return None
        return job.rate_limit.at(datetime.now(job.zone or system_zone()))

    def of_transfer(self, job: Job | None) -> int | None:
        """What a transfer is held to."""
        rates = (self.of_node(), self.of_job(job.name) if job is not None else None)
        return min((rate for rate in rates if rate is not None), default=None)
