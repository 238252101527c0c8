"""Where predictions run: a container that speaks Cog's HTTP interface, or Replicate's API in front of one."""

import asyncio
import json
import os
import random
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from gateway.server_sent_events import MAX_EVENT, Events

BUSY_SECONDS = 60.0
"""How long a busy target is asked again."""

MAX_PAUSE = 0.5
"""Seconds between two such requests, at most."""

IDLE_SECONDS = 900.0
"""A target that sends nothing for so long is given up. It covers the start of a cold container."""

PLACES = 64
"""Predictions that a container runs at once; the next ones wait here."""

MAX_REFUSAL = 2**16
"""Bytes to read of an answer that refuses a prediction."""

POLL_SECONDS = 0.5
"""How often a prediction on Replicate is looked at once its stream has ended, until it has, too."""

CANCEL_SECONDS = 10.0
"""How long the end of the gateway waits for cancels on Replicate."""

REPLICATE = "https://api.replicate.com"

TERMINAL = ("succeeded", "failed", "canceled", "aborted")

_RUNTIME_PREFIX = re.compile(
    r"^(Prediction failed: )?((Async prediction failed|Generator iteration error): )?(RequestError: )?"
)
_OTHER_ERROR = re.compile(r"\w+(Error|Exception): ")

Json = dict[str, Any]


class TargetError(Exception):
    """A prediction that did not succeed. ``status`` is the HTTP status that tells a client whose fault it is."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Running:
    """A prediction that was accepted. Iterate `chunks` once; then ``metrics`` are known."""

    def __init__(self) -> None:
        self.chunks: AsyncGenerator[str, None]
        self.metrics: Json = {}


class Target(ABC):
    """Runs predictions."""

    name: str
    """For error messages."""

    def __init__(self) -> None:
        # No limit on connections: the server's own limit bounds them.
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=IDLE_SECONDS),
        )

    async def close(self) -> None:
        """Close the connections, which cancels what runs."""
        await self.session.close()

    @asynccontextmanager
    async def predict(self, inputs: Json) -> AsyncIterator[Running]:
        """Run a prediction; leaving the block before its end cancels it. Raises TargetError, also while iterating."""
        running = Running()
        async with AsyncExitStack() as stack:
            with self._explained():
                running.chunks = await stack.enter_async_context(self._predict(inputs, running))
            await stack.enter_async_context(aclosing(running.chunks))
            yield running

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the errors of a connection into a TargetError."""
        try:
            yield
        except (aiohttp.ClientConnectionError, TimeoutError, OSError) as error:
            reason = "did not answer in time" if isinstance(error, TimeoutError) else "cannot be reached"
            raise TargetError(502, f"The target {self.name} {reason}.") from error
        except aiohttp.ClientPayloadError as error:
            raise TargetError(502, f"The target {self.name} broke off its answer.") from error
        except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
            raise TargetError(502, f"The target {self.name} sent what is no answer to a prediction.") from error

    @abstractmethod
    def _predict(self, inputs: Json, running: Running) -> AbstractAsyncContextManager[AsyncGenerator[str, None]]:
        """A context with the output's chunks, which raise what `_explained` makes of errors. The metrics are put into
        ``running``."""


