"""Free memory goes back to the system."""

import json
import subprocess
import sys
import threading

import pytest

from lmtp.engine import engine as engine_module
from lmtp.engine import heap
from tests.tiny import build, start

ALONE = """
import json, resource
from lmtp.engine import heap

def size():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()

heap.KEPT = 20_000_000
sizes = [size()]
blocks = [b"x" * (100_000 + i) for i in range(800)]
last = blocks[::100]  # above the others, so that malloc cannot shrink by itself
del blocks
for _ in range(2):
    sizes.append(size())
    heap.give_back()
print(json.dumps([*sizes, size()]))
"""


def test_what_malloc_keeps_is_given_back() -> None:
    """In a process of its own, since this one's heap has gaps already."""
    answer = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, check=True, text=True)
    before, freed, given_back, again = json.loads(answer.stdout)
    assert freed - before > 50e6
    assert given_back - before < 10e6
    assert again - given_back < 1e6


def test_an_engine_with_nothing_to_do_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given = threading.Event()
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(heap, "give_back", given.set)
    engine = start(build("llama"))
    try:
        assert given.wait(20)
    finally:
        engine.stop()
