"""Which replica gets a call: the one that holds the longest beginning of its text, unless it is overloaded.

The router remembers the texts that it sent where, in blocks of fixed length: a block's key is the hash of its items and
of the key before it, so that equal keys mean equal beginnings. Loads are bounded as in "Consistent Hashing with Bounded
Loads" (Mirrokni, Thorup, Zadimoghaddam, 2018): no replica takes more than a fixed multiple of the mean load.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence

BLOCK = 16
"""Items, characters or tokens, of a block: shorter texts go to the least loaded."""
MAX_BLOCKS = 1 << 19
"""Blocks that the router remembers; the least recently used go first. They take about 100 MB."""
LONG = 64
"""Items that are worth reuse in any text. Fewer count if they are half of it: texts that begin with the same few words
need not be together."""
MAX_LOAD = 1.25
"""A replica's load, in multiples of the mean, from which calls go elsewhere."""
FREE_LOAD = 16
"""A replica with fewer calls is never overloaded: its steps take hardly longer than with one. In the simulation, with 8
clients a replica, 16 computes up to a third less than 4, and queries take as long."""


class PrefixRouter:
    """Chooses a replica for each call and remembers the choice."""

    def __init__(
        self,
        *,
        block: int = BLOCK,
        max_blocks: int = MAX_BLOCKS,
        max_load: float = MAX_LOAD,
        free_load: int = FREE_LOAD,
    ) -> None:
        self._block = block
        self._max_blocks = max_blocks
        self._max_load = max_load
        self._free_load = free_load
        self._holders: OrderedDict[int, set[str]] = OrderedDict()

    def choose(self, text: Sequence[Hashable], loads: Mapping[str, int]) -> str:
        """The replica for a call.

        Args:
            text: The call's text, as characters or tokens.
            loads: Calls that run on each replica now. Not empty.
        """
        blocks = list(self._blocks(text))
        allowed = max(self._free_load, math.ceil(self._max_load * (sum(loads.values()) + 1) / len(loads)))
        free = {replica: load for replica, load in loads.items() if load < allowed}
        held = dict.fromkeys(free, 0)
        enough = min(LONG, len(text) / 2)
        for count, block in enumerate(blocks, 1):
            if count * self._block >= enough:
                for replica in self._holders.get(block, set()) & free.keys():
                    held[replica] = count
        chosen = max(free, key=lambda replica: (held[replica], -free[replica]))
        self._remember(blocks, chosen)
        return chosen

    def remember(self, text: Sequence[Hashable], replica: str) -> None:
        """Note that a call went to this replica, whichever was chosen."""
        self._remember(list(self._blocks(text)), replica)

    def forget(self, replica: str) -> None:
        """The replica is gone, and so is all that it held."""
        for block in [block for block, holders in self._holders.items() if replica in holders]:
            self._holders[block].discard(replica)
            if not self._holders[block]:
                del self._holders[block]

    def _blocks(self, text: Sequence[Hashable]) -> Iterator[int]:
        before = 0
        for begin in range(0, len(text) - self._block + 1, self._block):
            before = hash((before, tuple(text[begin : begin + self._block])))
            yield before

    def _remember(self, blocks: Sequence[int], replica: str) -> None:
        # From the last to the first: of one text, the end is forgotten first.
        for block in reversed(blocks):
            self._holders.setdefault(block, set()).add(replica)
            self._holders.move_to_end(block)
        while len(self._holders) > self._max_blocks:
            self._holders.popitem(last=False)
