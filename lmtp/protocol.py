"""LMTP operations and replies: typed, validated, encoded.

This is LMQL's Language Model Transport Protocol as it travels through a Cog prediction. The input is a JSON array of
``["NAME", {payload}]`` operations. The output is lines of ``TOKEN {object}`` and ``MSG {object}``. This module knows
nothing about models: checks that need a vocabulary or a context length are in engine/stream.py.
"""

import difflib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

MANY_BYTES = 2**16
"""A batch of more characters is not parsed on the event loop."""

BATCH_LIMIT = 256
"""The most operations in one prediction."""

FORCE = 100.0
"""A ``logit_bias`` of at least this allows its token and forbids every token without one. Its negative forbids."""

CONSTRAINTS = ("choices", "regex", "json_schema", "grammar")
"""The fields of GENERATE that constrain its text. An operation has at most one."""

NO_ADAPTER = "none"
"""The ``adapter`` that is none; an empty one means the same."""

MAX_COUNT = 2**31 - 1
"""More than any vocabulary. The bound keeps token counts within a tensor's integers."""

MAX_BATCH_BYTES = 2**26
"""The longest ``ops_batch_json``."""

MAX_OPERATION_BYTES = 2**24
"""The longest operation of it. Parsing one holds the interpreter for a tenth of a second at most."""

MAX_BIASES = 2**21
"""Entries of ``logit_bias`` in one prediction: 40 times a vocabulary of 50,000. As Python objects they take
100 times the memory of a ``mask``."""

MAX_JSON = {
    "choices": 2**23,
    "data": 2**20,
    "grammar": 2**19,
    "json_schema": 2**22,
    "mask": 2**22,
    "regex": 2**22,
    "stop": 2**19,
}
"""Bytes of JSON of a field, before it is parsed. The limits on what it means are lower: see engine/source.py."""

MAX_SPLIT = 2**24
"""Characters of a batch whose operations are told apart although it is not JSON."""

MAX_QUOTED = 60
"""Characters of a caller's text that an error message quotes."""

MAX_NAME = 256
"""Characters of a ``stream_id``, which every reply repeats, of a ``cache_salt`` and of an ``adapter``."""

MAX_STOPS, MAX_STOP = 64, 1000
"""How many stop sequences an operation may have, and characters of one: each token is compared with all of them."""

StreamId = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | Annotated[str, Meta(max_length=MAX_NAME)]
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Penalty = Annotated[float, Meta(ge=-10_000, le=10_000)]
TokenId = Count
Prompt = list[TokenId] | str
Salt = Annotated[str, Meta(max_length=MAX_NAME)]
AdapterName = Annotated[str, Meta(max_length=MAX_NAME)]
Stops = Annotated[list[Annotated[str, Meta(min_length=1, max_length=MAX_STOP)]], Meta(max_length=MAX_STOPS)]
FinishReason = Literal["stop", "length"]


class RequestError(ValueError):
    """A request that cannot be served. The message is one sentence for the person who sent it.

    It may quote the caller's text and goes into the log, so control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text on one line: control characters, line ends and lone surrogates are escaped."""
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() or c == "\N{NO-BREAK SPACE}" else ascii(c)[1:-1] for c in text)
    return "".join(escaped)


def quoted(text: object) -> str:
    """A caller's text or number for an error message, cut to MAX_QUOTED characters."""
    written = text if isinstance(text, str) else str(text)
    if len(written) > MAX_QUOTED:
        return f"{written[:MAX_QUOTED]!r}… ({len(written)} characters)"
    return repr(text)


