"""LMQL's own server behind the part of Cog's HTTP interface that the Replicate stand-in uses.

It does what LMQL's predictor for Replicate does, without Cog. One LMQL scheduler loads the model through LMQL's
Transformers backend. Every prediction gets an LMQL token session; its operations go in, and the session's replies come
out as lines. All the work is code of the PyPI package `lmql`; this file only passes messages. Every choice favours
LMQL: predictions run concurrently, so that the scheduler can batch them, on one event loop.

Run it as `python -m benchmarks.lmql_server --weights DIRECTORY`. It prints `Ready: URL` once the model is loaded.
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web
from lmql.models.lmtp.backends.transformers_model import TransformersLLM
from lmql.models.lmtp.lmtp_async import LMTPAsyncTransport
from lmql.models.lmtp.lmtp_scheduler import Scheduler, TokenSession

LOADING = "<unavailable>"
"""The scheduler's model information until the model is loaded."""


class Predictor:
    """LMQL's scheduler with one model."""

    def __init__(self, weights: str, dtype: str) -> None:
        self._model = weights
        self._arguments = {"device_map": "auto", "dtype": dtype, "local_files_only": True}
        self._scheduler = Scheduler.instance(weights, self._arguments, user=None, sync=False)

    async def loaded(self) -> None:
        """Wait until the model is loaded."""
        while self._scheduler.model_info() == LOADING:
            if not self._scheduler.worker_thread.is_alive():
                raise RuntimeError(f"{TransformersLLM.__name__} did not load {self._model}")
            await asyncio.sleep(0.05)

    async def predict(self, ops_batch_json: str) -> AsyncIterator[str]:
        """Run a batch of LMTP operations; yield its reply lines."""
        replies: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        session = TokenSession(LMTPAsyncTransport(replies), self._arguments, static=True, longrunning=True)
        names: list[Any] = []
        try:
            for name, payload in json.loads(ops_batch_json):
                names.append(payload["stream_id"])
                # The session needs numbers; a client's stream id may be anything.
                await session.handle(name, {**payload, "stream_id": len(names) - 1, "model": self._model})
            unfinished = set(range(len(names)))
            while unfinished:
                kind, reply = await replies.get()
                stream = reply["stream_id"]
                if stream not in unfinished:
                    continue
                if kind == "MSG" or "error" in reply or reply.get("finish_reason") is not None:
                    unfinished.discard(stream)
                yield f"{kind} {json.dumps({**reply, 'stream_id': names[stream]})}\n"
        finally:
            session.close()


class Server:
    """Predictions over HTTP, with Cog's server-sent events."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def application(self) -> web.Application:
        """The routes that the stand-in calls."""
        application = web.Application(client_max_size=2**26)
        application.router.add_get("/openapi.json", self.schema)
        application.router.add_put("/predictions/{id}", self.create)
        return application

    async def schema(self, request: web.Request) -> web.Response:
        """An empty schema: the stand-in only passes it on."""
        return web.json_response({})

    async def create(self, request: web.Request) -> web.StreamResponse:
        """Run a prediction and stream its lines."""
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        outcome: dict[str, Any] = {"status": "succeeded"}
        await self._send(response, "start", {"id": request.match_info["id"], "status": "processing"})
        try:
            async for line in self._predictor.predict(body["input"]["ops_batch_json"]):
                await self._send(response, "output", {"chunk": line})
        except (ValueError, LookupError, TypeError) as error:
            outcome = {"status": "failed", "error": str(error)}
        await self._send(response, "completed", outcome)
        return response

    async def _send(self, response: web.StreamResponse, event: str, data: dict[str, Any]) -> None:
        await response.write(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode())


async def serve(weights: str, dtype: str) -> None:
    """Load the model and serve until the process ends."""
    predictor = Predictor(weights, dtype)
    await predictor.loaded()
    runner = web.AppRunner(Server(predictor).application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"Ready: http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Run the server from the command line."""
    parser = argparse.ArgumentParser(description="LMQL's own server, for script/benchmark.")
    parser.add_argument("--weights", required=True, help="the directory with the model's files")
    parser.add_argument("--dtype", default="bfloat16", help="torch's name of the dtype (default: %(default)s)")
    options = parser.parse_args()
    asyncio.run(serve(options.weights, options.dtype))


if __name__ == "__main__":
    main()
