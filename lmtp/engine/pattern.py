"""Regular expressions: constructs that other dialects have and that Rust's silently reads as something else."""

from __future__ import annotations

import re

from lmtp.protocol import RequestError

AROUND = 20
"""Characters that an error quotes before and after a place."""

_ESCAPE = re.compile(r"\\(?:[pPxuU]\{[^}]*\}|.)", re.DOTALL)
_REPEAT = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})")
_POSIX = re.compile(r"\[:\^?\w*:\]")
_SET_OPERATION = re.compile(r"&&|--|~~")


def check_pattern(pattern: str, field: str) -> list[int]:
    """Raise RequestError for a construct that would be misread. Returns where negated classes begin, after the ^."""
    negated = []
    i = 0
    while i < len(pattern):
        if pattern[i] == "\\":
            i = _escape(pattern, i, field)
        elif pattern[i] == "[":
            if pattern.startswith("^", i + 1):
                negated.append(i + 2)
            i = _class(pattern, i, field)
        elif pattern.startswith("(?", i):
            i += 2
        elif repeat := _REPEAT.match(pattern, i):
            i = repeat.end()
            if pattern.startswith("+", i):
                raise _refusal(field, "possessive quantifiers", pattern, repeat.start(), i + 1)
            i += pattern.startswith("?", i)
        else:
            i += 1
    return negated


def _escape(pattern: str, i: int, field: str) -> int:
    """The end of the escape at ``i``."""
    found = _ESCAPE.match(pattern, i)
    if found is None:
        raise RequestError(f"{field}: ends with a single backslash; write \\\\ for a backslash.")
    return found.end()


def _class(pattern: str, start: int, field: str) -> int:
    """The end of the character class at ``start``."""
    i = start + 1 + pattern.startswith("^", start + 1)
    i += pattern.startswith("]", i)  # there it is an ordinary character
    while i < len(pattern) and pattern[i] != "]":
        if pattern[i] == "\\":
            i = _escape(pattern, i, field)
        elif posix := _POSIX.match(pattern, i):
            i = posix.end()
        elif operation := _SET_OPERATION.match(pattern, i):
            raise _refusal(field, "operations on character classes", pattern, *operation.span())
        elif pattern[i] == "[":
            raise _refusal(field, "classes within classes", pattern, i, i + 1)
        else:
            i += 1
    return i + 1


def _refusal(field: str, what: str, pattern: str, start: int, end: int) -> RequestError:
    around = pattern[max(start - AROUND, 0) : end + AROUND]
    return RequestError(
        f"{field}: {what} are not supported: {pattern[start:end]!r} at character {start + 1}, in {around!r}; "
        "escape characters that stand for themselves."
    )
