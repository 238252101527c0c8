"""The sources of an encoder-decoder model's streams: each is encoded once, and then lies in the rows of its streams.

A row holds the keys and values that cross-attention reads, in tensors ``[rows, heads, capacity + 1, dim]`` beside the
slots of the targets. Which source a row holds is remembered, and compared before each step: where it is another one,
the right one is copied from a row that has it, or projected from what the encoder returned. That is kept while a
running stream uses it, and after that within a budget, least recently used first to go.

Behind its source a row holds zeros: padding has weight 0, but 0 times a NaN would be NaN.
"""

import inspect
import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from lmtp.runners.model import Limits, UnsupportedModel, input_device, only_wanted
from lmtp.runners.slot_runner import layers_in
from lmtp.runners.slots import FIRST_SLOTS, Layer, Memory
from lmtp.runners.step import SourceInputs, Stream

log = logging.getLogger(__name__)

COLUMNS = 16
"""Rows have room for multiples of this many tokens, and cross-attention reads such."""


class EncoderOutput(BaseModelOutput):
    """What the model's decoder is given; mixtures of experts ask for the router's logits, which only training needs."""

    router_logits = None


@dataclass(eq=False)
class Encoded:
    """What the encoder returned for one source: ``[1, length, width]``."""

    states: Tensor

    @property
    def length(self) -> int:
        """Tokens of the source."""
        return self.states.shape[1]


class Held(NamedTuple):
    """What a row holds: which source, and how many tokens of it. The row keeps no encoded source alive."""

    source: Callable[[], Encoded | None]
    length: int


EMPTY = Held(lambda: None, 0)

GIVEN_BACK = "given back"
"""What a preempted stream has of its source. What it finds of it later was counted when it was computed."""


class Encoder:
    """Runs the model's encoder, a source at a time: what it returns can depend on the padding of a batch."""

    def __init__(self, model: PreTrainedModel, limits: Limits) -> None:
        assert limits.source is not None
        self.limits = limits.source
        self._start = limits.target_start[0]
        self._model: Any = model  # PreTrainedModel types its methods as tensors
        self._encoder: Any = model.get_encoder()
        self._device = input_device(model)
        self._attention_type = getattr(self._encoder, "attention_type", None)
        states = self([0]).states
        self.width, self.dtype, self.device = states.shape[2], states.dtype, states.device
        """Numbers of the encoder's output for a token, and what and where they are."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the encoder's output for a token."""
        return self.width * self.dtype.itemsize

    @property
    def bytes_per_square(self) -> int:
        """Bytes that encoding takes at once for each pair of a source's tokens: one layer's attention with its bias,
        where the model adds one between all of them."""
        for module in self._encoder.modules():
            bias = getattr(module, "compute_bias", None)
            if bias and "key_length" in inspect.signature(bias).parameters:
                return 3 * int(module.n_heads) * int(self._model.dtype.itemsize)
        return 0

    def reset(self) -> None:
        """Make the encoder what it was. BigBird-Pegasus's changes its attention for a short source, and keeps that."""
        if self._attention_type is not None:
            self._encoder.set_attention_type(self._attention_type)

    @torch.inference_mode()
    def __call__(self, source: Sequence[int]) -> Encoded:
        """Encode a source."""
        self.reset()
        ids = torch.tensor([source], device=self._device)
        return Encoded(self._encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state)

    @torch.inference_mode()
    def project(self, encoded: Encoded) -> list[Any]:
        """The layers of the cache that the decoder makes of an encoded source: keys and values ``[1, heads, length,
        dim]``."""
        layers: list[Any] = self._cache_of(encoded).cross_attention_cache.layers
        return layers

    def layers(self) -> tuple[list[Layer], list[Layer]]:
        """The decoder's layers, and those of its cross-attention.

        Raises UnsupportedModel where its cache is not one of keys and values for every token.
        """
        cache = self._cache_of(self([0]))
        return layers_in(cache.self_attention_cache.layers), layers_in(cache.cross_attention_cache.layers)

    @torch.inference_mode()
    def _cache_of(self, encoded: Encoded) -> EncoderDecoderCache:
        """The cache after one token of a target."""
        nothing = torch.zeros(0, dtype=torch.long, device=self._device)
        with only_wanted(self._model, nothing):
            output = self._model(
                encoder_outputs=EncoderOutput(encoded.states),
                attention_mask=torch.ones(1, encoded.length, dtype=torch.long, device=self._device),
                decoder_input_ids=torch.tensor([[self._start]], device=self._device),
                past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
                use_cache=True,
            )
        cache = output.past_key_values
        if not isinstance(cache, EncoderDecoderCache) or not cache.cross_attention_cache.layers:
            raise UnsupportedModel("its cache is not one of an encoder and a decoder")
        return cache


Key = tuple[object, tuple[int, ...]]
"""A salt and a source."""


