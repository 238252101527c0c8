"""A step's tokens through the model, logits back: the runner over slots.

The model's own code runs unchanged. It is handed a cache that writes each row's keys and values at that row's own
positions in the slots and returns views of them, position ids, and an additive float mask in the model's dtype (boolean
masks are added as numbers by some attention code, which is silently wrong).
"""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from lmtp.engine.scheduler import Step
from lmtp.engine.stream import Scoring, Stream
from lmtp.protocol import Score
from lmtp.runners.compiled import CompiledStep
from lmtp.runners.graphs import GraphedStep
from lmtp.runners.slots import LayerShape, Memory, Slots

COLUMNS = 16
"""Attention reads the slots' columns in multiples of this, which aligns its rows and masks."""

AGREEMENT = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
"""How far the self-check lets a position's logits be from the model's own, relative to their spread. After random
tokens a model in bfloat16 is this far from itself in float32 at one position of ten; a wrong mask or a lost cache moves
nearly all of them further."""

FORGIVEN = {torch.float32: 0.0, torch.float16: 0.25, torch.bfloat16: 0.25}
"""The part of the positions that may be further off all the same: rounding decides which expert a mixture asks."""


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids have to be: a large model is spread over several devices."""
    embeddings: nn.Module = model.get_input_embeddings()
    return next(embeddings.parameters()).device


SHARED = 8
"""How many tokens the self-check's last text takes over from another row."""


class UnsupportedModel(Exception):
    """The model cannot be served from slots; the message says what was found."""


class SlotCache(Cache):
    """The Transformers cache of one step: writes into the memory's slots, returns views of them."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], writes: Tensor, columns: int) -> None:
        """``writes`` ``[rows, q]``: the columns that the tokens of the first slots go to; ``columns``: how many are
        read."""
        super().__init__(layers=[])
        self._keys, self._values = keys, values
        self._rows, self._length = writes.shape
        self._columns = columns
        self._places = torch.arange(self._rows, device=writes.device)[:, None, None], writes[:, None, :]

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention with ``[rows, heads, q, dim]``; returns ``[rows, heads, columns, dim]``."""
        return self._write(self._keys[layer_idx], key_states), self._write(self._values[layer_idx], value_states)

    def _write(self, memory: Tensor, states: Tensor) -> Tensor:
        rows, columns = self._places
        heads = torch.arange(states.shape[1], device=states.device)[None, :, None]
        memory.index_put_((rows.to(states.device), heads, columns.to(states.device)), states)
        return memory.narrow(0, 0, self._rows).narrow(2, 0, self._columns)

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before this step's tokens, as models count them that build biases from lengths."""
        return self._columns - self._length

    @override
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns read, and the first of them."""
        return self._columns, 0


class ModelStep(nn.Module):
    """The model's forward pass over slots, which compiled.py and graphs.py make faster."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if _rope_depends_on_batch(model):
            raise UnsupportedModel("its rotary embedding changes with the longest row of the batch")
        self.model = model
        self.rules = _mask_rules(model)
        self._accepts_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        writes: Tensor,
        wanted: Tensor,
        masks: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        """The logits ``[wanted, vocabulary]`` after the tokens ``ids`` ``[rows, q]`` at ``positions`` ``[rows, q]``.

        Row i is slot i of ``keys`` and ``values``, each layer's ``[slots, heads, capacity + 1, dim]``; its tokens go to
        the columns ``writes[i]``. ``wanted`` are indices into the flattened ``[rows * q]``. ``masks`` are those of
        ``rules``, each ``[rows, 1, q, columns]``. Without any, all rows begin with these tokens, and the model makes
        its own causal masks: then its attention is the fastest, since it skips what no position sees.
        """
        rows, q = ids.shape
        columns = masks[0].shape[3] if masks else q
        torch._check(rows <= keys[0].shape[0])
        torch._check(columns < keys[0].shape[2])
        cache = SlotCache(keys, values, writes, columns)
        inputs: dict[str, Any] = {"position_ids": positions} if self._accepts_positions else {}
        mask = dict(zip(self.rules, masks, strict=True)) if len(masks) > 1 else masks[0] if masks else None
        with only_wanted(self.model, wanted):
            output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs)
        logits: Tensor = output.logits
        return logits[0]


