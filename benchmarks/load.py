"""What other processes take of the processors beside a benchmark."""

import os
import time

import psutil

MIN_SECONDS = 0.5
"""Processor time is counted in ticks: a shorter time has too few of them."""


class Load:
    """The part of the processors that processes use which the benchmark did not start."""

    def __init__(self) -> None:
        self._own: set[int] = set()
        self._busy = 0.0
        self._started, self._used = time.monotonic(), self._others_seconds()

    def since_last(self) -> float:
        """The part since the last call, from 0 to 1. Rows that come together were measured together: one figure."""
        now = time.monotonic()
        if (passed := now - self._started) >= MIN_SECONDS:
            used = self._others_seconds()
            self._busy = max(0.0, used - self._used) / passed / (psutil.cpu_count() or 1)
            self._started, self._used = now, used
        return self._busy

    def _others_seconds(self) -> float:
        """Processor time of all other living processes and of their children that have ended."""
        self._own |= {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
        skipped = self._own | {1}  # what outlives its parent, ours or not, ends as a child of process 1
        times = [each.info["cpu_times"] for each in psutil.process_iter(["cpu_times"]) if each.pid not in skipped]
        return sum(sum(each[:4]) for each in times if each)  # without the time that waited for disks
