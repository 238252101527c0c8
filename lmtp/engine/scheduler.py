"""Which streams run in this step and how many tokens of each; who waits.

A step is one padded batch over a run of neighbouring slots: row i takes the next ``counts[i]`` tokens of its stream.
Prefill, decode and scoring differ only in these numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmtp.engine.stream import Stream

WORTH_WAITING = 16
"""A new stream waits for another to compute at least this many tokens that both begin with."""

FORCED_RUN = 16
"""Up to so many tokens that a grammar forced on a decoding stream are computed along with the others' single ones; a
longer run is computed like a prompt."""

DRAFTED_STEP = 16
"""Tokens of a step, padding included, that drafts may fill it up to. On a CPU a step of so many takes hardly longer
than one of a single token, since reading the model's weights is what takes its time."""


class StreamMemory(Protocol):
    """Where running streams keep what is computed: slots.py, or the fallback runner's own caches."""

    active: list[Stream]

    @property
    def longest(self) -> int:
        """The most tokens a stream can hold."""

    def shared_prefix(self, stream: Stream) -> tuple[int, int]:
        """Tokens of the stream that are computed already: now, and once the running streams are done with theirs."""

    def admit(self, stream: Stream) -> bool:
        """Let the stream run; False where there is no room now."""

    def release(self, stream: Stream, keep: bool = True) -> None:
        """Take back what the stream held."""


@dataclass(frozen=True)
class Step:
    """The tokens of one forward pass: ``counts[i]`` tokens of ``streams[i]``, which owns slot ``first_slot + i``."""

    first_slot: int
    streams: list[Stream]
    counts: list[int]


class Scheduler:
    """First come, first served; prompts are computed in chunks, taking turns with the streams that decode."""

    def __init__(
        self, memory: StreamMemory, chunk: int, busy_chunk: int, most_logits: int, drafts: bool = False
    ) -> None:
        """``chunk``: tokens of a prefill step; ``busy_chunk``: the same while other streams decode, so that these do
        not stall, or 0 where a prompt has to be computed in one step; ``most_logits``: positions of one step at which
        logits may be wanted; ``drafts``: whether tokens guessed right save steps."""
        self.memory = memory
        self.waiting: list[Stream] = []
        self._chunk = chunk
        self._busy_chunk = busy_chunk
        self._most_logits = most_logits
        self._prefilled_last = False
        self._drafts = drafts

    def add(self, stream: Stream) -> None:
        """Put a stream at the end of the queue."""
        self.waiting.append(stream)

    def remove(self, stream: Stream, keep: bool = True) -> None:
        """Take a stream out, waiting or running; what it computed stays for reuse unless ``keep`` is false."""
        if stream in self.waiting:
            self.waiting.remove(stream)
        elif stream.slot >= 0:
            self.memory.release(stream, keep)

    def next_step(self) -> Step | None:
        """Admit who can be admitted and choose the next step; None where nothing is to be done."""
        self._admit()
        active = self.memory.active
        if not active:
            return None
        prefilling = [stream.pending > (FORCED_RUN if stream.decoding else 1) for stream in active]
        if not any(prefilling):
            return self._step(active, max(_width(active), self._draft(active)))
        decoding = not all(prefilling)
        self._prefilled_last = not (decoding and self._prefilled_last and self._busy_chunk)
        if not self._prefilled_last:
            return self._step(active, _width([s for s, not_yet in zip(active, prefilling, strict=True) if not not_yet]))
        first = prefilling.index(True)
        last = prefilling.index(False, first) if False in prefilling[first:] else len(active)
        budget = self._busy_chunk if decoding and self._busy_chunk else self._chunk
        return self._prefill(active[first:last], budget)

    def _draft(self, streams: Sequence[Stream]) -> int:
        """Have the streams guess what follows; how many tokens of a stream are to be computed for it."""
        most = DRAFTED_STEP // len(streams) - 1 if self._drafts else 0
        if most < 1:
            return 1
        for stream in streams:
            stream.guess(most)
        return 1 + max(len(stream.draft) for stream in streams)

    def _prefill(self, streams: Sequence[Stream], budget: int) -> Step:
        """As many of the streams as fill the budget without padding most of it; at least the first."""
        rows = [streams[0]]
        tokens = streams[0].pending
        for stream in streams[1:]:
            longest = max(stream.pending, *(row.pending for row in rows))
            padded = longest * (len(rows) + 1)
            if padded > budget or tokens + stream.pending < padded // 2:
                break
            rows.append(stream)
            tokens += stream.pending
        return self._step(rows, max(budget // len(rows), 1))

    def _step(self, streams: Sequence[Stream], most: int) -> Step:
        counts = []
        logits_left = self._most_logits
        for stream in streams:
            count = min(stream.pending + len(stream.draft), most)
            wanted = stream.computed + count - max(stream.first_wanted, stream.computed)
            if wanted > logits_left:  # the first row always makes progress: there is room for one position at least
                count -= wanted - logits_left
                wanted = logits_left
            if count == 0:
                break
            logits_left -= max(wanted, 0)
            counts.append(count)
        return Step(streams[0].slot, list(streams[: len(counts)]), counts)

    def _admit(self) -> None:
        """Give slots to waiting streams, in order; one that can soon reuse a long prefix lets others pass."""
        waiting, self.waiting = self.waiting, []
        blocked = False
        for stream in waiting:
            if not blocked:
                now, soon = self.memory.shared_prefix(stream)
                if soon - now < WORTH_WAITING:
                    blocked = not self.memory.admit(stream)
                    if not blocked:
                        continue
            self.waiting.append(stream)


def _width(streams: Sequence[Stream]) -> int:
    """How many tokens of each decoding stream to compute: as many as at least half of them have, so that no column of
    the step is mostly padding. Where a grammar forced a run on one stream of many, it rides along a token at a time,
    which costs it nothing."""
    pending = sorted((stream.pending for stream in streams), reverse=True)
    return pending[(len(pending) - 1) // 2]
