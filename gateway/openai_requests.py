"""Requests of OpenAI's API, validated, and turned into inputs of a prediction.

Fields and defaults follow https://platform.openai.com/docs/api-reference. What is not supported is an error, never
ignored: a client must not take an answer for what it asked for.
"""

import difflib
import json
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from gateway.errors import ApiError
from gateway.model import Model

MAX_OPERATIONS = 256
"""Operations in one prediction."""

MAX_N = 16
"""Completions that a chat can have."""

IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "parallel_tool_calls",
}  # fmt: skip
"""Fields that do not change an answer here."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
"""Fields that are not supported, with the values that ask for nothing."""

Json = dict[str, Any]


class StreamOptions(Struct):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of completions take. Extensions of this project come last."""

    model: str
    temperature: Annotated[float, Meta(ge=0, le=5)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] = {}
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0

    top_k: Annotated[int, Meta(ge=0)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    choices: list[str] | None = None
    regex: str | None = None
    grammar: str | None = None
    cache_salt: str | None = None
    allow_special_tokens: bool = False

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(Request, kw_only=True):
    """A request to ``/v1/completions``."""

    prompt: str | list[Any]
    max_tokens: Annotated[int, Meta(ge=0)] = 16
    logprobs: Annotated[int, Meta(ge=0)] | None = None
    echo: bool = False
    best_of: int | None = None
    json_schema: Json | bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts: one or several, as text or as token ids. Raises ApiError, also for fields that contradict."""
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens is 0; that needs echo.", "max_tokens")
        if self.best_of not in (None, self.n):
            raise ApiError(400, "best_of is not supported beyond n.", "best_of", "unsupported_parameter")
        given = self.prompt
        several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        try:
            return msgspec.convert(several, list[str | list[Annotated[int, Meta(ge=0)]]])
        except msgspec.ValidationError:
            reason = "prompt must be a text, a list of texts, a list of token ids, or a list of such lists."
            raise ApiError(400, reason, "prompt") from None

    def operation(self, stream_id: int, prompt: str | list[int], index: int, adapter: str) -> Json:
        """GENERATE for completion number ``index`` of a prompt."""
        fields = {
            "stream_id": stream_id,
            "prompt": prompt,
            "max_tokens": self.max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": None if self.top_p is None else max(self.top_p, 1e-9),
            "top_k": self.top_k,
            "min_p": self.min_p,
            "min_tokens": self.min_tokens,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": None if self.seed is None else self.seed + index,
            "stop": self.stops or None,
            "logit_bias": self.logit_bias or None,
            "top_logprobs": self.logprobs or 0,
            "text": True,
            "choices": self.choices,
            "regex": self.regex,
            "grammar": self.grammar,
            "json_schema": self.json_schema,
            "adapter": adapter or None,
            "cache_salt": self.cache_salt,
            "allow_special_tokens": self.allow_special_tokens,
        }
        return {name: value for name, value in fields.items() if value is not None}


class JsonSchema(Struct):
    """The schema of a response format. It is always strict here."""

    schema_: Json | bool = msgspec.field(name="schema", default=True)
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """The form that an answer must have."""

    type: str
    json_schema: JsonSchema | None = None

    def constraint(self) -> Json | bool | None:
        """The schema, true for any JSON, or None for any text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        if self.type == "json_schema" and self.json_schema is not None:
            return self.json_schema.schema_
        reason = "response_format must be of type text, json_object, or json_schema with a json_schema."
        raise ApiError(400, reason, "response_format")


class Part(Struct, forbid_unknown_fields=True):
    """A part of a message's content."""

    type: str
    text: str | None = None


class Message(Struct, forbid_unknown_fields=True):
    """A turn of a conversation."""

    role: str
    content: str | list[Json] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None

    def plain(self, index: int) -> Json:
        """The message as the predictor's input takes it."""
        here = f"messages[{index}]"
        if self.role not in ("system", "developer", "user", "assistant"):
            raise ApiError(400, f"{here}: the role {self.role!r} is not supported.", f"{here}.role")
        for field in ("name", "tool_calls", "audio", "function_call"):
            if getattr(self, field):
                raise ApiError(400, f"{here}: {field} is not supported.", f"{here}.{field}", "unsupported_parameter")
        return {"role": "system" if self.role == "developer" else self.role, "content": self._text(here)}

    def _text(self, here: str) -> str:
        if isinstance(self.content, str):
            return self.content
        texts = []
        for part in self.content or []:
            if part.get("type") not in ("text", "refusal") or not isinstance(part.get(part["type"]), str):
                reason = f"{here}: content of type {part.get('type')!r} is not supported; this model reads text."
                raise ApiError(400, reason, f"{here}.content", "unsupported_parameter")
            texts.append(part[part["type"]])
        return "".join(texts)


class Chat(Request, kw_only=True):
    """A request to ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0)] = 0
    response_format: ResponseFormat | None = None

    def inputs(self, model: Model) -> Json:
        """The prediction's inputs. What is left out is what the model sets, then OpenAI's default."""
        if self.n > MAX_N:
            raise ApiError(400, f"n is {self.n}; a chat has at most {MAX_N} completions.", "n")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", "top_logprobs")
        schema = self.response_format.constraint() if self.response_format else None
        temperature = self.temperature
        if temperature is None and "temperature" not in model.defaults:
            temperature = 1.0
        inputs = {
            "messages": json.dumps([message.plain(i) for i, message in enumerate(self.messages)]),
            "output": "lmtp",
            "max_tokens": self.max_completion_tokens or self.max_tokens or model.context,
            "n": self.n,
            "temperature": temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "min_tokens": self.min_tokens or None,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty or None,
            "frequency_penalty": self.frequency_penalty or None,
            "seed": self.seed,
            "stop_sequences": json.dumps(self.stops) if self.stops else None,
            "logit_bias": json.dumps(self.logit_bias) if self.logit_bias else None,
            "top_logprobs": self.top_logprobs,
            "json_schema": None if schema is None else json.dumps(schema),
            "choices": None if self.choices is None else json.dumps(self.choices),
            "regex": self.regex,
            "grammar": self.grammar,
            "adapter": adapter_of(self.model, model) or None,
            "cache_salt": self.cache_salt,
            "allow_special_tokens": self.allow_special_tokens or None,
        }
        return {name: value for name, value in inputs.items() if value is not None}


R = TypeVar("R", bound=Request)


def read(body: bytes, kind: type[R]) -> R:
    """Parse a request. Raises ApiError, naming the parameter."""
    try:
        given = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ApiError(400, f"The body must be a JSON object: {error}.") from None
    given = {name: value for name, value in given.items() if value is not None and name not in IGNORED}
    known = kind.__struct_fields__
    for name in list(given):
        if name in NEUTRAL and given[name] in NEUTRAL[name]:
            del given[name]
        elif name not in known:
            near = difflib.get_close_matches(name[:60], known, 1)
            hint = f" Did you mean {near[0]!r}?" if near and name not in NEUTRAL else ""
            raise ApiError(400, f"{name[:60]!r} is not supported.{hint}", name[:60], "unsupported_parameter")
    try:
        request = msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).replace("`", "").partition(" - at ")
        param = place.removeprefix("$.") or None
        raise ApiError(400, f"{param}: {reason[0].lower()}{reason[1:]}." if param else f"{reason}.", param) from None
    if request.stream_options and not request.stream:
        raise ApiError(400, "stream_options needs stream to be true.", "stream_options")
    return request


def adapter_of(name: str, model: Model) -> str:
    """The adapter that a model's name means: empty for the model itself. Raises ApiError for an unknown name."""
    if name == model.name:
        return ""
    if name in model.adapters:
        return name
    names = ", ".join((model.name, *model.adapters))
    raise ApiError(404, f"The model {name[:200]!r} does not exist. Served here: {names}.", "model", "model_not_found")
