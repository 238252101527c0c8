"""A stand-in for Replicate's HTTP API on loopback, in front of one running Cog server.

As on Replicate, every prediction is one call to the container, made with the prediction's own id, and continues after
its client disconnects. Documents and events follow https://replicate.com/docs/reference/http and
https://replicate.com/docs/topics/predictions/streaming, as far as the Python, Node and LMQL clients use them.
"""

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
from aiohttp import web

OWNER, MODEL, VERSION = "test", "model", "0123456789abcdef" * 4
TOKEN = "r8_test"
TERMINAL = ("succeeded", "failed", "canceled")

JsonObject = dict[str, Any]


@dataclass
class StandIn:
    """A running stand-in."""

    url: str
    """Without a path, like Replicate's own https://api.replicate.com."""
    predictions: dict[str, "Prediction"]
    """All its predictions by id, oldest first."""


@dataclass
class Prediction:
    """One prediction and its state."""

    id: str
    input: JsonObject
    status: str = "starting"
    chunks: list[str] = field(default_factory=list)
    logs: str = ""
    error: str | None = None
    metrics: JsonObject = field(default_factory=dict)
    created: str = field(default_factory=lambda: now())
    started: str | None = None
    completed: str | None = None
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    webhook: str = ""
    webhook_events: Collection[str] = ()
    """Of ``start``, ``output``, ``logs`` and ``completed``, those that the webhook is told."""

    def document(self, base: str) -> JsonObject:
        """The prediction as the API returns it."""
        here = f"{base}/v1/predictions/{self.id}"
        return {
            "id": self.id,
            "model": f"{OWNER}/{MODEL}",
            "version": VERSION,
            "input": self.input,
            "output": self.chunks or None,
            "logs": self.logs,
            "error": self.error,
            "status": self.status,
            "metrics": self.metrics,
            "created_at": self.created,
            "started_at": self.started,
            "completed_at": self.completed,
            "urls": {"get": here, "cancel": f"{here}/cancel", "stream": f"{base}/v1/stream/{self.id}"},
        }


@contextmanager
def stand_in(cog: str) -> Iterator[StandIn]:
    """Run the stand-in for the Cog server at the address `cog`, in a thread with its own event loop."""
    ready: Future[tuple[StandIn, Callable[[], None]]] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_Api(cog).run(ready)), name="replicate stand-in")
    thread.start()
    try:
        api, stop = ready.result(timeout=10)
        try:
            yield api
        finally:
            stop()
    finally:
        thread.join()


def now() -> str:
    return datetime.now(UTC).isoformat()


def problem(status: int, title: str, detail: str) -> web.Response:
    """An error in the API's format."""
    return web.json_response({"title": title, "detail": detail, "status": status}, status=status)


