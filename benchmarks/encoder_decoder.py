"""Greedy decoding of an encoder-decoder model, against Transformers' generate."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from benchmarks import engines, prompts
from benchmarks.decode import continued, generated, new_tokens
from benchmarks.plan import Plan
from benchmarks.report import Row, speedup
from benchmarks.side import Caller, Side

ROWS = ("encoder-decoder",)
STREAMS = 8
SOURCE = 64
LAST = 32000
"""The vocabulary is smaller than the demo model's."""


def measure(plan: Plan) -> Iterator[Row]:
    """The row encoder-decoder."""
    from benchmarks import random_models  # needs torch

    own = replace(plan, weights=random_models.t5(plan))
    with ExitStack() as stack:
        ours, theirs = engines.our_engine(own, stack), engines.transformers(own, stack)
        results, their_results = plan.alternate(partial(_greedy, plan, ours), partial(_generate, plan, theirs))
        steps = median(len(result["steps"]) for result in results)
        yield speedup(
            "encoder-decoder",
            f"greedy decoding, {STREAMS} at once, a random T5 of 250M, sources of {SOURCE} tokens,"
            f" {new_tokens(plan)} new tokens",
            "generate",
            "tokens/s",
            [engines.rates(results), engines.rates(their_results)],
            at_least=1.5,
            goal=2.0,
            note=f"{ours.call('describe')}; {new_tokens(plan)} tokens of each stream in {steps:.0f} steps",
        )


def _greedy(plan: Plan, engine: Caller, run: int) -> dict[str, Any]:
    return continued(plan, _sources(run), engine)


def _generate(plan: Plan, peer: Side, run: int) -> dict[str, Any]:
    return generated(plan, _sources(run), peer)


def _sources(run: int) -> list[list[int]]:
    return [prompts.tokens(SOURCE, "source", run, stream, last=LAST) for stream in range(STREAMS)]
