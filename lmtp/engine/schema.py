"""JSON Schemas: what is rewritten or refused before llguidance compiles them, and whether a finished text is valid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from lmtp.engine.pattern import check_pattern
from lmtp.protocol import RequestError, quoted

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

JSON_STYLE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}
"""JSON by schema is on one line, spaced like most JSON that models were trained on. With free whitespace a model can
emit it without end, and hardly any token is forced. With ``\\u`` escapes a name could be spelled so that its own schema
does not apply. A schema's own ``x-guidance`` overrides this."""

MAX_EXACT = 2**53
"""llguidance reads numbers as doubles, which hold every integer up to this one."""

MAX_OPTIONAL = 2_000
"""Optional properties of one object."""

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const", "enum")
_SCHEMAS = (
    "items",
    "additionalItems",
    "additionalProperties",
    "contains",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
)
_LISTS = ("items", "prefixItems", "allOf", "anyOf", "oneOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DRAFT = re.compile(r"https?://json-schema\.org/(draft-0[4-7]|draft/20(19-09|20-12))/schema#?")
_UNICODE_ESCAPED = re.compile(r"\\u00[01]|\x7f")


def prepare(text: str) -> tuple[str, JsonCompileOptions]:
    """The schema as llguidance should read it, and the style of its texts.

    Raises RequestError for what llguidance would read as something else.
    """
    schema = json.loads(text)
    for part in _subschemas(schema):
        _refuse_inexact(part)
        _refuse_many_optional(part)
        _drop_what_means_nothing(part)
        if isinstance(part.get("pattern"), str):
            part["pattern"] = _pattern(part["pattern"])
        if isinstance(part.get("patternProperties"), dict):
            part["patternProperties"] = {_pattern(key): value for key, value in part["patternProperties"].items()}
    style = JSON_STYLE.copy()
    if _UNICODE_ESCAPED.search(text):  # without \u llguidance would leave these characters out of a constant
        del style["json_allowed_escapes"]
    return json.dumps(schema, ensure_ascii=False), style


def is_valid(schema_text: str, text: str) -> bool | None:
    """Whether the text is JSON, without a repeated key, that the schema allows. None if that cannot be told.

    The time it takes is not bounded: call it where it can be stopped.
    """
    import jsonschema_rs  # only a process of its own needs it

    try:
        value = json.loads(text, parse_float=Decimal, parse_constant=_refuse, object_pairs_hook=_unique)
    except ValueError:
        return False
    schema = json.loads(schema_text, parse_float=Decimal)
    for part in _subschemas(schema):
        _drop_what_means_nothing(part)
    try:
        validator = jsonschema_rs.validator_for(
            schema, validate_formats=True, pattern_options=jsonschema_rs.RegexOptions(), offline=True
        )
    except (ValueError, jsonschema_rs.ValidationError):
        return None
    return validator.is_valid(value)


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and all schemas within, none of them within a constant. Not recursive: nesting has no bound here."""
    rest = [schema]
    while rest:
        part = rest.pop()
        if not isinstance(part, dict):
            continue
        yield part
        rest += [part[name] for name in _SCHEMAS if name in part]
        for name in _LISTS:
            rest += part[name] if isinstance(part.get(name), list) else ()
        for name in _MAPS:
            rest += part[name].values() if isinstance(part.get(name), dict) else ()


def _refuse_inexact(part: dict[str, Any]) -> None:
    for name in _BOUNDS:
        rest = [part.get(name)]
        while rest:
            value = rest.pop()
            if isinstance(value, list):
                rest += value
            elif isinstance(value, dict):
                rest += value.values()
            elif isinstance(value, int) and abs(value) > MAX_EXACT:
                raise RequestError(f"json_schema: {name} {quoted(value)} is beyond 2^53, where numbers are not exact.")


def _refuse_many_optional(part: dict[str, Any]) -> None:
    properties, required = part.get("properties"), part.get("required")
    if isinstance(properties, dict):
        named = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        if (count := len(properties.keys() - named)) > MAX_OPTIONAL:
            raise RequestError(f"json_schema: an object has {count} optional properties; {MAX_OPTIONAL} is the most.")


def _drop_what_means_nothing(part: dict[str, Any]) -> None:
    """Drop keywords that allow everything, and names of dialects that nobody knows."""
    if part.get("uniqueItems") is False:
        del part["uniqueItems"]
    if "$schema" in part and not (isinstance(part["$schema"], str) and _DRAFT.fullmatch(part["$schema"])):
        del part["$schema"]


def _pattern(pattern: str) -> str:
    """The pattern without NUL in its negated classes.

    llguidance lets characters that a class excludes come back as escapes if the class holds every control character.
    NUL itself has no escape in JSON_STYLE.
    """
    for place in reversed(check_pattern(pattern, "json_schema: pattern")):
        rest = pattern[place:]
        escape = "\\" if rest.startswith("]") else ""
        pattern = f"{pattern[:place]}\\x00{escape}{rest}"
    return pattern


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is repeated")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
