"""KV memory for packed steps: one flat pool, and the extents that streams own in it.

The pool is allocated once. A running stream owns an extent, a range of the pool with room for all it may come to hold.
A finished stream's tokens stay in an idle extent of just their size. A new stream takes over the longest prefix that it
shares with any extent: in place where little else is lost, otherwise as a copy. Idle extents go in LRU order when room
is needed, and neighbours move together when the free room is in pieces.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtp.runners.slots import SPARE_TAIL, Layer, Slot
from lmtp.runners.step import Stream

MAX_STREAMS = 256
MAX_EXTENTS = 512
"""Extents at once, running and idle: each is compared with every new stream."""

MOVED = 256
"""Tokens that are moved at a time, by way of memory that is allocated with the pool: a move that ran out of memory half
done would leave a stream with another one's tokens."""


class Pool:
    """The tensors. Layers of one shape share one, so that moving tokens is two operations for all of them."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, tokens: int) -> None:
        """Memory for ``tokens`` tokens, and a spare place. Raises torch.OutOfMemoryError."""
        self.tokens = tokens
        self.spare = tokens
        """The place that what fills up a recorded step is written to."""
        members: list[tuple[tuple[int, int, torch.device], int]] = []
        counts: dict[tuple[int, int, torch.device], int] = {}
        for layer in layers:
            for dim in (layer.key_dim, layer.value_dim):
                kind = (layer.heads, dim, layer.device)
                members.append((kind, counts.get(kind, 0)))
                counts[kind] = members[-1][1] + 1
        self._tensors = {
            (heads, dim, device): torch.zeros((count, tokens + 1, heads, dim), dtype=dtype, device=device)
            for (heads, dim, device), count in counts.items()
        }
        self._between = {kind: torch.empty_like(tensor[:, :MOVED]) for kind, tensor in self._tensors.items()}
        views = [self._tensors[kind][index] for kind, index in members]
        self.keys: list[Tensor] = views[0::2]
        """Each layer's keys ``[tokens + 1, heads, dim]``."""
        self.values: list[Tensor] = views[1::2]

    def move(self, source: int, target: int, count: int) -> None:
        """Copy ``count`` tokens to another place, which may overlap theirs."""
        starts = range(0, count, MOVED)
        for start in starts if target < source else reversed(starts):
            some = min(MOVED, count - start)
            for kind, tensor in self._tensors.items():
                between = self._between[kind][:, :some]
                between.copy_(tensor[:, source + start : source + start + some])
                tensor[:, target + start : target + start + some] = between

    def clear(self, start: int, count: int) -> None:
        """Overwrite tokens with zeros."""
        for tensor in self._tensors.values():
            tensor[:, start : start + count] = 0


@dataclass(eq=False)
class Extent(Slot):
    """A range of the pool: its owner or, once idle, the tokens whose keys and values it still holds."""

    start: int = 0
    size: int = 0

    @property
    def end(self) -> int:
        """Where the next one may start."""
        return self.start + self.size


