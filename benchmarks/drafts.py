"""Drafts of a stream that samples: a text that repeats itself, continued with and without them."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

from benchmarks import engines, prompts
from benchmarks.plan import Plan, say
from benchmarks.report import Row, speedup
from benchmarks.side import Caller

ROWS = ("drafts",)
MAX_TOKENS = 128
LINES = 8
TEMPERATURE = 0.7


def measure(plan: Plan) -> Iterator[Row]:
    """The row drafts."""
    tokens = plan.size(MAX_TOKENS, 16)
    say(f"  {tokens} tokens of a text that repeats itself")
    with ExitStack() as stack:
        ours = engines.our_engine(plan, stack)
        results = plan.alternate(partial(continued, ours, tokens, True), partial(continued, ours, tokens, False))
    steps = [median(len(result["steps"]) for result in side) for side in results]
    equal = sum(with_drafts["ids"] == plain["ids"] for with_drafts, plain in zip(*results, strict=True))
    yield speedup(
        "drafts",
        f"{tokens} tokens sampled at temperature {TEMPERATURE} after {LINES} similar lines of HTML, one stream",
        "the same without drafts",
        "tokens/s",
        [engines.rates(side) for side in results],
        at_least=2,
        goal=3,
        note=f"{steps[0]:.0f} steps instead of {steps[1]:.0f}; {equal} of {len(results[0])} texts are equal",
    )


def text(run: int) -> str:
    """Lines that only their numbers tell apart."""
    return "".join(
        f'<li class="entry"><a href="/entries/{100 * run + line}">Entry {100 * run + line}</a></li>\n'
        for line in range(LINES)
    )


def continued(ours: Caller, tokens: int, drafts: bool, run: int) -> dict[str, Any]:
    """Continue the text of a run, whose own keys and values are there already."""
    ours.call("draft", on=drafts)
    first, rest = (
        prompts.operations([text(run)], max_tokens=count, temperature=TEMPERATURE, seed=run) for count in (1, tokens)
    )
    ours.call("run", predictions=[{"operations": first}])
    result: dict[str, Any] = ours.call("run", predictions=[{"operations": rest}])
    return result
