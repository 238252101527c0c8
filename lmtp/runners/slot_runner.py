"""The runner over slots: a step's tokens through the model, logits back.

The model's own code runs unchanged. It gets position ids, a cache that writes each row's keys and values at that row's
own positions and returns views of the slots, and an additive float mask in the model's dtype. (Some attention code adds
boolean masks as numbers, which is silently wrong.)
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from typing_extensions import override

from lmtp.runners.adapters import Adapters
from lmtp.runners.model import UnsupportedModel, accepts_positions, input_device, limits_of, only_wanted, rope_kinds
from lmtp.runners.slots import Layer, Memory, Slots
from lmtp.runners.step import Step, StepInputs, StepLimits, Stream
from lmtp.runners.temperature import scale_by_position
from lmtp.weights.kinds import PREFIX_LM

CHUNK = 2048
BUSY_CHUNK = 256
MAX_LOGITS = 2**24
"""Logits of one step, so that a long scored prompt with a large vocabulary fits: 64 MB in float32."""

STEP_SECONDS = 0.15
"""How long a step on a CPU should take while others may be waiting."""
CORE_FLOPS = {torch.float32: 6e10, torch.bfloat16: 2e11}
"""Operations of one core in a second, as measured: float32 with AVX2, bfloat16 with AMX."""
MIN_WORK = 16
READING = {torch.float32: 7, torch.bfloat16: 25}
"""Tokens that take as long to compute as the weights take to read: float32 with AVX2, bfloat16 with AVX-512."""

COLUMNS = 16
"""Attention reads the slots' columns in multiples of this, which aligns its rows and masks."""


class FastStep(Protocol):
    """A faster way to run SlotStep, with the same signature."""

    description: str
    max_first_chunk: int
    """A longer chunk at the beginning of texts takes less time in the model's own code, which needs no mask there: its
    causal attention skips what no position sees."""

    def __call__(self, inputs: StepInputs) -> Tensor:
        """As SlotStep.forward, with at least one mask."""


