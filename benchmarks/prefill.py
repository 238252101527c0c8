"""A long prompt, against one plain forward pass over it."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks import engines, prompts
from benchmarks.plan import Plan
from benchmarks.report import Row, cost
from benchmarks.side import Caller, Side

ROWS = ("prefill",)
TOKENS = 2000


def measure(plan: Plan) -> Iterator[Row]:
    """The row prefill."""
    with ExitStack() as stack:
        ours, theirs = engines.our_engine(plan, stack), engines.transformers(plan, stack)
        results, forward = plan.alternate(partial(first_token, plan, ours), partial(_forward, plan, theirs))
        yield cost(
            "prefill",
            f"a prompt of {plan.size(TOKENS, 200):,} tokens to its first new token",
            "one plain forward pass, logits of the last position only",
            "s",
            [engines.seconds(results), engines.seconds(forward)],
            at_most=1.1,
            goal=1.02,
        )


def first_token(plan: Plan, engine: Caller, run: int) -> dict[str, Any]:
    """This project's engine generates one token."""
    return engines.run(engine, prompts.operations([_prompt(plan, run)], max_tokens=1), 1)


def _forward(plan: Plan, peer: Side, run: int) -> dict[str, Any]:
    return {"seconds": peer.call("forward", prompt=_prompt(plan, run))}


def _prompt(plan: Plan, run: int) -> list[int]:
    return prompts.tokens(plan.size(TOKENS, 200), "prefill", run)
