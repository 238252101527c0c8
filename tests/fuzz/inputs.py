"""Examples of everything that a caller can send: mostly plausible, and one field of it hostile."""

import base64
import inspect
import json
from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lmtp.protocol import OPERATIONS
from predict import Predictor
from tests.soak.model import VOCABULARY

Json = SearchStrategy[Any]

ids = st.integers(0, VOCABULARY - 1)
text = st.text(st.characters(), max_size=12)
"""Any characters, NUL, line ends and lone surrogates among them."""

numbers = st.sampled_from(
    [-(10**30), -(2**63) - 1, -1, 0, 0.5, 1e308, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30]
)
long_texts = st.builds(
    lambda part, count: part * count, st.text(st.characters(), min_size=1, max_size=3), st.just(40_000)
)
nested = st.builds(
    lambda kind, depth: f"<nested {kind} {depth}>", st.sampled_from("[{"), st.sampled_from([50, 1000, 100_000])
)
"""Stands for lists or objects inside each other, which `encode` writes: json.dumps cannot."""

hostile = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.floats(),
    text,
    long_texts,
    nested,
    st.recursive(st.none() | numbers | text, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8),
)  # fmt: skip

choices = st.lists(st.sampled_from(["yes", "no", "", "\n", "\x7f", "é", '"', "a" * 50]) | text, min_size=1, max_size=4)
regexes = st.sampled_from(["a+b", r"\d{2}", "(a|b)*", "", "[^a]", r"\w", "é?", "x{0,9}"]) | st.text(
    "ab0()[]{}*+?|\\.^$-,&~x1", max_size=12
)
schemas = st.one_of(
    st.booleans(),
    st.sampled_from(
        [
            {"type": "integer", "minimum": 3},
            {"enum": ["a", 1, None]},
            {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
            {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"]},
            {"type": "string", "pattern": "^[ab]$"},
            {"const": "\u2028"},
        ]
    ),
    st.dictionaries(st.sampled_from(["type", "enum", "minimum", "items", "$ref", "allOf", "pattern", "required"]), hostile, max_size=2),
)  # fmt: skip
grammars = st.sampled_from(['start: "a" | "b"', 'root ::= "a"+', "start: /[ab]{2}/", "start: x"]) | st.text(
    'start: root=/"ab|()[]*+?\\\n', max_size=20
)
masks = st.binary(max_size=8) | st.binary(min_size=1, max_size=1).map(lambda byte: byte * (VOCABULARY // 8))

PLAUSIBLE: dict[str, Json] = {
    "stream_id": st.integers(0, 3) | st.text("ab", max_size=1),
    "prompt": st.lists(ids, min_size=1, max_size=8) | st.text(min_size=1, max_size=12),
    "scored": st.lists(ids, min_size=1, max_size=8) | st.text(min_size=1, max_size=12),
    "model": st.just("m"),
    "max_tokens": st.integers(1, 8),
    "min_tokens": st.integers(0, 8),
    "temperature": st.floats(0, 3),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(0, 50),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.5, 2),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "length_penalty": st.floats(-2, 2),
    "seed": st.integers(),
    "top_logprobs": st.integers(0, 40),
    "logit_bias": st.dictionaries(ids.map(str), st.sampled_from([-100, -1.5, 0, 2, 100]), max_size=5),
    "mask": masks.map(lambda bits: base64.b64encode(bits).decode()),
    "choices": choices,
    "regex": regexes,
    "json_schema": schemas,
    "grammar": grammars,
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
    "text": st.booleans(),
}
"""The fields of operations. What is not here is hostile only."""

PROMPT_INPUTS: dict[str, Json] = {
    "prompt": st.text(min_size=1, max_size=12),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "x"]), "content": text}),
        max_size=3,
    ).map(json.dumps),
    "prompt_template": st.sampled_from(["", "", "Q: {prompt} A:", "{system_prompt}{prompt}", "{prompt", "{}"]),
    "stop_sequences": st.sampled_from(["", "", "a", '["a", "b"]', "[", '[""]', "[1]"]) | st.text(max_size=5),
    "logit_bias": PLAUSIBLE["logit_bias"].map(json.dumps),
    "choices": choices.map(json.dumps),
    "json_schema": schemas.map(lambda schema: encode(schema)),
    "regex": regexes,
    "grammar": grammars,
}


