"""What may run at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from replicator.cancellation import Cancellation
from replicator.errors import Cancelled, DeadlineExceeded, ReplicatorError, VolumeBusy
from scheduler.limits import Slots

DEADLINE = 10.0


class Task(threading.Thread):
    """Holds a slot from when it gets it until told to end."""

    def __init__(self, slots: Slots, volume: str, node: str) -> None:
        super().__init__(daemon=True)
        self.slots, self.volume, self.node = slots, volume, node
        self.cancel = Cancellation()
        self.entered = threading.Event()
        self.may_end = threading.Event()
        self.error: ReplicatorError | None = None

    def run(self) -> None:
        try:
            with self.slots.slot(self.volume, f"{self.node}:backup", self.node, self.cancel):
                self.entered.set()
                self.may_end.wait(DEADLINE)
        except ReplicatorError as error:
            self.error = error

    def finish(self) -> None:
        self.may_end.set()
        self.join(DEADLINE)
        assert not self.is_alive()


Begin = Callable[[str, str], Task]


def seen(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true before the deadline: nobody tells of those who begin to wait."""
    pause = threading.Event()
    return any(condition() or pause.wait(0.002) for _ in range(int(DEADLINE / 0.002)))


@pytest.fixture
def slots() -> Slots:
    return Slots(3, 2, patience=DEADLINE)


@pytest.fixture
def begin(slots: Slots) -> Iterator[Begin]:
    """Start a task and return when it is in or waits."""
    tasks: list[Task] = []

    def start(volume: str, node: str) -> Task:
        before = slots.running + slots.waiting
        task = Task(slots, volume, node)
        tasks.append(task)
        task.start()
        assert seen(lambda: slots.running + slots.waiting > before)
        return task

    yield start
    for task in tasks:
        task.cancel.cancel()
        task.finish()


def test_no_replica_twice(slots: Slots, begin: Begin) -> None:
    task = begin("a", "n1")
    with pytest.raises(VolumeBusy, match="a to n1:backup is already"), slots.slot("a", "n1:backup", "n1", task.cancel):
        pytest.fail("let in")
    with slots.slot("a", "n2:backup", "n2", Cancellation()):
        assert slots.running == 2
    task.finish()
    with slots.slot("a", "n1:backup", "n1", Cancellation()):
        assert slots.running == 1


def test_one_that_waits_is_not_started_twice_either(slots: Slots, begin: Begin) -> None:
    for volume in "abc":
        begin(volume, "n1" if volume < "c" else "n2")
    begin("d", "n1")
    with pytest.raises(VolumeBusy), slots.slot("d", "n1:backup", "n1", Cancellation()):
        pytest.fail("let in")
    assert (slots.running, slots.waiting) == (3, 1)


def test_limit_per_node_and_in_total_first_come_first_served(slots: Slots, begin: Begin) -> None:
    a, b = begin("a", "n1"), begin("b", "n1")
    c = begin("c", "n1")  # n1 is full
    d = begin("d", "n2")  # is not kept waiting by c
    assert a.entered.wait(DEADLINE)
    assert b.entered.wait(DEADLINE)
    assert d.entered.wait(DEADLINE)
    e, f = begin("e", "n2"), begin("f", "n1")  # all places are taken
    assert (slots.running, slots.waiting) == (3, 3)
    a.finish()
    assert c.entered.wait(DEADLINE)
    assert not e.entered.is_set()
    assert not f.entered.is_set()
    d.finish()
    assert e.entered.wait(DEADLINE)
    assert not f.entered.is_set()
    b.finish()
    assert f.entered.wait(DEADLINE)


def test_who_waits_can_be_cancelled(slots: Slots, begin: Begin) -> None:
    holders = [begin("a", "n1"), begin("b", "n1")]
    waiting, behind = begin("c", "n1"), begin("d", "n1")
    waiting.cancel.cancel()
    waiting.join(DEADLINE)
    assert isinstance(waiting.error, Cancelled)
    assert slots.waiting == 1
    holders[0].finish()
    assert behind.entered.wait(DEADLINE)
    with slots.slot("c", "n2:backup", "n2", Cancellation()):
        pass


