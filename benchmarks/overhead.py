"""The time that Cog's runtime and this project's Python add to the model's time in a step.

`overhead` is a step as clients see it: STREAMS predictions at once over HTTP, each streamed as server-sent events. It
is the time between the moment when all streams have their first token and the moment when the first stream has its
last, divided by the tokens of a stream in between.

The model's time is the runner's time in a step with as many streams in an engine of its own. There the streams are one
prediction, so that one listener wakes up per step, and no server and no client uses the cores.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from statistics import mean
from typing import Any
from urllib.parse import SplitResult, urlsplit

from benchmarks import engines, prompts
from benchmarks.plan import Plan, say
from benchmarks.report import Row, cost
from benchmarks.servers import our_server
from benchmarks.side import Side

ROWS = ("overhead", "overhead-engine")
STREAMS = 32
NEW_TOKENS = 96
MIN_STEPS = 4


class Arrivals(asyncio.Protocol):
    """One prediction on its own connection. It only records when bytes arrive, to leave the cores to the server."""

    succeeded, token = b'"succeeded"', b"TOKEN {"
    """What the answer holds if it succeeded, and once for each token."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: list[tuple[float, bytes]] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        if isinstance(transport, asyncio.Transport):
            transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Record the bytes and their time."""
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        """The server closes the connection after the last event, as requested."""
        if not self.done.done():
            self.done.set_result(None)

    def tokens(self) -> list[float]:
        """The arrival time of each token. Raises RuntimeError if the prediction did not succeed."""
        body = b"".join(piece for _, piece in self.pieces)
        if self.succeeded not in body:
            raise RuntimeError(f"a prediction failed: {body[-500:].decode(errors='replace')}")
        streamed = body.find(b"event: completed")  # this event repeats the whole output
        streamed = len(body) if streamed < 0 else streamed
        times, received = [], 0
        for when, piece in self.pieces:
            times += [when] * piece[: max(streamed - received, 0)].count(self.token)
            received += len(piece)
        return times


def measure(plan: Plan) -> Iterator[Row]:
    """The rows overhead and overhead-engine."""
    with ExitStack() as stack:
        engine = engines.our_engine(plan, stack)
        server = stack.enter_context(our_server(plan))
        say(f"  {streams(plan)} predictions over HTTP and within an engine")
        http, within, forward = plan.alternate(
            lambda run: step_seconds(through_http(plan, server.url, run)),
            partial(_within, plan, engine),
            partial(_forward, plan, engine),
        )
    yield cost(
        "overhead",
        f"a decoding step of {streams(plan)} predictions through Cog's server, as its clients see it",
        "the runner's time in that step",
        "s",
        [http, forward],
        at_most=1.1,
        goal=1.05,
        note="seen from outside: the time in which all predictions get one more token. The runner's time is that of an "
        "engine without server and clients, with the streams as one prediction",
    )
    yield cost(
        "overhead-engine",
        "the same step in an engine without Cog and HTTP, from its start to the next one's",
        "the runner's time in that step",
        "s",
        [within, forward],
        at_most=1.1,
        goal=1.05,
        note="the part of the row overhead that is this project's Python",
    )


def streams(plan: Plan) -> int:
    """Predictions at once."""
    return plan.size(STREAMS, 4)


def _operations(plan: Plan, side: str, run: int) -> list[Any]:
    stories = [prompts.story("overhead", side, run, i) for i in range(streams(plan))]
    return prompts.operations(stories, max_tokens=plan.size(NEW_TOKENS, 16))


def through_http(plan: Plan, url: str, run: int) -> list[list[float]]:
    """Run the predictions over HTTP; the arrival time of each token of each stream."""
    return asyncio.run(_through_http(url, _operations(plan, "http", run)))


async def _through_http(url: str, operations: list[Any]) -> list[list[float]]:
    predictions = []
    async with asyncio.timeout(300):
        for operation in operations:
            predictions.append(asyncio.create_task(_predict(urlsplit(url), operation)))
            await asyncio.sleep(0.01)
        return [(await prediction).tokens() for prediction in predictions]


async def _predict(address: SplitResult, operation: Any) -> Arrivals:
    """Run a prediction, again if it is refused: coglet 0.23.1 may answer 409 to one of two simultaneous requests."""
    request = http_request(address.netloc, "/predictions", {"input": {"ops_batch_json": json.dumps([operation])}})
    while True:
        _, connection = await asyncio.get_running_loop().create_connection(
            partial(Arrivals, request), address.hostname or "", address.port or 80
        )
        await connection.done
        if not connection.pieces or not connection.pieces[0][1].startswith(b"HTTP/1.1 409"):
            return connection


def _shared(arrivals: list[list[float]]) -> tuple[float, list[int]]:
    """The seconds in which all streams are running, and the tokens of each stream in them."""
    first = max(times[0] for times in arrivals)
    last = min(times[-1] for times in arrivals)
    counts = [sum(first < when <= last for when in times) for times in arrivals]
    if max(counts) < MIN_STEPS:
        raise RuntimeError(f"all streams ran together for only {max(counts)} steps; one of them ended too soon")
    return last - first, counts


def step_seconds(arrivals: list[list[float]]) -> float:
    """Seconds a step while all streams are running, from the arrival times of each stream's tokens."""
    seconds, counts = _shared(arrivals)
    return seconds / max(counts)


def tokens_per_second(arrivals: list[list[float]]) -> float:
    """Tokens a second of all streams, while all of them are running."""
    seconds, counts = _shared(arrivals)
    return sum(counts) / seconds


def _within(plan: Plan, engine: Side, run: int) -> float:
    """Seconds from step to step, with a prediction for each operation."""
    full = _full_steps(engine, [[operation] for operation in _operations(plan, "engine", run)])
    return (full[-1][0] - full[0][0]) / (len(full) - 1)


def _forward(plan: Plan, engine: Side, run: int) -> float:
    """Seconds inside the runner in a step."""
    return mean(spent for _, spent in _full_steps(engine, [_operations(plan, "model", run)]))


def _full_steps(engine: Side, batches: list[list[Any]]) -> list[tuple[float, float]]:
    """Start, and seconds inside the runner, of the steps in which all streams decode."""
    steps = engine.call("run", predictions=[{"operations": batch} for batch in batches])["steps"]
    total = sum(map(len, batches))
    return [(start, spent) for rows, most, start, spent in steps if rows == total and most == 1]


def http_request(host: str, path: str, body: Mapping[str, Any]) -> bytes:
    """A request for a stream, after which the server closes the connection."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