def encode(value: Any) -> str:
    """The JSON text of an example."""
    written = json.dumps(value)
    for kind, end in ("[]", "{}"):
        for depth in (50, 1000, 100_000):
            inside = (kind if kind == "[" else '{"a":') * depth + ("" if kind == "[" else "1") + end * depth
            written = written.replace(f'"<nested {kind} {depth}>"', inside)
    return written


@st.composite
def operations(draw: st.DrawFn) -> list[Any]:
    """An operation; one of two has a hostile or an unknown field."""
    name = draw(st.sampled_from(list(OPERATIONS)))
    fields = msgspec.structs.fields(OPERATIONS[name])
    required = {field.name: PLAUSIBLE[field.name] for field in fields if field.required}
    optional = {field.name: PLAUSIBLE.get(field.name, hostile) for field in fields if not field.required}
    payload = draw(st.fixed_dictionaries(required, optional=_few(draw, optional)))
    if draw(st.booleans()):
        payload[draw(st.sampled_from([field.name for field in fields]) | text)] = draw(hostile)
    return [name, payload]


def _few(draw: st.DrawFn, optional: dict[str, Json]) -> dict[str, Json]:
    """At most four of them: operations with more contradict themselves."""
    names = draw(st.lists(st.sampled_from(list(optional)), max_size=4, unique=True))
    return {name: optional[name] for name in names}


LARGE = {
    "logit_bias": json.dumps({str(i): 1 for i in range(100_000)}),
    "choices": json.dumps([f"choice {i}" for i in range(10_000)]),
    "json_schema": json.dumps({"enum": ["x" * 100] * 10_000}),
    "stop_sequences": json.dumps(["x" * 100] * 10_000),
    "messages": json.dumps([{"role": "user", "content": "x"}] * 20_000),
}
"""Inputs of a megabyte or so."""

batches = st.one_of(
    st.lists(operations(), min_size=1, max_size=5).map(encode),
    st.lists(operations(), min_size=1, max_size=2).map(encode),
    st.lists(st.one_of(operations(), st.lists(hostile, max_size=3), hostile), max_size=4).map(encode),
    hostile.map(encode),
    st.text(max_size=20),
    operations().map(lambda operation: encode([operation])[:-3]),
    st.sampled_from(
        [
            '[["' + '\\"' * 300_000,
            '[["GENERATE", {"stream_id": "' + "a" * 1_000_000 + '", "prompt": [1]}]]',
            '[["GENERATE", {"stream_id": ' + "7" * 1_000_000 + ', "prompt": [1]}]]',
            "[" + "1," * 300_000 + '["MODEL_INFO", {"stream_id": "\\ud800"}]]',
        ]
    ),
)
"""Values of ops_batch_json."""


@st.composite
def prompts(draw: st.DrawFn) -> dict[str, Any]:
    """Values of all inputs of the predictor, as the runtime lets them pass. Most have their defaults."""
    inputs = {}
    parameters = list(inspect.signature(Predictor.predict).parameters.items())[1:]
    changed = draw(st.lists(st.sampled_from([name for name, _ in parameters]), max_size=5))
    for name, parameter in parameters:
        inputs[name] = parameter.default.default
        if name in changed and name not in ("messages", "ops_batch_json"):
            inputs[name] = draw(_input(name, parameter))
    asked = draw(st.sampled_from(["prompt"] * 8 + ["messages", "messages", ""]))
    if asked == "prompt":
        inputs["prompt"] = draw(PROMPT_INPUTS["prompt"] | long_texts.filter(_is_unicode))
    if asked == "messages":
        inputs["messages"] = draw(_input("messages", dict(parameters)["messages"]))
    if "max_tokens" not in changed:
        inputs["max_tokens"] = 8
    return inputs


def _input(name: str, parameter: inspect.Parameter) -> Json:
    field, kind = parameter.default, str(parameter.annotation)
    if field.choices:
        return st.sampled_from(field.choices)
    if "bool" in kind:
        return st.booleans()
    if "int" in kind:
        least = -(2**70) if field.ge is None else int(field.ge)
        most = 2**70 if field.le is None else int(field.le)
        return st.integers(least, min(least + 20, most)) | st.integers(least, most) | st.just(float(max(least, 1)))
    if "float" in kind:
        return st.floats(field.ge, field.le)
    large = [st.just(LARGE[name])] if name in LARGE else []
    return st.one_of(PROMPT_INPUTS.get(name, text), text, long_texts, *large).filter(_is_unicode)


def _is_unicode(value: str) -> bool:
    """The runtime hands over UTF-8: no lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in value)
