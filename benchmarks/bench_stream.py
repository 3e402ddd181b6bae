"""Streams through the real transport on loopback, beside bare TLS and ssh.

Rounds of all contenders are interleaved, so that what else the machine does meets all alike; medians are compared.
Run with ``python -m benchmarks.bench_stream [--json FILE] [--quick]``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.report import Result, compare, print_table, write_json
from benchmarks.stream_contenders import MIB, Move, bare_tls, ours_blocks, ours_pipes, ssh_pipes
from tests.support.transport import make_cluster

SUBJECT = "Streams over loopback"
UNIT = "GB/s"


def measure(contenders: dict[str, Move], size: int, rounds: int) -> dict[str, float]:
    """GB/s of each, the median of interleaved rounds after one to warm up."""
    for move in contenders.values():
        move(64 * MIB)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, move in contenders.items():
            speeds[name].append(size / move(size) / 1e9)
    return {name: statistics.median(found) for name, found in speeds.items()}


def run(quick: bool = False) -> list[Result]:
    """All figures; ``quick`` moves less."""
    size, rounds = (512 * MIB, 3) if quick else (2048 * MIB, 5)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cluster = make_cluster(Path(folder, "cluster"))
        contenders: dict[str, Move] = {
            "bare": stack.enter_context(bare_tls(cluster)),
            "blocks": stack.enter_context(ours_blocks(cluster)),
            "pipes": stack.enter_context(ours_pipes(cluster)),
            "text": stack.enter_context(ours_blocks(cluster, data="text", compress=True)),
            "noise": stack.enter_context(ours_blocks(cluster, compress=True)),
            "ssh": stack.enter_context(ssh_pipes(Path(folder, "ssh"))),
        }
        speed = measure(contenders, size, rounds)
    tls = "bare TLS, memory to memory"
    blocks = compare(SUBJECT, "blocks, memory to memory", speed["blocks"], speed["bare"], tls, UNIT, target=0.85)
    ssh_name = "ssh -c aes128-gcm@openssh.com"
    return [
        compare(SUBJECT, "native, pipe to pipe", speed["pipes"], speed["ssh"], ssh_name, UNIT, target=1.3),
        compare(SUBJECT, "native, pipe to pipe", speed["pipes"], speed["bare"], tls, UNIT, target=0.65),
        replace(blocks, note="digests made and verified"),
        compare(SUBJECT, "blocks, zstd allowed, text", speed["text"], speed["blocks"], "the same without zstd", UNIT),
        compare(
            SUBJECT, "blocks, zstd allowed, random", speed["noise"], speed["blocks"], "the same without zstd", UNIT
        ),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    results = run(options.quick)
    print_table(results)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
