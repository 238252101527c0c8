"""What one benchmark run is to do, and how two sides are timed next to each other."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

SETTLE_SECONDS = 0.3
"""Between two measurements: OpenMP's threads keep a core busy for a while after their last work."""


@dataclass(frozen=True)
class Plan:
    """What to measure, how often, with which weights."""

    weights: Path
    runs: int = 5
    quick: bool = False
    """Tiny sizes: shows that everything runs; its figures say nothing."""
    only: Sequence[str] = ()
    dtype: str = "bfloat16"

    def wants(self, *rows: str) -> bool:
        """Whether one of the rows was asked for, by its name or by that of its family: `decode` is every `decode-…`."""
        return not self.only or any(row == name or row.startswith(f"{name}-") for row in rows for name in self.only)

    def size(self, full: int, quick: int) -> int:
        """The size of something: as the table says, or tiny."""
        return quick if self.quick else full

    def alternate(self, *sides: Callable[[int], T]) -> list[list[T]]:
        """Each side's samples, taken in turns: A B A B.

        A side is given the number of its run, so that a prompt can differ from run to run and nothing is won by
        remembering the last one. Run 0 warms up and is not counted.
        """
        samples: list[list[T]] = [[] for _ in sides]
        for run in range(self.runs + 1):
            for side, collected in zip(sides, samples, strict=True):
                time.sleep(SETTLE_SECONDS)
                sample = side(run)
                if run:
                    collected.append(sample)
        return samples


def say(*words: object) -> None:
    """Progress, for the person who waits."""
    print(*words, file=sys.stderr, flush=True)
