"""Calls that share a prompt: a text continued chunk by chunk, and options scored after one prompt."""

import asyncio
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks import peers, prompts
from benchmarks.plan import Plan, say
from benchmarks.report import Row, Skipped
from benchmarks.servers import Clients, both, lmtp_client
from tests.replicate_stand_in import StandIn

ROWS = ("continuation", "continuation-tokens", "score", "score-tokens")
PROMPT, CHUNKS, CHUNK = 1000, 20, 16
SCORED_PROMPT, OPTIONS, OPTION = 500, 16, 3
END_OF_SEQUENCE = {"2": -100}
"""LMQL's mask against an early end, so that both sides do the same work."""


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The rows continuation and score, each with a row that counts tokens instead of seconds."""
    if not peers.has_lmql():
        yield Skipped([row for row in ROWS if plan.wants(row)], peers.LMQL_HOW_TO)
        return
    with both(plan) as clients:
        if plan.wants(*ROWS[:2]):
            yield from _continuation(plan, clients)
        if plan.wants(*ROWS[2:]):
            yield from _score(plan, clients)


def _continuation(plan: Plan, clients: Clients) -> Iterator[Row]:
    length, chunks = plan.size(PROMPT, 100), plan.size(CHUNKS, 3)
    say(f"  {length} tokens continued {chunks} times")

    async def work(run: int) -> None:
        text = prompts.tokens(length, "continuation", run)
        async with lmtp_client() as client:
            for _ in range(chunks):
                replies = client.generate(list(text), max_tokens=CHUNK, temperature=0.0, logit_bias=END_OF_SEQUENCE)
                chunk = [reply["token"] async for reply in replies]
                # LMQL's server sends the last token twice.
                text += chunk[:CHUNK]
        if len(text) != length + chunks * CHUNK:
            raise RuntimeError(f"{len(text) - length} tokens came, not {chunks * CHUNK}")

    computed: list[float] = []
    steps: list[float] = []

    def ours(run: int) -> float:
        seconds, metrics = _timed(clients, clients.ours, lambda: work(run))
        computed.append(sum(metric["computed_token_count"] for metric in metrics))
        steps.append(sum(metric["step_count"] for metric in metrics))
        return seconds

    our_seconds, their_seconds = plan.alternate(ours, lambda run: _timed(clients, clients.lmqls, lambda: work(run))[0])
    # All but the last token that was generated, which nobody asked to go on from.
    needed = length + chunks * CHUNK - 1
    yield Row(
        name="continuation",
        work=f"{length:,} tokens continued in {chunks} calls of {CHUNK} tokens, each holding the whole text so far",
        against="LMQL's own server",
        unit="s",
        ours=our_seconds,
        peer=their_seconds,
        at_least=4,
        goal=6,
        note=f"{chunks * CHUNK} tokens in {median(steps[1:]):.0f} steps, the others guessed rightly",
    )
    yield Row(
        name="continuation-tokens",
        work="the same: tokens computed; at most one more than needed for each call",
        against="tokens there are to compute",
        unit="tokens",
        ours=computed[1:],
        peer=[needed] * plan.runs,
        kind="cost",
        at_least=(needed + chunks) / needed,
        goal=1.0,
    )


def _score(plan: Plan, clients: Clients) -> Iterator[Row]:
    length, options = plan.size(SCORED_PROMPT, 100), plan.size(OPTIONS, 4)
    say(f"  {options} options scored after {length} tokens")

    async def one(client: Any, prompt: list[int], option: list[int]) -> None:
        scores = [reply["logprob"] async for reply in client.score(prompt, option)]
        if len(scores) != len(option):
            raise RuntimeError(f"{len(scores)} scores came, not {len(option)}")

    async def work(run: int) -> None:
        prompt = prompts.tokens(length, "score", run)
        async with lmtp_client() as client:
            # As after a query's first call: LMQL's client asks for the model's version once.
            await client.check_model()
            scored = [prompts.tokens(OPTION, "option", run, i) for i in range(options)]
            await asyncio.gather(*(one(client, prompt, option) for option in scored))

    computed: list[float] = []

    def ours(run: int) -> float:
        seconds, metrics = _timed(clients, clients.ours, lambda: work(run))
        computed.append(sum(metric["computed_token_count"] for metric in metrics))
        return seconds

    our_seconds, their_seconds = plan.alternate(ours, lambda run: _timed(clients, clients.lmqls, lambda: work(run))[0])
    yield Row(
        name="score",
        work=f"{options} options of {OPTION} tokens scored after one prompt of {length} tokens, {options} predictions "
        "at once",
        against="LMQL's own server",
        unit="s",
        ours=our_seconds,
        peer=their_seconds,
        at_least=8,
        goal=15,
    )
    yield Row(
        name="score-tokens",
        work="the same: tokens computed",
        against="the prompt once and, for each option, its tokens",
        unit="tokens",
        ours=computed[1:],
        # Each option's logits begin at the prompt's last token; nothing follows its own last token.
        peer=[length - 1 + options * OPTION] * plan.runs,
        kind="cost",
        at_least=1.0,
        goal=1.0,
    )


def _timed(clients: Clients, api: StandIn, work: Any) -> tuple[float, list[dict[str, Any]]]:
    """Seconds that the work took, and the metrics of its predictions."""
    before = len(api.predictions)
    clients.wait_until_idle()
    started = time.perf_counter()
    clients.run(api, work)
    seconds = time.perf_counter() - started
    return seconds, [prediction.metrics for prediction in list(api.predictions.values())[before:]]
