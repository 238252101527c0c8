"""Streams of all kinds that come when they come, beside the same one at a time."""

import random
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

from benchmarks import prompts
from benchmarks.decode import our_engine, transformers
from benchmarks.plan import Plan
from benchmarks.report import Row

ROWS = ("mixed", "mixed-gaps")
SECONDS = 5.0
STREAMS = 32


def streams(plan: Plan, run: int) -> list[dict[str, Any]]:
    """Predictions of one stream each. The kinds are the same in every run, the tokens are not."""
    draw = random.Random("arrivals")
    count = plan.size(STREAMS, 4)
    predictions: list[dict[str, Any]] = []
    for stream in range(count):
        payload: dict[str, Any] = {
            "stream_id": stream,
            "prompt": prompts.tokens(draw.randint(5, plan.size(400, 40)), "mixed", run, stream),
            "max_tokens": draw.randint(plan.size(48, 4), plan.size(208, 12)),
            "temperature": draw.choice([0.0, 0.0, 0.7, 1.0, 1.3]),
            "top_logprobs": draw.choice([1, 1, 5, 20]),
            "seed": stream,
        }
        kind = draw.choice(["none", "half", "few"])
        if kind == "half":
            payload["mask"] = prompts.half_mask("mixed", stream)
        elif kind == "few":
            payload["logit_bias"] = {str(token): 100 for token in sorted(set(prompts.tokens(200, "few", stream)))}
        after = draw.uniform(0, plan.size(50, 5) / 10)
        predictions.append({"after": after, "operations": [["GENERATE", payload]]})
    # Time is counted from the first arrival.
    first = min(prediction["after"] for prediction in predictions)
    for prediction in predictions:
        prediction["after"] -= first
    return sorted(predictions, key=lambda prediction: float(prediction["after"]))


def gap(result: dict[str, Any]) -> float:
    """The 95th percentile of the time between a stream's tokens, in seconds."""
    gaps = [later - earlier for times in result["arrivals"] for earlier, later in pairwise(times)]
    return quantiles(gaps, n=20)[-1]


def step(result: dict[str, Any]) -> float:
    """The median time, in seconds, from one decoding step to the next step."""
    decoding = [
        following[2] - this[2]
        for this, following in pairwise(result["steps"])
        if this[1] == 1 and following[2] - this[2] < 2 * this[3] + 0.01  # else the engine had nothing to do
    ]
    return median(decoding)


def measure(plan: Plan) -> Iterator[Row]:
    """The rows mixed and mixed-gaps."""
    with ExitStack() as stack:
        ours, theirs = our_engine(plan, stack), transformers(plan, stack)

        def together(run: int) -> dict[str, Any]:
            result: dict[str, Any] = ours.call("run", predictions=streams(plan, run))
            return result

        def one_at_a_time(run: int) -> dict[str, Any]:
            operations = [prediction["operations"][0] for prediction in streams(plan, run)]
            result: dict[str, Any] = theirs.call("one_at_a_time", operations=operations if run else operations[:2])
            return result

        our_results, their_results = plan.alternate(together, one_at_a_time)
        what = f"{plan.size(STREAMS, 4)} streams arriving over {SECONDS:.0f} s, mixed lengths, masks and temperatures"
        yield Row(
            name="mixed",
            work=what,
            against="the same on generate, one at a time, all there from the start",
            unit="tokens/s",
            ours=[each["tokens"] / each["seconds"] for each in our_results],
            peer=[each["tokens"] / each["seconds"] for each in their_results],
            more_is_better=True,
            at_least=6,
            goal=12,
        )
        yield Row(
            name="mixed-gaps",
            work="the same: 95th percentile of the time between a stream's tokens",
            against="the median decoding step",
            unit="s",
            ours=[gap(each) for each in our_results],
            peer=[step(each) for each in our_results],
            kind="cost",
            at_least=4,
            goal=4,
        )
