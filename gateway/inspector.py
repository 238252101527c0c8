"""What the page at `/` asks: one prediction, each of its tokens with what it and its alternatives spell.

The body is ``{"input": {…}}``, as for Cog's ``/predictions``. The answer is JSON, one object a line: tokens, then
``distribution`` over choices, ``metrics``, or ``error``.
"""

from typing import Annotated, Any

import msgspec
from aiohttp import web

from gateway.errors import ApiError, told
from gateway.model import Model, Models
from gateway.openai_answers import document, tokens
from gateway.replies import Reply
from gateway.target import Target, TargetError

Json = dict[str, Any]

_METRICS = (
    "input_token_count", "output_token_count", "reused_token_count", "computed_token_count", "drafted_token_count",
    "accepted_token_count", "time_to_first_token", "tokens_per_second", "constraint_valid",
)  # fmt: skip


class _Document(msgspec.Struct):
    """The predictor's answer with output=json."""

    class Choice(msgspec.Struct):
        finish_reason: str
        tokens: list[Reply]

    choices: Annotated[list[Choice], msgspec.Meta(min_length=1)]
    distribution: list[Json] = []
    prompt_logprobs: list[Reply] = []


async def describe(request: web.Request, models: Models) -> web.Response:
    """`GET /inspect`: what the page has to know of the model."""
    model = await models.get()
    return document({"model": model.name, "scores_prompts": model.scores_prompts})


async def inspect(request: web.Request, target: Target, models: Models) -> web.StreamResponse:
    """`POST /inspect`."""
    try:
        inputs: Json = msgspec.json.decode(await request.read(), type=dict[str, Json])["input"]
    except (msgspec.DecodeError, RecursionError, UnicodeError, LookupError):
        raise ApiError(400, 'The body must be {"input": {…}}.') from None
    model = await models.get()
    compared = bool(inputs.get("choices"))
    if "ops_batch_json" not in inputs:
        inputs["output"] = "json" if compared else "lmtp"  # only the document holds the distribution
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
    try:
        async with target.predict(inputs) as running:
            await response.prepare(request)
            if compared:
                text = "".join([chunk async for chunk in running.chunks])
                await response.write(_of_document(model, _read(text)))
            else:
                async for some in tokens(running, ("prompt", 0)):
                    await response.write(b"".join([_line(_token(model, token)) for token in some]))
        metrics = {name: running.metrics[name] for name in _METRICS if name in running.metrics}
        await response.write(_line({"metrics": metrics}))
    except ConnectionError:
        raise  # the client has left
    except Exception as error:
        if not response.prepared:
            raise
        await response.write(_line({"error": str(told(error))}))
    return response


def _read(text: str) -> _Document:
    try:
        return msgspec.json.decode(text, type=_Document)
    except (msgspec.DecodeError, RecursionError) as error:
        raise TargetError(502, f"The target's output is not the predictor's: {error}.") from error


def _of_document(model: Model, document: _Document) -> bytes:
    lines = []
    for stream, some in (("prompt", document.prompt_logprobs), (0, document.choices[0].tokens)):
        for token in some:
            token.stream_id = stream
            lines.append(_line(_token(model, token)))
    return b"".join([*lines, _line({"distribution": document.distribution})])


def _token(model: Model, reply: Reply) -> Json:
    return {
        "stream": reply.stream_id,
        "id": reply.token,
        "text": model.text(reply.token) if model.spellings is not None else reply.text,
        "logprob": reply.logprob,
        "ends": reply.token in model.end_of_sequence,
        "finish": reply.finish_reason,
        "top": [[i, model.text(i), logprob] for i, logprob in reply.top_logprobs.items()],
    }


def _line(document: Json) -> bytes:
    return msgspec.json.encode(document) + b"\n"