class Container(Target):
    """A container, or `script/serve`, at a URL."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.name = url
        self._address = f"{url.rstrip('/')}/predictions"
        self._places = asyncio.Semaphore(PLACES)

    @asynccontextmanager
    async def _predict(self, inputs: Json, running: Running) -> AsyncIterator[AsyncGenerator[str, None]]:
        body = msgspec.json.encode({"input": inputs})
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        async with (
            self._places,
            await _accepted(
                lambda: self.session.post(self._address, data=body, headers=headers, allow_redirects=False),
                "the target is busy",
            ) as response,
        ):
            if response.status != 200:
                raise _refusal(response.status, await _text(response, MAX_REFUSAL))
            if response.content_type != "text/event-stream":
                raise TargetError(502, f"The target {self.name} sends {response.content_type}: it is no container.")
            yield self._chunks(response, running)
            # Here the connection is closed unless the answer was read to its end. The runtime then cancels.

    async def _chunks(self, response: aiohttp.ClientResponse, running: Running) -> AsyncGenerator[str, None]:
        events = Events()
        with self._explained():
            while piece := await response.content.readany():
                chunks = []
                for name, data in events.feed(piece):
                    if name == b"output":
                        chunks.append(_output.decode(data).chunk)
                    elif name == b"completed":
                        ended = msgspec.json.decode(data, type=_Ended)
                        if chunks:
                            yield "".join(chunks)
                        await response.content.readany()  # the end, so that the connection can be used again
                        _check(ended, running)
                        return
                    elif name == b"error":
                        raise failed(msgspec.json.decode(data, type=_Failed).error, 502)
                if chunks:
                    yield "".join(chunks)
        raise TargetError(502, "The target closed the connection before the prediction was done.")


class Replicate(Target):
    """A model or a deployment on Replicate. The token goes to the API's own address only."""

    def __init__(self, model: str, token: str, api: str = REPLICATE) -> None:
        """``model``: ``user/name``, ``user/name:version`` or ``deployment/user/name``."""
        super().__init__()
        self.name = f"replicate:{model}"
        self._api = f"{api.rstrip('/')}/v1"
        self._headers = {"Authorization": f"Bearer {token}"}
        name, _, self._version = model.partition(":")
        self._deployment = name.removeprefix("deployment/") if name.startswith("deployment/") else ""
        self._model = name
        self._cancels: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for cancels that are on their way, then close."""
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=CANCEL_SECONDS)
        await super().close()

    @asynccontextmanager
    async def _predict(self, inputs: Json, running: Running) -> AsyncIterator[AsyncGenerator[str, None]]:
        creating = asyncio.create_task(self._create(inputs))
        ended = asyncio.Event()
        try:
            # A caller that leaves now would not learn which prediction it has to cancel.
            made = await asyncio.shield(creating)
            yield self._chunks(made, running, ended)
        finally:
            if not ended.is_set():
                # The caller may be cancelled itself, so the request is a task of its own.
                task = asyncio.create_task(self._cancel(creating))
                self._cancels.add(task)
                task.add_done_callback(self._cancels.discard)

    async def _create(self, inputs: Json) -> Json:
        path, body = "predictions", {"input": inputs, "stream": True}
        if self._deployment:
            path = f"deployments/{self._deployment}/predictions"
        else:
            body["version"] = await self._latest()
        return await self._call("POST", path, body)

    async def _latest(self) -> str:
        """The version that predictions are made with: the one given, or the model's latest, looked up once."""
        if not self._version:
            latest = (await self._call("GET", f"models/{self._model}")).get("latest_version")
            if not latest:
                raise TargetError(502, f"{self.name} has no version yet.")
            self._version = latest["id"]
        return self._version

    async def _call(self, method: str, path: str, body: Json | None = None) -> Json:
        """A call of the API. Raises TargetError; the message never holds the token."""
        url = f"{self._api}/{path}"
        async with await _accepted(
            lambda: self.session.request(method, url, json=body, headers=self._headers, allow_redirects=False),
            "Replicate takes no more calls",
        ) as response:
            text = await _text(response, MAX_EVENT)
            if response.status in (401, 403):
                raise TargetError(502, "Replicate does not accept the gateway's REPLICATE_API_TOKEN.")
            if response.status == 404:
                raise TargetError(502, f"There is no {self.name} that the gateway's token may use.")
            if response.status == 422:
                raise TargetError(400, _detail(text))
            if response.status >= 300:
                raise TargetError(502, f"Replicate answered {response.status}: {_detail(text)}")
            return dict(json.loads(text))

    async def _chunks(self, made: Json, running: Running, ended: asyncio.Event) -> AsyncGenerator[str, None]:
        sent = 0
        with self._explained():
            if stream := made.get("urls", {}).get("stream"):
                # The address is secret, so it needs no token.
                headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
                async with self.session.get(stream, headers=headers, allow_redirects=False) as response:
                    response.raise_for_status()
                    events = Events()
                    while piece := await response.content.readany():
                        come = events.feed(piece)
                        if text := b"".join([data for name, data in come if name == b"output"]).decode():
                            sent += len(text)
                            yield text
                        if any(name in (b"done", b"error") for name, _ in come):
                            break
            while (document := await self._call("GET", f"predictions/{made['id']}"))["status"] not in TERMINAL:
                await asyncio.sleep(POLL_SECONDS)
            if text := "".join(document.get("output") or [])[sent:]:
                yield text  # a model without a stream
            ended.set()
            _check(msgspec.convert(document, _Ended), running)

    async def _cancel(self, creating: asyncio.Task[Json]) -> None:
        """Cancel a prediction, once it is known, if it was made at all."""
        with suppress(TargetError, aiohttp.ClientError, TimeoutError):
            await self._call("POST", f"predictions/{(await creating)['id']}/cancel")