def test_cancelled_before_it_began(slots: Slots) -> None:
    cancel = Cancellation()
    cancel.cancel()
    with pytest.raises(Cancelled), slots.slot("a", "n1:backup", "n1", cancel):
        pytest.fail("let in")
    assert (slots.running, slots.waiting) == (0, 0)


def test_patience_ends() -> None:
    slots = Slots(1, 1, patience=0.02)
    with slots.slot("a", "n1:backup", "n1", Cancellation()):
        with (
            pytest.raises(DeadlineExceeded, match="one of 1 transfers") as caught,
            slots.slot("b", "n2:backup", "n2", Cancellation()),
        ):
            pytest.fail("let in")
        assert "[limits]" in caught.value.hint
        assert (slots.running, slots.waiting) == (1, 0)
    with slots.slot("b", "n2:backup", "n2", Cancellation()):
        pass


def test_a_failing_block_gives_its_place_back(slots: Slots) -> None:
    for _ in range(5):
        with pytest.raises(ZeroDivisionError), slots.slot("a", "n1:backup", "n1", Cancellation()):
            raise ZeroDivisionError
    assert slots.running == 0


def test_many_threads_never_exceed_the_limits() -> None:
    slots = Slots(4, 2, patience=60)
    lock, running, most, done = threading.Lock(), {"n0": 0, "n1": 0, "n2": 0}, [0, 0], [0]

    def work(number: int) -> None:
        node = f"n{number % 3}"
        for _ in range(20):
            with slots.slot(f"v{number}", f"{node}:backup", node, Cancellation()):
                with lock:
                    running[node] += 1
                    most[:] = max(most[0], sum(running.values())), max(most[1], running[node])
                    done[0] += 1
                with lock:
                    running[node] -= 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert done == [600]
    assert most[0] <= 4
    assert most[1] <= 2
    assert (slots.running, slots.waiting) == (0, 0)


def test_a_pool_is_shared_by_all_nodes() -> None:
    slots = Slots(8, 8, 2, patience=DEADLINE)
    never = Cancellation()
    with (
        slots.slot("v1", "b:s", "b", never, pools=("tank",)),
        slots.slot("v2", "c:s", "c", never, pools=("tank", "other")),
        slots.slot("v3", "b:s", "b", never, pools=("other",)),
    ):
        impatient = Slots(8, 8, 1, patience=0.01)
        with (
            impatient.slot("v1", "b:s", "b", never, pools=("tank",)),
            impatient.slot("v2", "c:s", "c", never, pools=("other",)),
            pytest.raises(DeadlineExceeded, match="1 per pool"),
            impatient.slot("v3", "c:s", "c", never, pools=("other", "tank")),
        ):
            pass
        assert slots.running == 3
    assert slots.running == 0
    with pytest.raises(ValueError, match="at least 1"):
        Slots(2, 2, 0)


def test_who_waits_for_a_pool_is_not_overtaken() -> None:
    """The first waits for pool tank. A later one for the same pool must not get it first, nor the peer's last place."""
    slots = Slots(8, 2, 1, patience=DEADLINE)
    order: list[str] = []
    done = threading.Event()

    def work(volume: str, node: str, pools: tuple[str, ...]) -> None:
        with slots.slot(volume, f"{node}:s", node, Cancellation(), pools=pools):
            order.append(volume)
            if volume == "free":
                done.set()

    with slots.slot("first", "b:s", "b", Cancellation(), pools=("tank",)):
        threads = []
        for count, (volume, node, pools) in enumerate(
            [("second", "b", ("tank",)), ("third", "c", ("tank",)), ("fourth", "b", ()), ("free", "d", ("other",))]
        ):
            threads.append(threading.Thread(target=work, args=(volume, node, pools), daemon=True))
            threads[-1].start()
            if volume != "free":
                assert seen(lambda wanted=count + 1: slots.waiting == wanted)  # type: ignore[misc]
        assert done.wait(DEADLINE)
        assert order == ["free"]
    for thread in threads:
        thread.join(DEADLINE)
    assert order.index("second") < order.index("third")
