"""Streams through the real transport on loopback, beside bare TLS and ssh.

Rounds of all contenders are interleaved, and each begins with another one, so that neither what else the machine does
nor who runs after whom favours anybody; medians are compared.
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


def measure(contenders: dict[str, Move], size: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of each in interleaved rounds, after one to warm up."""
    for move in contenders.values():
        move(64 * MIB)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            speeds[name].append(size / contenders[name](size) / 1e9)
    return speeds


def run(quick: bool = False) -> list[Result]:
    """All figures; ``quick`` moves less."""
    size, rounds = (512 * MIB, 5) if quick else (2048 * MIB, 5)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cluster = make_cluster(Path(folder, "cluster"))
        contenders: dict[str, Move] = {
            "bare": stack.enter_context(bare_tls(cluster)),
            "blocks": stack.enter_context(ours_blocks(cluster)),
            "pipes": stack.enter_context(ours_pipes(cluster)),
            "ssh": stack.enter_context(ssh_pipes(Path(folder, "ssh"))),
            "text": stack.enter_context(ours_blocks(cluster, data="text", compress=True)),
            "noise": stack.enter_context(ours_blocks(cluster, compress=True)),
        }
        speeds = measure(contenders, size, rounds)

    def beside(case: str, ours: str, peer: str, name: str, target: float | None = None, note: str = "") -> Result:
        mine, theirs = statistics.median(speeds[ours]), statistics.median(speeds[peer])
        # Of each round by itself, so that what else the machine did in it falls out of the ratio.
        ratio = statistics.median(a / b for a, b in zip(speeds[ours], speeds[peer], strict=True))
        return replace(compare(SUBJECT, case, mine, theirs, name, UNIT, target=target), ratio=ratio, note=note)

    tls, plain = "bare TLS, memory to memory", "the same, never compressed"
    return [
        beside("native, pipe to pipe", "pipes", "ssh", "ssh -c aes128-gcm@openssh.com", 1.3),
        beside("native, pipe to pipe", "pipes", "bare", tls, 0.65),
        beside("blocks, memory to memory", "blocks", "bare", tls, 0.85, "digests made and verified"),
        beside("blocks, zstd where it gains: text", "text", "blocks", plain),
        beside("blocks, zstd where it gains: random", "noise", "blocks", plain),
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