class Extents:
    """Who owns which part of the pool."""

    refusal = ""
    """See Runner.refusal. The pool never grows, so the system is never asked."""

    def __init__(self, pool: Pool, context: int) -> None:
        """``context``: the most tokens a stream can have."""
        self.pool = pool
        self.longest = min(context, pool.tokens)
        """The most tokens a stream can hold."""
        self.active: list[Stream] = []
        """The streams that own extents: ``active[i].slot == i``."""
        self._extents: list[Extent] = []
        """In the order of their places."""
        self._owned: dict[Stream, Extent] = {}
        self._clock = itertools.count()

    def start_of(self, stream: Stream) -> int:
        """The place of a running stream's first token. Admitting other streams may move it."""
        return self._owned[stream].start

    @property
    def owned(self) -> int:
        """Tokens that running streams have room for."""
        return sum(extent.size for extent in self._owned.values())

    def shared_prefix(self, stream: Stream) -> tuple[int, int]:
        """See Runner.shared_prefix."""
        now = soon = 0
        for extent in self._extents:
            shared = extent.shared(stream, now)
            now = max(now, min(shared, extent.held[1]))
            if extent.stream is not None:
                soon = max(soon, min(shared, extent.stream.goal))
        return now, max(now, soon)

    def admit(self, stream: Stream) -> bool:
        """Give the stream an extent, with the longest prefix that any extent holds; False where there is no room."""
        need, owned = stream.max_length, self.owned
        if owned + need > self.pool.tokens or len(self.active) >= MAX_STREAMS:
            return False
        source, length = self._longest_prefix(stream)
        if source and source.stream is None and self._takes_over(source, length, owned + need):
            extent = source
            extent.tokens, extent.size = extent.tokens[:length], length
        else:
            extent = Extent()
        self._evict(need - extent.size, kept=source)
        start = self._open(need, extent)
        if extent is source:
            self._extents.remove(extent)
            if extent.start != start:
                self.pool.move(extent.start, start, length)
        elif source:
            self.pool.move(source.start, start, length)
            source.last_used = next(self._clock)
        extent.start, extent.size, extent.stream, extent.tokens = start, need, stream, []
        bisect.insort(self._extents, extent, key=lambda other: other.start)
        stream.computed = stream.reused = length
        stream.slot = len(self.active)
        self.active.append(stream)
        self._owned[stream] = extent
        return True

    def release(self, stream: Stream, keep: bool = True) -> None:
        """Take the extent back; its contents stay for reuse unless ``keep`` is false."""
        extent = self._owned.pop(stream)
        del self.active[stream.slot]
        for slot, other in enumerate(self.active[stream.slot :], start=stream.slot):
            other.slot = slot
        stream.slot = -1
        extent.stream, extent.tokens = None, stream.tokens[: stream.computed] if keep else []
        extent.salt, extent.source = stream.salt, stream.source
        extent.last_used = next(self._clock)
        start, size = extent.start, extent.size
        extent.size = len(extent.tokens)
        if not extent.tokens:
            self._extents.remove(extent)
        if not keep:
            self.pool.clear(start, size)

    def _longest_prefix(self, stream: Stream) -> tuple[Extent | None, int]:
        best, length = None, 0
        for extent in self._extents:
            shared = min(extent.shared(stream, length), extent.held[1])
            if shared > length:
                best, length = extent, shared
        return best, length

    def _takes_over(self, source: Extent, length: int, needed: int) -> bool:
        """Whether a stream takes an idle extent over in place: where little of it is lost, or where the tokens needed
        leave no room for it."""
        return len(source.tokens) - length < SPARE_TAIL or needed + source.size > self.pool.tokens

    def _evict(self, room: int, kept: Extent | None) -> None:
        """Drop idle extents, the least recently used first, until so many tokens are free."""
        free = self.pool.tokens - sum(extent.size for extent in self._extents)
        idle = sorted((e for e in self._extents if e.stream is None and e is not kept), key=lambda e: e.last_used)
        for extent in idle:
            if free >= room and len(self._extents) < MAX_EXTENTS:
                return
            self._extents.remove(extent)
            free += extent.size

    def _open(self, need: int, taken: Extent) -> int:
        """Where ``need`` tokens in a row are free, after moving as few as that takes. The extent that is taken over
        counts as free. It stays where it is, and so do its tokens."""
        others = [extent for extent in self._extents if extent is not taken]
        ends = [0, *(extent.end for extent in others)]
        starts = [*(extent.start for extent in others), self.pool.tokens]
        first, last = self._cheapest(need, taken, others, starts, ends)
        moved = others[first:last]
        start, end = ends[first], starts[last]
        # Around the tokens that are taken over, so that they are not overwritten.
        before = [extent for extent in moved if not taken.size or extent.start < taken.start]
        for extent in before:
            self._shift(extent, start)
            start = extent.end
        for extent in reversed(moved[len(before) :]):
            end -= extent.size
            self._shift(extent, end)
        return taken.start if _stays(taken, need, start, end) else start

    def _cheapest(
        self, need: int, taken: Extent, others: Sequence[Extent], starts: Sequence[int], ends: Sequence[int]
    ) -> tuple[int, int]:
        """Between which gaps the extents have to move: gap i lies before ``others[i]``."""
        best, found = (2**63, 0), (0, len(others))
        last, free, held = -1, 0, 0
        for first in range(len(starts)):
            if last < first:
                last, free, held = first, starts[first] - ends[first], 0
            while free < need and last < len(others):
                held += others[last].held[1]
                last += 1
                free += starts[last] - ends[last]
            if free < need:
                break
            stays = first == last and _stays(taken, need, ends[first], starts[last])
            cost = held + (0 if stays else taken.held[1]), free
            if cost < best:
                best, found = cost, (first, last)
            free -= starts[first] - ends[first]
            if first < last:
                held -= others[first].held[1]
        return found

    def _shift(self, extent: Extent, start: int) -> None:
        if extent.start != start:
            self.pool.move(extent.start, start, extent.held[1])
            extent.start = start


def _stays(taken: Extent, need: int, start: int, end: int) -> bool:
    """Whether the extent has the room it needs where it is, between these places."""
    return taken.size > 0 and start <= taken.start and taken.start + need <= end
