"""A long prompt beside one plain forward pass over it."""

from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks import prompts
from benchmarks.decode import greedy, our_engine, transformers
from benchmarks.plan import Plan
from benchmarks.report import Row

ROWS = ("prefill",)
TOKENS = 2000


def measure(plan: Plan) -> Iterator[Row]:
    """The row prefill."""
    length = plan.size(TOKENS, 200)
    with ExitStack() as stack:
        ours, theirs = our_engine(plan, stack), transformers(plan, stack)

        def first_token(run: int) -> float:
            operations = greedy([prompts.tokens(length, "prefill", run)], 1)
            return float(ours.call("run", predictions=[{"operations": operations}])["seconds"])

        def forward(run: int) -> float:
            return float(theirs.call("forward", prompt=prompts.tokens(length, "prefill", run)))

        our_samples, their_samples = plan.alternate(first_token, forward)
        yield Row(
            name="prefill",
            work=f"a prompt of {length:,} tokens to its first new token",
            against="one plain forward pass, logits of the last position only",
            unit="s",
            ours=our_samples,
            peer=their_samples,
            kind="cost",
            at_least=1.1,
            goal=1.02,
        )
