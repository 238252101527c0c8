"""A mixed workload with random arrivals, against the same streams one at a time."""

import random
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

from benchmarks import engines, prompts
from benchmarks.plan import Plan
from benchmarks.report import Row, cost, speedup
from benchmarks.side import Side

ROWS = ("mixed", "mixed-gaps")
SECONDS = 5.0
STREAMS = 32
WARM_UP_TOKENS = 8
"""Enough for every stream to get its memory; a whole run takes a minute."""


def measure(plan: Plan) -> Iterator[Row]:
    """The rows mixed and mixed-gaps."""
    with ExitStack() as stack:
        ours, theirs = engines.our_engine(plan, stack), engines.transformers(plan, stack)
        results, their_results = plan.alternate(partial(together, plan, ours), partial(_one_at_a_time, plan, theirs))
        yield speedup(
            "mixed",
            f"{plan.size(STREAMS, 4)} streams arriving over {SECONDS:.0f} s, mixed lengths, masks and temperatures",
            "the same on generate, one at a time, all there from the start",
            "tokens/s",
            [engines.rates(results), engines.rates(their_results)],
            at_least=6,
            goal=12,
        )
        yield cost(
            "mixed-gaps",
            "the same: 95th percentile of the time between a stream's tokens",
            "the median decoding step",
            "s",
            [[gap(result) for result in results], [step(result) for result in results]],
            at_most=4,
            goal=4,
        )


def streams(plan: Plan, run: int) -> list[dict[str, Any]]:
    """Predictions of one stream each. The kinds are the same in every run, the tokens are not; run 0 is short."""
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
        if run == 0:
            payload["max_tokens"] = min(payload["max_tokens"], WARM_UP_TOKENS)
        after = draw.uniform(0, plan.size(50, 5) / 10)
        predictions.append({"after": after, "operations": [["GENERATE", payload]]})
    # Time starts at the first arrival.
    first = min(prediction["after"] for prediction in predictions)
    for prediction in predictions:
        prediction["after"] -= first
    return sorted(predictions, key=lambda prediction: float(prediction["after"]))


def together(plan: Plan, engine: Side, run: int) -> dict[str, Any]:
    """The workload on this project's engine."""
    result: dict[str, Any] = engine.call("run", predictions=streams(plan, run))
    return result


def _one_at_a_time(plan: Plan, peer: Side, run: int) -> dict[str, Any]:
    operations = [prediction["operations"][0] for prediction in streams(plan, run)]
    result: dict[str, Any] = peer.call("one_at_a_time", operations=operations if run else operations[:2])
    return result


def gap(result: dict[str, Any]) -> float:
    """The 95th percentile of the time between a stream's tokens, in seconds."""
    gaps = [later - earlier for times in result["arrivals"] for earlier, later in pairwise(times)]
    return quantiles(gaps, n=20)[-1]


def step(result: dict[str, Any]) -> float:
    """The median time from the start of a decoding step to the start of the next, in seconds."""
    decoding = [
        following[2] - this[2]
        for this, following in pairwise(result["steps"])
        if this[1] == 1 and following[2] - this[2] < 2 * this[3] + 0.01  # longer: the engine was idle in between
    ]
    return median(decoding)
