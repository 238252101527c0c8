"""What a benchmark run measures, and how two sides are timed next to each other."""

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

SETTLE_SECONDS = 0.3
"""Pause between two measurements: OpenMP threads keep a core busy for a while after their last work."""


@dataclass(frozen=True)
class Plan:
    """What to measure, how often, with which weights."""

    weights: Path
    runs: int = 5
    quick: bool = False
    """Tiny sizes: a check that everything runs. The figures mean nothing."""
    only: Sequence[str] = ()
    dtype: str = "bfloat16"
    against: Path | None = None
    """Another checkout of this project, measured in place of the peers."""

    def wants(self, *rows: str) -> bool:
        """Whether any of the rows was requested, by its name or by its family: `decode` means every `decode-…`."""
        return not self.only or any(row == name or row.startswith(f"{name}-") for row in rows for name in self.only)

    def size(self, full: int, quick: int) -> int:
        """The full size, or the tiny one in a quick run."""
        return quick if self.quick else full

    def alternate(self, *sides: Callable[[int], T]) -> list[list[T]]:
        """Each side's samples, taken in turns: A B A B.

        Each side gets the number of its run and varies its prompt with it, so that no cache answers a run. Run 0 is
        a warm-up and does not count.
        """
        samples: list[list[T]] = [[] for _ in sides]
        for run in range(self.runs + 1):
            for side, collected in zip(sides, samples, strict=True):
                time.sleep(SETTLE_SECONDS)
                sample = side(run)
                if run:
                    collected.append(sample)
        return samples


def native_dtype() -> str:
    """bfloat16 if the processor computes it in hardware, else float32."""
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        processor = ""
    return "bfloat16" if re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", processor) else "float32"


def say(*words: object) -> None:
    """Print progress on standard error."""
    print(*words, file=sys.stderr, flush=True)