class _Api:
    def __init__(self, cog: str) -> None:
        self.cog = cog
        self.base = ""
        self.predictions: dict[str, Prediction] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self, ready: "Future[tuple[StandIn, Callable[[], None]]]") -> None:
        app = web.Application(middlewares=[self.authenticate])
        model = f"/v1/models/{OWNER}/{MODEL}"
        deployment = f"/v1/deployments/{OWNER}/{MODEL}"
        app.router.add_get(model, self.get_model)
        app.router.add_get(f"{model}/versions", self.list_versions)
        app.router.add_get(f"{model}/versions/{VERSION}", self.get_version)
        app.router.add_post(f"{model}/predictions", self.create)
        app.router.add_get(deployment, self.get_deployment)
        app.router.add_post(f"{deployment}/predictions", self.create)
        app.router.add_post("/v1/predictions", self.create)
        app.router.add_get("/v1/predictions/{id}", self.get_prediction)
        app.router.add_post("/v1/predictions/{id}/cancel", self.cancel)
        app.router.add_get("/v1/stream/{id}", self.stream)
        runner = web.AppRunner(app, shutdown_timeout=1)
        await runner.setup()
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with aiohttp.ClientSession(self.cog, timeout=aiohttp.ClientTimeout(total=None)) as self.session:
            try:
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                self.base = f"http://127.0.0.1:{runner.addresses[0][1]}"

                def stop() -> None:
                    loop.call_soon_threadsafe(stopped.set)

                ready.set_result((StandIn(self.base, self.predictions), stop))
                await stopped.wait()
            finally:
                for task in self.tasks:
                    task.cancel()
                await asyncio.gather(*self.tasks, return_exceptions=True)
                await runner.cleanup()

    @web.middleware
    async def authenticate(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Require a token, in either spelling. A stream's address is a secret and needs none."""
        given = request.headers.get("Authorization", "")
        if given not in (f"Bearer {TOKEN}", f"Token {TOKEN}") and not request.path.startswith("/v1/stream/"):
            return problem(401, "Unauthenticated", "You did not pass a valid authentication token")
        return await handler(request)

    # Models, versions and deployments

    async def version(self) -> JsonObject:
        async with self.session.get("/openapi.json") as response:
            schema = await response.json()
        return {"id": VERSION, "created_at": now(), "cog_version": "0.23.1", "openapi_schema": schema}

    async def get_model(self, request: web.Request) -> web.Response:
        document = {
            "url": f"https://replicate.com/{OWNER}/{MODEL}",
            "owner": OWNER,
            "name": MODEL,
            "description": None,
            "visibility": "private",
            "github_url": None,
            "paper_url": None,
            "license_url": None,
            "run_count": len(self.predictions),
            "cover_image_url": None,
            "default_example": None,
            "latest_version": await self.version(),
        }
        return web.json_response(document)

    async def list_versions(self, request: web.Request) -> web.Response:
        return web.json_response({"previous": None, "next": None, "results": [await self.version()]})

    async def get_version(self, request: web.Request) -> web.Response:
        return web.json_response(await self.version())

    async def get_deployment(self, request: web.Request) -> web.Response:
        release = {
            "number": 1,
            "model": f"{OWNER}/{MODEL}",
            "version": VERSION,
            "created_at": now(),
            "created_by": {"type": "user", "username": OWNER, "name": OWNER},
            "configuration": {"hardware": "cpu", "min_instances": 1, "max_instances": 1},
        }
        return web.json_response({"owner": OWNER, "name": MODEL, "current_release": release})

    # Predictions

    async def create(self, request: web.Request) -> web.Response:
        body = await request.json()
        if request.path == "/v1/predictions" and body.get("version") not in (VERSION, f"{OWNER}/{MODEL}:{VERSION}"):
            return problem(422, "Invalid version or not permitted", "The specified version does not exist")
        prediction = Prediction(secrets.token_hex(13), body.get("input", {}))
        if webhook := body.get("webhook"):
            prediction.webhook = webhook
            prediction.webhook_events = body.get("webhook_events_filter") or ("start", "output", "logs", "completed")
        address, accept = f"/predictions/{prediction.id}", {"Accept": "text/event-stream"}
        while (
            response := await self.session.put(address, json={"input": prediction.input}, headers=accept)
        ).status == 409:
            # At capacity: Replicate would queue the prediction. coglet 0.23.1 also answers 409 to simultaneous requests.
            response.close()
            await asyncio.sleep(0.002)
        if response.status != 200:
            errors = await response.text()
            if response.status == 422:
                errors = "\n".join(f"- {'.'.join(e['loc'][1:])}: {e['msg']}" for e in json.loads(errors)["detail"])
            return problem(response.status, "Input validation failed", errors)
        self.predictions[prediction.id] = prediction
        task = asyncio.create_task(self.follow(prediction, response))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        document = await self.answer(prediction, request.headers.get("Prefer", ""))
        return web.json_response(document, status=201)

    async def answer(self, prediction: Prediction, prefer: str) -> JsonObject:
        """The new prediction; with `Prefer: wait` or `wait=SECONDS`, once it is done or the time is over."""
        preference, _, seconds = prefer.partition("=")
        if preference != "wait":
            return prediction.document(self.base)
        with suppress(TimeoutError):
            async with asyncio.timeout(int(seconds or 60)):
                await self.done(prediction)
        document = prediction.document(self.base)
        # Clients rely on this: they take any other status as final.
        return document if prediction.status in TERMINAL else {**document, "status": "starting"}

    async def follow(self, prediction: Prediction, response: aiohttp.ClientResponse) -> None:
        """Record the events that the container sends for a prediction."""
        async with response:
            async for name, data in server_sent_events(response):
                async with prediction.changed:
                    if name == "start":
                        prediction.status, prediction.started = "processing", now()
                    elif name == "output":
                        prediction.chunks.append(data["chunk"])
                    elif name == "log":
                        prediction.logs += data["data"]
                    elif name == "completed":
                        prediction.error, prediction.metrics = data.get("error"), data.get("metrics", {})
                        prediction.status, prediction.completed = data["status"], now()
                    prediction.changed.notify_all()
                if {"log": "logs"}.get(name, name) in prediction.webhook_events:
                    document = prediction.document(self.base)
                    async with self.session.post(prediction.webhook, json=document) as told:
                        told.raise_for_status()
        if prediction.status not in TERMINAL:
            async with prediction.changed:
                prediction.status, prediction.error = "failed", "The container closed the connection."
                prediction.changed.notify_all()

    async def done(self, prediction: Prediction) -> None:
        async with prediction.changed:
            await prediction.changed.wait_for(lambda: prediction.status in TERMINAL)

    def find(self, request: web.Request) -> Prediction:
        prediction = self.predictions.get(request.match_info["id"])
        if prediction is None:
            raise web.HTTPNotFound(text='{"detail": "Not found"}', content_type="application/json")
        return prediction

    async def get_prediction(self, request: web.Request) -> web.Response:
        return web.json_response(self.find(request).document(self.base))

    async def cancel(self, request: web.Request) -> web.Response:
        prediction = self.find(request)
        # coglet 0.23.1 loses a cancellation that arrives before its prediction starts, so retry until it takes effect.
        while prediction.status not in TERMINAL:
            async with self.session.post(f"/predictions/{prediction.id}/cancel"):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.done(prediction), timeout=1)
        return web.json_response(prediction.document(self.base))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: an `output` for each chunk from the first on, then `error` if it failed, then `done`."""
        prediction = self.find(request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        with suppress(ConnectionResetError):
            await response.prepare(request)
            await self.send_events(prediction, response)
        return response

    async def send_events(self, prediction: Prediction, response: web.StreamResponse) -> None:
        sent = 0

        async def send(event: str, data: str) -> None:
            nonlocal sent
            lines = "".join(f"data: {line}\n" for line in data.split("\n"))
            await response.write(f"event: {event}\nid: {int(time.time())}:{sent}\n{lines}\n".encode())
            sent += 1

        while True:
            async with prediction.changed:
                await prediction.changed.wait_for(
                    lambda: len(prediction.chunks) > sent or prediction.status in TERMINAL
                )
                waiting = prediction.chunks[sent:]
            for chunk in waiting:
                await send("output", chunk)
            if prediction.status in TERMINAL and len(prediction.chunks) == sent:
                break
        reasons = {"succeeded": {}, "canceled": {"reason": "canceled"}, "failed": {"reason": "error"}}
        if prediction.status == "failed":
            await send("error", json.dumps({"detail": prediction.error}))
        await send("done", json.dumps(reasons[prediction.status]))


async def server_sent_events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, JsonObject]]:
    """Names and data of Cog's events. Data is JSON on one line of any length."""
    name, rest = "", b""
    async for part in response.content.iter_any():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            label, _, value = line.decode().partition(": ")
            if label == "event":
                name = value
            elif label == "data":
                yield name, json.loads(value)
