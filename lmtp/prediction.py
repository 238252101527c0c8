"""A running prediction and its counters, as a caller sees it."""

import asyncio
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from lmtp.protocol import Reply, Token

REPLY_BYTES, ENTRY_BYTES = 500, 100
"""About what a reply takes in memory, and each of its most likely tokens."""


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


@dataclass
class Turns:
    """What the engine's thread remembers to take turns between predictions. No other thread changes it."""

    began: float = 0.0
    """When its streams were opened, by the engine's clock."""
    read: float = 0.0
    """When it last had no unread replies, or some were taken."""
    taken: int = 0
    """How many bytes were taken by then."""
    queued: int = -1
    """The step after which it last went to the end of the queue: when it was new, or one of its streams was admitted or
    gave way; -1: not yet."""
    prefilled: int = -1
    """The step that last computed some of its prompts."""
    decoded: int = -1
    """The step that last decoded some of its streams, while there are too many for one step."""
    paused: bool = False
    """Whether its streams wait because its replies do."""

    @property
    def last(self) -> int:
        """The later of the two steps."""
        return max(self.prefilled, self.decoded)


class Prediction:
    """Operations that run together.

    Iterate over it, on any one thread, for the replies of one step after the other. The iteration ends once every
    operation has had its terminal reply. Leaving it as a context manager ends what still runs.
    """

    def __init__(self, end: Callable[["Prediction"], None], resume: Callable[[], None] = lambda: None) -> None:
        """``end`` asks the engine to end the prediction's streams, ``resume`` to look whether it may go on; both on any
        thread."""
        self.counters = Counters()
        self.turns = Turns()
        self.salt = object()
        """Marks prefixes that are shared within this prediction alone."""
        self.outbox: list[Reply] = []
        """Replies that `deliver` will hand over. Only the engine's thread touches it."""
        self.cancelled = False
        """Whether it was cancelled, even if every reply had been handed over."""
        self.taken = 0
        """Bytes, as estimated, of the replies that were taken. Only who iterates changes it."""
        self._delivered = 0
        self._end = end
        self._resume = resume
        self._arrived: queue.SimpleQueue[tuple[list[Reply], int] | asyncio.CancelledError | None] = queue.SimpleQueue()

    @property
    def unread(self) -> int:
        """Bytes, as estimated, of the replies that wait to be taken."""
        return self._delivered - self.taken

    def cancel(self) -> None:
        """End it, on any thread. Its iterator raises asyncio.CancelledError."""
        self.cancelled = True
        self._arrived.put(asyncio.CancelledError())  # before the end, or the iteration could end as if it had succeeded
        self._end(self)

    def deliver(self, last: bool) -> None:
        """Hand over the outbox; after the ``last`` replies the iteration ends. Called by the engine."""
        if self.outbox:
            size = sum(map(_size, self.outbox))
            self._delivered += size
            self._arrived.put((self.outbox, size))
            self.outbox = []
        if last:
            self._arrived.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end(self)

    def __iter__(self) -> Iterator[list[Reply]]:
        while (arrived := self._arrived.get()) is not None:
            if isinstance(arrived, asyncio.CancelledError):
                raise arrived
            replies, size = arrived
            self.taken += size
            if self.turns.paused:
                self._resume()
            yield replies


def _size(reply: Reply) -> int:
    top = reply.top_logprobs if isinstance(reply, Token) else None
    return REPLY_BYTES + (ENTRY_BYTES * len(top) if isinstance(top, dict) else 0)
