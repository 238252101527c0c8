"""A step's tokens through the model, logits back: the runner over slots.

The model's own code runs unchanged. It is handed a cache that writes each row's keys and values at that row's own
positions in the slots and returns views of them, position ids, and an additive float mask in the model's dtype (boolean
masks are added as numbers by some attention code, which is silently wrong).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from lmtp.protocol import Score
from lmtp.scheduler import Scheduler, Step
from lmtp.slots import LayerShape, Memory, Slots
from lmtp.stream import Scoring

COLUMNS = 64
"""Attention reads the slots' columns in multiples of this, so that shapes repeat."""

AGREEMENT = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.15}
"""How far the self-check lets a position's logits be from the model's own, relative to their spread."""


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids have to be: a large model is spread over several devices."""
    embeddings: nn.Module = model.get_input_embeddings()
    return next(embeddings.parameters()).device


class UnsupportedModel(Exception):
    """The model cannot be served from slots; the message says what was found."""


class SlotCache(Cache):
    """The Transformers cache of one step: writes into the memory's rows, returns views of them."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(layers=[])
        self._memory = memory
        self._rows = slice(0)
        self._columns = 0
        self._length = 0
        self._write: tuple[Any, ...] = ()

    def begin(self, first: int, writes: Tensor, columns: int, span: slice | None) -> None:
        """Point at a step's rows: ``writes`` ``[rows, q]`` are the columns its tokens go to, ``columns`` how many are
        read; ``span`` is given instead where there is one row and its columns are neighbours."""
        rows, self._length = writes.shape
        self._rows = slice(first, first + rows)
        self._columns = columns
        if span is not None:
            self._write = (slice(None), slice(None), span)
        else:
            self._write = (torch.arange(rows, device=writes.device)[:, None], slice(None), writes)

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention with ``[rows, heads, q, dim]``; returns ``[rows, heads, columns, dim]``."""
        keys = self._memory.keys[layer_idx][self._rows]
        values = self._memory.values[layer_idx][self._rows]
        if isinstance(self._write[0], slice):
            keys[self._write] = key_states
            values[self._write] = value_states
        else:  # indexing with rows and columns puts [rows, q] in front of the heads
            keys[self._write] = key_states.transpose(1, 2)
            values[self._write] = value_states.transpose(1, 2)
        return keys[:, :, : self._columns], values[:, :, : self._columns]

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before this step's tokens, as models count them that build biases from lengths."""
        return self._columns - self._length

    @override
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns read, and the first of them."""
        return self._columns, 0


class SlotRunner:
    """Runs steps through slots."""

    def __init__(self, model: PreTrainedModel, memory: Memory) -> None:
        self._model = model
        self._memory = memory
        self._cache = SlotCache(memory)
        self._device = input_device(model)
        self._masks = _mask_rules(model)
        self._accepts_positions = "position_ids" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """The logits at the step's wanted positions, ``[wanted, vocabulary]``: row after row, in order of position."""
        counts = np.array(step.counts)
        rows, q = len(counts), int(counts.max())
        computed = np.array([stream.computed for stream in step.streams])
        offsets = np.arange(q)[None, :]
        padding = offsets >= counts[:, None]
        positions = computed[:, None] + np.minimum(offsets, counts[:, None] - 1)
        ids = np.zeros((rows, q), dtype=np.int64)
        wanted = np.zeros((rows, q), dtype=bool)
        for row, (stream, count) in enumerate(zip(step.streams, step.counts, strict=True)):
            ids[row, :count] = stream.tokens[stream.computed : stream.computed + count]
            wanted[row, max(stream.first_wanted - stream.computed, 0) : count] = True
        columns = min(-(-int((computed + counts).max()) // COLUMNS) * COLUMNS, self._memory.capacity)
        span = slice(int(computed[0]), int(computed[0] + q)) if rows == 1 else None
        writes = np.where(padding, self._memory.capacity, positions)
        position_ids = self._tensor(positions)
        self._cache.begin(step.first_slot, self._tensor(writes), columns, span)
        inputs: dict[str, Any] = {"input_ids": self._tensor(ids), "attention_mask": self._mask(position_ids, columns)}
        if self._accepts_positions:
            inputs["position_ids"] = position_ids
        with self._only_wanted(self._tensor(np.flatnonzero(wanted))):
            output = self._model(past_key_values=self._cache, use_cache=True, **inputs)
        return output.logits[0]

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _mask(self, positions: Tensor, columns: int) -> Tensor | dict[str, Tensor]:
        """Additive masks ``[rows, 1, q, columns]``: 0 where a position may look, the dtype's minimum elsewhere."""
        dtype = self._model.dtype
        column = torch.arange(columns, device=positions.device)
        position = positions[:, None, :, None]
        masks = {}
        for kind, visible in self._masks.items():
            masks[kind] = torch.where(visible(column, position), 0.0, torch.finfo(dtype).min).to(dtype)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @contextlib.contextmanager
    def _only_wanted(self, index: Tensor) -> Iterator[None]:
        """Let the output layer see only the wanted positions, whatever the model does before and after it."""

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0]
            return (hidden.flatten(0, 1)[index.to(hidden.device)][None], *args[1:])

        handle = self._model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()


Visible = Callable[[Tensor, Tensor], Tensor]


def _mask_rules(model: PreTrainedModel) -> dict[str, Visible]:
    """For each kind of attention layer, which columns a position sees; named as Transformers names layer types."""
    config = model.config.get_text_config(decoder=True)
    window: int = getattr(config, "sliding_window", None) or 0
    chunk: int = getattr(config, "attention_chunk_size", None) or 0

    def full(column: Tensor, position: Tensor) -> Tensor:
        return column <= position

    def sliding(column: Tensor, position: Tensor) -> Tensor:
        return (column <= position) & (column > position - window)

    def chunked(column: Tensor, position: Tensor) -> Tensor:
        return (column <= position) & (column // chunk == position // chunk)

    rules: dict[str, Visible] = {"full_attention": full, "sliding_attention": sliding, "chunked_attention": chunked}
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"sliding_attention" if window else "chunked_attention" if chunk else "full_attention"}
    if unknown := kinds - set(rules):
        raise UnsupportedModel(f"layers of type {', '.join(sorted(unknown))}")
    return {kind: rules[kind] for kind in sorted(kinds)}


@torch.inference_mode()
def layers_of(model: PreTrainedModel) -> tuple[list[LayerShape], list[torch.device]]:
    """What each layer keeps per token and where, read off the cache that the model itself fills for one token.

    Raises UnsupportedModel where that is not a cache of keys and values for every token.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if not layers or not all(isinstance(layer, DynamicLayer) and layer.is_initialized for layer in layers):
        raise UnsupportedModel("its cache is not one of keys and values")
    shapes = [LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]
    return shapes, [layer.keys.device for layer in layers]


@torch.inference_mode()
def check(model: PreTrainedModel, runner: SlotRunner, slots: Slots, vocabulary: int) -> None:
    """Prove the runner on uneven rows against the model's own forward pass, through chunks, padding, reuse and moves.

    Raises UnsupportedModel where they disagree.
    """
    generator = np.random.default_rng(0)
    texts = [generator.integers(vocabulary, size=size).tolist() for size in (7, 21, 13)]
    texts.append(texts[1][:12] + texts[2])
    scheduler = Scheduler(slots, chunk=24, busy_chunk=8, most_logits=256)
    got: dict[int, list[Tensor]] = {}
    for index, tokens in enumerate(texts):
        got[index] = []
        scheduler.add(Scoring(Score(stream_id=index, prompt=[], scored=tokens), tokens[:1], tokens[1:], None))
    while step := scheduler.next_step():
        logits = runner.run(step)
        for stream, count in zip(step.streams, step.counts, strict=True):
            got[int(stream.operation.stream_id)] += logits[:count].unbind()
            logits = logits[count:]
            stream.computed += count
            if stream.pending == 0:
                scheduler.remove(stream)
    slots.clear()
    device = input_device(model)
    wrong = total = 0
    for index, tokens in enumerate(texts):
        own = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0, :-1].float()
        ours = torch.stack(got[index]).float()
        spread = (own - own.mean(-1, keepdim=True)).norm(dim=-1)
        distance = (own - ours).norm(dim=-1) / spread.clamp(min=1e-9)
        wrong += int((~(distance < AGREEMENT[model.dtype])).sum())
        total += len(tokens) - 1
    # A mixture of experts may choose another expert for a rounding difference, so a few positions are forgiven.
    if wrong > total * (0.1 if model.dtype != torch.float32 else 0.0):
        raise UnsupportedModel(f"{wrong} of {total} positions differ from the model's own forward pass")
