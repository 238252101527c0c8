"""OpenAI's `/v1/completions`: texts or token ids continued, and scored with ``echo``.

Each completion is a GENERATE operation, all of them one prediction. An echoed prompt is scored first, by predictions of
its own; the completions then reuse what that computed.
"""

from dataclasses import dataclass

import msgspec
from aiohttp import web

from gateway import openai_answers as answers
from gateway.errors import ApiError
from gateway.model import Model, Models
from gateway.openai_answers import Choice, Json, Parts, Usage
from gateway.openai_requests import MAX_OPERATIONS, Completion, adapter_of, read
from gateway.replies import Reply
from gateway.target import Running, Target


async def complete(request: web.Request, target: Target, models: Models) -> web.StreamResponse:
    """`POST /v1/completions`."""
    asked = read(await request.read(), Completion)
    model = await models.get()
    adapter = adapter_of(asked.model, model)
    prompts = asked.prompts()
    if asked.n * len(prompts) > MAX_OPERATIONS:
        raise ApiError(400, f"{len(prompts)} prompts and n={asked.n} are more than {MAX_OPERATIONS} completions.")
    completing = _Completing(target, asked, model, adapter)
    if asked.echo:
        await completing.score(prompts)
        prompts = [[token.token for token in echo] for echo in completing.echoes]
    start = answers.head(asked, "text_completion", "cmpl")
    if asked.stream:
        return await answers.stream(request, asked, start, completing.parts(prompts), completing.usage)
    return answers.whole(start, await completing.whole(prompts), completing.usage)


@dataclass
class _Columns:
    """Log-probabilities of one choice, in columns."""

    model: Model
    offset: int = 0
    """Characters of the choice before the next token."""

    def document(self, tokens: list[Reply], top: bool) -> Json:
        """Of the next tokens. The first one of an echo has nothing before it."""
        columns: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [] if top else None, "text_offset": []}
        for token in tokens:
            first = token.stream_id == ECHO and not columns["tokens"] and token.logprob == 0.0
            columns["tokens"].append(answers.spelt(self.model, token))
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
"""The id of the tokens of an echoed prompt."""


class _Completing:
    """A request that is answered."""

    def __init__(self, target: Target, asked: Completion, model: Model, adapter: str) -> None:
        self.usage = Usage()
        self.echoes: list[list[Reply]] = []
        """The scored tokens of each prompt, if asked for."""
        self._target = target
        self._asked = asked
        self._adapter = adapter
        self._model = model
        self._columns: dict[int, _Columns] = {}

    async def score(self, prompts: list[str | list[int]]) -> None:
        """Fill `echoes`."""
        self.echoes = [[] for _ in prompts]
        operations: list[list[str | Json]] = []
        for place, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                self.echoes[place] = await self._score_text(prompt)
            else:
                score: Json = {"stream_id": place, "prompt": [], "scored": prompt, "text": True}
                score |= {"top_logprobs": self._asked.logprobs or 0, "adapter": self._adapter}
                operations.append(["SCORE", score | {"cache_salt": self._asked.cache_salt}])
        if operations:
            async with self._target.predict(_batch(operations)) as running:
                async for tokens in answers.tokens(running, range(len(prompts))):
                    for token in tokens:
                        self.echoes[int(token.stream_id or 0)].append(token)
        for echo in self.echoes:
            for token in echo:
                token.stream_id, token.finish_reason = ECHO, None
        self.usage.prompt = sum(map(len, self.echoes))

    async def _score_text(self, prompt: str) -> list[Reply]:
        """The predictor's own input tokenizes a text as the beginning of a sequence; SCORE would continue one."""
        inputs = {
            "prompt": prompt,
            "prompt_template": "{prompt}",
            "prompt_logprobs": True,
            "output": "lmtp",
            "max_tokens": 1,
            "temperature": 0.0,
            "top_logprobs": self._asked.logprobs or 0,
            "adapter": self._adapter,
            "cache_salt": self._asked.cache_salt or "",
            "allow_special_tokens": self._asked.allow_special_tokens,
        }
        scored: list[Reply] = []
        async with self._target.predict(inputs) as running:
            async for tokens in answers.tokens(running, ("prompt", 0)):
                scored += [token for token in tokens if token.stream_id == "prompt"]
        return scored

    def _operations(self, prompts: list[str | list[int]]) -> list[list[str | Json]]:
        n = self._asked.n if self._asked.max_tokens else 0
        return [
            ["GENERATE", self._asked.operation(place * n + index, prompt, index, self._adapter)]
            for place, prompt in enumerate(prompts)
            for index in range(n)
        ]

    def _echoed(self, prompts: list[str | list[int]]) -> list[list[Reply]]:
        """What each choice begins with."""
        echoes = self.echoes or [[] for _ in prompts]
        return [echo for echo in echoes for _ in range(self._asked.n)]

    async def parts(self, prompts: list[str | list[int]]) -> Parts:
        """The choices as they grow."""
        operations = self._operations(prompts)
        if self.echoes:
            reason = None if operations else "length"
            yield [self._choice(i, echo, reason) for i, echo in enumerate(self._echoed(prompts))]
        if operations:
            async with self._target.predict(_batch(operations)) as running:
                async for tokens in answers.tokens(running, range(len(operations))):
                    yield [self._choice(int(t.stream_id or 0), [t], t.finish_reason) for t in tokens]
            self._count(running)

    async def whole(self, prompts: list[str | list[int]]) -> list[Json]:
        """The finished choices."""
        choices = [Choice([*echo]) for echo in self._echoed(prompts)]
        if operations := self._operations(prompts):
            async with self._target.predict(_batch(operations)) as running:
                await answers.gather(running, choices)
            self._count(running)
        return [self._choice(i, choice.tokens, choice.finish_reason) for i, choice in enumerate(choices)]

    def _count(self, running: Running) -> None:
        scored = self.usage.prompt
        self.usage.count(running, self._asked.n)
        if self.echoes:  # all of it was computed, by another prediction
            self.usage.prompt, self.usage.cached = scored, 0

    def _choice(self, index: int, tokens: list[Reply], finish_reason: str | None) -> Json:
        logprobs = None
        if self._asked.logprobs is not None:
            columns = self._columns.setdefault(index, _Columns(self._model))
            logprobs = columns.document(tokens, top=self._asked.logprobs > 0)
        text = "".join([token.text for token in tokens])
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _batch(operations: list[list[str | Json]]) -> Json:
    return {"ops_batch_json": msgspec.json.encode(operations).decode()}
