"""What Cog's runtime and this project's Python add to the model's time in a step.

A step as a client sees it is timed through the real server: 32 predictions at once over HTTP, each streamed as
server-sent events; from the moment all of them have their first token to the moment the first one has its last, divided
by the tokens that came in between. The model's time is what 32 such streams take inside the runner in an engine of
their own, as one prediction: one listener wakes up once a step, and no server and no client is on the machine's cores.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import mean
from typing import Any
from urllib.parse import urlsplit

from benchmarks import prompts
from benchmarks.decode import our_engine
from benchmarks.plan import Plan, say
from benchmarks.report import Row
from benchmarks.servers import our_server
from benchmarks.side import Side

ROWS = ("overhead", "overhead-engine")
STREAMS = 32
NEW_TOKENS = 96
FEWEST_STEPS = 4


class Arrivals(asyncio.Protocol):
    """One prediction over a connection of its own: only notes when bytes came, to leave the cores to the server."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: list[tuple[float, bytes]] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        if isinstance(transport, asyncio.Transport):
            transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note what came."""
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        """The server closes the connection after the last event, as the request asked it to."""
        if not self.done.done():
            self.done.set_result(None)

    def tokens(self) -> list[float]:
        """When each token came. Raises RuntimeError where the prediction did not succeed."""
        body = b"".join(piece for _, piece in self.pieces)
        if b'"succeeded"' not in body:
            raise RuntimeError(f"a prediction failed: {body[-500:].decode(errors='replace')}")
        streamed = body.index(b"event: completed")  # the last event holds the whole output once more
        times, received = [], 0
        for when, piece in self.pieces:
            times += [when] * piece[: max(streamed - received, 0)].count(b"TOKEN {")
            received += len(piece)
        return times


def measure(plan: Plan) -> Iterator[Row]:
    """The rows overhead and overhead-engine."""
    streams = plan.size(STREAMS, 4)
    new_tokens = plan.size(NEW_TOKENS, 16)

    def operations(run: int, side: str) -> list[list[Any]]:
        return [
            ["GENERATE", {"stream_id": i, "prompt": prompts.story("overhead", side, run, i), "max_tokens": new_tokens}]
            for i in range(streams)
        ]

    with ExitStack() as stack:
        engine = our_engine(plan, stack)
        server = stack.enter_context(our_server(plan))
        say(f"  {streams} predictions over HTTP and within an engine")
        through_http, within, forward = plan.alternate(
            lambda run: asyncio.run(_through_http(server.url, operations(run, "http"))),
            lambda run: _within(engine, operations(run, "engine")),
            lambda run: _forward(engine, operations(run, "model")),
        )
    yield Row(
        name="overhead",
        work=f"a decoding step of {streams} predictions through Cog's server, as its clients see it",
        against="the runner's time in that step",
        unit="s",
        ours=through_http,
        peer=forward,
        kind="cost",
        at_least=1.1,
        goal=1.05,
        note="seen from outside: the time in which all predictions get one more token; against the time inside "
        "the runner in an engine without server and clients, the streams being one prediction",
    )
    yield Row(
        name="overhead-engine",
        work="the same step in an engine without Cog and HTTP, from its start to the next one's",
        against="the runner's time in that step",
        unit="s",
        ours=within,
        peer=forward,
        kind="cost",
        at_least=1.1,
        goal=1.05,
        note="the part of the row overhead that is this project's Python",
    )


async def _through_http(url: str, operations: list[list[Any]]) -> float:
    """Seconds a step."""
    address = urlsplit(url)
    connections = []
    for operation in operations:
        connection = Arrivals(_request(address.netloc, {"input": {"ops_batch_json": json.dumps([operation])}}))
        await asyncio.get_running_loop().create_connection(
            lambda connection=connection: connection,  # type: ignore[misc]
            address.hostname or "",
            address.port or 80,
        )
        connections.append(connection)
        await asyncio.sleep(0.01)  # coglet 0.23.1 may refuse one of two requests that come at the same instant
    async with asyncio.timeout(300):
        await asyncio.gather(*(connection.done for connection in connections))
    return step_seconds([connection.tokens() for connection in connections])


def step_seconds(arrivals: list[list[float]]) -> float:
    """Seconds a step, while all streams are under way, from when each stream's tokens came."""
    first = max(times[0] for times in arrivals)
    last = min(times[-1] for times in arrivals)
    counted = max(sum(first < when <= last for when in times) for times in arrivals)
    if counted < FEWEST_STEPS:
        raise RuntimeError(f"the streams had only {counted} steps in common; one of them ended too soon")
    return (last - first) / counted


def _within(engine: Side, operations: list[list[Any]]) -> float:
    """Seconds from step to step, every operation being a prediction."""
    full = _full_steps(engine, [[operation] for operation in operations], len(operations))
    return (full[-1][0] - full[0][0]) / (len(full) - 1)


def _forward(engine: Side, operations: list[list[Any]]) -> float:
    """Seconds inside the runner in a step."""
    return mean(spent for _, spent in _full_steps(engine, [operations], len(operations)))


def _full_steps(engine: Side, batches: list[list[list[Any]]], streams: int) -> list[tuple[float, float]]:
    """Start and seconds inside the runner of the steps in which all streams decode."""
    steps = engine.call("run", predictions=[{"operations": batch} for batch in batches])["steps"]
    return [(start, spent) for rows, most, start, spent in steps if rows == streams and most == 1]


def _request(host: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /predictions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
