"""Which streams run in this step and how many tokens of each; who waits.

A step takes neighbouring active streams and the next ``counts[i]`` tokens of each. Prefill, decode and scoring differ
only in these numbers.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from lmtp.engine.drafts import width
from lmtp.engine.stream import OperationStream
from lmtp.prediction import Prediction
from lmtp.runners.runner import Runner
from lmtp.runners.step import Step, StepLimits

WORTH_WAITING = 16
"""A new stream waits for another one to compute at least this many tokens that both begin with."""

FORCED_RUN = 16
"""Tokens that a grammar forces on a decoding stream are computed along with other streams' single tokens up to this
many. A longer run is computed like a prompt."""

DRAFTED_STEP = 16
"""Tokens of a step, padding included, that drafts may fill it up to."""

MAX_PASSED = 128
"""Waiting streams that are passed over in a step, since they wait for a prefix or find no room. These are two of each
prediction if there are as many predictions as Cog lets run."""

QUIET = 512
"""Steps after which a prediction without others has the server to itself: a step may then compute a whole chunk of its
prompts, since larger chunks cost less."""

LEAST_CHUNK = 64
"""Tokens of a prefill step that are tried at least, however little memory there is."""

LAST_PROMPTS = 4
"""Otherwise a step may have this many times the work of others if it ends all prompts there are."""

TURN = 512
"""Steps after which a prediction's only stream gives way to a prediction that has none running. Preempting it sooner
would cost more than it gains: what it computed may have to be computed again."""


class Scheduler:
    """Predictions take turns: the one with the fewest running streams is admitted first, and one with none makes
    another that has several give one up. Prompts are computed in chunks, in turns with the streams that decode."""

    def __init__(self, runner: Runner) -> None:
        self._queues: dict[Prediction, deque[OperationStream]] = {}
        """The waiting streams of each prediction that has any."""
        self._runner = runner
        self.refused: OperationStream | None = None
        """The stream that got no memory when streams were last admitted."""
        self._prefilled_last = False
        self._steps = 0
        self._progress = 0
        """The most tokens that a stream can have computed in all steps."""
        self._changes = 0
        """How often a stream was admitted or released. In between no memory becomes free, no longer prefix begins."""
        self._rotated = 0
        """The step at which the last turn ended."""
        self._shared = -QUIET
        """The last step before which there were several predictions."""

    @property
    def waits(self) -> bool:
        """Whether streams wait for memory, those of paused predictions excepted."""
        return any(not prediction.turns.paused for prediction in self._queues)

    def waiting(self) -> list[OperationStream]:
        """The streams that wait for memory, those of paused predictions excepted."""
        return [s for prediction, queue in self._queues.items() if not prediction.turns.paused for s in queue]

    @property
    def idle(self) -> bool:
        """Whether no stream can run before something is asked for or taken."""
        return not self._runner.active and all(prediction.turns.paused for prediction in self._queues)

    def add(self, stream: OperationStream) -> None:
        """Put a stream at the end of its prediction's queue."""
        turns = stream.prediction.turns
        if turns.queued < 0:  # a new prediction is behind all others but those of the last step
            turns.queued, turns.prefilled = self._steps, self._steps - 1
        self._queues.setdefault(stream.prediction, deque()).append(stream)

    def remove(self, stream: OperationStream, keep: bool = True) -> None:
        """Take a stream out, waiting or running. What it computed stays reusable unless ``keep`` is false."""
        if stream.slot >= 0:
            self._release(stream, keep)
        elif stream in (queue := self._queues.get(stream.prediction, deque())):
            queue.remove(stream)
            if not queue:
                del self._queues[stream.prediction]

    def pause(self, prediction: Prediction) -> None:
        """Let the prediction's streams wait until ``paused`` is false again."""
        prediction.turns.paused = True
        for stream in reversed(self._active()):
            if stream.prediction is prediction:
                self._preempt(stream)

    def next_step(self) -> Step[OperationStream] | None:
        """Admit streams while there is room, and choose the next step; None if no stream runs."""
        self._admit()
        active = self._active()
        if not active:
            return None
        self._steps += 1
        if len(self._queues.keys() | {stream.prediction for stream in active}) > 1:
            self._shared = self._steps
        step = self._choose(active)
        self._progress += max(step.counts)
        return step

    def smaller(self, step: Step[OperationStream]) -> Step[OperationStream] | None:
        """About half of a step; None if it is as small as can be."""
        if max(step.counts) > 1 and not self._runner.step_limits.whole:
            return Step(step.streams, [max(count // 2, 1) for count in step.counts])
        half = len(step.counts) // 2
        return Step(step.streams[:half], step.counts[:half]) if half else None

    def shorten(self, step: Step[OperationStream]) -> None:
        """Compute prompts in chunks of half of this step's tokens from now on, since it found no memory."""
        limits = self._runner.step_limits
        most = max(sum(step.counts) // 2, LEAST_CHUNK)
        if max(step.counts) > FORCED_RUN and most < limits.chunk:
            self._runner.step_limits = replace(limits, chunk=most, busy_chunk=min(limits.busy_chunk, most))

    def _choose(self, active: Sequence[OperationStream]) -> Step[OperationStream]:
        """The next step of the active streams: prompts and decoding streams in turn."""
        limits = self._runner.step_limits
        prefilling = [limits.whole or stream.pending > (FORCED_RUN if stream.decoding else 1) for stream in active]
        if not any(prefilling):
            return self._decode(active, prefilling)
        decoding = not all(prefilling)
        if limits.packed:
            return self._together(active, prefilling)
        self._prefilled_last = not (decoding and self._prefilled_last and limits.busy_chunk)
        if not self._prefilled_last:
            return self._decode(active, prefilling)
        first = min(
            (i for i, prefill in enumerate(prefilling) if prefill), key=lambda i: active[i].prediction.turns.prefilled
        )
        last = prefilling.index(False, first) if False in prefilling[first:] else len(active)
        step = self._prefill(active[first:last], self._budget(active, decoding))
        for stream in step.streams:
            stream.prediction.turns.prefilled = self._steps
        return step

    def _active(self) -> Sequence[OperationStream]:
        return cast(Sequence[OperationStream], self._runner.active)  # only `_admit` admits streams

    def _decode(self, active: Sequence[OperationStream], prefilling: Sequence[bool]) -> Step[OperationStream]:
        """A token of each stream, or several if most of them have several. Where that is too much for one step, the
        prediction that has waited longest comes first, with the streams next to its own.

        Streams that prefill compute a token along with the others.
        """
        first, end = 0, len(active)
        work = self._runner.step_limits.work
        longest = max(stream.computed for stream in active)
        if end * StepLimits.cost(longest) > work:
            first, end, longest = self._in_turn(active, prefilling, work)
        streams = active[first:end]
        pending = [s.pending for s, prefill in zip(streams, prefilling[first:end], strict=True) if not prefill]
        several = max(pending) if self._runner.step_limits.packed else _width(pending)
        if several > 1:  # forced runs save whole steps, so they may take twice the work of one
            several = max(min(several, int(2 * work / len(streams) / StepLimits.cost(longest))), 1)
        return self._step(streams, several if any(prefilling) else max(several, self._draft(streams)))

    def _together(self, active: Sequence[OperationStream], prefilling: Sequence[bool]) -> Step[OperationStream]:
        """What every stream has pending that decodes, and then prompts as far as they fit into the budget: those first
        whose prediction has waited longest."""
        budget = self._budget(active, decoding=not all(prefilling))
        most = {stream: stream.pending for stream, prefill in zip(active, prefilling, strict=True) if not prefill}
        prompts = [stream for stream, prefill in zip(active, prefilling, strict=True) if prefill]
        for stream in sorted(prompts, key=lambda stream: stream.prediction.turns.prefilled):
            if budget:
                most[stream] = min(stream.pending, budget)
                budget -= most[stream]
                stream.prediction.turns.prefilled = self._steps
        return self._step(list(most), list(most.values()))

    def _in_turn(
        self, active: Sequence[OperationStream], prefilling: Sequence[bool], work: int
    ) -> tuple[int, int, int]:
        """Where the streams begin and end that decode in this step, and how much the longest of them has computed. A
        prediction that had one of the last two steps does not join another one's."""
        first = min(
            (i for i, prefill in enumerate(prefilling) if not prefill),
            key=lambda i: (active[i].prediction.turns.last, active[i].decoded),
        )
        own, longest, end = active[first].prediction, 0, first
        while end < len(active):
            stream = active[end]
            columns = max(longest, stream.computed)
            joins = stream.prediction is own or stream.prediction.turns.last < self._steps - 2
            if end > first and not (joins and (end + 1 - first) * StepLimits.cost(columns) <= work):
                break
            longest, end = columns, end + 1
        for stream in active[first:end]:
            stream.decoded = stream.prediction.turns.decoded = self._steps
        return first, end, longest

    def _budget(self, active: Sequence[OperationStream], decoding: bool) -> int:
        """Tokens of a prefill step."""
        limits = self._runner.step_limits
        if decoding:
            return limits.busy_chunk or limits.chunk
        whole = sum((s.goal - s.reused) * StepLimits.cost(s.reused, together=True) for s in active)
        most = limits.chunk if self._steps - self._shared >= QUIET else min(limits.chunk, LAST_PROMPTS * limits.work)
        return limits.chunk if whole <= most else min(limits.chunk, limits.work)

    def _draft(self, streams: Sequence[OperationStream]) -> int:
        """Let the streams draft; returns how many tokens of a stream the step takes for it."""
        limits = self._runner.step_limits
        most = DRAFTED_STEP // len(streams) - 1 if limits.drafts else 0
        if most < 1:
            return 1
        for stream in streams:
            stream.guess(most)
        return width([(len(stream.draft), stream.chance) for stream in streams], limits.drafts, limits.packed)

    def _prefill(self, streams: Sequence[OperationStream], budget: int) -> Step[OperationStream]:
        """As many of the streams as fill the budget without padding most of it; at least the first."""
        limits = self._runner.step_limits
        bounded = budget < limits.chunk  # others may wait for it
        if bounded:
            budget = min(budget, limits.work)
        rows = [streams[0]]
        tokens = streams[0].pending
        for stream in streams[1:]:
            longest = max(stream.pending, *(row.pending for row in rows))
            padded = longest * (len(rows) + 1)
            if padded > budget or tokens + stream.pending < padded // 2:
                break
            rows.append(stream)
            tokens += stream.pending
        if bounded:
            columns = max(row.computed for row in rows)
            budget = min(budget, int(limits.work / StepLimits.cost(columns, together=True)))
        if limits.whole:
            return self._step(rows, max(row.pending for row in rows))
        return self._step(rows, max(budget // len(rows), 1))

    def _step(self, streams: Sequence[OperationStream], most: int | Sequence[int]) -> Step[OperationStream]:
        """At most ``most`` tokens of each stream, or of all of them, as far as their logits fit."""
        counts = []
        logits_left = self._runner.step_limits.logits
        for stream, limit in zip(streams, [most] * len(streams) if isinstance(most, int) else most, strict=True):
            count = min(stream.pending + len(stream.draft), limit)
            wanted = stream.wanted(count)
            if wanted > logits_left:  # the first stream always makes progress: at least one position fits
                count -= wanted - logits_left
                wanted = logits_left
            if count <= 0:
                break
            logits_left -= wanted
            counts.append(count)
        return Step(list(streams[: len(counts)]), counts)

    def _admit(self) -> None:
        """Admit waiting streams while there is room.

        One that can soon reuse a long prefix lets others pass. So does one that finds no room. If its prediction has
        none running, it lets only such predictions pass, and after TURN steps nobody.
        """
        self.refused = None
        if not self._queues:
            return
        running = Counter(stream.prediction for stream in self._active())
        passed: Counter[Prediction] = Counter()
        """How many streams of each prediction, from the first, are passed over."""
        claimed = False
        """Whether one of them is the first of a prediction that has none running."""
        while passed.total() < MAX_PASSED and (prediction := self._next_prediction(running, passed, claimed)):
            queue, place = self._queues[prediction], passed[prediction]
            stream = queue[place]
            if self._awaits_prefix(stream):
                passed[prediction] += 1
                continue
            claims = not running[prediction]
            if not self._make_room(stream, running, claims and not claimed):
                self.refused = self.refused or stream
                if claims and self._steps - stream.refused >= TURN:
                    return
                claimed = claimed or claims
                passed[prediction] += 1
                continue
            stream.refused = -1
            del queue[place]
            if not queue:
                del self._queues[prediction]
            if stream.admitted >= 0:
                stream.reused = 0  # what it finds of its own was counted when it was computed
            stream.admitted = prediction.turns.queued = self._steps
            running[prediction] += 1
            self._changes += 1

    def _awaits_prefix(self, stream: OperationStream) -> bool:
        """Whether a running stream is computing a prefix of the stream's that is worth waiting for. It is compared with
        the slots only if that can have changed since it last was."""
        if stream.compared != self._changes or (stream.awaits and self._progress >= stream.awaits):
            now, soon = self._runner.shared_prefix(stream)
            missing = soon - now
            stream.compared = self._changes
            stream.awaits = self._progress + missing - WORTH_WAITING + 1 if missing >= WORTH_WAITING else 0
        return stream.awaits > 0

    def _make_room(self, stream: OperationStream, running: Counter[Prediction], claims: bool) -> bool:
        """Admit the stream; where it ``claims`` its turn, in place of others that give way."""
        begun = False
        while stream.full == self._changes or not self._runner.admit(stream):
            stream.full = self._changes
            if stream.refused < 0:
                stream.refused = self._steps
            # Where the system has no memory left, none of ours helps.
            victim = self._who_gives_way(running, begun) if claims and not self._runner.refusal else None
            begun = True
            if victim is None:
                return False
            running[victim.prediction] -= 1
            self._preempt(victim)
        return True

    def _next_prediction(
        self, running: Counter[Prediction], passed: Counter[Prediction], claimed: bool
    ) -> Prediction | None:
        """The prediction with the fewest streams running or passed over; of several, the one that has waited longest.
        ``claimed``: one that has none running."""
        waiting = [
            prediction
            for prediction, queue in self._queues.items()
            if not prediction.turns.paused and passed[prediction] < len(queue) and not (claimed and running[prediction])
        ]
        return min(waiting, key=lambda p: (running[p] + passed[p], p.turns.queued), default=None)

    def _who_gives_way(self, running: Counter[Prediction], begun: bool) -> OperationStream | None:
        """The stream that has computed least of the prediction with the most. If all have one, the one that has had its
        turn: in TURN steps, each stream gives way once. ``begun``: another one has given way for the same stream."""
        active = self._active()
        most = max(running.values(), default=0)
        if most > 1:
            return min((s for s in active if running[s.prediction] == most), key=lambda stream: stream.computed)
        oldest = min(active, key=lambda stream: stream.admitted, default=None)
        if oldest is None or self._steps - oldest.admitted < TURN:
            return None
        if self._steps - self._rotated < TURN // len(active) and not begun:
            return None
        self._rotated = self._steps
        return oldest

    def _preempt(self, stream: OperationStream) -> None:
        """Take back the stream's memory. It goes on from what is left of it as soon as it is admitted again: tokens,
        random numbers and grammar are the stream's own."""
        self._release(stream)
        stream.prediction.turns.queued = self._steps
        self._queues.setdefault(stream.prediction, deque()).appendleft(stream)

    def _release(self, stream: OperationStream, keep: bool = True) -> None:
        self._runner.release(stream, keep)
        self._changes += 1


def _width(pending: Sequence[int]) -> int:
    """How many tokens of each decoding stream to compute: as many as at least half of them have pending, so that no
    column is mostly padding. A run that a grammar forced on one stream of many is computed a token at a time beside the
    others, which costs nothing extra."""
    return sorted(pending, reverse=True)[(len(pending) - 1) // 2]
