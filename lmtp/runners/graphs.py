"""The decode step as CUDA graphs.

On a GPU a small batch's step is mostly kernel launches. A CUDA graph records them once for a number of rows and columns
and replays them in one call (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Rows are rounded up to a
power of two and columns to a multiple of COLUMNS, so that few graphs serve. Missing rows write into the column that is
never read. Graphs hold addresses, so a resized memory needs new ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmtp.runners.step import ModelStep, StepInputs

COLUMNS = 256
MAX_GRAPHS = 48


@dataclass
class Graph:
    """One recorded step, with the tensors that it reads and writes."""

    inputs: StepInputs
    logits: Tensor
    recorded: torch.cuda.CUDAGraph


class GraphedStep:
    """Replays a step of one token a row, and runs the others as they are."""

    description = "decode steps as CUDA graphs"
    max_first_chunk = 1

    def __init__(self, step: ModelStep) -> None:
        self._step = step
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._addresses: tuple[int, ...] = ()
        self._pool: Any = None

    def __call__(self, inputs: StepInputs) -> Tensor:
        """As SlotStep.forward; the result is valid until the next call."""
        rows, q = inputs.ids.shape
        graph = self._graph(inputs) if q == 1 else None
        if graph is None:
            return self._step(inputs)
        static = graph.inputs
        static.ids[:rows].copy_(inputs.ids)
        static.positions[:rows].copy_(inputs.positions)
        static.writes[:rows].copy_(inputs.writes)
        static.writes[rows:].fill_(inputs.keys[0].shape[2] - 1)
        columns = inputs.masks[0].shape[3]
        for recorded, mask in zip(static.masks, inputs.masks, strict=True):
            recorded[:rows, ..., :columns].copy_(mask)
            recorded[:rows, ..., columns:].fill_(torch.finfo(mask.dtype).min)
        graph.recorded.replay()
        return graph.logits[:rows] if len(inputs.wanted) == rows else graph.logits[inputs.wanted]

    def _graph(self, inputs: StepInputs) -> Graph | None:
        """A graph for at least this many rows and columns; None if there is no memory for another one."""
        keys = inputs.keys
        slots, capacity = keys[0].shape[0], keys[0].shape[2] - 1
        addresses = (slots, capacity, *(tensor.data_ptr() for tensor in keys))
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
        rows, columns = len(inputs.ids), inputs.masks[0].shape[3]
        key = min(1 << (rows - 1).bit_length(), slots), min(-(-columns // COLUMNS) * COLUMNS, capacity)
        if key not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            try:
                self._graphs[key] = self._record(*key, inputs)
            except torch.OutOfMemoryError:
                self._graphs.clear()
                return None
        return self._graphs[key]

    def _record(self, rows: int, columns: int, like: StepInputs) -> Graph:
        device = like.ids.device
        ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        inputs = StepInputs(
            ids,
            positions=torch.zeros_like(ids),
            writes=torch.full_like(ids, like.keys[0].shape[2] - 1),
            wanted=torch.arange(rows, device=device),
            masks=[torch.zeros(rows, 1, 1, columns, dtype=mask.dtype, device=device) for mask in like.masks],
            keys=like.keys,
            values=like.values,
        )
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries initialize themselves in the first runs, which cannot be recorded
            for _ in range(2):
                self._step(inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        if self._pool is None:  # shared: only one graph runs at a time, and its output is read before the next
            self._pool = torch.cuda.graph_pool_handle()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, pool=self._pool):
            logits = self._step(inputs)
        return Graph(inputs, logits, recorded)
