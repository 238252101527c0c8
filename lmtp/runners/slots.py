"""KV memory: slots, their reuse by prefix, growth within a budget.

Keys and values live in one tensor pair per layer, ``[slots, kv_heads, capacity + 1, head_dim]``. The last column takes
what padding writes and is never read. A running stream owns a slot. Owned slots come first, so that attention reads
views of the memory and never copies. A finished stream leaves its tokens in its slot; a new stream takes over the
longest prefix it shares with any slot, idle or running.
"""

import itertools
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from lmtp.runners.step import Stream
from lmtp.settings import SettingsError

FIRST_SLOTS = 4
FIRST_CAPACITY = 256
MIN_TOKENS = 16
"""Tokens that the memory has to hold at least."""
SPARE_TAIL = 32
"""A prefix is taken over in place if the old stream loses fewer tokens than this: recomputing so few is cheaper than
copying the prefix."""


@dataclass(frozen=True)
class Layer:
    """What one layer keeps for a token, keys ``[heads, key_dim]`` and values ``[heads, value_dim]``, and where."""

    heads: int
    key_dim: int
    value_dim: int
    device: torch.device


class Memory:
    """The tensors. Layers of one shape share one tensor, so that moving a slot is one operation for all of them."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._groups: dict[tuple[int, int, torch.device], int] = {}
        members = []
        for layer in layers:
            for dim in (layer.key_dim, layer.value_dim):
                key = (layer.heads, dim, layer.device)
                members.append((key, self._groups.get(key, 0)))
                self._groups[key] = members[-1][1] + 1
        self._members = members
        self._tensors: dict[tuple[int, int, torch.device], Tensor] = {}
        self.slots = 0
        self.capacity = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one slot takes in all layers."""
        return sum(count * heads * dim for (heads, dim, _), count in self._groups.items()) * self._dtype.itemsize

    @property
    def total(self) -> int:
        """Bytes of memory of all the devices it lies on."""
        return sum(
            torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total
            for device in {device for _, _, device in self._groups}
        )

    def resize(self, slots: int, capacity: int, held: Sequence[int] = ()) -> None:
        """Make room for ``slots`` slots of ``capacity`` tokens. Each of the first slots keeps what fits of its first
        ``held[slot]`` tokens."""
        self._tensors = self._made(slots, capacity, held)  # only once all exist: memory may run out on the way
        self.slots, self.capacity = slots, capacity
        views = [self._tensors[key][index] for key, index in self._members]
        self.keys, self.values = views[0::2], views[1::2]

    def _made(self, slots: int, capacity: int, held: Sequence[int]) -> dict[tuple[int, int, torch.device], Tensor]:
        tensors = {}
        for (heads, dim, device), count in self._groups.items():
            # Zeros, since padding is read: a masked column has weight 0, but 0 times a stray NaN would be NaN.
            tensor = _zeros((count, slots, heads, capacity + 1, dim), self._dtype, device)
            for slot, length in enumerate(held[:slots]):
                columns = min(length, capacity)
                if columns:
                    tensor[:, slot, :, :columns] = self._tensors[heads, dim, device][:, slot, :, :columns]
            tensors[heads, dim, device] = tensor
        return tensors

    def from_slot(self, first: int) -> tuple[list[Tensor], list[Tensor]]:
        """Each layer's keys and values ``[slots - first, heads, capacity + 1, dim]``, without the first slots."""
        if first == 0:
            return self.keys, self.values
        return [keys[first:] for keys in self.keys], [values[first:] for values in self.values]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot into another."""
        for tensor in self._tensors.values():
            tensor[:, target, :, :length] = tensor[:, source, :, :length]

    def clear(self, slot: int) -> None:
        """Overwrite a slot with zeros: NaN in it would spoil sums over masked columns."""
        for tensor in self._tensors.values():
            tensor[:, slot] = 0

    def swap(self, one: int, other: int, short: int, long: int) -> None:
        """Exchange the first ``short`` tokens of one slot and the first ``long`` of the other, each moved once."""
        for tensor in self._tensors.values():
            kept = tensor[:, one, :, :short].clone()
            tensor[:, one, :, :long] = tensor[:, other, :, :long]
            tensor[:, other, :, :short] = kept


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, take time and memory only where they are written.

    Slots are rarely full, and the memory grows several times while streams arrive.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise torch.OutOfMemoryError(f"no memory for keys and values: {error}") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@dataclass(eq=False)
class Slot:
    """One slot: the stream that owns it or, once idle, the tokens whose keys and values it still holds."""

    stream: Stream | None = None
    tokens: list[int] = field(default_factory=list)
    salt: object = Stream.SHARED
    source: tuple[int, ...] = ()
    last_used: int = 0

    def shared(self, stream: Stream, least: int = 0) -> int:
        """How many of the stream's first tokens are also this slot's, whether computed by now or not; 0 if their salts
        or sources differ. Where one token shows that these are no more than ``least``, they are not counted: 0."""
        owner = self.stream or self
        if owner.salt != stream.salt or owner.source != stream.source:
            return 0
        if least >= min(len(owner.tokens), stream.first_wanted) or owner.tokens[least] != stream.tokens[least]:
            return 0
        return min(common_prefix(owner.tokens, stream.tokens), stream.first_wanted)

    @property
    def held(self) -> tuple[list[int], int]:
        """Tokens and how many of them, from the first, are held."""
        if self.stream is not None:
            return self.stream.tokens, self.stream.computed
        return self.tokens, len(self.tokens)


class Slots:
    """Who owns which slot. Slot i lies at row i of the memory."""

    def __init__(self, memory: Memory, budget: int, max_slots: int, context: int) -> None:
        """``budget`` is in bytes; ``context`` the most tokens a stream can have. Raises SettingsError for a budget that
        holds no prompt, or more than there is."""
        self._memory = memory
        self._budget_tokens = budget // memory.bytes_per_token
        self.refusal = ""
        """Why the system gave no memory when a stream was last not admitted; empty while it does."""
        check_budget(budget, min(MIN_TOKENS, context) * memory.bytes_per_token, memory.total)
        self._max_slots = max_slots
        self._context = context
        self._clock = itertools.count()
        self._slots: list[Slot] = []
        self.active: list[Stream] = []
        """The streams that own slots, in slot order: ``active[i].slot == i``."""

    @property
    def longest(self) -> int:
        """The most tokens a stream can hold within the budget."""
        return min(self._context, self._budget_tokens)

    def shared_prefix(self, stream: Stream) -> tuple[int, int]:
        """How many of the stream's first tokens some slot holds now, and how many once the running streams are done."""
        now = soon = 0
        for slot in self._slots:
            shared = slot.shared(stream, now)
            now = max(now, min(shared, slot.held[1]))
            if slot.stream is not None:
                soon = max(soon, min(shared, slot.stream.goal))
        return now, max(now, soon)

    def admit(self, stream: Stream) -> bool:
        """Give the stream a slot, with the longest prefix that any slot holds; False where there is no room now."""
        try:
            if not self._make_room(stream.max_length):
                return False
        except torch.OutOfMemoryError as error:  # other programs use the GPU as well
            self.refusal = str(error).splitlines()[0]
            return False
        self.refusal = ""
        source, length = self._longest_prefix(stream)
        target = self._choose_target(source, length)
        place = len(self.active)
        if target is source:
            self._swap(self._slots.index(target), place)
        else:
            target.tokens = []  # nothing of it has to be moved
            self._swap(self._slots.index(target), place)
            if length:
                self._memory.copy(self._slots.index(source), place, length)
        stream.computed = stream.reused = length
        target.stream, target.tokens = stream, []
        target.last_used = next(self._clock)
        if length:
            source.last_used = target.last_used
        stream.slot = place
        self.active.append(stream)
        return True

    def release(self, stream: Stream, keep: bool = True) -> None:
        """Take the slot back; its contents stay for reuse unless ``keep`` is false."""
        slot = self._slots[stream.slot]
        if not keep:
            self._memory.clear(stream.slot)
        slot.stream, slot.tokens = None, stream.tokens[: stream.computed] if keep else []
        slot.salt, slot.source = stream.salt, stream.source
        slot.last_used = next(self._clock)
        last = self.active.pop()
        if last is not stream:
            self._swap(stream.slot, last.slot)
            self.active[stream.slot] = last
            last.slot = stream.slot
        stream.slot = -1

    def _make_room(self, tokens: int) -> bool:
        """Provide an idle slot that takes ``tokens`` tokens, within the budget; False where that is impossible now."""
        memory, running = self._memory, len(self.active)
        if running < memory.slots and tokens <= memory.capacity:
            if all(slot.tokens for slot in self._slots[running:]):  # grow before evicting
                self._resize(min(memory.slots * 2, self._max_slots), memory.capacity)
            return True
        if running >= self._max_slots:
            return False
        need = max([tokens, *(stream.max_length for stream in self.active)])
        capacity = memory.capacity or min(FIRST_CAPACITY, self._context)
        while capacity < need:
            capacity *= 2
        capacity = min(capacity, self._context)
        if (running + 1) * capacity > self._budget_tokens:
            capacity = need  # give up long idle streams and spare room
        if (running + 1) * capacity > self._budget_tokens:
            return False
        slots = memory.slots if running < memory.slots else memory.slots * 2
        self._resize(min(max(slots, FIRST_SLOTS), self._max_slots), capacity)
        return True

    def _resize(self, slots: int, capacity: int) -> None:
        running = len(self.active)
        slots = max(min(slots, self._budget_tokens // capacity), running + 1)
        if (slots, capacity) == (self._memory.slots, self._memory.capacity):
            return
        if slots < len(self._slots):  # only the first slots stay: the most recently used idle ones move there
            idle = sorted(self._slots[running:], key=lambda slot: (bool(slot.tokens), slot.last_used), reverse=True)
            for place, slot in enumerate(idle[: slots - running], start=running):
                self._swap(self._slots.index(slot), place)
        self._memory.resize(slots, capacity, [slot.held[1] for slot in self._slots])
        del self._slots[slots:]
        self._slots += [Slot() for _ in range(slots - len(self._slots))]
        for slot in self._slots[running:]:
            del slot.tokens[capacity:]

    def _longest_prefix(self, stream: Stream) -> tuple[Slot, int]:
        best, length = self._slots[-1], 0
        for slot in self._slots:
            shared = min(slot.shared(stream, length), slot.held[1])
            if shared > length:
                best, length = slot, shared
        return best, length

    def _choose_target(self, source: Slot, length: int) -> Slot:
        idle = self._slots[len(self.active) :]
        victim = min(idle, key=lambda slot: (bool(slot.tokens), slot.last_used))
        if source.stream is None and length and (source is victim or len(source.tokens) - length < SPARE_TAIL):
            return source
        return victim

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        ones, others = self._slots[one].held[1], self._slots[other].held[1]
        if ones > others > 0:
            self._memory.swap(other, one, others, ones)
        elif ones and others:
            self._memory.swap(one, other, ones, others)
        elif ones:
            self._memory.copy(one, other, ones)
        elif others:
            self._memory.copy(other, one, others)
        self._slots[one], self._slots[other] = self._slots[other], self._slots[one]


def check_budget(budget: int, needed: int, total: int) -> None:
    """Raise SettingsError for a budget in bytes that is less than needed, or more than there is."""
    if not needed <= budget <= total:
        given, least, most = (f"{float(f'{size / 2**30:.3g}'):g}" for size in (budget, needed, total))
        raise SettingsError(
            f"KV_CACHE_GB is {given}; this model needs at least {least}, and there are {most} GB of memory."
        )


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many tokens two lists share from the first. It bisects, since comparing slices is fast."""
    low, high = 0, min(len(one), len(other))
    if high == 0 or one[0] != other[0]:
        return 0
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
