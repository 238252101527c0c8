"""OpenAI's `/v1/chat/completions`: a conversation is the predictor's input ``messages``, answered as LMTP."""

from aiohttp import web

from gateway import openai_answers as answers
from gateway.model import Model, Models
from gateway.openai_answers import Choice, Json, Parts, Usage
from gateway.openai_requests import Chat, read
from gateway.replies import Reply
from gateway.target import Target


async def chat(request: web.Request, target: Target, models: Models) -> web.StreamResponse:
    """`POST /v1/chat/completions`."""
    asked = read(await request.read(), Chat)
    chatting = _Chatting(target, asked, await models.get())
    if asked.stream:
        start = answers.head(asked, "chat.completion.chunk", "chatcmpl")
        return await answers.stream(request, asked, start, chatting.parts(), chatting.usage)
    return answers.whole(answers.head(asked, "chat.completion", "chatcmpl"), await chatting.whole(), chatting.usage)


class _Chatting:
    """A request that is answered."""

    def __init__(self, target: Target, asked: Chat, model: Model) -> None:
        """Raises ApiError for what the predictor's inputs cannot express."""
        self.usage = Usage()
        self._target = target
        self._asked = asked
        self._model = model
        self._inputs = asked.inputs(model)

    async def parts(self) -> Parts:
        """The choices as they grow; first the role of each."""
        role = {"role": "assistant", "content": "", "refusal": None}
        first = [_delta(i, role, None, None) for i in range(self._asked.n)]
        async with self._target.predict(self._inputs) as running:
            async for tokens in answers.tokens(running, range(self._asked.n)):
                yield first + [
                    _delta(int(t.stream_id or 0), {"content": t.text}, self._logprobs([t]), t.finish_reason)
                    for t in tokens
                ]
                first = []
        self.usage.count(running)

    async def whole(self) -> list[Json]:
        """The finished choices."""
        choices = [Choice() for _ in range(self._asked.n)]
        async with self._target.predict(self._inputs) as running:
            await answers.gather(running, choices)
        self.usage.count(running)
        return [
            {
                "index": i,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.tokens),
                "finish_reason": choice.finish_reason,
            }
            for i, choice in enumerate(choices)
        ]

    def _logprobs(self, tokens: list[Reply]) -> Json | None:
        if not self._asked.logprobs:
            return None
        content = [self._detailed(token) for token in tokens if token.token not in self._model.end_of_sequence]
        return {"content": content, "refusal": None}

    def _detailed(self, token: Reply) -> Json:
        model = self._model
        likely = list(token.top_logprobs.items())[: self._asked.top_logprobs]
        return {
            "token": answers.spelt(model, token),
            "logprob": token.logprob,
            "bytes": model.bytes(token.token),
            "top_logprobs": [{"token": model.text(i), "logprob": p, "bytes": model.bytes(i)} for i, p in likely],
        }


def _delta(index: int, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