class SlotCache(Cache):
    """The Transformers cache of one step: writes into the slots, returns views of them."""

    def __init__(self, inputs: StepInputs, columns: int) -> None:
        """``columns``: how many of them attention reads."""
        super().__init__(layers=[])
        self._keys, self._values = inputs.keys, inputs.values
        self._rows, self._length = inputs.writes.shape
        self._columns = columns
        self._writes = inputs.writes
        self._places: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention with ``[rows, heads, q, dim]``; returns ``[rows, heads, columns, dim]``."""
        return self._write(self._keys[layer_idx], key_states), self._write(self._values[layer_idx], value_states)

    def _write(self, memory: Tensor, states: Tensor) -> Tensor:
        memory.index_put_(self._places_of(states.shape[1], states.device), states)
        return memory.narrow(0, 0, self._rows).narrow(2, 0, self._columns)

    def _places_of(self, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Where a layer with so many heads writes: rows, heads, columns. Mostly all layers have as many."""
        if (heads, device) not in self._places:
            row, head = (torch.arange(size, device=device) for size in (self._rows, heads))
            self._places[heads, device] = row[:, None, None], head[None, :, None], self._writes[:, None].to(device)
        return self._places[heads, device]

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before this step's tokens, for models that build biases from lengths."""
        return self._columns - self._length

    @override
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many columns attention reads, and the first of them."""
        return self._columns, 0


class SlotStep(nn.Module):
    """The model's forward pass over slots: a ModelStep that compiled.py makes faster."""

    def __init__(self, model: PreTrainedModel, adapters: Adapters | None = None) -> None:
        """Raises UnsupportedModel for a model whose layers or positions cannot work over slots."""
        super().__init__()
        if model.config.model_type in PREFIX_LM:
            raise UnsupportedModel("its prompt attends both ways, so no prefix of it can be reused")
        if _rope_depends_on_batch(model):
            raise UnsupportedModel("its rotary embedding changes with the longest row of the batch")
        served = scale_by_position(model)
        if lengths := [length for length in _hidden_lengths(model) if length not in served]:
            raise UnsupportedModel(f"its configuration bounds attention by {', '.join(lengths)}, which masks do not")
        self.model = model
        self.adapters = adapters or Adapters(model)
        self.rules = _mask_rules(model)
        self._dtype = model.dtype  # asked each time, it walks over all modules
        self._accepts_positions = accepts_positions(model)

    def new_memory(self, layers: Sequence[Layer]) -> Memory:
        """Memory for the steps that follow."""
        return Memory(layers, self._dtype)

    def masks(self, positions: Tensor, columns: int) -> list[Tensor]:
        """For each kind of layer an additive mask ``[rows, 1, q, columns]``."""
        hidden = torch.finfo(self._dtype).min
        column = torch.arange(columns, device=positions.device)
        position = positions.view(len(positions), 1, -1, 1)
        seen = [visible(column, position) for visible in self.rules.values()]
        return [torch.full_like(each, hidden, dtype=self._dtype).masked_fill_(each, 0.0) for each in seen]

    def forward(self, inputs: StepInputs) -> Tensor:
        """The logits ``[wanted, vocabulary]`` at the wanted positions. The masks are those of ``rules``, in order."""
        rows, q = inputs.ids.shape
        masks = inputs.masks
        columns = masks[0].shape[3] if masks else q
        torch._check(rows <= inputs.keys[0].shape[0])
        torch._check(columns < inputs.keys[0].shape[2])
        cache = SlotCache(inputs, columns)
        more: dict[str, Any] = {"position_ids": inputs.positions} if self._accepts_positions else {}
        mask = dict(zip(self.rules, masks, strict=True)) if len(masks) > 1 else masks[0] if masks else None
        with only_wanted(self.model, inputs.wanted):
            output = self.model(
                input_ids=inputs.ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more
            )
        logits: Tensor = output.logits
        return logits[0]