def open_target(address: str) -> Target:
    """The target that an address names: a URL, or ``replicate:`` and a model. Raises ValueError with what to do."""
    if not address.startswith("replicate:"):
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"{address}: give a URL such as http://127.0.0.1:5000, or replicate:user/model.")
        return Container(address)
    model, token = address.removeprefix("replicate:"), os.environ.get("REPLICATE_API_TOKEN", "")
    if not re.fullmatch(r"(deployment/)?[\w.-]+/[\w.-]+(:[\w.-]+)?", model):
        raise ValueError(f"{address}: give replicate:user/model, user/model:version or deployment/user/name.")
    if not token:
        raise ValueError("Set REPLICATE_API_TOKEN to a token of https://replicate.com/account/api-tokens.")
    return Replicate(model, token, os.environ.get("REPLICATE_API_BASE_URL", REPLICATE))


class _Output(Struct):
    chunk: str


_output = msgspec.json.Decoder(_Output)


class _Ended(Struct):
    status: str
    error: str | None = None
    metrics: Json | None = None


class _Failed(Struct):
    error: str = "The prediction failed."


def _check(ended: _Ended, running: Running) -> None:
    """Keep the metrics. Raises TargetError unless the prediction succeeded."""
    running.metrics = ended.metrics or {}
    if ended.status != "succeeded":
        raise failed(ended.error or f"The prediction was {ended.status}.", 400 if ended.status == "failed" else 502)


def failed(message: str, status: int = 400) -> TargetError:
    """The error for a message of the predictor, which is about the request unless it says otherwise."""
    message = _RUNTIME_PREFIX.sub("", message)
    if "ask again later" in message:
        status = 503
    elif _OTHER_ERROR.match(message) or message.startswith("the engine has stopped"):
        status = 502
    return TargetError(status, message)


async def _accepted(request: Any, busy: str) -> aiohttp.ClientResponse:
    """The response to a request, which is sent again while the answer is 409 or 429.

    Cog's runtime answers 409 if all places are taken, and now and then to one of two simultaneous requests.
    """
    pause = 0.002
    deadline = asyncio.get_running_loop().time() + BUSY_SECONDS
    while True:
        response: aiohttp.ClientResponse = await request()
        if response.status not in (409, 429):
            return response
        response.release()
        if asyncio.get_running_loop().time() + pause > deadline:
            raise TargetError(503, f"{busy[0].upper()}{busy[1:]}; ask again later.")
        await asyncio.sleep(pause * random.uniform(0.5, 1))
        pause = min(1.3 * pause, MAX_PAUSE)


async def _text(response: aiohttp.ClientResponse, limit: int) -> str:
    """The body, or the first bytes of it if it has more than ``limit``."""
    body = bytearray()
    while len(body) < limit and (piece := await response.content.readany()):
        body += piece
    return body[:limit].decode(errors="replace")


def _refusal(status: int, text: str) -> TargetError:
    """The error for a request that the container refused."""
    if 300 <= status < 400:
        return TargetError(502, f"The target redirects ({status}), which is not followed: give --target its own URL.")
    if status != 422:
        return TargetError(503 if status == 503 else 502, f"The target answered {status}: {_detail(text)}")
    try:
        problems = "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in json.loads(text)["detail"])
    except (ValueError, LookupError, TypeError):
        problems = _detail(text)
    return TargetError(400, problems)


def _detail(text: str) -> str:
    """What an error document says, on one line."""
    try:
        document = json.loads(text)
        text = str(document.get("detail") or document.get("error") or document)
    except (ValueError, AttributeError):
        pass
    return " ".join(text[:500].split())
