"""What the gateway costs: LMQL's queries over its WebSocket, and streams of OpenAI's API.

LMQL's queries are compared with the same queries through Replicate's interface, streams with streams of a container's
own `/predictions`. Each side has a server of its own, so that both can get the same prompts and none is answered from a
cache.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import peers, prompts
from benchmarks.lmql_queries import QUERIES, text
from benchmarks.overhead import Arrivals, http_request, streams, tokens_per_second
from benchmarks.plan import ROOT, Plan, say
from benchmarks.report import Row, Skipped, cost
from benchmarks.servers import our_server, wait_until_idle
from tests.replicate_stand_in import StandIn, stand_in
from tests.server import Server, started

ROWS = ("gateway-queries", "gateway-streams")
NEW_TOKENS = 96


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The rows gateway-queries and gateway-streams."""
    with ExitStack() as stack:
        behind, alone = (stack.enter_context(our_server(plan)) for _ in range(2))
        command = [sys.executable, str(ROOT / "script/gateway"), "--target", behind.url, "--port", "0"]
        gateway = stack.enter_context(started([*command, "--name", "model"]))
        if plan.wants("gateway-streams"):
            yield _streams(plan, gateway, alone)
        if plan.wants("gateway-queries"):
            if peers.has_lmql():
                yield _queries(plan, gateway, (behind, alone), stack.enter_context(stand_in(alone.url)))
            else:
                yield Skipped(["gateway-queries"], peers.LMQL_HOW_TO)


def _queries(plan: Plan, gateway: Server, servers: Sequence[Server], api: StandIn) -> Row:
    import lmql

    from benchmarks.lmql_client import model_clause, redirected

    loop = asyncio.new_event_loop()
    endpoint = gateway.url.replace("http://127.0.0.1", "localhost")
    websocket = f'lmql.model("ignored", endpoint="{endpoint}", tokenizer="{plan.weights}")'

    def seconds(model: str, run: int) -> float:
        for server in servers:
            wait_until_idle(server)
        began = time.perf_counter()
        for name in QUERIES:
            loop.run_until_complete(lmql.run(text(name, model, 100 + run)))
        return time.perf_counter() - began

    say("  LMQL's queries over the gateway's WebSocket and through Replicate's interface")
    with tempfile.TemporaryDirectory() as cache, redirected(lambda: api.url, Path(cache)):
        sides = plan.alternate(partial(seconds, websocket), partial(seconds, model_clause(plan.weights)))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    return cost(
        "gateway-queries",
        "the LMQL queries, one after the other, over the gateway's WebSocket",
        "the same queries through Replicate's interface",
        "s",
        sides,
        at_most=1.1,
        goal=1.0,
        note="the stand-in for Replicate's API is on the same machine; the real one is farther away",
    )


def _streams(plan: Plan, gateway: Server, alone: Server) -> Row:
    new = plan.size(NEW_TOKENS, 16)
    common: dict[str, Any] = {"max_tokens": new, "temperature": 0.0}

    def ours(run: int) -> float:
        bodies = [{"model": "model", "stream": True, "prompt": story, **common} for story in _stories(plan, run)]
        return 1 / tokens_per_second(asyncio.run(_all(gateway.url, "/v1/completions", bodies, Chunks)))

    def theirs(run: int) -> float:
        operations = prompts.operations(_stories(plan, run), text=True, top_logprobs=0, **common)
        bodies = [{"input": {"ops_batch_json": json.dumps([operation])}} for operation in operations]
        return 1 / tokens_per_second(asyncio.run(_all(alone.url, "/predictions", bodies, Arrivals)))

    say(f"  {streams(plan)} streams of OpenAI's API and of /predictions")
    return cost(
        "gateway-streams",
        f"a token of {streams(plan)} concurrent streams of /v1/completions",
        "a token of as many streams of /predictions",
        "s",
        plan.alternate(ours, theirs),
        at_most=1.05,
        goal=1.02,
        note="while all streams run, which the gateway shares the cores with",
    )


def _stories(plan: Plan, run: int) -> list[list[int] | str]:
    return [prompts.story("gateway", run, i) for i in range(streams(plan))]


class Chunks(Arrivals):
    """A stream of OpenAI's API."""

    succeeded = b"data: [DONE]"
    token = b"data: {"


async def _all(url: str, path: str, bodies: list[dict[str, Any]], kind: type[Arrivals]) -> list[list[float]]:
    """Run requests at once; the arrival time of each token of each."""
    address = urlsplit(url)

    async def one(body: dict[str, Any]) -> list[float]:
        while True:
            request = http_request(address.netloc, path, body)
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(
                partial(kind, request), address.hostname or "", address.port or 80
            )
            await connection.done
            if not connection.pieces[0][1].startswith(b"HTTP/1.1 409"):
                return connection.tokens()

    async with asyncio.timeout(300):
        tasks = []
        for body in bodies:
            tasks.append(asyncio.create_task(one(body)))
            await asyncio.sleep(0.01)
        return [await task for task in tasks]
