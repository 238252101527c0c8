"""The ways to make a prediction over HTTP: waiting, streaming, with a webhook; cancelling it, or leaving."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

Document = dict[str, Any]

WAYS = ("wait", "stream", "webhook")

CANCEL_SECONDS = 0.2
"""The runtime loses cancels while it starts a prediction, so they are repeated."""


@dataclass(frozen=True)
class Answer:
    """An HTTP status, and the prediction or the error that came with it."""

    code: int
    document: Document

    @property
    def status(self) -> str:
        """The prediction's state; empty for another answer."""
        return str(self.document.get("status", ""))

    @property
    def output(self) -> list[str]:
        """The chunks of the output."""
        return self.document.get("output") or []


@dataclass
class Client:
    """One server's clients."""

    session: aiohttp.ClientSession
    url: str
    hook: str
    """Where webhooks are sent to."""
    called: dict[str, asyncio.Future[Document]] = field(default_factory=dict)
    """Who waits for a webhook, by the prediction's id."""
    refusals: int = 0
    """Answers of 409: all places were taken, or two requests came at the same instant."""

    async def predict(self, way: str, id: str, inputs: Document) -> Answer:
        """Make a prediction in one of WAYS and wait for its end."""
        if way == "stream":
            return await self._stream(id, inputs)
        if way == "webhook":
            return await self._call_back(id, inputs)
        async with self._post({"id": id, "input": inputs}) as response:
            return await _answer(response)

    async def cancel(self, id: str) -> int:
        """Ask to cancel a prediction; returns the HTTP status."""
        async with self.session.post(f"{self.url}/predictions/{id}/cancel") as response:
            return response.status

    async def predict_and_cancel(self, way: str, id: str, inputs: Document, after: float) -> Answer:
        """Make a prediction and cancel it after so many seconds, until it has ended."""
        answer = asyncio.create_task(self.predict(way, id, inputs))
        try:
            await asyncio.wait([answer], timeout=after)
            while not answer.done():
                await self.cancel(id)
                await asyncio.wait([answer], timeout=CANCEL_SECONDS)
            return await answer
        finally:
            answer.cancel()

    async def predict_and_leave(self, way: str, id: str, inputs: Document, after: float) -> None:
        """Make a prediction and drop the connection after so many seconds."""
        answer = asyncio.create_task(self.predict(way, id, inputs))
        await asyncio.wait([answer], timeout=after)
        answer.cancel()
        await asyncio.wait([answer])

    async def runs(self, id: str) -> bool:
        """Whether a prediction of this id runs: a PUT returns it. Else the PUT is a prediction that fails at once."""
        while True:
            body = {"input": {"prompt": ""}}
            async with self.session.put(f"{self.url}/predictions/{id}", json=body) as response:
                if response.status != 409:
                    return response.status == 202
            await asyncio.sleep(CANCEL_SECONDS)

    async def begin(self, id: str, inputs: Document) -> asyncio.Future[Document]:
        """Start a prediction; the result is its last state, from the webhook. Returns once it is accepted."""
        called = self.called[id] = asyncio.get_running_loop().create_future()
        body = {"id": id, "input": inputs, "webhook": f"{self.hook}/{id}", "webhook_events_filter": ["completed"]}
        async with self._post(body, Prefer="respond-async") as response:
            if response.status != 202:
                called.set_result((await _answer(response)).document | {"code": response.status})
        return called

    async def health(self) -> Document:
        """The server's health check."""
        async with self.session.get(f"{self.url}/health-check") as response:
            return dict(await response.json())

    async def _call_back(self, id: str, inputs: Document) -> Answer:
        try:
            document = await (await self.begin(id, inputs))
            return Answer(document.pop("code", 200), document)
        finally:
            self.called.pop(id, None)

    async def _stream(self, id: str, inputs: Document) -> Answer:
        async with self._post({"id": id, "input": inputs}, Accept="text/event-stream") as response:
            if response.content_type != "text/event-stream":
                return await _answer(response)
            chunks: list[str] = []
            async for event, data in _events(response):
                if event == "output":
                    chunks.append(data["chunk"])
                elif event == "completed":
                    if data["status"] == "succeeded" and chunks != data["output"]:
                        raise ValueError(f"the events hold {chunks}, the last one {data.get('output')}")
                    return Answer(200, data)
        raise ValueError("the stream ended without a last event")

    @asynccontextmanager
    async def _post(self, body: Document, **headers: str) -> AsyncIterator[aiohttp.ClientResponse]:
        while True:
            async with self.session.post(f"{self.url}/predictions", json=body, headers=headers) as response:
                if response.status != 409:
                    yield response
                    return
            self.refusals += 1
            await asyncio.sleep(0.05)


async def _answer(response: aiohttp.ClientResponse) -> Answer:
    text = await response.text()
    try:
        document = json.loads(text)
    except ValueError:
        document = {"detail": text}
    return Answer(response.status, document if isinstance(document, dict) else {"detail": document})


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Document]]:
    """Name and data of server-sent events."""
    rest = b""
    async for part in response.content.iter_any():
        *events, rest = (rest + part).split(b"\n\n")
        for event in events:
            fields = dict(line.split(": ", 1) for line in event.decode().split("\n") if ": " in line)
            if "data" in fields:
                yield fields.get("event", ""), json.loads(fields["data"])


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Client]:
    """Clients of the server, and a receiver of their webhooks on loopback."""
    app = web.Application(client_max_size=2**30)
    runner = web.AppRunner(app, access_log=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:
        client = Client(session, url, "")

        async def receive(request: web.Request) -> web.Response:
            called = client.called.get(request.match_info["id"])
            if called and not called.done():
                called.set_result(await request.json())
            return web.Response()

        app.router.add_post("/{id}", receive)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            client.hook = f"http://{host}:{port}"
            yield client
        finally:
            await runner.cleanup()
