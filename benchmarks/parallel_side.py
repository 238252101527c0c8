"""A model in several processes and the whole of it in one: steps of both in turns."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lmtp.runners import parallel
from lmtp.runners.group import Leader
from lmtp.runners.runner import Runner, open_runner
from lmtp.runners.step import Step, Stream
from lmtp.weights import load

KV_BYTES = 2**29
"""Of each process, for keys and values."""


class Both:
    """One process with the whole model, and a group of processes that share it."""

    def __init__(self, weights: str, processes: int) -> None:
        directory = Path(weights)
        one = open_runner(load.load(directory, "float32").model, KV_BYTES)
        group = Leader(processes, parallel.__name__)
        several = parallel.open_parallel(group, parallel.load(group, directory, "float32").model, KV_BYTES)
        self._runners = several, one
        self._telling: list[float] = []
        self._time_telling(group)

    def steps(self, prompts: list[list[int]], count: int) -> list[float]:
        """Seconds of a step of several processes, of the same step of one, and of telling the others what it computes.

        Each is the median of ``count`` steps.
        """
        self._telling.clear()
        return [*in_turns(self._runners, prompts, count), median(self._telling)]

    def _time_telling(self, group: Leader) -> None:
        tell = group.tell

        def timed(code: int, numbers: Any = ()) -> None:
            started = time.perf_counter()
            tell(code, numbers)
            if code == parallel.Told.STEP:
                self._telling.append(time.perf_counter() - started)

        group.tell = timed  # type: ignore[method-assign]


def in_turns(runners: Sequence[Runner], prompts: list[list[int]], count: int) -> list[float]:
    """Each runner's median seconds of ``count`` steps, which take turns. A step computes a token of each stream.

    The prompts are equally long.
    """
    length = len(prompts[0])
    batches = [[Stream(list(prompt), length + count + 1) for prompt in prompts] for _ in runners]
    for runner, streams in zip(runners, batches, strict=True):
        if not all(runner.admit(stream) for stream in streams):
            raise RuntimeError(f"{KV_BYTES} bytes hold fewer than {len(prompts)} streams")
        _step(runner, streams, length)
    turns = [
        [_step(runner, streams, 1) for runner, streams in zip(runners, batches, strict=True)] for _ in range(count)
    ]
    for runner, streams in zip(runners, batches, strict=True):
        for stream in streams:
            runner.release(stream, keep=False)
    return [median(seconds) for seconds in zip(*turns, strict=True)]


def _step(runner: Runner, streams: list[Stream], tokens: int) -> float:
    """Seconds of a step of all tokens of the streams that are not computed. Each stream then gets another one."""
    started = time.perf_counter()
    with torch.inference_mode():
        runner.prepare(Step(streams, [tokens] * len(streams)))()
    seconds = time.perf_counter() - started
    for stream in streams:
        stream.computed += tokens
        stream.tokens.append(stream.tokens[0])
    return seconds
