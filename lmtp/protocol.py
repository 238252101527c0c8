"""LMTP operations and replies: typed, validated, encoded.

This is LMQL's Language Model Transport Protocol as it travels through a Cog prediction. The input is a JSON array of
``["NAME", {payload}]`` operations. The output is lines of ``TOKEN {object}`` and ``MSG {object}``. This module knows
nothing about models: checks that need a vocabulary or a context length are in engine/stream.py.
"""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

BATCH_LIMIT = 256
"""The most operations in one prediction."""

FORCE = 100.0
"""A ``logit_bias`` of at least this allows its token and forbids every token without one. Its negative forbids."""

CONSTRAINTS = ("choices", "regex", "json_schema", "grammar")
"""The fields of GENERATE that constrain its text. An operation has at most one."""

MAX_COUNT = 2**31 - 1
"""More than any vocabulary. The bound keeps token counts within a tensor's integers."""

StreamId = int | str
Penalty = Annotated[float, Meta(ge=-10_000, le=10_000)]
TokenId = Annotated[int, Meta(ge=0)]
Prompt = list[TokenId] | str
FinishReason = Literal["stop", "length"]


class RequestError(ValueError):
    """A request that cannot be served. The message is one sentence for the person who sent it."""


class Generate(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Continue a prompt. docs/protocol.md describes the fields."""

    stream_id: StreamId
    prompt: Prompt
    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1)] = 32
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    temperature: Annotated[float, Meta(ge=0, le=10_000)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=MAX_COUNT)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.001, le=1000)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    length_penalty: float | None = None  # ignored: it matters only to beam search, which runs in LMQL's client
    seed: int | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_COUNT)] = 1
    logit_bias: dict[TokenId, float] | None = None
    mask: str | None = None
    choices: list[str] | None = None
    regex: str | None = None
    json_schema: dict[str, Any] | bool | None = None
    grammar: str | None = None
    stop: list[Annotated[str, Meta(min_length=1)]] | None = None
    text: bool = False


def constraint_of(operation: Generate) -> str | None:
    """The name of the operation's constraint field, or None. Raises RequestError for more than one."""
    given = [field for field in CONSTRAINTS if getattr(operation, field) is not None]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)}: give one constraint at most.")
    return given[0] if given else None


