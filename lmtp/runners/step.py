"""A step: the streams that take part, how many tokens of each, and the tensors that the model takes.

A stream is a list of tokens of which the first ``computed`` are in the runner's memory. A step computes some more of
them. Prefill, decode, forced runs, drafts and scoring differ only in these numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypeVar

from torch import Tensor


class Stream:
    """What a runner knows of a stream."""

    SHARED: ClassVar[object] = None
    """The salt of streams that share prefixes with every other stream of this salt."""

    def __init__(self, tokens: list[int], max_length: int) -> None:
        self.tokens = tokens
        self.max_length = max_length
        """Tokens it may come to hold, prompt included: its memory must have room for them."""
        self.prompt_length = len(tokens)
        """How many of its first tokens are the prompt; later ones were generated, or are to be scored."""
        self.computed = 0
        """How many tokens, from the first, have their keys and values in the runner's memory."""
        self.reused = 0
        """How many of those were computed for another stream."""
        self.draft: list[int] = []
        """Guessed next tokens, computed along with the known ones."""
        self.salt = Stream.SHARED
        """Streams share prefixes only if their salts are equal."""
        self.adapter = ""
        """The adapter that computes it; empty: the base alone. Its salt tells adapters apart."""
        self.source: tuple[int, ...] = ()
        """What the encoder reads; streams share prefixes only if their sources are equal. A decoder has none."""
        self.encoded: object = None
        """What the runner keeps of the source while the stream lasts."""
        self.source_counts = (0, 0)
        """How many tokens of the source were computed for this stream and how many reused, until that is counted."""
        self.problem = ""
        """Why the runner could not compute it: its logits mean nothing. Other streams of the step are sound."""
        self.slot = -1
        """Its place in the runner's memory; -1 while it has none."""

    @property
    def goal(self) -> int:
        """How many tokens have to be computed before the stream can go on or end: all of them, by default."""
        return len(self.tokens)

    @property
    def first_wanted(self) -> int:
        """The first position whose logits are wanted: the last one, by default. The positions before it are never
        computed twice."""
        return len(self.tokens) - 1

    @property
    def pending(self) -> int:
        """How many known tokens still have to be computed."""
        return self.goal - self.computed

    def upcoming(self, count: int) -> list[int]:
        """The next ``count`` tokens to compute: known ones, then those of the draft."""
        known = self.tokens[self.computed : self.computed + count]
        return known + self.draft[: count - len(known)]

    def wanted(self, count: int) -> int:
        """At how many of the next ``count`` positions logits are wanted: the last ones."""
        return max(self.computed + count - max(self.first_wanted, self.computed), 0)

    def places(self, count: int) -> Sequence[int]:
        """The position of each row of logits that is wanted once the next ``count`` tokens are computed."""
        end = self.computed + count
        return range(end - self.wanted(count), end)


S_co = TypeVar("S_co", bound=Stream, covariant=True)


@dataclass(frozen=True)
class Step(Generic[S_co]):
    """The tokens of one forward pass: the next ``counts[i]`` tokens of ``streams[i]``.

    The streams are neighbours among the runner's active ones, in their order, unless its steps are packed.
    """

    streams: Sequence[S_co]
    counts: Sequence[int]


DECODE_COLUMNS, CHUNK_COLUMNS = 1536, 4096
"""Columns that cost as much as the rest of a token. Measured with the demo model in float32 on a CPU, where a token
takes 5.2 ms of one core, a column of a decoding row 3.7 µs and a column of a prompt's token 1.2 µs."""


@dataclass(frozen=True)
class StepLimits:
    """Which steps suit a runner; the scheduler keeps to them."""

    chunk: int
    """Tokens of a prefill step."""
    busy_chunk: int
    """The same while other streams decode, so that these do not stall; 0: a prompt takes one step in any case."""
    logits: int
    """Positions of one step at which logits may be wanted."""
    drafts: int
    """Tokens that take as long to compute as the weights take to read; 0 where accepted draft tokens save no time."""
    packed: bool = False
    """Whether a step takes any streams with any numbers of tokens: nothing is padded to the longest."""
    whole: bool = False
    """Whether prompts are computed whole, each in one step, be it longer than a chunk."""
    work: int = 2**31
    """Tokens of any other step than one that ends all prompts there are, so that nobody waits long for a step. A token
    counts more the more columns it attends to: see `cost`."""

    @staticmethod
    def cost(columns: int, together: bool = False) -> float:
        """What a token costs that attends to so many columns, in tokens without attention. ``together``: it shares
        the columns with other tokens of its row, so that they are read once."""
        return 1 + columns / (CHUNK_COLUMNS if together else DECODE_COLUMNS)


class StepInputs(NamedTuple):
    """What one forward pass over slots takes. Row i is slot i of ``keys`` and ``values``."""

    ids: Tensor
    """``[rows, q]``: token ids; the padding of short rows has any id."""
    positions: Tensor
    """``[rows, q]``: each token's position in its stream."""
    writes: Tensor
    """``[rows, q]``: the column that each token's keys and values go to."""
    wanted: Tensor
    """``[wanted]``: indices into the flattened ``[rows * q]`` at which logits are wanted."""
    masks: list[Tensor]
    """One additive mask ``[rows, 1, q, columns]`` for each kind of attention layer: 0 where a position may look, the
    dtype's minimum elsewhere. Empty where every row begins with these tokens: the model then makes its own causal
    masks, and its attention skips what no position sees."""
    keys: list[Tensor]
    """Each layer's keys ``[slots, heads, capacity + 1, dim]``; the last column takes what padding writes."""
    values: list[Tensor]
    """Each layer's values, in the same layout."""


class SourceInputs(NamedTuple):
    """What one step reads of its sources. Row i is that of the step's stream i."""

    mask: Tensor
    """``[rows, 1, 1, columns]``: 0 for a row's own source, the dtype's minimum behind it."""
    keys: list[Tensor]
    """Each layer's keys ``[slots, heads, capacity + 1, dim]``, of which the first rows and columns are read."""
    values: list[Tensor]
    """Each layer's values, in the same layout."""


ModelStep = Callable[[StepInputs], Tensor]
"""The model's forward pass: the logits ``[wanted, vocabulary]`` at the wanted positions.

slot_runner.SlotStep runs the model's own code; compiled.CompiledStep is a faster way to run it.
"""
