"""Compiled constraints that were used lately, within a bound on their memory."""

from __future__ import annotations

from collections import OrderedDict

from lmtp.engine.grammar import Compiled

OVERHEAD = 2**14
"""Bytes of a compiled constraint beside what its compilation took."""


class ConstraintCache:
    """Compiled constraints and refusals, up to a number of bytes; the least recently used go first.

    New ones share a quarter of it. On its second use one moves to the rest, so that many new ones, which evict each
    other, leave it alone.
    """

    def __init__(self, size: int) -> None:
        self._new = _Recent(size // 4)
        self._used = _Recent(size - size // 4)

    def get(self, key: bytes) -> Compiled | str | None:
        """What is kept under a key."""
        found = self._used.pop(key) or self._new.pop(key)
        if found is None or (isinstance(found, Compiled) and found.broken):
            return None
        for key_, evicted in self._used.add(key, found):
            self._new.add(key_, evicted)
        return found

    def add(self, key: bytes, value: Compiled | str) -> None:
        """Keep a new one."""
        self._new.add(key, value)


class _Recent(OrderedDict[bytes, Compiled | str]):
    """A part of the cache."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._free = size

    def pop(self, key: bytes, default: None = None) -> Compiled | str | None:  # type: ignore[override]
        value = super().pop(key, default)
        if value is not None:
            self._free += size_of(value)
        return value

    def add(self, key: bytes, value: Compiled | str) -> list[tuple[bytes, Compiled | str]]:
        """Add one as the most recently used; returns what had to go."""
        self[key] = value
        self._free -= size_of(value)
        evicted = []
        while self._free < 0:
            oldest = next(iter(self))
            evicted.append((oldest, self[oldest]))
            self.pop(oldest)
        return evicted


def size_of(value: Compiled | str) -> int:
    """Bytes that a compiled constraint or a refusal takes of the cache."""
    return OVERHEAD + (value.size + value.reserve if isinstance(value, Compiled) else len(value))
