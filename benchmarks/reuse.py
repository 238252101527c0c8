"""Calls that share a prompt: a text continued chunk by chunk, and options scored after one prompt."""

import asyncio
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

from benchmarks import peers, prompts
from benchmarks.plan import Plan, say
from benchmarks.report import Row, Skipped, cost, speedup
from benchmarks.servers import Clients, both, lmql_server
from tests.replicate_stand_in import StandIn

ROWS = ("continuation", "continuation-tokens", "score", "score-tokens")
PROMPT, CHUNKS, CHUNK = 1000, 20, 16
SCORED_PROMPT, OPTIONS, OPTION = 500, 16, 3
END_OF_SEQUENCE = {"2": -100}
"""LMQL's mask against an early end, so that both sides generate equally many tokens."""

Timed = tuple[float, list[dict[str, Any]]]
"""Seconds, and the metrics of the predictions."""


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The rows continuation and score, each with a row that counts tokens instead of seconds."""
    if not peers.has_lmql():
        yield Skipped([row for row in ROWS if plan.wants(row)], peers.LMQL_HOW_TO)
        return
    with both(plan, lmql_server(plan)) as clients:
        if plan.wants(*ROWS[:2]):
            yield from _continuation(plan, clients)
        if plan.wants(*ROWS[2:]):
            yield from _score(plan, clients)


def _continuation(plan: Plan, clients: Clients) -> Iterator[Row]:
    length, chunks = continuation_size(plan)
    say(f"  {length} tokens continued {chunks} times")
    ours, theirs = plan.alternate(
        partial(continuation, plan, clients, clients.ours), partial(continuation, plan, clients, clients.theirs)
    )
    steps = median(_total(each, "step_count") for each in ours)
    yield speedup(
        "continuation",
        f"{length:,} tokens continued in {chunks} calls of {CHUNK} tokens, each holding the whole text so far",
        "LMQL's own server",
        "s",
        [seconds(ours), seconds(theirs)],
        at_least=4,
        goal=6,
        note=f"{chunks * CHUNK} tokens in {steps:.0f} steps; the others are accepted drafts",
    )
    # Nobody continues from the last token.
    needed = length + chunks * CHUNK - 1
    yield cost(
        "continuation-tokens",
        "the same: tokens computed; at most one more than needed for each call",
        "tokens there are to compute",
        "tokens",
        [[_total(each, "computed_token_count") for each in ours], [needed] * plan.runs],
        at_most=(needed + chunks) / needed,
        goal=1.0,
    )


def continuation_size(plan: Plan) -> tuple[int, int]:
    """Tokens of the first prompt, and calls."""
    return plan.size(PROMPT, 100), plan.size(CHUNKS, 3)


def score_size(plan: Plan) -> tuple[int, int]:
    """Tokens of the prompt, and options."""
    return plan.size(SCORED_PROMPT, 100), plan.size(OPTIONS, 4)


def continuation(plan: Plan, clients: Clients, api: StandIn, run: int) -> Timed:
    """Continue a text call by call."""
    length, chunks = continuation_size(plan)

    async def work() -> None:
        from benchmarks.lmql_client import lmtp_client

        text = prompts.tokens(length, "continuation", run)
        async with lmtp_client() as client:
            for _ in range(chunks):
                replies = client.generate(list(text), max_tokens=CHUNK, temperature=0.0, logit_bias=END_OF_SEQUENCE)
                chunk = [reply["token"] async for reply in replies]
                # LMQL's server sends the last token twice.
                text += chunk[:CHUNK]
        _expect(chunks * CHUNK, len(text) - length)

    return _timed(clients, api, work)


def _score(plan: Plan, clients: Clients) -> Iterator[Row]:
    length, options = score_size(plan)
    say(f"  {options} options scored after {length} tokens")
    ours, theirs = plan.alternate(
        partial(score, plan, clients, clients.ours), partial(score, plan, clients, clients.theirs)
    )
    samples = [seconds(ours), seconds(theirs)]
    scored = f"{options} options of {OPTION} tokens scored after one prompt of {length} tokens"
    work = f"{scored}, {options} predictions at once"
    yield speedup("score", work, "LMQL's own server", "s", samples, at_least=8, goal=15)
    yield cost(
        "score-tokens",
        "the same: tokens computed",
        "the prompt once and, for each option, its tokens",
        "tokens",
        # An option's first logits come from the prompt's last token; its own last token is not computed.
        [[_total(each, "computed_token_count") for each in ours], [length - 1 + options * OPTION] * plan.runs],
        at_most=1.0,
        goal=1.0,
    )


def score(plan: Plan, clients: Clients, api: StandIn, run: int) -> Timed:
    """Score options after one prompt, all at once."""
    length, options = score_size(plan)
    prompt = prompts.tokens(length, "score", run)

    async def one(client: Any, option: list[int]) -> None:
        _expect(len(option), len([reply["logprob"] async for reply in client.score(prompt, option)]))

    async def work() -> None:
        from benchmarks.lmql_client import lmtp_client

        async with lmtp_client() as client:
            # LMQL's client asks for the model's version once, before a query's first call.
            await client.check_model()
            await asyncio.gather(*(one(client, prompts.tokens(OPTION, "option", run, i)) for i in range(options)))

    return _timed(clients, api, work)


def _timed(clients: Clients, api: StandIn, work: Any) -> Timed:
    turn = clients.timed(api, work)
    return turn.seconds, [prediction.metrics for prediction in turn.predictions]


def _expect(expected: int, got: int) -> None:
    if got != expected:
        raise RuntimeError(f"expected {expected} tokens, got {got}")


def seconds(samples: list[Timed]) -> list[float]:
    """Seconds of each sample."""
    return [took for took, _ in samples]


def _total(sample: Timed, metric: str) -> float:
    return float(sum(metrics[metric] for metrics in sample[1]))
