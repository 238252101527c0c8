"""The runner over packed tokens: a step's tokens through the model without padding and masks, for GPUs.

The tokens of all streams are one row ``[1, tokens]``, prompts and single tokens together. The model's own code gets
position ids, a cache that writes each token's keys and values at its place in the pool, and attention over the pool.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from typing_extensions import override

from lmtp.runners.extents import MAX_STREAMS, Extents, Pool
from lmtp.runners.flash import Attention, Rows
from lmtp.runners.fused import Fused
from lmtp.runners.model import UnsupportedModel, accepts_positions, only_wanted
from lmtp.runners.slot_runner import MAX_LOGITS, SlotStep, has_experts
from lmtp.runners.slots import Layer
from lmtp.runners.step import Step, StepLimits, Stream

CHUNK = 8192
BUSY_CHUNK = 1024
READING = 100
"""Tokens that take as long to compute as the weights take to read, from below."""


class PackedInputs(NamedTuple):
    """What one forward pass over the pool takes."""

    ids: Tensor
    """``[1, tokens]``: token ids."""
    positions: Tensor
    """``[1, tokens]``: each token's position in its stream."""
    writes: Tensor
    """``[tokens]``: the place in the pool that each token's keys and values go to."""
    wanted: Tensor
    """``[wanted]``: the tokens at which logits are wanted."""
    rows: Rows


class Shape(NamedTuple):
    """The sizes of a step's inputs. They travel to the device as one int64 tensor."""

    tokens: int
    wanted: int
    rows: int
    max_queries: int
    max_length: int

    @property
    def size(self) -> int:
        """int64 numbers of the tensor. Rows take int32."""
        return 3 * self.tokens + self.wanted + (3 * self.rows + 3) // 2

    def split(self, packed: Tensor) -> PackedInputs:
        """Views of the tensor."""
        ids, positions, writes, wanted, queries, first, lengths = self.fields(packed, torch.int32)
        rows = Rows(queries, first, lengths, self.max_queries, self.max_length)
        return PackedInputs(ids[None], positions[None], writes, wanted, rows)

    def fields(self, numbers: Any, int32: Any) -> tuple[Any, ...]:
        """Views of the tensor, or of an array of its numbers: ids, positions, writes, wanted, then the three tensors of
        Rows, of the dtype ``int32``."""
        tokens, rows = self.tokens, self.rows
        rest = 3 * tokens + self.wanted
        small = numbers[rest:].view(int32)
        return (
            *(numbers[i * tokens : (i + 1) * tokens] for i in range(3)),
            numbers[3 * tokens : rest],
            *(small[i * (rows + 1) : (i + 1) * (rows + 1)] for i in range(2)),
            small[2 * (rows + 1) : 3 * rows + 2],
        )


class Recorded(Protocol):
    """Recorded steps, each for a number of tokens of any streams up to a length. A token is a row of its own."""

    description: str
    shapes: Sequence[Shape]
    """The inputs of each of them."""

    def shape(self, tokens: int, length: int) -> Shape | None:
        """The inputs of the smallest recorded step with room for so many tokens of streams of up to this length; None
        where there is none."""

    def run(self, shape: Shape, packed: Tensor, wanted: int) -> Tensor:
        """The logits at the first ``wanted`` wanted positions, of inputs on the host; valid until the next call."""


class PoolCache(Cache):
    """The Transformers cache of one step: writes into the pool, returns all of it."""

    def __init__(self, pool: Pool, writes: Tensor) -> None:
        super().__init__(layers=[])
        self._pool, self._writes = pool, writes

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention with ``[1, heads, tokens, dim]``; returns ``[1, heads, pool, dim]``."""
        keys, values = self._pool.keys[layer_idx], self._pool.values[layer_idx]
        keys.index_copy_(0, self._writes, key_states[0].transpose(0, 1))
        values.index_copy_(0, self._writes, value_states[0].transpose(0, 1))
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing counts by it: positions are given, and there are no masks."""
        return 0


class PackedStep:
    """The model's forward pass over a pool."""

    def __init__(self, slot_step: SlotStep, layers: list[Layer]) -> None:
        """``slot_step`` knows which tokens the model's layers see. Raises UnsupportedModel for a model whose positions
        or attention do not work over a pool."""
        self.model = slot_step.model
        if not accepts_positions(self.model):
            raise UnsupportedModel("it takes no positions")
        self.layers = layers
        self.device = layers[0].device
        self._attention = Attention(self.model, list(slot_step.rules), layers)
        self._fused = Fused(self.model)

    @torch.inference_mode()
    def __call__(self, inputs: PackedInputs, pool: Pool) -> Tensor:
        """The logits ``[wanted, vocabulary]``."""
        with (
            self._attention.over(inputs.rows, pool.keys),
            self._fused.in_use(),
            only_wanted(self.model, inputs.wanted),
        ):
            output = self.model(
                input_ids=inputs.ids,
                position_ids=inputs.positions,
                past_key_values=PoolCache(pool, inputs.writes),
                use_cache=True,
            )
        logits: Tensor = output.logits
        return logits[0]


