"""Packed steps as CUDA graphs.

On a GPU a small step is mostly kernel launches. A CUDA graph records them once and replays them in one call
(https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Each graph takes a number of tokens, of any streams and
in any mixture: a token is a row of its own that sees the tokens before it. A step takes the smallest graph that is
large enough and fills it up at the pool's spare place. All graphs are recorded at setup, none while serving.
"""

import contextlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmtp.runners.extents import Pool
from lmtp.runners.model import UnsupportedModel, in_words
from lmtp.runners.packed import PackedInputs, PackedStep, Shape

log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""How many tokens the graphs take."""

WARM_UPS = 2
"""Libraries initialize themselves in the first runs, which cannot be recorded."""


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
        """Record a graph for each of BUCKETS. What fails is left out for good. Raises UnsupportedModel where all
        fail. ``longest``: the most tokens a stream can hold."""
        self._step, self._pool, self._longest = step, pool, longest
        self._graphs: dict[int, Graph] = {}
        self._side = torch.cuda.Stream(step.device)
        # Shared: only one graph runs at a time, and its output is read before the next.
        self._memory: Any = torch.cuda.graph_pool_handle()
        failed: dict[int, str] = {}
        for tokens in sorted(BUCKETS, reverse=True):  # the small ones then fit into the memory of the large ones
            try:
                self._graphs[tokens] = self._record(tokens)
            except Exception as error:  # whatever the model's code raises
                failed[tokens] = in_words(error).splitlines()[0]
        if not self._graphs:
            raise UnsupportedModel(f"no step can be recorded: {failed[min(failed)]}")
        for tokens, reason in failed.items():
            log.warning("no CUDA graph for %d tokens: %s", tokens, reason)
        self.description = f"{len(self._graphs)} CUDA graphs of up to {max(self._graphs)} tokens"

    @property
    def sizes(self) -> list[int]:
        """See packed.Recorded."""
        return sorted(self._graphs)

    def shape(self, tokens: int) -> Shape | None:
        """See packed.Recorded."""
        size = next((size for size in self.sizes if size >= tokens), None)
        return self._shape(size) if size else None

    def run(self, shape: Shape, packed: Tensor, wanted: int) -> Tensor:
        """See packed.Recorded."""
        graph = self._graphs[shape.tokens]
        graph.packed.copy_(packed)
        graph.recorded.replay()
        return graph.logits[:wanted]

    def _shape(self, tokens: int) -> Shape:
        return Shape(tokens, tokens, tokens, max_queries=1, max_length=self._longest)

    @torch.inference_mode()
    def _record(self, tokens: int) -> Graph:
        shape, device = self._shape(tokens), self._step.device
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
            for _ in range(WARM_UPS):
                self._step(inputs, self._pool)
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
