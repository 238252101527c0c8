"""What a benchmark run measures, and how two sides are timed next to each other."""

import sys
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

SETTLE_SECONDS = 0.3
"""Pause between two measurements: OpenMP threads keep a core busy for a while after their last work."""


UNITS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 bf16",
    "avx512f": "AVX-512",
    "avx2": "AVX2 only",
    "bf16": "ARM bf16",
}
"""By flag, the best first."""


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
    names: Sequence[str] = ()
    """All rows there are. A name among them means that row alone."""

    def wants(self, *rows: str) -> bool:
        """Whether any of the rows was requested, by its name or by its family.

        `decode` means every `decode-…`, `startup` only the row of that name.
        """
        families = [f"{name}-" for name in self.only if name not in self.names]
        return not self.only or any(row in self.only or row.startswith(tuple(families)) for row in rows)

    def size(self, full: T, quick: T) -> T:
        """The full size, or the tiny one in a quick run."""
        return quick if self.quick else full

    def alternate(self, *sides: Callable[[int], T]) -> list[list[T]]:
        """Each side's samples, taken in turns: A B A B.

        Each side gets the number of its run and varies its prompt with it, so that no cache answers a run. Run 0 is
        a warm-up and does not count.
        """
        samples: list[list[T]] = [[] for _ in sides]
        for run in range(self.runs + 1):
            took = []
            for side, collected in zip(sides, samples, strict=True):
                time.sleep(SETTLE_SECONDS)
                started = time.perf_counter()
                sample = side(run)
                took.append(f"{time.perf_counter() - started:.1f} s")
                if run:
                    collected.append(sample)
            say(f"    {f'turn {run} of {self.runs}' if run else 'warm-up'}: {', '.join(took)}")
        return samples


def matrix_units(flags: Set[str]) -> str:
    """The units of a processor that multiply matrices, from its flags in /proc/cpuinfo."""
    return next((name for flag, name in UNITS.items() if flag in flags), "no AVX2")


def native_dtype(flags: Set[str]) -> str:
    """bfloat16 if a processor with these flags computes it in hardware, else float32."""
    return "bfloat16" if flags & {"amx_bf16", "avx512_bf16", "bf16"} else "float32"


def processor_flags() -> Set[str]:
    """This processor's flags; empty where the system does not tell them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), frozenset())


def say(*words: object) -> None:
    """Print progress on standard error."""
    print(*words, file=sys.stderr, flush=True)