class Sources:
    """The encoded sources, and the rows that running streams read."""

    def __init__(self, encoder: Encoder, rows: Memory, budget: int, states_budget: int) -> None:
        """``budget``: bytes of the rows and of what the encoder returned for the running streams' sources.
        ``states_budget``: bytes of encoded sources that no stream uses."""
        self._encoder = encoder
        self._rows = rows
        bytes_per_token = rows.bytes_per_token + encoder.bytes_per_token
        self._budget_tokens = budget // bytes_per_token // COLUMNS * COLUMNS
        self._states_budget = states_budget
        self._held: list[Held] = []
        """What each row holds."""
        self._known: weakref.WeakValueDictionary[Key, Encoded] = weakref.WeakValueDictionary()
        """Those that running streams use, and those that are kept."""
        self._kept: OrderedDict[Key, Encoded] = OrderedDict()
        """Those within ``states_budget``, least recently used first."""
        self._nothing = Encoded(torch.zeros(1, 1, encoder.width, dtype=encoder.dtype, device=encoder.device))
        """What streams read whose source failed."""
        square = encoder.bytes_per_square
        self.longest = min(
            encoder.limits.context, self._budget_tokens, math.isqrt(budget // square) if square else self._budget_tokens
        )
        """The most tokens that a source can have."""

    def make_room(self, lengths: Sequence[int]) -> bool:
        """Have a row for each of these lengths in tokens; False where the budget does not allow it.

        Raises torch.OutOfMemoryError.
        """
        rows, running = self._rows, len(lengths)
        need = -(-max(lengths) // COLUMNS) * COLUMNS
        if running <= rows.slots and need <= rows.capacity:
            return True
        capacity = max(need, rows.capacity)
        if running * capacity > self._budget_tokens:
            capacity = need
        if running * capacity > self._budget_tokens:
            return False
        slots = max(FIRST_SLOTS, rows.slots if running <= rows.slots else rows.slots * 2)
        slots = max(min(slots, self._budget_tokens // capacity), running)
        held = [one if one.length <= capacity else EMPTY for one in self._held[:slots]]
        rows.resize(slots, capacity, [one.length for one in held])
        self._held = held + [EMPTY] * (slots - len(held))
        return True

    def unread(self, streams: Sequence[Stream]) -> int:
        """How many tokens still have to be encoded before all the streams can run."""
        sources = {(stream.salt, stream.source) for stream in streams if not isinstance(stream.encoded, Encoded)}
        return sum(len(source) for salt, source in sources if (salt, source) not in self._known)

    def inputs(self, streams: Sequence[Stream]) -> SourceInputs:
        """What a step of these neighbouring streams reads; encodes the sources that are new.

        A stream whose source fails gets a ``problem`` and reads another one.
        """
        first, count = streams[0].slot, len(streams)
        lengths = torch.tensor([self._ready(stream).length for stream in streams])
        columns = -(-int(lengths.max()) // COLUMNS) * COLUMNS
        behind = torch.arange(columns)[None, :] >= lengths[:, None]
        dtype, device = self._encoder.dtype, self._encoder.device
        mask = torch.zeros(count, columns, dtype=dtype).masked_fill_(behind, torch.finfo(dtype).min)
        return SourceInputs(mask.to(device)[:, None, None, :], *self._rows.from_slot(first))

    def forget(self, stream: Stream) -> None:
        """Keep nothing of a running stream's source, which may hold numbers that are not finite. Other streams of the
        same source have their rows filled again."""
        self._kept.pop((stream.salt, stream.source), None)
        self._known.pop((stream.salt, stream.source), None)
        for row, held in enumerate(self._held):
            if row == stream.slot or held.source() is stream.encoded is not None:
                self._empty(row)

    def _ready(self, stream: Stream) -> Encoded:
        """The stream's source, encoded and in its row."""
        try:
            encoded = self._of(stream)
            self._place(stream.slot, encoded)
        except Exception as error:  # whatever the model's code raises, and no memory: other sources may well succeed
            log.exception("a source failed")
            stream.problem = (str(error).splitlines() or [type(error).__name__])[0]
            self._empty(stream.slot)
            self._place(stream.slot, self._nothing)
            return self._nothing
        return encoded

    def _of(self, stream: Stream) -> Encoded:
        if isinstance(stream.encoded, Encoded):
            return stream.encoded
        key = (stream.salt, stream.source)
        encoded = self._known.get(key)
        if encoded is None:
            encoded = self._known[key] = self._encoder(stream.source)
            stream.source_counts = (len(stream.source), 0)
        elif stream.encoded is not GIVEN_BACK:
            stream.source_counts = (0, len(stream.source))
        stream.encoded = self._kept[key] = encoded
        self._kept.move_to_end(key)
        size = sum(kept.states.nbytes for kept in self._kept.values())
        while size > self._states_budget:
            size -= self._kept.popitem(last=False)[1].states.nbytes
        return encoded

    def _place(self, row: int, encoded: Encoded) -> None:
        """Let the row hold the source."""
        held = self._held[row]
        if held.source() is encoded:
            return
        length = encoded.length
        other = next((i for i, one in enumerate(self._held) if one.source() is encoded), None)
        if other is not None:
            self._rows.copy(other, row, length)
        else:
            for index, layer in enumerate(self._encoder.project(encoded)):
                self._rows.keys[index][row, :, :length] = layer.keys[0]
                self._rows.values[index][row, :, :length] = layer.values[0]
        for tensors in (self._rows.keys, self._rows.values) if held.length > length else ():
            for tensor in tensors:
                tensor[row, :, length : held.length] = 0
        self._held[row] = Held(weakref.ref(encoded), length)

    def _empty(self, row: int) -> None:
        self._rows.clear(row)
        self._held[row] = EMPTY
