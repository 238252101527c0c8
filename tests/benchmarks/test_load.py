"""What other processes take of the processors, from the figures of made-up processes."""

import os
from types import SimpleNamespace

import psutil
import pytest

from benchmarks.load import Load

OWN, OTHER, SYSTEM = 1001, 1002, 1003


class Machine:
    """Two processors, a clock and some processes, of which one is a child of this one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds = {1: 50.0, os.getpid(): 3.0, OWN: 0.0, OTHER: 20.0}
        self.children = [OWN]

    def processes(self, attributes: list[str]) -> list[SimpleNamespace]:
        times = {pid: {"cpu_times": (seconds, 0.0, 0.0, 0.0, 99.0)} for pid, seconds in self.seconds.items()}
        hidden = SimpleNamespace(pid=SYSTEM, info={"cpu_times": None})
        return [hidden, *(SimpleNamespace(pid=pid, info=info) for pid, info in times.items())]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    own = SimpleNamespace(children=lambda recursive: [SimpleNamespace(pid=pid) for pid in made.children])
    monkeypatch.setattr("psutil.process_iter", made.processes)
    monkeypatch.setattr("psutil.Process", lambda: own)
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    monkeypatch.setattr("benchmarks.load.time.monotonic", lambda: made.now)
    return made


def test_what_the_benchmark_starts_is_no_load(machine: Machine) -> None:
    load = Load()
    machine.now = 10.0
    for pid in (os.getpid(), OWN):
        machine.seconds[pid] += 10
    assert load.since_last() == 0


def test_work_that_begins_during_a_row_is_seen_and_does_not_count_for_the_next(machine: Machine) -> None:
    load = Load()
    machine.now, machine.seconds[OTHER] = 10.0, 25.0
    assert load.since_last() == 0.25
    machine.now = 20.0
    assert load.since_last() == 0


def test_a_process_that_starts_during_a_row_is_seen(machine: Machine) -> None:
    load = Load()
    machine.now, machine.seconds[OTHER + 10] = 10.0, 10.0
    assert load.since_last() == 0.5


def test_rows_that_were_measured_together_have_one_figure(machine: Machine) -> None:
    load = Load()
    machine.now, machine.seconds[OTHER] = 10.0, 25.0
    assert [load.since_last(), load.since_last()] == [0.25, 0.25]


def test_what_outlives_the_process_that_started_it_stays_the_benchmarks(machine: Machine) -> None:
    machine.seconds[OWN] = 30.0
    load = Load()
    machine.now, machine.children = 10.0, []
    assert load.since_last() == 0
    del machine.seconds[OWN]
    machine.now, machine.seconds[1] = 20.0, 80.0
    assert load.since_last() == 0


def test_a_process_that_ends_makes_no_negative_load(machine: Machine) -> None:
    load = Load()
    machine.now = 10.0
    del machine.seconds[OTHER]
    assert load.since_last() == 0


def test_the_processes_of_this_machine_have_figures() -> None:
    assert Load()._others_seconds() >= 0
    assert psutil.Process().cpu_times()._fields[:4] == ("user", "system", "children_user", "children_system")
