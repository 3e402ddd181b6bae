"""What a running daemon takes over of a changed configuration, and that it names what it does not."""

from __future__ import annotations

import pytest

from replicator import config
from replicator.config import Config
from replicator.rates import Rates
from replicator.reloading import taken_over, waiting

BASE = """
[node]
name = "prox1"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
[storage.images]
kind = "image"
path = "/images"
[storage.copies]
kind = "image"
path = "/copies"
[peer.prox2]
address = "10.99.0.2:8571"
[job.vms]
source = "images:*"
targets = ["copies"]
rate_limit = "1MiB/s"
[limits]
rate_limit = "8MiB/s"
"""


def parse(text: str) -> Config:
    return config.parse(text)


def test_rates_log_and_notices_are_taken_over() -> None:
    running = parse(BASE)
    rates = Rates(running)
    assert (rates.of_node(), rates.of_job("vms")) == (8 << 20, 1 << 20)
    new = parse(
        BASE.replace('"1MiB/s"', '"3MiB/s"').replace('"8MiB/s"', '"2MiB/s"')
        + '[log]\nlevel = "debug"\n[notify]\ncommand = ["true"]\n'
    )
    now = taken_over(running, new)
    rates.use(now)
    assert (rates.of_node(), rates.of_job("vms")) == (2 << 20, 3 << 20)
    assert rates.of_transfer(now.jobs["vms"]) == 2 << 20
    assert (now.log.level, now.notify) == ("debug", new.notify)
    assert waiting(now, new) == ()
    gone = parse(BASE.replace('rate_limit = "1MiB/s"\n', "").replace('rate_limit = "8MiB/s"\n', ""))
    rates.use(taken_over(now, gone))
    assert rates.of_transfer(now.jobs["vms"]) is None
    assert taken_over(now, gone).notify is None


@pytest.mark.parametrize(
    ("before", "after", "keys"),
    [
        ('name = "prox1"', 'name = "prox9"', ("node", "job.vms")),  # whose source and target are of this node
        ("[network]", '[network]\nhttp = ""', ("network",)),
        ('path = "/copies"', 'path = "/copies2"', ("storage.copies",)),
        ("10.99.0.2:", "10.99.0.3:", ("peer.prox2",)),
        ("[job.vms]", '[job.vms]\nschedule = "1h"', ("job.vms",)),
        ("[job.vms]", "[job.other]", ("job.other", "job.vms")),
        ("[limits]", "[limits]\ntransfers = 7", ("limits",)),
        ("[limits]", '[fence]\ncommand = ["true"]\n[limits]', ("fence",)),
    ],
)
def test_the_rest_waits_for_a_restart_and_stays_as_it_was(before: str, after: str, keys: tuple[str, ...]) -> None:
    running, new = parse(BASE), parse(BASE.replace(before, after))
    now = taken_over(running, new)
    assert waiting(now, new) == keys
    assert now == running


def test_a_reload_of_the_same_is_none() -> None:
    running = parse(BASE)
    assert taken_over(running, parse(BASE)) == running
    assert waiting(running, parse(BASE)) == ()
