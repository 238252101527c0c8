"""OpenAI's API: models, completions and chat completions, as its official clients use them."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from gateway import replies
from gateway.model import Model, Models
from gateway.openai_requests import MAX_OPERATIONS, ApiError, Chat, Completion, adapter_of, read
from gateway.replies import Reply
from gateway.target import Running, Target, TargetError, failed

Json = dict[str, Any]


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def document(self) -> Json:
        """As responses hold it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class Logprobs:
    """Log-probabilities of a completion, in the format of ``/v1/completions``."""

    model: Model
    offset: int = 0
    """Characters of the choice before the next token."""

    def document(self, tokens: list[Reply], top: bool) -> Json:
        """Of the next tokens. A token that nothing precedes has none."""
        columns: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [] if top else None, "text_offset": []}
        for token in tokens:
            first = token.stream_id == ECHO and not columns["tokens"] and token.logprob == 0.0
            columns["tokens"].append(_spelt(self.model, token))
            columns["token_logprobs"].append(None if first else token.logprob)
            columns["text_offset"].append(self.offset)
            if top:
                likely: dict[str, float] = {}
                for i, logprob in token.top_logprobs.items():
                    likely.setdefault(self.model.text(i), logprob)
                columns["top_logprobs"].append(None if first else likely)
            self.offset += len(token.text)
        return columns


ECHO = "echo"
"""The id of a stream that scores a prompt."""


@dataclass
class Choice:
    """One completion, put together."""

    text: str = ""
    finish_reason: str = "length"
    tokens: list[Reply] = field(default_factory=list)


