"""Free memory goes back to the system."""

import threading

import psutil
import pytest

from lmtp.engine import engine as engine_module
from lmtp.engine import heap
from tests.tiny import build, start

MEGABYTE = 2**20


def test_what_malloc_keeps_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "KEPT", 20 * MEGABYTE)

    def size() -> int:
        return int(psutil.Process().memory_info().rss)

    before = size()
    blocks = [bytes(100_000) for _ in range(800)]
    last = blocks[::100]  # between the others, so that malloc cannot shrink by itself
    del blocks
    grown = size() - before
    assert grown > 40 * MEGABYTE
    heap.give_back()
    assert size() - before < grown - 40 * MEGABYTE
    assert len(last) == 8


def test_an_engine_with_nothing_to_do_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given = threading.Event()
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(heap, "give_back", given.set)
    engine = start(build("llama"))
    try:
        assert given.wait(20)
    finally:
        engine.stop()
