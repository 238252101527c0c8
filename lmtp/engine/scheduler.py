"""Which streams run in this step and how many tokens of each; who waits.

A step takes neighbouring active streams and the next ``counts[i]`` tokens of each. Prefill, decode and scoring differ
only in these numbers.
"""

from collections.abc import Sequence
from typing import cast

from lmtp.engine.stream import OperationStream
from lmtp.runners.runner import Runner
from lmtp.runners.step import Step

WORTH_WAITING = 16
"""A new stream waits for another one to compute at least this many tokens that both begin with."""

FORCED_RUN = 16
"""Tokens that a grammar forces on a decoding stream are computed along with other streams' single tokens up to this
many. A longer run is computed like a prompt."""

DRAFTED_STEP = 16
"""Tokens of a step, padding included, that drafts may fill it up to. On a CPU such a step takes about as long as one of
a single token, since most of its time goes into reading the model's weights."""


class Scheduler:
    """First come, first served. Prompts are computed in chunks, in turns with the streams that decode."""

    def __init__(self, runner: Runner) -> None:
        self.waiting: list[OperationStream] = []
        self._runner = runner
        self._prefilled_last = False

    def add(self, stream: OperationStream) -> None:
        """Put a stream at the end of the queue."""
        self.waiting.append(stream)

    def remove(self, stream: OperationStream, keep: bool = True) -> None:
        """Take a stream out, waiting or running. What it computed stays reusable unless ``keep`` is false."""
        if stream in self.waiting:
            self.waiting.remove(stream)
        elif stream.slot >= 0:
            self._runner.release(stream, keep)

    def next_step(self) -> Step[OperationStream] | None:
        """Admit streams while there is room, and choose the next step; None if no stream runs."""
        self._admit()
        active = cast(Sequence[OperationStream], self._runner.active)  # only `_admit` admits streams
        if not active:
            return None
        limits = self._runner.step_limits
        prefilling = [stream.pending > (FORCED_RUN if stream.decoding else 1) for stream in active]
        if not any(prefilling):
            return self._step(active, max(_width(active), self._draft(active)))
        decoding = not all(prefilling)
        self._prefilled_last = not (decoding and self._prefilled_last and limits.busy_chunk)
        if not self._prefilled_last:
            return self._step(active, _width([s for s, prefill in zip(active, prefilling, strict=True) if not prefill]))
        first = prefilling.index(True)
        last = prefilling.index(False, first) if False in prefilling[first:] else len(active)
        budget = limits.busy_chunk if decoding and limits.busy_chunk else limits.chunk
        return self._prefill(active[first:last], budget)

    def _draft(self, streams: Sequence[OperationStream]) -> int:
        """Let the streams draft; returns how many tokens of a stream the step takes for it."""
        most = DRAFTED_STEP // len(streams) - 1 if self._runner.step_limits.drafts else 0
        if most < 1:
            return 1
        for stream in streams:
            stream.guess(most)
        return 1 + max(len(stream.draft) for stream in streams)

    def _prefill(self, streams: Sequence[OperationStream], budget: int) -> Step[OperationStream]:
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

    def _step(self, streams: Sequence[OperationStream], most: int) -> Step[OperationStream]:
        """At most ``most`` tokens of each stream, as far as their logits fit."""
        counts = []
        logits_left = self._runner.step_limits.logits
        for stream in streams:
            count = min(stream.pending + len(stream.draft), most)
            wanted = stream.wanted(count)
            if wanted > logits_left:  # the first stream always makes progress: at least one position fits
                count -= wanted - logits_left
                wanted = logits_left
            if count == 0:
                break
            logits_left -= wanted
            counts.append(count)
        return Step(list(streams[: len(counts)]), counts)

    def _admit(self) -> None:
        """Admit waiting streams in order. One that can soon reuse a long prefix lets others pass."""
        waiting, self.waiting = self.waiting, []
        blocked = False
        for stream in waiting:
            if not blocked:
                now, soon = self._runner.shared_prefix(stream)
                if soon - now < WORTH_WAITING:
                    blocked = not self._runner.admit(stream)
                    if not blocked:
                        continue
            self.waiting.append(stream)


def _width(streams: Sequence[OperationStream]) -> int:
    """How many tokens of each decoding stream to compute: as many as at least half of them have pending, so that no
    column is mostly padding. A run that a grammar forced on one stream of many is computed a token at a time beside the
    others, which costs nothing extra."""
    pending = sorted((stream.pending for stream in streams), reverse=True)
    return pending[(len(pending) - 1) // 2]
