"""A running prediction and its counters, as a caller sees it."""

import asyncio
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from lmtp.protocol import Reply


@dataclass
class Counters:
    """Token and step counts of a prediction. Nothing here depends on a clock."""

    input_tokens: int = 0
    output_tokens: int = 0
    reused_tokens: int = 0
    computed_tokens: int = 0
    """Rejected draft tokens are not among them."""
    drafted_tokens: int = 0
    """Guessed tokens that were computed along with known ones; see engine/drafts.py."""
    accepted_tokens: int = 0
    """Drafted tokens that turned out right."""
    steps: int = 0
    """Steps in which at least one of its streams took part."""
    rows: int = 0
    """Streams in those steps, other predictions' included."""
    unfinished_constraints: int = 0
    """Streams that ended before their grammar allows an end: at max_tokens or at a stop sequence."""

    def add(self, **counts: int) -> None:
        """Increase the named counters."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)


class Prediction:
    """Operations that run together.

    Iterate over it, on any one thread, for the replies of one step after the other. The iteration ends once every
    operation has had its terminal reply. Leaving it as a context manager ends what still runs.
    """

    def __init__(self, end: Callable[["Prediction"], None]) -> None:
        """``end`` asks the engine to end the prediction's streams, on any thread."""
        self.counters = Counters()
        self.outbox: list[Reply] = []
        """Replies that `deliver` will hand over. Only the engine's thread touches it."""
        self._end = end
        self._arrived: queue.SimpleQueue[list[Reply] | asyncio.CancelledError | None] = queue.SimpleQueue()

    def cancel(self) -> None:
        """End it, on any thread. Its iterator raises asyncio.CancelledError."""
        self._arrived.put(asyncio.CancelledError())  # before the end, or the iteration could end as if it had succeeded
        self._end(self)

    def deliver(self, last: bool) -> None:
        """Hand over the outbox; after the ``last`` replies the iteration ends. Called by the engine."""
        if self.outbox:
            self._arrived.put(self.outbox)
            self.outbox = []
        if last:
            self._arrived.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end(self)

    def __iter__(self) -> Iterator[list[Reply]]:
        while (replies := self._arrived.get()) is not None:
            if isinstance(replies, asyncio.CancelledError):
                raise replies
            yield replies