class SlotRunner:
    """Runs steps through slots."""

    def __init__(self, model: PreTrainedModel, memory: Memory, fast: CompiledStep | GraphedStep | None = None) -> None:
        """``fast`` runs in place of the model's own code what it can run."""
        self.step = ModelStep(model)
        self.fast = fast
        self._memory = memory
        self._device = input_device(model)
        self._dtype = model.dtype

    @torch.inference_mode()
    def prepare(self, step: Step) -> Callable[[], Tensor]:
        """What runs the model. It returns the logits at the step's wanted positions, ``[wanted, vocabulary]``, row by
        row in order of position."""
        counts = np.array(step.counts)
        rows, q = len(counts), int(counts.max())
        computed = np.array([stream.computed for stream in step.streams])
        offsets = np.arange(q)[None, :]
        positions = computed[:, None] + np.minimum(offsets, counts[:, None] - 1)
        ids = np.zeros((rows, q), dtype=np.int64)
        wanted = np.zeros((rows, q), dtype=bool)
        for row, (stream, count) in enumerate(zip(step.streams, step.counts, strict=True)):
            ids[row, :count] = stream.upcoming(count)
            wanted[row, max(stream.first_wanted - stream.computed, 0) : count] = True
        writes = np.where(offsets >= counts[:, None], self._memory.capacity, positions)
        position_ids = self._tensor(positions)
        masks: list[Tensor] = []
        begun = bool(computed.any())
        fast = self.fast if self.fast and (begun or q <= self.fast.longest_beginning) else None
        if fast or begun:
            columns = min(-(-int((computed + counts).max()) // COLUMNS) * COLUMNS, self._memory.capacity)
            masks = self._masks(position_ids, columns)
        return functools.partial(
            fast or self.step,
            self._tensor(ids),
            position_ids,
            self._tensor(writes),
            self._tensor(np.flatnonzero(wanted)),
            masks,
            *self._memory.from_slot(step.first_slot),
        )

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _masks(self, positions: Tensor, columns: int) -> list[Tensor]:
        """For each kind of layer an additive mask ``[rows, 1, q, columns]``: 0 where a position may look, else the
        dtype's minimum."""
        column = torch.arange(columns, device=positions.device)
        position = positions[:, None, :, None]
        hidden = torch.tensor(torch.finfo(self._dtype).min, dtype=self._dtype, device=positions.device)
        return [torch.where(visible(column, position), 0.0, hidden) for visible in self.step.rules.values()]


@contextlib.contextmanager
def only_wanted(model: PreTrainedModel, index: Tensor) -> Iterator[None]:
    """Let the output layer see only the positions ``index`` of the flattened batch, whatever the model does before and
    after it: the logits are then ``[1, wanted, vocabulary]``."""

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden.flatten(0, 1)[index.to(hidden.device)][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
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


def _rope_depends_on_batch(model: PreTrainedModel) -> bool:
    """Transformers computes these kinds from the highest position in a batch, so a long row would change its
    neighbours."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type", kind.get("type")) in ("longrope", "dynamic") for kind in kinds)


Layers = tuple[list[LayerShape], list[torch.device]]
"""What each layer keeps for a token, and where."""


@torch.inference_mode()
def layers_of(model: PreTrainedModel) -> Layers:
    """A model's layers, read off the cache that the model itself fills for one token.

    Raises UnsupportedModel where that is not a cache of keys and values for every token.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if not layers or not all(isinstance(layer, DynamicLayer) and layer.is_initialized for layer in layers):
        raise UnsupportedModel("its cache is not one of keys and values")
    shapes = [LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]
    return shapes, [layer.keys.device for layer in layers]


@dataclass(frozen=True)
class Reference:
    """Some uneven texts, and for each the logits ``[tokens - 1, vocabulary]`` of the model's own forward pass."""

    texts: list[list[int]]
    logits: list[Tensor]

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel) -> "Reference":
        """Random texts; the last begins as the longest does."""
        vocabulary = model.get_output_embeddings().weight.shape[0]
        generator = np.random.default_rng(0)
        texts = [generator.integers(vocabulary, size=size).tolist() for size in (5, 14, 9)]
        texts.append(texts[1][:SHARED] + texts[2][:5])
        longest = max(map(len, texts))
        # Padded at the end, where no token of a text sees it.
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=input_device(model))
        logits = model(input_ids=ids, use_cache=False).logits
        return cls(texts, [row[: len(text) - 1].float() for row, text in zip(logits, texts, strict=True)])


@torch.inference_mode()
def check(
    model: PreTrainedModel, layers: Layers, reference: Reference, fast: CompiledStep | GraphedStep | None = None
) -> None:
    """Prove slots, and ``fast`` where it is given, against the model's own forward pass: through chunks, single tokens,
    padding, reuse and moves.

    Raises UnsupportedModel where they disagree.
    """
    memory = Memory(*layers, model.dtype)
    slots = Slots(memory, budget=memory.bytes_per_token * 512, most_slots=8, context=64)
    runner = SlotRunner(model, memory, fast)
    got: list[list[Tensor]] = [[] for _ in reference.texts]
    streams: list[Stream] = [
        Scoring(Score(stream_id=index, prompt=[], scored=[]), tokens[:1], tokens[1:], None)
        for index, tokens in enumerate(reference.texts)
    ]
    late = streams.pop()
    late.prompt_length = SHARED
    for stream in streams:
        slots.admit(stream)
    for first, most in itertools.cycle(((0, 7), (0, 1), (1, 4))):
        if late.computed == 0 and slots.shared_prefix(late)[0] == SHARED - 1:
            slots.admit(late)  # what it shares can be had from another row now
        if not slots.active:
            break
        first = min(first, len(slots.active) - 1)
        rows = slots.active[first:]
        step = Step(first, rows, [min(stream.pending, most) for stream in rows])
        logits = runner.prepare(step)()
        for stream, count in zip(step.streams, step.counts, strict=True):
            wanted = max(stream.computed + count - max(stream.first_wanted, stream.computed), 0)
            got[int(stream.operation.stream_id)] += logits[:wanted].unbind()
            logits = logits[wanted:]
            stream.computed += count
        for stream in step.streams:
            if stream.pending == 0:
                slots.release(stream)
    wrong = total = 0
    for own, ours in zip(reference.logits, got, strict=True):
        own = own[-len(ours) :]  # of the last text, what it shares was not asked for
        spread = (own - own.mean(-1, keepdim=True)).norm(dim=-1)
        distance = (own - torch.stack(ours).float()).norm(dim=-1) / spread.clamp(min=1e-9)
        wrong += int((~(distance < AGREEMENT[model.dtype])).sum())
        total += len(ours)
    if wrong > total * FORGIVEN[model.dtype]:
        raise UnsupportedModel(f"{wrong} of {total} positions differ from the model's own forward pass")