class Api:
    """Answers requests by predictions of a target."""

    def __init__(self, target: Target, models: Models) -> None:
        self._target = target
        self._models = models
        self._since = int(time.time())

    # Models

    async def list_models(self, request: web.Request) -> web.Response:
        """`GET /v1/models`: the model, and each of its adapters."""
        model = await self._models.get()
        names = (model.name, *model.adapters)
        return _json({"object": "list", "data": [self._described(name) for name in names]})

    async def get_model(self, request: web.Request) -> web.Response:
        """`GET /v1/models/NAME`."""
        name = request.match_info["name"]
        adapter_of(name, await self._models.get())
        return _json(self._described(name))

    def _described(self, name: str) -> Json:
        return {"id": name, "object": "model", "created": self._since, "owned_by": "gateway"}

    # Completions

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/completions`."""
        asked = read(await request.read(), Completion)
        model = await self._models.get()
        adapter = adapter_of(asked.model, model)
        prompts = asked.prompts()
        if asked.max_tokens == 0 and not asked.echo:
            raise ApiError(400, "max_tokens is 0; that needs echo.", "max_tokens")
        if asked.best_of not in (None, asked.n):
            raise ApiError(400, "best_of is not supported beyond n.", "best_of", "unsupported_parameter")
        if asked.n * len(prompts) > MAX_OPERATIONS:
            raise ApiError(400, f"{len(prompts)} prompts and n={asked.n} are more than {MAX_OPERATIONS} completions.")
        usage = Usage()
        echoes: list[list[Reply]] = []
        if asked.echo:
            echoes = await self._score(asked, prompts, adapter, usage)
            prompts = [[token.token for token in echo] for echo in echoes]
        operations = [
            ["GENERATE", asked.operation(place * asked.n + index, prompt, index, adapter)]
            for place, prompt in enumerate(prompts)
            for index in range(asked.n)
        ]
        if not asked.max_tokens:
            operations = []
        inputs = {"ops_batch_json": msgspec.json.encode(operations).decode()}
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head |= {"model": asked.model}
        count = len(prompts) * asked.n
        columns = [Logprobs(model) for _ in range(count)]

        def choice(index: int, tokens: list[Reply], finish_reason: str | None) -> Json:
            logprobs = None
            if asked.logprobs is not None:
                logprobs = columns[index].document(tokens, top=asked.logprobs > 0)
            text = "".join(token.text for token in tokens)
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

        if asked.stream:
            include = bool(asked.stream_options and asked.stream_options.include_usage)

            async def parts() -> AsyncGenerator[list[Json], None]:
                if echoes:
                    yield [choice(i, echoes[i // asked.n], None if operations else "length") for i in range(count)]
                if operations:
                    async with self._target.predict(inputs) as running:
                        async for tokens in self._tokens(running):
                            yield [choice(int(t.stream_id or 0), [t], t.finish_reason) for t in tokens]
                    self._count(usage, running, asked, bool(echoes))

            return await self._stream(request, head, parts(), usage if include else None)
        choices = [Choice(tokens=[*echoes[i // asked.n]] if echoes else []) for i in range(count)]
        if operations:
            async with self._target.predict(inputs) as running:
                await self._gather(running, choices)
            self._count(usage, running, asked, bool(echoes))
        documents = [choice(i, each.tokens, each.finish_reason) for i, each in enumerate(choices)]
        return _json(head | {"choices": documents, "usage": usage.document()})

    async def _score(
        self, asked: Completion, prompts: list[str | list[int]], adapter: str, usage: Usage
    ) -> list[list[Reply]]:
        """The tokens of each prompt, with log-probabilities."""
        echoes: list[list[Reply]] = [[] for _ in prompts]
        shared: Json = {"top_logprobs": asked.logprobs or 0, "cache_salt": asked.cache_salt, "adapter": adapter}
        operations = []
        for place, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                # The predictor's own input tokenizes a text as the beginning of a sequence; SCORE would continue one.
                inputs = shared | {"prompt": prompt, "prompt_template": "{prompt}", "prompt_logprobs": True}
                inputs |= {"output": "lmtp", "max_tokens": 1, "temperature": 0.0}
                inputs |= {"allow_special_tokens": asked.allow_special_tokens, "cache_salt": asked.cache_salt or ""}
                async with self._target.predict(inputs) as running:
                    async for tokens in self._tokens(running):
                        echoes[place] += [token for token in tokens if token.stream_id == "prompt"]
            else:
                score = shared | {"stream_id": place, "prompt": [], "scored": prompt, "text": True}
                operations.append(["SCORE", score])
        if operations:
            async with self._target.predict({"ops_batch_json": msgspec.json.encode(operations).decode()}) as running:
                async for tokens in self._tokens(running):
                    for token in tokens:
                        echoes[int(token.stream_id or 0)].append(token)
        for echo in echoes:
            usage.prompt += len(echo)
            for token in echo:
                token.stream_id, token.finish_reason = ECHO, None
        return echoes

    def _count(self, usage: Usage, running: Running, asked: Completion, echoed: bool) -> None:
        """Add what a prediction took. Operations count a prompt once for each of its ``n`` completions."""
        metrics = running.metrics
        usage.completion = metrics.get("output_token_count", 0)
        if not echoed:
            usage.prompt = metrics.get("input_token_count", 0) // asked.n
            usage.cached = min(metrics.get("reused_token_count", 0), usage.prompt)

    # Chat

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`."""
        asked = read(await request.read(), Chat)
        model = await self._models.get()
        inputs = asked.inputs(model)
        usage = Usage()
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
        head |= {"model": asked.model}

        def logprobs(tokens: list[Reply]) -> Json | None:
            if not asked.logprobs:
                return None
            kept = [token for token in tokens if token.token not in model.end_of_sequence]
            return {"content": [_detailed(model, token, asked.top_logprobs) for token in kept], "refusal": None}

        def count(running: Running) -> None:
            metrics = running.metrics
            usage.prompt = metrics.get("input_token_count", 0)
            usage.completion = metrics.get("output_token_count", 0)
            usage.cached = min(metrics.get("reused_token_count", 0), usage.prompt)

        if asked.stream:
            include = bool(asked.stream_options and asked.stream_options.include_usage)

            async def parts() -> AsyncGenerator[list[Json], None]:
                role = {"role": "assistant", "content": "", "refusal": None}
                async with self._target.predict(inputs) as running:
                    begun = False
                    async for tokens in self._tokens(running):
                        first = [] if begun else [_delta(i, role, None, None) for i in range(asked.n)]
                        begun = True
                        yield first + [
                            _delta(int(t.stream_id or 0), {"content": t.text}, logprobs([t]), t.finish_reason)
                            for t in tokens
                        ]
                count(running)

            head["object"] = "chat.completion.chunk"
            return await self._stream(request, head, parts(), usage if include else None)
        choices = [Choice() for _ in range(asked.n)]
        async with self._target.predict(inputs) as running:
            await self._gather(running, choices)
        count(running)
        documents = [
            {
                "index": i,
                "message": {"role": "assistant", "content": each.text, "refusal": None},
                "logprobs": logprobs(each.tokens),
                "finish_reason": each.finish_reason,
            }
            for i, each in enumerate(choices)
        ]
        return _json(head | {"choices": documents, "usage": usage.document()})

    # Both

    async def _tokens(self, running: Running) -> AsyncIterator[list[Reply]]:
        """The tokens as they come. Raises TargetError if a stream failed."""
        async for lines in replies.lines(running.chunks):
            tokens = replies.parse(lines)
            error = next((i for i, token in enumerate(tokens) if token.error is not None), len(tokens))
            if error:
                yield tokens[:error]
            for token in tokens[error:]:
                raise failed(token.error or "")

    async def _gather(self, running: Running, choices: list[Choice]) -> None:
        async for tokens in self._tokens(running):
            for token in tokens:
                choice = choices[int(token.stream_id or 0)]
                choice.text += token.text
                choice.tokens.append(token)
                choice.finish_reason = token.finish_reason or choice.finish_reason

    async def _stream(
        self, request: web.Request, head: Json, parts: AsyncGenerator[list[Json], None], usage: Usage | None
    ) -> web.StreamResponse:
        """Send choices as server-sent events. What fails before the first one is an ordinary response."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        try:
            async with aclosing(parts):
                async for choices in parts:
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write(b"".join(_event(head | {"choices": [choice]}) for choice in choices))
            if not response.prepared:
                await response.prepare(request)
            if usage:
                await response.write(_event(head | {"choices": [], "usage": usage.document()}))
            await response.write(b"data: [DONE]\n\n")
        except TargetError as error:
            if not response.prepared:
                raise
            await response.write(_event(ApiError(error.status, str(error)).document()))
        return response


def _spelt(model: Model, token: Reply) -> str:
    return model.text(token.token) if model.spellings is not None else token.text


def _detailed(model: Model, token: Reply, top: int) -> Json:
    """A token's log-probability in the format of chat completions."""
    likely = [
        {"token": model.text(i), "logprob": logprob, "bytes": model.bytes(i)}
        for i, logprob in list(token.top_logprobs.items())[:top]
    ]
    spelt = _spelt(model, token)
    return {"token": spelt, "logprob": token.logprob, "bytes": model.bytes(token.token), "top_logprobs": likely}


def _delta(index: int, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _event(document: Json) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def _json(document: Json) -> web.Response:
    return web.Response(body=msgspec.json.encode(document), content_type="application/json")