class SlotRunner(Slots):
    """Slots that also run steps, each as one padded batch."""

    longest_source = 0

    def __init__(
        self,
        step: SlotStep,
        memory: Memory,
        budget: int,
        max_slots: int,
        context: int,
        fast: FastStep | None = None,
        reason: str = "",
    ) -> None:
        """``fast`` replaces ``step`` where it can; ``reason`` says why there is none. The other arguments are those of
        Slots."""
        super().__init__(memory, budget, max_slots, context)
        self.description = f"slots, {fast.description}" if fast else "slots"
        self.reason = reason
        self.step_limits = _step_limits(step.model, max_slots)
        self.step = step
        self.fast = fast
        self._device = input_device(step.model)

    def prepare(self, step: Step[Stream]) -> Callable[[], Tensor]:
        """See Runner.prepare."""
        begun = any(stream.computed for stream in step.streams)
        fast = self.fast if self.fast and (begun or max(step.counts) <= self.fast.max_first_chunk) else None
        run = functools.partial(fast or self.step, self._inputs(step, masked=begun or fast is not None))
        rows = [stream.adapter for stream in step.streams]
        return functools.partial(self.step.adapters.run, rows, run) if any(rows) else run

    def _inputs(self, step: Step[Stream], masked: bool) -> StepInputs:
        """What the model takes for a step, with masks or without."""
        rows, q = len(step.counts), max(step.counts)
        ids: list[int] = []
        positions: list[int] = []
        writes: list[int] = []
        wanted: list[int] = []
        longest = 0
        # With lists: for a few tokens, an operation of NumPy takes longer than all of them.
        for first, stream, count in zip(range(0, rows * q, q), step.streams, step.counts, strict=True):
            end = stream.computed + count
            longest = max(longest, end)
            own, padding = range(stream.computed, end), q - count
            ids += [*stream.upcoming(count), *[0] * padding]
            positions += [*own, *[end - 1] * padding]
            writes += [*own, *[self._memory.capacity] * padding]
            wanted += range(first + count - stream.wanted(count), first + count)
        tokens = np.array([ids, positions, writes], np.int64).reshape(3, rows, q)
        position_ids = self._tensor(tokens[1])
        masks: list[Tensor] = []
        if masked:
            masks = self._masks(position_ids, min(-(-longest // COLUMNS) * COLUMNS, self._memory.capacity))
        keys, values = self._memory.from_slot(step.streams[0].slot)
        return StepInputs(
            self._tensor(tokens[0]),
            position_ids,
            self._tensor(tokens[2]),
            self._tensor(np.array(wanted, np.int64)),
            masks,
            keys,
            values,
        )

    def _tensor(self, numbers: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(numbers)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)

    def _masks(self, positions: Tensor, columns: int) -> list[Tensor]:
        return self.step.masks(positions, columns)


def _step_limits(model: PreTrainedModel, max_slots: int) -> StepLimits:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    work = StepLimits.work
    if model.device.type == "cpu":
        flops = CORE_FLOPS.get(model.dtype, CORE_FLOPS[torch.bfloat16]) * torch.get_num_threads()
        work = max(int(STEP_SECONDS * flops / (2 * sum(p.numel() for p in model.parameters()))), MIN_WORK)
    return StepLimits(
        CHUNK,
        min(BUSY_CHUNK, work),
        logits=max(MAX_LOGITS // vocabulary, max_slots),
        # On a GPU more tokens a row take more launches.
        drafts=READING.get(model.dtype, 7) if model.device.type == "cpu" and not has_experts(model) else 0,
        work=work,
    )


def has_experts(model: PreTrainedModel) -> bool:
    """Whether more tokens read more weights."""
    config = model.config.get_text_config(decoder=True)
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


Visible = Callable[[Tensor, Tensor], Tensor]


def _mask_rules(model: PreTrainedModel) -> dict[str, Visible]:
    """For each kind of attention layer, which columns a position sees. The names are Transformers' layer types."""
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
    """Whether Transformers computes the embedding from the highest position in the batch: a long row would then change
    its neighbours."""
    return any(kind.get("rope_type", kind.get("type")) in ("longrope", "dynamic") for kind in rope_kinds(model))


LENGTH = re.compile("window|local|chunk|floor|extent")
"""How configurations name a number of tokens after which attention changes."""

NOT_HIDDEN = re.compile("^(sliding_window|attention_chunk_size)$|layers|pattern|feed_forward|^num_")
"""Those that _mask_rules reads, and those that count no tokens."""


def _hidden_lengths(model: PreTrainedModel) -> list[str]:
    """The configuration's lengths that the model's own code applies to columns, which differ between the rows of a
    batch, and that the self-check's texts are too short to show, such as GPT-Neo's local attention."""
    if model.config.is_encoder_decoder:
        return []  # these are the encoder's, which computes a source at once
    config = model.config.get_text_config(decoder=True)
    context = limits_of(model).context
    return [
        name
        for name, value in vars(config).items()
        if LENGTH.search(name) and not NOT_HIDDEN.search(name) and type(value) is int and 1 < value < context
    ]


@torch.inference_mode()
def layers_of(model: PreTrainedModel) -> list[Layer]:
    """A model's layers, read off the cache that the model itself fills for one token.

    Raises UnsupportedModel where that is not a cache of keys and values for every token.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    return layers_in(getattr(cache, "layers", None) or [])


def layers_in(layers: Sequence[Any]) -> list[Layer]:
    """What the layers of a Transformers cache keep. Raises UnsupportedModel as `layers_of`."""
    layers = list(layers)
    while layers and isinstance(layers[-1], DummyLayer):  # the last layers may share those of earlier ones
        layers.pop()
    if not layers or not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise UnsupportedModel("its cache is not one of keys and values")
    return [
        Layer(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], layer.keys.device) for layer in layers
    ]
