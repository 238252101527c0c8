"""Runs work that may take long without holding up work that does not."""

import contextlib
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from lmtp.engine.vetting import NICE, QUICK_SECONDS

T = TypeVar("T")

MAX_QUICK = 4
"""Short attempts at once."""

MAX_SLOW = 2
"""Works that take longer and run at once."""


class Lanes:
    """All work gets a short attempt first. What needs longer is begun anew, beside few others that do.

    In both lanes owners take turns: whoever comes waits for one work of each other owner at most.
    """

    def __init__(self) -> None:
        self._quick = _Lane(MAX_QUICK, "quick")
        self._slow = _Lane(MAX_SLOW, "slow", initializer=_yield_to_the_engine)

    def run(self, owner: object, work: Callable[[float], T], seconds: float) -> Future[T]:
        """Call ``work`` with the seconds that it may take. It raises TimeoutError if they are too few. If the result is
        cancelled, no further attempt begins."""
        result: Future[T] = Future()
        self._quick.submit(owner, partial(self._attempt, owner, work, min(QUICK_SECONDS, seconds), seconds, result))
        return result

    def _attempt(self, owner: object, work: Callable[[float], T], limit: float, most: float, result: Future[T]) -> None:
        if result.cancelled():
            return
        with contextlib.suppress(InvalidStateError):  # it may be cancelled meanwhile
            try:
                value = work(limit)
            except BaseException as error:
                if isinstance(error, TimeoutError) and limit < most:
                    self._slow.submit(owner, partial(self._attempt, owner, work, most, most, result))
                else:
                    result.set_exception(error)
            else:
                result.set_result(value)


class _Lane:
    """Threads that take the works of several owners in turn."""

    def __init__(self, threads: int, name: str, initializer: Callable[[], None] | None = None) -> None:
        self._threads = ThreadPoolExecutor(threads, name, initializer)
        self._waiting: OrderedDict[object, deque[Callable[[], None]]] = OrderedDict()
        """The works of each owner, the next owner first."""
        self._lock = threading.Lock()

    def submit(self, owner: object, work: Callable[[], None]) -> None:
        """Do the work when its owner's turn comes."""
        with self._lock:
            self._waiting.setdefault(owner, deque()).append(work)
        self._threads.submit(self._do_next)

    def _do_next(self) -> None:
        with self._lock:
            owner, works = self._waiting.popitem(last=False)
            work = works.popleft()
            if works:
                self._waiting[owner] = works
        work()


def _yield_to_the_engine() -> None:
    """Lower the priority of this thread and of those that it starts."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