class Score(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Return the log-probabilities of given tokens after a prompt."""

    stream_id: StreamId
    prompt: Prompt
    scored: Prompt
    model: str | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_COUNT)] = 0
    text: bool = False


class ModelInfo(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Describe the served model."""

    stream_id: StreamId
    model: str | None = None
    data: Any = None


Operation = Generate | Score | ModelInfo
OPERATIONS: dict[str, type[Generate] | type[Score] | type[ModelInfo]] = {
    "GENERATE": Generate,
    "SCORE": Score,
    "MODEL_INFO": ModelInfo,
}


class Token(Struct, frozen=True, kw_only=True):
    """One generated or scored token."""

    token: int
    stream_id: StreamId
    logprob: float
    finish_reason: FinishReason | None
    top_logprobs: dict[int, float] | UnsetType = UNSET
    text: str | UnsetType = UNSET


class Info(Struct, frozen=True, kw_only=True):
    """The reply to MODEL_INFO."""

    stream_id: StreamId
    model_info: dict[str, Any]


class Failure(Struct, frozen=True, kw_only=True):
    """An error reply to one operation. ``kind`` is the command of its line: TOKEN for GENERATE and SCORE, else MSG."""

    stream_id: StreamId | None
    error: str
    kind: Literal["TOKEN", "MSG"]


Reply = Token | Info | Failure


class _FailureLine(Struct, frozen=True):
    stream_id: StreamId | None
    error: str


class _Identity(Struct):
    stream_id: StreamId | None = None


_encoder = msgspec.json.Encoder()


def encode(replies: Iterable[Reply]) -> str:
    """Encode the replies as protocol lines. Each line is strict JSON and ends with a newline."""
    return "".join(_line(reply) for reply in replies)


def _line(reply: Reply) -> str:
    if isinstance(reply, Token):
        command, content = "TOKEN", _encoder.encode(reply)
    elif isinstance(reply, Info):
        command, content = "MSG", _encoder.encode(reply)
    else:
        command, content = reply.kind, _encoder.encode(_FailureLine(reply.stream_id, reply.error))
    # JSON allows these characters unescaped, but clients that split lines treat them as line breaks.
    return f"{command} {content.decode().translate(_LINE_ENDS)}\n"


_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def parse_batch(text: str) -> list[Operation | Failure]:
    """Parse ``ops_batch_json``. A Failure takes the place of each invalid operation.

    Raises RequestError if there is no stream to answer: not JSON, not a list, empty, over BATCH_LIMIT.
    """
    try:
        entries = msgspec.json.decode(text, type=list[msgspec.Raw])
    except msgspec.ValidationError:
        raise RequestError("ops_batch_json must be a JSON array of operations, each [name, {fields}].") from None
    except msgspec.DecodeError as error:
        raise RequestError(f"ops_batch_json is not JSON: {error}.") from None
    if not entries:
        raise RequestError("ops_batch_json holds no operations; send at least one.")
    if len(entries) > BATCH_LIMIT:
        raise RequestError(
            f"ops_batch_json holds {len(entries)} operations; one prediction takes at most {BATCH_LIMIT}."
        )
    operations = [_parse_operation(index, entry) for index, entry in enumerate(entries)]
    return _reject_repeated_ids(operations)


def _parse_operation(index: int, entry: msgspec.Raw) -> Operation | Failure:
    try:
        name, payload = msgspec.json.decode(entry, type=tuple[str, msgspec.Raw])
    except msgspec.ValidationError:
        return Failure(stream_id=None, error=f"operation {index}: must be [name, {{fields}}].", kind="MSG")
    try:
        stream_id = msgspec.json.decode(payload, type=_Identity).stream_id
    except msgspec.ValidationError:
        stream_id = None
    kind: Literal["TOKEN", "MSG"] = "TOKEN" if name in ("GENERATE", "SCORE") else "MSG"
    operation = OPERATIONS.get(name)
    if operation is None:
        known = ", ".join(OPERATIONS)
        error = f"operation {index}: unknown operation {name!r} (known: {known}){_nearest(name, OPERATIONS) or '.'}"
        return Failure(stream_id=stream_id, error=error, kind=kind)
    try:
        return msgspec.json.decode(payload, type=operation)
    except msgspec.ValidationError as error:
        return Failure(stream_id=stream_id, error=f"{name} {_describe(error, operation)}", kind=kind)


_UNKNOWN_FIELD = re.compile(r"unknown field `(.*)`")
_PATH = re.compile(r" - at `(?:key` in `)?\$\.?(.*?)`$")


def _describe(error: msgspec.ValidationError, operation: type[Struct]) -> str:
    """Rewrite msgspec's message: the field's path comes first; an unknown field gets the nearest known name."""
    message = str(error)
    if unknown := _UNKNOWN_FIELD.search(message):
        field = unknown.group(1)
        hint = _nearest(field, operation.__struct_fields__)
        return f"has no field {field!r}{hint or '.'}"
    path = _PATH.search(message)
    message = message.replace("`", "")
    if path is None:
        return f"{message[0].lower()}{message[1:]}."
    message = message.split(" - at ")[0]
    return f"{path.group(1) or 'payload'}: {message[0].lower()}{message[1:]}."


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _reject_repeated_ids(operations: list[Operation | Failure]) -> list[Operation | Failure]:
    """Replace all operations that share a stream_id by one Failure.

    None of them runs: their replies could not be told apart, and each stream gets exactly one terminal reply.
    """
    seen: dict[StreamId, int] = {}
    for operation in operations:
        if operation.stream_id is not None:
            seen[operation.stream_id] = seen.get(operation.stream_id, 0) + 1
    repeated = {stream_id for stream_id, count in seen.items() if count > 1}
    result: list[Operation | Failure] = []
    for operation in operations:
        if operation.stream_id not in repeated:
            result.append(operation)
        elif seen[operation.stream_id] > 1:
            error = (
                f"stream_id {operation.stream_id!r} is used by {seen[operation.stream_id]} operations of this batch."
            )
            kind: Literal["TOKEN", "MSG"] = "MSG" if isinstance(operation, ModelInfo) else "TOKEN"
            result.append(Failure(stream_id=operation.stream_id, error=error, kind=kind))
            seen[operation.stream_id] = 1
    return result


def parse_logit_bias(text: str) -> dict[int, float] | None:
    """Parse a ``logit_bias`` given as JSON; None if the text is empty. Raises RequestError."""
    return _parse(text, dict[TokenId, float], 'logit_bias must be a JSON object like {"42": -100}')


def parse_choices(text: str) -> list[str] | None:
    """Parse ``choices`` given as JSON; None if the text is empty. Raises RequestError."""
    return _parse(text, list[str], 'choices must be a JSON list of strings like ["yes", "no"]')


def parse_json_schema(text: str) -> dict[str, Any] | bool | None:
    """Parse a ``json_schema`` given as JSON; None if the text is empty. Raises RequestError."""
    schema: dict[str, Any] | bool | None = _parse(
        text, dict[str, Any] | bool, "json_schema must be a JSON object, or true for any JSON"
    )
    return schema


def _parse(text: str, kind: Any, expected: str) -> Any:
    if not text.strip():
        return None
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        reason = str(error).replace("`", "")
        raise RequestError(f"{expected}: {reason}.") from None


def finite(logprob: float) -> float:
    """Round a log-probability to a millionth. JSON has no infinity: impossible becomes the lowest float32."""
    return round(logprob, 6) + 0.0 if math.isfinite(logprob) else -3.4028234663852886e38
