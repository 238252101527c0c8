"""What answers of OpenAI's API share: tokens read from a prediction, usage, and the form of a stream."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from gateway import replies
from gateway.errors import told
from gateway.model import Model
from gateway.openai_requests import Request
from gateway.replies import Reply
from gateway.target import Running, TargetError, failed

Json = dict[str, Any]
Parts = AsyncGenerator[list[Json], None]
"""Choices in the order in which a stream sends them, those that come together in one list."""


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def count(self, running: Running, n: int = 1) -> None:
        """Take the metrics of a prediction that has ended. ``n``: how often it counted the prompt. Raises TargetError
        for metrics that are no numbers."""
        try:
            metrics = msgspec.convert(running.metrics, _Metrics)
        except msgspec.ValidationError as error:
            raise TargetError(502, f"The target's metrics are not the predictor's: {error}.") from error
        self.prompt = int(metrics.input_token_count) // n
        self.completion = int(metrics.output_token_count)
        self.cached = min(int(metrics.reused_token_count), self.prompt)

    def document(self) -> Json:
        """As responses hold it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class _Metrics(msgspec.Struct):
    """What is counted, of a prediction's metrics. Some JSON libraries write whole numbers as 4.0."""

    input_token_count: float = 0
    output_token_count: float = 0
    reused_token_count: float = 0


@dataclass
class Choice:
    """One completion, put together."""

    tokens: list[Reply] = field(default_factory=list)
    finish_reason: str = "length"

    @property
    def text(self) -> str:
        """The text of its tokens."""
        return "".join(token.text for token in self.tokens)


def head(asked: Request, kind: str, prefix: str) -> Json:
    """What every document of an answer begins with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}


async def tokens(running: Running, streams: Collection[int | str]) -> AsyncIterator[list[Reply]]:
    """The tokens as they come. Raises TargetError if a stream failed, or is none of those asked for, ``streams``."""
    async for lines in replies.lines(running.chunks):
        parsed = replies.parse(lines)
        for i, token in enumerate(parsed):
            if token.error is not None:
                if i:
                    yield parsed[:i]
                raise failed(token.error)
            if token.stream_id not in streams:
                raise TargetError(
                    502, f"The target sent a token of stream {token.stream_id!a:.99}: nobody asked for it."
                )
        yield parsed


async def gather(running: Running, choices: list[Choice]) -> None:
    """Add the tokens of a prediction to the choices. Stream ids are their indexes."""
    async for some in tokens(running, range(len(choices))):
        for token in some:
            choice = choices[int(token.stream_id or 0)]
            choice.tokens.append(token)
            choice.finish_reason = token.finish_reason or choice.finish_reason


async def stream(request: web.Request, asked: Request, start: Json, parts: Parts, usage: Usage) -> web.StreamResponse:
    """Send choices as server-sent events. What fails before the first one is raised."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    head = msgspec.json.encode(start)[:-1] + b',"choices":['  # the same in each chunk
    try:
        async with aclosing(parts):
            async for choices in parts:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(
                    b"".join([b"data: %b%b]}\n\n" % (head, msgspec.json.encode(choice)) for choice in choices])
                )
        if not response.prepared:
            await response.prepare(request)
        if asked.stream_options and asked.stream_options.include_usage:
            await response.write(_event(start | {"choices": [], "usage": usage.document()}))
        await response.write(b"data: [DONE]\n\n")
    except ConnectionError:
        raise  # the client has left
    except Exception as error:
        if not response.prepared:
            raise
        await response.write(_event(told(error).document()))
    return response


def whole(start: Json, choices: list[Json], usage: Usage) -> web.Response:
    """An answer in one document."""
    return document(start | {"choices": choices, "usage": usage.document()})


def document(content: Json) -> web.Response:
    """A response of JSON."""
    return web.Response(body=msgspec.json.encode(content), content_type="application/json")


def spelt(model: Model, token: Reply) -> str:
    """A token's text by itself."""
    return model.text(token.token) if model.spellings is not None else token.text


def _event(content: Json) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
