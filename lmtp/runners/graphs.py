"""The decode step as CUDA graphs.

On a GPU a small batch's step is mostly the launching of kernels. A CUDA graph records them once for a number of rows
and columns and replays them in one call (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Rows are
rounded up to a power of two and columns to a multiple of COLUMNS, so that few graphs serve; rows that are not there
write into the column that is never read. Graphs hold addresses, so a resized memory needs new ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

COLUMNS = 256
MOST_GRAPHS = 48


@dataclass
class Graph:
    """One recorded step and the tensors it reads and writes."""

    ids: Tensor
    positions: Tensor
    writes: Tensor
    masks: list[Tensor]
    logits: Tensor
    recorded: torch.cuda.CUDAGraph


class GraphedStep:
    """Replays runner.ModelStep for one token a row, and calls it for more; takes and returns what it does."""

    longest_beginning = 1
    """A longer chunk at the beginning of texts is not replayed and needs no mask."""

    def __init__(self, step: nn.Module) -> None:
        self._step = step
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._addresses: tuple[int, ...] = ()
        self._pool: Any = None

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        writes: Tensor,
        wanted: Tensor,
        masks: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        """As runner.ModelStep.forward; valid until the next call."""
        rows, q = ids.shape
        graph = self._graph(rows, masks, keys, values) if q == 1 else None
        if graph is None:
            logits: Tensor = self._step(ids, positions, writes, wanted, masks, keys, values)
            return logits
        graph.ids[:rows].copy_(ids)
        graph.positions[:rows].copy_(positions)
        graph.writes[:rows].copy_(writes)
        graph.writes[rows:].fill_(keys[0].shape[2] - 1)
        columns = masks[0].shape[3]
        for static, mask in zip(graph.masks, masks, strict=True):
            static[:rows, ..., :columns].copy_(mask)
            static[:rows, ..., columns:].fill_(torch.finfo(mask.dtype).min)
        graph.recorded.replay()
        return graph.logits[:rows] if len(wanted) == rows else graph.logits[wanted]

    def _graph(
        self, rows: int, masks: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Graph | None:
        """A graph for so many rows and columns or a few more; None where there is no memory for another."""
        slots, capacity = keys[0].shape[0], keys[0].shape[2] - 1
        addresses = (slots, capacity, *(tensor.data_ptr() for tensor in keys))
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
        columns = masks[0].shape[3]
        key = min(1 << (rows - 1).bit_length(), slots), min(-(-columns // COLUMNS) * COLUMNS, capacity)
        if key not in self._graphs:
            if len(self._graphs) >= MOST_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            try:
                self._graphs[key] = self._record(*key, masks, keys, values)
            except torch.OutOfMemoryError:
                self._graphs.clear()
                return None
        return self._graphs[key]

    def _record(
        self, rows: int, columns: int, like: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Graph:
        device = like[0].device
        ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        positions = torch.zeros_like(ids)
        writes = torch.full_like(ids, keys[0].shape[2] - 1)
        masks = [torch.zeros(rows, 1, 1, columns, dtype=mask.dtype, device=device) for mask in like]
        arguments = (ids, positions, writes, torch.arange(rows, device=device), masks, keys, values)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries set themselves up in the first runs, which cannot be recorded
            for _ in range(2):
                self._step(*arguments)
        torch.cuda.current_stream(device).wait_stream(side)
        if self._pool is None:  # one for all: only one graph runs at a time, and its output is read before the next
            self._pool = torch.cuda.graph_pool_handle()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, pool=self._pool):
            logits = self._step(*arguments)
        return Graph(ids, positions, writes, masks, logits, recorded)
