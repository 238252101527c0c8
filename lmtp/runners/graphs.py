"""Packed steps as CUDA graphs.

On a GPU a small step is mostly kernel launches. A CUDA graph records them once and replays them in one call
(https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Each graph takes a number of tokens, of any streams and
in any mixture: a token is a row of its own that sees the tokens before it. A step takes the smallest graph that is
large enough and fills it up at the pool's spare place. All graphs are recorded at setup, none while serving.

FlashAttention divides long rows among the processors of a GPU where rows and heads alone do not fill it
(https://pytorch.org/blog/flash-decoding/). It decides that by the greatest length, which a graph fixes. So graphs of
few tokens are recorded for several lengths.
"""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmtp.runners.extents import Pool
from lmtp.runners.model import UnsupportedModel, in_words
from lmtp.runners.packed import PackedInputs, PackedStep, Shape

log = logging.getLogger(__name__)

BUCKETS = (*range(1, 9), *(size * (4 + i) // 4 for size in (8, 16, 32, 64, 128) for i in (1, 2, 3, 4)))
"""How many tokens the graphs take, up to 256. They are so close that less than a fifth of a step is filler, and none in
a step of up to eight tokens."""

LENGTHS = (256, 1024, 4096, 16384)
FEW = 8
"""Graphs of up to FEW tokens are for streams of up to one of LENGTHS, and for the longest."""


@dataclass
class Graph:
    """One recorded step, with the memory that it reads and writes."""

    packed: Tensor
    inputs: PackedInputs
    """Views of it."""
    logits: Tensor
    recorded: torch.cuda.CUDAGraph


class Graphs:
    """The recorded steps of a model over a pool."""

    def __init__(self, step: PackedStep, pool: Pool, longest: int) -> None:
        """Record a graph for each number of tokens, and for each length if they are few. What fails is left out for
        good. Raises UnsupportedModel where all fail. ``longest``: the most tokens a stream can hold."""
        self._step, self._pool = step, pool
        self._graphs: dict[Shape, Graph] = {}
        self._side = torch.cuda.Stream(step.device)
        # Shared: only one graph runs at a time, and its output is read before the next.
        self._memory: Any = torch.cuda.graph_pool_handle()
        failed: dict[Shape, str] = {}
        # The small ones then fit into the memory of the large ones.
        for shape in sorted(_shapes(longest), reverse=True):
            try:
                self._graphs[shape] = self._record(shape)
            except Exception as error:  # whatever the model's code raises
                failed[shape] = in_words(error).splitlines()[0]
        if not self._graphs:
            raise UnsupportedModel(f"no step can be recorded: {failed[min(failed)]}")
        for shape, reason in failed.items():
            log.warning("no CUDA graph for %d tokens of up to %d: %s", shape.tokens, shape.max_length, reason)
        self.shapes: Sequence[Shape] = sorted(self._graphs)
        self.description = f"{len(self.shapes)} CUDA graphs of up to {self.shapes[-1].tokens} tokens"

    def shape(self, tokens: int, length: int) -> Shape | None:
        """See packed.Recorded."""
        return next((shape for shape in self.shapes if shape.tokens >= tokens and shape.max_length >= length), None)

    def run(self, shape: Shape, packed: Tensor, wanted: int) -> Tensor:
        """See packed.Recorded."""
        graph = self._graphs[shape]
        graph.packed.copy_(packed, non_blocking=True)
        graph.recorded.replay()
        return graph.logits[:wanted]

    @torch.inference_mode()
    def _record(self, shape: Shape) -> Graph:
        tokens, device = shape.tokens, self._step.device
        packed = torch.zeros(shape.size, dtype=torch.long, device=device)
        inputs = shape.split(packed)
        # Every token is the first of a stream at the spare place.
        inputs.writes.fill_(self._pool.spare)
        inputs.rows.queries.copy_(torch.arange(tokens + 1, dtype=torch.int32, device=device))
        inputs.rows.first.fill_(self._pool.spare)
        inputs.rows.lengths.fill_(1)
        before = torch.cuda.current_stream(device)
        self._side.wait_stream(before)
        with torch.cuda.stream(self._side):
            self._step(inputs, self._pool)  # libraries initialize themselves, which cannot be recorded
        before.wait_stream(self._side)
        recorded = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(recorded, pool=self._memory, stream=self._side, capture_error_mode="thread_local"):
                logits = self._step(inputs, self._pool)
        except Exception:
            self._end_capture(before)
            raise
        return Graph(packed, inputs, logits, recorded)

    def _end_capture(self, before: torch.cuda.Stream) -> None:
        """Undo what a failed capture leaves behind: its stream is the current one, and memory comes from its pool."""
        torch.cuda.set_stream(before)
        device = self._step.device
        with contextlib.suppress(RuntimeError):  # where the capture has come as far as ending this itself
            torch._C._cuda_endAllocateToPool(device.index or 0, self._memory)
        torch.cuda.synchronize(device)
        self._memory = torch.cuda.graph_pool_handle()


def _shapes(longest: int) -> list[Shape]:
    """What is recorded. ``longest``: the most tokens a stream can hold."""
    shorter = [length for length in LENGTHS if length < longest]
    return [
        Shape(tokens, tokens, tokens, max_queries=1, max_length=length)
        for tokens in BUCKETS
        for length in (*(shorter if tokens <= FEW else ()), longest)
    ]
