"""Checksums beside PyPI's ``blake3`` and ``crc32c``, and zero detection beside memory itself.

    python -m benchmarks.bench_checksum [--quick] [--json FILE]

Everything is on one core, but for the last subject. Peers have their turn in the same rounds as ours.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import crc32c

from benchmarks.measure import medians
from benchmarks.report import Result, compare, print_table, write_json
from transport import checksum

KIB = 1024
MIB = 1024 * KIB
GB = 1e9

KEY = bytes(range(32))

BLAKE3 = "Keyed BLAKE3 of blocks, one core"
CRC32C = "CRC32C, one core"
ZEROS = "Zero detection, one core"
COMPARISON = "Comparing digests, one core"
CORES = "Keyed BLAKE3 of 64 KiB blocks, many cores"


def run(quick: bool) -> list[Result]:
    """Measure everything; ``quick`` means fewer rounds and less memory."""
    rounds = 5 if quick else 15
    memory = 64 * MIB if quick else 256 * MIB
    return [
        *_blake3(rounds, memory),
        *_crc32c(rounds),
        *_zeros(rounds, memory),
        _comparison(rounds),
        *_cores(rounds),
    ]


def _size(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def _random(size: int) -> bytes:
    """Random bytes, a part of them over and over: no block is zero, and none is compared."""
    part = random.Random(1).randbytes(min(size, 4 * MIB))
    return part * (size // len(part))


def _touched(size: int) -> bytearray:
    """Zeros in memory of their own; the system gives untouched zeros out of one page that stays in the cache."""
    zeros = bytearray(size)
    zeros[:: 4 * KIB] = bytes(size // (4 * KIB))
    return zeros


def _blake3(rounds: int, memory: int) -> list[Result]:
    cases = [(4 * KIB, MIB), (64 * KIB, MIB), (64 * KIB, memory), (MIB, MIB), (MIB, memory)]
    results = [_blake3_case(block_size, total, rounds) for block_size, total in cases]
    for name in checksum.implementations()[:-1]:
        data, digests = _random(MIB), bytearray(16 * 16)
        slow = medians({name: _digest(data, digests, 64 * KIB, name)}, rounds=rounds)[name]
        case = f"64 KiB blocks of 1 MiB, {name}"
        results.append(Result(BLAKE3, case, MIB / slow / GB, None, "", "GB/s", None, note="for other processors"))
    return results


def _digest(data: bytes, digests: bytearray, block_size: int, implementation: str | None = None) -> Callable[[], int]:
    return lambda: checksum.digest_blocks_into(
        data, KEY, digests, None, block_size=block_size, implementation=implementation
    )


def _blake3_case(block_size: int, total: int, rounds: int) -> Result:
    data = _random(total)
    digests = bytearray(16 * (total // block_size))
    blocks = [memoryview(data)[at : at + block_size] for at in range(0, total, block_size)]

    def peer() -> None:
        for block in blocks:
            blake3.blake3(block, key=KEY).digest()

    times = medians({"ours": _digest(data, digests, block_size), "peer": peer}, rounds=rounds)
    return compare(
        BLAKE3,
        f"{_size(block_size)} blocks of {_size(total)}",
        total / times["ours"] / GB,
        total / times["peer"] / GB,
        "blake3",
        "GB/s",
        target=1.0 if block_size == 64 * KIB else None,
    )


def _crc32c(rounds: int) -> list[Result]:
    results = []
    for size in (4 * KIB, 64 * KIB, MIB, 16 * MIB):
        data = _random(size)
        # One call at a time is not measured well: many to a way, as a sender makes them.
        ours, peer = _repeat(checksum.crc32c, data, 4 * MIB // size), _repeat(crc32c.crc32c, data, 4 * MIB // size)
        times = medians({"ours": ours, "peer": peer}, rounds=rounds)
        done = size * max(4 * MIB // size, 1)
        results.append(
            compare(
                CRC32C,
                _size(size),
                done / times["ours"] / GB,
                done / times["peer"] / GB,
                "crc32c",
                "GB/s",
                target=1.8 if size == MIB else None,
            )
        )
    return results


def _repeat(function: Callable[[bytes], int], data: bytes, times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(max(times, 1)):
            function(data)

    return repeated


def _zeros(rounds: int, memory: int) -> list[Result]:
    results = []
    for size in (64 * KIB, MIB, memory):
        zeros, other = _touched(size), _touched(size)

        def copy(zeros: bytearray = zeros, other: bytearray = other) -> None:
            memoryview(other)[:] = zeros

        def equal(zeros: bytearray = zeros, other: bytearray = other) -> bool:
            return zeros == other

        def ours(zeros: bytearray = zeros) -> bool:
            return checksum.is_zero(zeros)

        times = medians({"ours": ours, "copy": copy, "equal": equal}, rounds=rounds)
        speed = {name: size / each / GB for name, each in times.items()}
        target = 1.0 if size == memory else None
        for name, peer in (("copy", "memcpy, to and fro"), ("equal", "memcmp of two")):
            results.append(compare(ZEROS, _size(size), speed["ours"], speed[name], peer, "GB/s", target=target))
    zeros, digests = _touched(memory), bytearray(16 * (memory // (64 * KIB)))
    whole = medians({"ours": lambda: checksum.digest_blocks_into(zeros, KEY, digests, None)}, rounds=rounds)["ours"]
    note = "a block of zeros is looked at, not hashed"
    results.append(Result(ZEROS, f"digests of {_size(memory)}", memory / whole / GB, None, "", "GB/s", None, note=note))
    return results


def _comparison(rounds: int) -> Result:
    blocks = 8 * KIB * MIB // checksum.BLOCK_SIZE
    ours, theirs = random.Random(1).randbytes(16 * blocks), bytearray(random.Random(1).randbytes(16 * blocks))
    for block in range(0, blocks, 100):
        theirs[16 * block] ^= 1
    seconds = medians({"ours": lambda: checksum.differing_blocks(ours, theirs)}, rounds=rounds)["ours"]
    case = f"{blocks} digests of an 8 GiB image, 1% differ"
    return compare(COMPARISON, case, seconds * 1e3, 5.0, "limit", "ms", target=1.0, less_is_better=True)


def _cores(rounds: int) -> list[Result]:
    each, cores = 16 * MIB, len(os.sched_getaffinity(0))
    datas, digests = [_random(each) for _ in range(cores)], [bytearray(16 * 256) for _ in range(cores)]
    ways: dict[str, Callable[[], object]] = {}
    with ThreadPoolExecutor(cores) as pool:
        for threads in range(1, cores + 1):
            works = [_digest(datas[i], digests[i], 64 * KIB) for i in range(threads)]
            ways[str(threads)] = lambda works=works: list(pool.map(lambda work: work(), works))  # type: ignore[misc]
        times = medians(ways, rounds=rounds)
    one = each / times["1"] / GB
    return [
        compare(
            CORES,
            f"{threads} thread{'s' if threads > 1 else ''}",
            threads * each / times[str(threads)] / GB,
            one * threads,
            f"{threads} x one thread",
            "GB/s",
        )
        for threads in range(1, cores + 1)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Checksums beside their peers.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, less memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    results = run(options.quick)
    print_table(results)
    print("Implementations here:", ", ".join(checksum.implementations()), "- the last is the default.")
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