class Generate(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Continue a prompt. docs/protocol.md describes the fields."""

    stream_id: StreamId
    prompt: Prompt
    target: Prompt | None = None
    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_COUNT)] = 32
    min_tokens: Count = 0
    temperature: Annotated[float, Meta(ge=0, le=10_000)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Count | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.001, le=1000)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    length_penalty: float | None = None  # ignored: it matters only to beam search, which runs in LMQL's client
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    top_logprobs: Count = 1
    logit_bias: dict[TokenId, float] | None = None
    mask: str | None = None
    choices: list[str] | None = None
    regex: str | None = None
    json_schema: dict[str, Any] | bool | None = None
    grammar: str | None = None
    stop: Stops | None = None
    text: bool = False
    adapter: AdapterName = ""
    cache_salt: Salt | None = None
    allow_special_tokens: bool = False


class Encode(Generate, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Let an encoder answer a prompt, which it reads as a whole: fill its masks, or label it.

    The input ``prompt`` makes it; LMTP has no such operation.
    """


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
    top_logprobs: Count = 0
    text: bool = False
    adapter: AdapterName = ""
    cache_salt: Salt | None = None
    allow_special_tokens: bool = False


class ModelInfo(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Describe the served model; with ``tokens`` also spell every token of its vocabulary."""

    stream_id: StreamId
    model: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")  # ignored
    tokens: bool = False


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


def parse_batch(text: str, max_ids: int = MAX_COUNT) -> list[Operation | Failure]:
    """Parse ``ops_batch_json``. A Failure takes the place of each invalid operation.

    ``max_ids``: token ids that a prompt may have. More are not even parsed.
    Raises RequestError if there is no stream to answer: not an array, empty, over a limit.
    """
    if len(text) > MAX_BATCH_BYTES:
        raise RequestError(f"ops_batch_json has {len(text)} characters; {MAX_BATCH_BYTES} is the limit.")
    try:
        entries: Sequence[msgspec.Raw | str] = msgspec.json.decode(text, type=list[msgspec.Raw])
    except msgspec.ValidationError:
        raise RequestError(_NO_ARRAY) from None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        entries = _split(text, error)  # one operation is at fault, and the others are to run
    if not entries:
        raise RequestError("ops_batch_json holds no operations; send at least one.")
    if len(entries) > BATCH_LIMIT:
        raise RequestError(
            f"ops_batch_json holds {len(entries)} operations; one prediction takes at most {BATCH_LIMIT}."
        )
    operations: list[Operation | Failure] = []
    biases = 0
    for index, entry in enumerate(entries):
        operation = _parse_operation(index, entry, max_ids, MAX_BIASES - biases)
        if isinstance(operation, Generate) and operation.logit_bias:
            biases += len(operation.logit_bias)
        operations.append(operation)
    return _reject_repeated_ids(operations)


_NO_ARRAY = "ops_batch_json must be a JSON array of operations, each [name, {fields}]."
_SPACE = " \t\r\n"
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
"""A string without an end is one token up to the end of the text: found at once, not from each of its quotes anew."""


def _split(text: str, error: Exception) -> list[str]:
    """The operations of a batch that the parser gave up, each as its text, however deep it is nested and whatever is in
    it. The parser descends into all of them at once, and gives up all of them for one. ``error`` is why."""
    if len(text) > MAX_SPLIT:
        raise RequestError(
            f"ops_batch_json: {_unreadable(error, text)}; repair it, or send at most {MAX_SPLIT} characters at once to"
            " learn which operation it is."
        )
    depth = start = end = 0
    entries: list[str] = []
    for token in _TOKEN.finditer(text):
        opens, closes = token[0] in "[{", token[0] in "]}"
        if depth == 0 and (token[0] != "[" or text[end : token.start()].strip(_SPACE)):
            break
        if depth == 1:
            scalars = _scalars(text[end : token.start()], bool(entries), not closes)
            if scalars is None:
                break
            entries += scalars
            start = token.start()
        depth += opens - closes
        if depth == 1 and end and (closes or not opens):
            entries.append(text[start : token.end()])
        if len(entries) > BATCH_LIMIT or depth == 0:
            end = token.end()
            break
        if depth == 1:
            end = token.end()
    if len(entries) > BATCH_LIMIT:
        raise RequestError(f"ops_batch_json holds more than {BATCH_LIMIT} operations; send several batches.")
    if depth or text[end:].strip(_SPACE) or not text[:end].endswith("]"):
        malformed = isinstance(error, msgspec.DecodeError)
        raise RequestError(f"ops_batch_json is not JSON: {error}." if malformed else _NO_ARRAY)
    return entries


def _scalars(between: str, after: bool, before: bool) -> list[str] | None:
    """The numbers, names and whatever else lies between two operations, or beside one; None if a comma is missing or
    one too many. ``after``, ``before``: whether an operation is in front of it, or follows."""
    parts = [part.strip(_SPACE) for part in between.split(",", BATCH_LIMIT + 2)]
    if parts == [""] and not after and not before:
        return []
    if after and parts.pop(0):
        return None
    if before and (not parts or parts.pop()):
        return None
    return parts if all(parts) else None


_STREAM_ID = re.compile(r'"stream_id"\s*:\s*(-?\d{1,19}|"(?:[^"\\]|\\.){0,1536}+")')
"""An id of 256 characters, each of which takes six at most. Each repetition takes memory while it is matched."""


class _Long(Struct):
    """The fields that can be long, unparsed."""

    prompt: msgspec.Raw = msgspec.Raw()
    target: msgspec.Raw = msgspec.Raw()
    scored: msgspec.Raw = msgspec.Raw()
    logit_bias: msgspec.Raw = msgspec.Raw()
    choices: msgspec.Raw = msgspec.Raw()
    data: msgspec.Raw = msgspec.Raw()
    grammar: msgspec.Raw = msgspec.Raw()
    json_schema: msgspec.Raw = msgspec.Raw()
    mask: msgspec.Raw = msgspec.Raw()
    regex: msgspec.Raw = msgspec.Raw()
    stop: msgspec.Raw = msgspec.Raw()


def _parse_operation(index: int, entry: msgspec.Raw | str, max_ids: int, max_biases: int) -> Operation | Failure:
    size = len(entry) if isinstance(entry, str) else memoryview(entry).nbytes
    if size > MAX_OPERATION_BYTES:
        reason = f"operation {index}: {size} bytes; {MAX_OPERATION_BYTES} is the limit."
        return Failure(stream_id=_written_id(entry), error=reason, kind="TOKEN")
    try:
        name, payload = msgspec.json.decode(entry, type=tuple[str, msgspec.Raw])
        stream_id = _stream_id(payload)
    except msgspec.ValidationError:
        return Failure(stream_id=None, error=f"operation {index}: must be [name, {{fields}}].", kind="MSG")
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        reason = f"operation {index}: {_unreadable(error, _written(entry))}."
        return Failure(stream_id=_written_id(entry), error=reason, kind="TOKEN")
    kind: Literal["TOKEN", "MSG"] = "TOKEN" if name in ("GENERATE", "SCORE") else "MSG"
    which = name if stream_id is not None else f"operation {index}: {name}"
    operation = OPERATIONS.get(name)
    if operation is None:
        known = ", ".join(OPERATIONS)
        hint = _nearest(name, OPERATIONS) or "."
        reason = f"operation {index}: unknown operation {quoted(name)} (known: {known}){hint}"
        return Failure(stream_id=stream_id, error=reason, kind=kind)
    try:
        _check_lengths(payload, max_ids, max_biases)
        return msgspec.json.decode(payload, type=operation)
    except RequestError as error:
        return Failure(stream_id=stream_id, error=f"{which} {error}", kind=kind)
    except msgspec.ValidationError as error:
        return Failure(stream_id=stream_id, error=f"{which} {_describe(error, operation)}", kind=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        return Failure(stream_id=stream_id, error=f"{which}: {_unreadable(error, _written(payload))}.", kind=kind)


def _check_lengths(payload: msgspec.Raw, max_ids: int, max_biases: int) -> None:
    """Raise RequestError for more than can be used, before millions of objects are made of it."""
    long = msgspec.json.decode(payload, type=_Long)
    for field in ("prompt", "target", "scored"):
        written = bytes(getattr(long, field))
        if written.startswith(b"[") and (count := written.count(b",") + 1) > max_ids:
            raise RequestError(f"{field}: {count} token ids; the model's context is {max_ids}.")
    for field in MAX_JSON:
        _check_json(field, memoryview(getattr(long, field)).nbytes)
    if bytes(long.logit_bias).count(b":") > max_biases:
        raise RequestError(f"logit_bias: the batch has more than {MAX_BIASES} entries by now; use mask, or split it.")


def _check_json(field: str, size: int, name: str = "") -> None:
    """``name``: what the caller calls the field, if not by its own name."""
    if size > MAX_JSON[field]:
        raise RequestError(f"{name or field}: {size} bytes of JSON; {MAX_JSON[field]} is the limit.")


def _written(entry: msgspec.Raw | str) -> str:
    return entry if isinstance(entry, str) else bytes(entry).decode(errors="replace")


def _written_id(entry: msgspec.Raw | str) -> StreamId | None:
    """The stream_id of an operation that is not parsed."""
    found = _STREAM_ID.search(_written(entry))
    try:
        return msgspec.json.decode(found[1], type=StreamId) if found else None
    except (msgspec.DecodeError, UnicodeError):
        return None


def _stream_id(payload: msgspec.Raw) -> StreamId | None:
    try:
        return msgspec.json.decode(payload, type=_Identity).stream_id
    except msgspec.ValidationError:
        return None


def _unreadable(error: Exception, text: str) -> str:
    """What is wrong with JSON text that the parser gives up."""
    if isinstance(error, RecursionError):
        return f"nested too deep; the limit is about {sys.getrecursionlimit()} levels"
    cut = "truncated" in str(error) and "\\u" in text  # a surrogate at the end of a string
    if isinstance(error, UnicodeError) or cut or any(word in str(error) for word in ("surrogate", "escape")):
        return "a string holds a lone surrogate, which is no character"
    numbers = "; JSON has no NaN and no Infinity" if "NaN" in text or "Infinity" in text else ""
    return f"{printable(str(error))}{numbers}"


def generate(operation: type[Generate] = Generate, **fields: Any) -> Generate:
    """An operation from values that did not come as JSON. Raises RequestError, naming the field."""
    try:
        return msgspec.convert(fields, operation)
    except msgspec.ValidationError as error:
        raise RequestError(_describe(error, Generate)) from None


_UNKNOWN_FIELD = re.compile(r"unknown field `(.*)`", re.DOTALL)
_PATH = re.compile(r" - at `(?:key` in `)?\$\.?(.*?)`$")


def _describe(error: msgspec.ValidationError, operation: type[Struct]) -> str:
    """Rewrite msgspec's message: the field's path comes first; an unknown field gets the nearest known name."""
    message = str(error)
    if unknown := _UNKNOWN_FIELD.search(message):
        field = unknown.group(1)
        hint = _nearest(field, operation.__struct_fields__)
        return f"has no field {quoted(field)}{hint or '.'}"
    path = _PATH.search(message)
    message = message.replace("`", "")
    if path is None:
        return f"{message[0].lower()}{message[1:]}."
    message = message.split(" - at ")[0]
    return f"{path.group(1) or 'payload'}: {message[0].lower()}{message[1:]}."


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name[:MAX_QUOTED], list(known), n=1, cutoff=0.5)
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
            count = seen[operation.stream_id]
            error = f"stream_id {quoted(operation.stream_id)} is used by {count} operations of this batch."
            kind: Literal["TOKEN", "MSG"] = "MSG" if isinstance(operation, ModelInfo) else "TOKEN"
            result.append(Failure(stream_id=operation.stream_id, error=error, kind=kind))
            seen[operation.stream_id] = 1
    return result


def parse_logit_bias(text: str) -> dict[int, float] | None:
    """Parse a ``logit_bias`` given as JSON; None if the text is empty. Raises RequestError."""
    if (count := text.count(":")) > MAX_BIASES:
        raise RequestError(f"logit_bias has {count} entries; {MAX_BIASES} is the limit.")
    return _parse(text, dict[TokenId, float], 'logit_bias must be a JSON object like {"42": -100}')


def parse_choices(text: str) -> list[str] | None:
    """Parse ``choices`` given as JSON; None if the text is empty. Raises RequestError."""
    _check_json("choices", len(text))
    return _parse(text, list[str], 'choices must be a JSON list of strings like ["yes", "no"]')


def parse_json_schema(text: str) -> dict[str, Any] | bool | None:
    """Parse a ``json_schema`` given as JSON; None if the text is empty. Raises RequestError."""
    _check_json("json_schema", len(text))
    schema: dict[str, Any] | bool | None = _parse(
        text, dict[str, Any] | bool, "json_schema must be a JSON object, or true for any JSON"
    )
    return schema


def parse_stop_sequences(text: str) -> list[str] | None:
    """Parse ``stop`` given as a JSON list, or as texts separated by commas; None if there are none. Raises
    RequestError."""
    _check_json("stop", len(text), "stop_sequences")
    expected = 'stop_sequences must be a JSON list like ["\\n", "END"] or texts separated by commas'
    if text.startswith("["):
        return parse_json(text, Stops, expected) or None
    try:
        return msgspec.convert([part for part in text.split(",") if part], Stops) or None
    except msgspec.ValidationError as error:
        raise RequestError(f"{expected}: {reason_of(error, text)}.") from None


def _parse(text: str, kind: Any, expected: str) -> Any:
    return parse_json(text, kind, expected) if text.strip() else None


def parse_json(text: str, kind: Any, expected: str) -> Any:
    """Parse JSON of a type. Raises RequestError, which begins with what was expected."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise RequestError(f"{expected}: {reason_of(error, text)}.") from None


def reason_of(error: Exception, text: str) -> str:
    """What is wrong with JSON text, in msgspec's words; of a long name its beginning."""
    if not isinstance(error, msgspec.ValidationError):
        return _unreadable(error, text)
    reason = str(error).replace("`", "")
    most = 3 * MAX_QUOTED
    return reason if len(reason) <= most else f"{reason[: most // 2]} … {reason[-most // 3 :]}"


def finite(logprob: float) -> float:
    """Round a log-probability to a millionth. JSON has no infinity: impossible becomes the lowest float32."""
    return round(logprob, 6) + 0.0 if math.isfinite(logprob) else -3.4028234663852886e38
