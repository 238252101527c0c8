"""JSON Schemas: no text that is finished and said to be valid is anything else."""

import json
from typing import Any

import pytest

from lmtp.engine.schema import is_valid, prepare
from lmtp.protocol import RequestError


def prepared(schema: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(prepare(json.dumps(schema))[0])
    return result


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"const": 123456789012345678}, "json_schema: const 123456789012345678 is beyond 2^53"),
        ({"enum": [1, {"a": [-(2**53) - 1]}]}, "enum -9007199254740993 is beyond 2^53"),
        ({"const": 10**4000}, "(4001 characters) is beyond 2^53"),
        ({"items": {"type": "integer", "maximum": 2**63}}, "maximum 9223372036854775808 is beyond 2^53"),
        ({"anyOf": [{"properties": {"a": {"minimum": 2**63 - 1}}}]}, "minimum 9223372036854775807 is beyond"),
        ({"$defs": {"a": {"pattern": "[a&&b]"}}}, "json_schema: pattern: operations on character classes"),
        ({"patternProperties": {"a*+": {}}}, "json_schema: pattern: possessive quantifiers"),
        ({"pattern": "a\\"}, "json_schema: pattern: ends with a single backslash"),
        ({"properties": {str(i): {} for i in range(2_001)}}, "an object has 2001 optional properties; 2000 is the"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        prepare(json.dumps(schema))
    assert message in str(refused.value)


def test_keywords_that_allow_everything_and_unknown_dialects_are_no_reason_to_refuse() -> None:
    schema = {"$schema": "https://example.org/mine", "items": {"uniqueItems": False, "type": "array"}}
    assert prepared(schema) == {"items": {"type": "array"}}
    assert is_valid(json.dumps(schema), "[[1, 1]]")
    known = {"$schema": "http://json-schema.org/draft-07/schema#", "uniqueItems": True}
    assert prepared(known) == known
    assert prepared({"const": {"uniqueItems": False}}) == {"const": {"uniqueItems": False}}
    assert prepared({"const": 2**53, "maximum": 1e300}) == {"const": 2**53, "maximum": 1e300}


def test_a_schema_of_any_depth_is_walked() -> None:
    nested: dict[str, Any] = {"const": 2**60}
    for _ in range(400):
        nested = {"items": nested}
    with pytest.raises(RequestError, match="beyond 2\\^53"):
        prepared(nested)


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"const": 123456789012345678}, "123456789012345678", "123456789012345680"),
        ({"type": "integer", "maximum": 2**63}, str(2**63), str(2**63 + 1)),
        ({"type": "integer"}, "1" + "0" * 4_000, "0.5"),
        ({"type": "number", "exclusiveMinimum": 0}, "0.0001", "0.0000"),
        ({"type": "number", "multipleOf": 0.1}, "0.3", "0.35"),
        ({"type": "number", "maximum": 1}, "1.0", "1.0000000000000000000000000000000001"),
        ({"type": "string", "pattern": "^[^a]*$"}, '"b"', '"\\u0061"'),
        ({"type": "string", "format": "date"}, '"2024-02-29"', '"2023-02-29"'),
        ({"type": "string", "format": "time"}, '"23:59:60Z"', '"12:00:60Z"'),
        ({"type": "object", "minProperties": 2}, '{"a": 1, "b": 1}', '{"a": 1, "a": 2}'),
        ({"additionalProperties": {"type": "integer"}}, '{"a": 1, "b": 1}', '{"a": 1, "a": 1}'),
        ({"properties": {"a": {"type": "integer"}}}, '{"b": "x"}', '{"\\u0061": "x"}'),
        ({"type": "number"}, "1e5", "NaN"),
        ({}, "[]", '{"a": '),
    ],
)
def test_the_check_knows_what_the_compiler_does_not(schema: dict[str, Any], valid: str, invalid: str) -> None:
    text = json.dumps(schema)
    assert is_valid(text, valid) is True
    assert is_valid(text, invalid) is False


def test_a_schema_that_the_check_cannot_read_is_no_claim() -> None:
    assert is_valid('{"pattern": "(?<=a)b"}', '"b"') is None
    assert is_valid('{"$ref": "https://example.org/x"}', "1") is None