class PackedRunner(Extents):
    """Extents that also run steps."""

    longest_source = 0
    reason = ""

    def __init__(self, step: PackedStep, pool: Pool, context: int, recorded: Recorded | None = None) -> None:
        """``recorded`` replaces ``step`` where it can."""
        super().__init__(pool, context)
        faster = f", {recorded.description}" if recorded else ""
        self.description = f"packed tokens, memory for {pool.tokens} of them{faster}"
        vocabulary = step.model.get_output_embeddings().weight.shape[0]
        self.step_limits = StepLimits(
            CHUNK,
            BUSY_CHUNK,
            logits=max(MAX_LOGITS // vocabulary, MAX_STREAMS),
            # A few tokens more cost launches unless they are recorded.
            drafts=READING if recorded and not has_experts(step.model) else 0,
            packed=True,
        )
        self.step = step
        self.recorded = recorded
        self.padded_tokens = 0
        """Tokens computed only to fill up recorded steps."""

    @torch.inference_mode()
    def prepare(self, step: Step[Stream]) -> Callable[[], Tensor]:
        """See Runner.prepare."""
        tokens = sum(step.counts)
        pairs = list(zip(step.streams, step.counts, strict=True))
        longest = max(stream.computed + count for stream, count in pairs)
        if self.recorded and (shape := self.recorded.shape(tokens, longest)):
            return self.prepare_recorded(step, shape)
        wanted = sum(stream.wanted(count) for stream, count in pairs)
        shape = Shape(tokens, wanted, len(pairs), max(step.counts), longest)
        packed = self._packed(step, shape)[0].to(self.step.device, non_blocking=True)
        return functools.partial(self.step, shape.split(packed), self.pool)

    @torch.inference_mode()
    def prepare_recorded(self, step: Step[Stream], shape: Shape) -> Callable[[], Tensor]:
        """The same for the recorded step of a shape that has room for the step."""
        assert self.recorded
        packed, wanted = self._packed(step, shape)
        self.padded_tokens += shape.tokens - sum(step.counts)
        return functools.partial(self.recorded.run, shape, packed, wanted)

    def _packed(self, step: Step[Stream], shape: Shape) -> tuple[Tensor, int]:
        """A step's inputs as one tensor on the host, and at how many positions logits are wanted. A shape with as
        many rows as tokens gets a row for each token, and what a step lacks is filled up at the spare place."""
        counts = np.array(step.counts)
        computed = np.array([stream.computed for stream in step.streams])
        starts = np.array([self.start_of(stream) for stream in step.streams])
        wanted = np.array([stream.wanted(count) for stream, count in zip(step.streams, step.counts, strict=True)])
        ends = counts.cumsum()
        tokens, spare = int(ends[-1]), self.pool.spare
        # Pinned, so that nobody waits for its copy. PyTorch keeps it until that is done.
        packed = torch.empty(shape.size, dtype=torch.long, pin_memory=self.step.device.type == "cuda")
        numbers = packed.numpy()
        numbers.fill(0)
        ids, positions, writes, places, queries, first, lengths = shape.fields(numbers, np.int32)
        np.concatenate(
            [stream.upcoming(count) for stream, count in zip(step.streams, step.counts, strict=True)], out=ids[:tokens]
        )
        positions[:tokens] = np.arange(tokens) + np.repeat(computed - (ends - counts), counts)
        writes[:tokens] = positions[:tokens] + np.repeat(starts, counts)
        writes[tokens:] = spare
        offsets = np.arange(tokens)
        found = offsets[offsets >= np.repeat(ends - wanted, counts)]
        places[: len(found)] = found
        if shape.rows == len(counts):
            queries[1:], first[:-1], lengths[:] = ends, starts, computed + counts
        else:
            queries[:] = np.arange(shape.rows + 1)
            first[:tokens], first[tokens:] = np.repeat(starts, counts), spare
            lengths[:tokens], lengths[tokens:] = positions[:tokens] + 1, 1
        return packed, len(found)
