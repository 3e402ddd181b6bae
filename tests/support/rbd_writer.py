"""A guest for each of some images, in a process of its own: writes, discards, zeroes and resizes at random."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from backends.rbd.binding import load
from tests.support.rbd_case import RbdCase

KIB, MIB = 1 << 10, 1 << 20
SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB)
WEIGHTS = (40, 25, 15, 10, 6, 4)
SMALLEST, LARGEST = 16 * MIB, 80 * MIB


def disturb(image: Any, seed: random.Random) -> str:
    """Do one thing to an image, as a guest or its operator does; what it was."""
    size = image.size()
    what = seed.choices(("write", "discard", "zeroes", "resize"), (70, 14, 13, 3))[0]
    if what == "resize":
        image.resize(seed.randrange(SMALLEST, LARGEST) // (4 * KIB) * (4 * KIB))
        return what
    length = min(seed.choices(SIZES, WEIGHTS)[0], size)
    offset = seed.randrange(0, (size - length) // 512 + 1) * 512
    if what == "write":
        image.write(seed.randbytes(length), offset)
    elif what == "discard":
        image.discard(offset, length)
    else:
        image.write_zeroes(offset, length)
    return what


def guest(conf: Path, namespace: str, name: str, pause: float, log: Path, stop: threading.Event) -> int:
    """Disturb one image until ``stop``, and write down when it was written to: what else is done to it may change
    nothing, as where a hole is discarded. How often it was disturbed."""
    binding = load()
    rados: Any = binding.new_connection(conf, "admin", {})
    rados.connect()
    seed = random.Random(f"{namespace} {name}")
    done = 0
    try:
        with rados.open_ioctx("rbd") as ioctx:
            ioctx.set_namespace(namespace)
            with binding.rbd.Image(ioctx, name) as image, (log / name).open("a", buffering=1) as times:
                while not stop.wait(seed.uniform(0, 2 * pause)):
                    begun = time.time()
                    if disturb(image, seed) == "write":
                        times.write(f"{begun} {time.time()}\n")
                    done += 1
    finally:
        rados.shutdown()
    return done


def times(log: Path, name: str) -> list[tuple[float, float]]:
    """When an image was written to so far: when it was begun, and when it was done; seconds since the epoch."""
    try:
        lines = (log / name).read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [(float(begun), float(done)) for begun, done in map(str.split, lines)]


def start(case: RbdCase, names: list[str], pause: float, log: Path) -> subprocess.Popen[bytes]:
    """Begin to disturb images; :func:`end` ends it.

    :param pause: seconds between two things that are done to one, on average
    :param log: a folder for :func:`times`
    """
    words = (str(case.conf), case.namespace or "", str(pause), str(log), *names)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.rbd_writer", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def end(process: subprocess.Popen[bytes]) -> int:
    """End it; how many things were done."""
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return int(output.split()[-1])


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main(conf: str, namespace: str, pause: str, log: str, *names: str) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    counts: list[int] = []

    def run(name: str) -> None:
        counts.append(guest(Path(conf), namespace, name, float(pause), Path(log), stop))

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    say("ready")
    for thread in threads:
        thread.join()
    if len(counts) != len(names):
        raise SystemExit("a guest has failed")
    say(str(sum(counts)))


if __name__ == "__main__":
    main(*sys.argv[1:])
