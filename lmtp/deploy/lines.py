"""Where a key stands in a TOML file: tomllib does not tell."""

import re
import tomllib
from itertools import takewhile
from typing import Any

_TABLE = re.compile(r"\s*\[([^\[\]]+)\]\s*(#.*)?")
_KEY = re.compile(r"[^=#\[]+(?==)")


def line_of(text: str, path: tuple[str, ...]) -> int:
    """The number of the first line that sets the path or, if none does, most of it. Lines count from 1.

    Keys inside inline tables are not found; their table is.
    """
    table: tuple[str, ...] = ()
    found, longest = 1, 0
    for number, line in enumerate(text.split("\n"), 1):
        if match := _TABLE.fullmatch(line):
            key = table = _parts(match[1])
        elif match := _KEY.match(line):
            key = (*table, *_parts(match[0]))
        else:
            continue
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(key, path, strict=False)))
        if common > longest:
            found, longest = number, common
    return found


def _parts(key: str) -> tuple[str, ...]:
    """The parts of a dotted key; none for a text that is no key, such as a line of a longer value."""
    try:
        rest: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    parts = []
    while isinstance(rest, dict):
        ((name, rest),) = rest.items()
        parts.append(name)
    return tuple(parts)
