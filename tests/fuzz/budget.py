"""Checks examples that hypothesis makes until the time is over.

    make fuzz                         two minutes
    make fuzz FUZZ_SECONDS=600        ten
    make fuzz NIGHTLY=1               four hours
    FUZZ_SEED=7 make fuzz             other examples; a failure names its seed

In `make test` each test takes a few seconds.
"""

import os
import time
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

Example = TypeVar("Example")

TESTS = 4
"""The tests that share the time."""

SECONDS = float(os.environ.get("FUZZ_SECONDS") or 3 * TESTS) / TESTS
SEED = int(os.environ.get("FUZZ_SEED") or 0)
ROUND = 100
"""Examples from one seed. Later rounds have the seeds after it."""


def fuzz(check: Callable[[Example], None], examples: SearchStrategy[Example], shrink: bool = True) -> None:
    """Call `check` with examples for SECONDS; it raises for a defect. Prints how many there were.

    Without ``shrink`` the example that fails first is reported as it is: to check another one may be slow.
    """
    deadline = time.monotonic() + SECONDS
    count, failed = 0, False

    def checked(example: Example) -> None:
        nonlocal count, failed
        if time.monotonic() > deadline and not failed:
            return
        count += not failed  # then hypothesis tries to make the example simpler
        try:
            check(example)
        except BaseException:
            failed = True
            raise

    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    health = list(HealthCheck)
    use = settings(max_examples=ROUND, deadline=None, database=None, phases=phases, suppress_health_check=health)
    number = SEED
    while time.monotonic() < deadline:
        try:
            seed(number)(use(given(examples)(checked)))()
        except BaseException as error:
            error.add_note(f"FUZZ_SEED={number}, example {count - (number - SEED) * ROUND}")
            raise
        number += 1
    print(f"{count:,} examples, seeds {SEED} to {number - 1}")
