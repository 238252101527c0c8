"""A container made of a few lines, for what a real one does rarely: to be busy, to fail, to say what it was asked."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from gateway.server import Gateway
from gateway.target import Container, Target

INFO = {
    "model": "/somewhere/tiny",
    "adapters": ["polite"],
    "context": 100,
    "end_of_sequence": [2],
    "tokens": ["a", " b", "</s>", [195], [169]],
}


@dataclass
class Fake:
    """A container: what it was asked, and what it answers."""

    lines: list[str] = field(default_factory=list)
    """The answer to a prediction, one chunk each."""
    refusals: list[int] = field(default_factory=list)
    """Statuses of the next answers, before it accepts any."""
    info: dict[str, Any] = field(default_factory=dict)
    """What MODEL_INFO says otherwise than INFO."""
    spells: bool = True
    """Whether MODEL_INFO can list what tokens spell."""
    failure: str = ""
    """Why each prediction fails."""
    metrics: dict[str, Any] = field(default_factory=lambda: {"input_token_count": 6, "output_token_count": 2})
    endless: bool = False
    """Whether a prediction goes on until the caller leaves."""
    inputs: list[dict[str, Any]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def predict(self, request: web.Request) -> web.StreamResponse:
        """`POST /predictions`, with Cog's events."""
        if self.refusals:
            return web.json_response({"detail": "no"}, status=self.refusals.pop(0))
        given = (await request.json())["input"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event: str, data: Any) -> None:
            await response.write(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode())

        if "MODEL_INFO" in (batch := given.get("ops_batch_json", "")):
            answer: dict[str, Any] = {"model_info": INFO | self.info}
            if not self.spells:
                answer["model_info"].pop("tokens")
                if '"tokens"' in batch:
                    answer = {"error": "tokens: no"}
            await send("output", {"chunk": "MSG " + json.dumps({"stream_id": 0, **answer}) + "\n"})
            await send("completed", {"status": "succeeded"})
            return response
        self.inputs.append(given)
        try:
            for line in self.lines:
                await send("output", {"chunk": line})
            while self.endless:
                await send("output", {"chunk": token(0)})
                await asyncio.sleep(0.01)
        except (ConnectionError, asyncio.CancelledError):
            self.cancelled.set()
            raise
        ended = {"status": "failed", "error": self.failure} if self.failure else {"status": "succeeded"}
        await send("completed", {**ended, "metrics": self.metrics})
        return response


def token(id: int, text: str = "a", finish: str | None = None, stream: int | str = 0, **fields: Any) -> str:
    """A line of an answer."""
    reply = {"token": id, "stream_id": stream, "logprob": -0.5, "finish_reason": finish, "text": text, **fields}
    return f"TOKEN {json.dumps(reply)}\n"


Client = TestClient[web.Request, web.Application]


@asynccontextmanager
async def served(fake: Fake, make: Callable[[str], Target] = Container, **options: Any) -> AsyncIterator[Client]:
    """A client of a gateway in front of the fake."""
    app = web.Application()
    app.router.add_post("/predictions", fake.predict)
    async with TestServer(app) as container:
        gateway = Gateway(make(str(container.make_url("/"))), **options)
        async with TestClient(TestServer(gateway.application(), handler_cancellation=True)) as client:
            yield client
