"""The sources of an encoder-decoder model's streams: each is encoded once, and then lies in the rows of its streams.

A row holds the keys and values that cross-attention reads, in tensors ``[rows, heads, capacity + 1, dim]`` beside the
slots of the targets. Which source a row holds is remembered, and compared before each step: where it is another one,
the right one is copied from a row that has it, or projected from what the encoder returned. That is kept while a
running stream uses it, and after that within a budget, least recently used first to go. A step encodes new sources of
equal length together, and projects all new ones together, since each time the encoder's or the decoder's weights are
read.

Behind its source a row holds zeros: padding has weight 0, but 0 times a NaN would be NaN.
"""

import contextlib
import inspect
import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from lmtp.runners.model import Limits, UnsupportedModel, input_device, only_wanted
from lmtp.runners.slot_runner import layers_in
from lmtp.runners.slots import FIRST_SLOTS, Layer, Memory
from lmtp.runners.step import SourceInputs, Stream

log = logging.getLogger(__name__)

T = TypeVar("T")

COLUMNS = 16
"""Rows have room for multiples of this many tokens, and cross-attention reads such."""

MAX_TOGETHER = 1024
"""Tokens of several sources that are encoded or projected at once. Their keys and values exist twice for a moment."""


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


Projected = tuple[tuple[Tensor, Tensor], ...]
"""Each layer's keys and values ``[heads, length, dim]`` of one source."""


class Held(NamedTuple):
    """What a row holds: which source, and how many tokens of it. The row keeps no encoded source alive."""

    source: Callable[[], Encoded | None]
    length: int


EMPTY = Held(lambda: None, 0)

GIVEN_BACK = "given back"
"""What a preempted stream has of its source. What it finds of it later was counted when it was computed."""


class Encoder:
    """Runs the model's encoder, without padding: what it returns can depend on that of a batch."""

    together = True
    """Whether sources of equal length are encoded together. Not where the self-check shows that they depend on each
    other."""

    def __init__(self, model: PreTrainedModel, limits: Limits) -> None:
        assert limits.source is not None
        self.limits = limits.source
        self._start = limits.target_start[0]
        self._model: Any = model  # PreTrainedModel types its methods as tensors
        self._encoder: Any = model.get_encoder()
        self._device = input_device(model)
        self._attention_type = getattr(self._encoder, "attention_type", None)
        (one,) = self([[0]])
        states = one.states
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
    def __call__(self, sources: Sequence[Sequence[int]]) -> list[Encoded]:
        """Encode sources of one length."""
        self.reset()
        ids = torch.tensor(sources, device=self._device)
        states: Tensor = self._encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        # Copied, so that none keeps the others' memory.
        return [Encoded(one if len(sources) == 1 else one.clone()) for one in states.split(1)]

    @torch.inference_mode()
    def project(self, several: Sequence[Encoded]) -> list[Projected]:
        """What the decoder makes of encoded sources, one after the other as if they were one: cross-attention computes
        its keys and values from each token alone. The self-check proves it."""
        states = torch.cat([one.states for one in several], dim=1)
        lengths = [one.length for one in several]
        layers: list[Any] = self._cache_of(Encoded(states)).cross_attention_cache.layers
        split = [
            zip(layer.keys[0].split(lengths, 1), layer.values[0].split(lengths, 1), strict=True) for layer in layers
        ]
        return list(zip(*split, strict=True))

    def layers(self) -> tuple[list[Layer], list[Layer]]:
        """The decoder's layers, and those of its cross-attention.

        Raises UnsupportedModel where its cache is not one of keys and values for every token.
        """
        cache = self._cache_of(self([[0]])[0])
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
        lengths = torch.tensor([encoded.length for encoded in self._ready(streams)])
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

    def _ready(self, streams: Sequence[Stream]) -> list[Encoded]:
        """The streams' sources, encoded and in their rows."""
        ready = [self._nothing] * len(streams)
        encoded = self._encoded(streams)
        for i, stream in enumerate(streams):
            with _noted(stream):
                ready[i] = self._of(stream, encoded)
        projected = self._projected(streams, ready)
        for i, stream in enumerate(streams):
            with _noted(stream):
                self._place(stream.slot, ready[i], projected)
            if stream.problem:
                self._empty(stream.slot)
                self._place(stream.slot, self._nothing, projected)
                ready[i] = self._nothing
        return ready

    def _projected(self, streams: Sequence[Stream], ready: Sequence[Encoded]) -> dict[Encoded, Projected]:
        """What no row holds that stays as it is. Where that fails for several at once, they are left to `_place`."""
        wanted = {stream.slot: one for stream, one in zip(streams, ready, strict=True)}
        sources = [held.source() for held in self._held]
        staying = [one for row, one in enumerate(sources) if wanted.get(row, one) is one]
        new = [one for one in dict.fromkeys(ready) if one not in staying]
        projected: dict[Encoded, Projected] = {}
        for group in _groups(new, lambda one: one.length, MAX_TOGETHER) if len(new) > 1 else ():
            with contextlib.suppress(Exception):
                projected.update(zip(group, self._encoder.project(group), strict=True))
        return projected

    def _encoded(self, streams: Sequence[Stream]) -> dict[Key, Encoded]:
        """New sources that have the length of another new one. Where several fail, they are left to `_of`."""
        if not self._encoder.together:
            return {}
        new: dict[int, dict[Key, None]] = {}
        for stream in streams:
            key = (stream.salt, stream.source)
            if not isinstance(stream.encoded, Encoded) and key not in self._known:
                new.setdefault(len(stream.source), {})[key] = None
        encoded: dict[Key, Encoded] = {}
        for length, keys in new.items():
            # As much at once as one source may take.
            most = min(MAX_TOGETHER, self.longest**2 // length)
            for group in _groups(keys, lambda key: len(key[1]), most):
                if len(group) > 1:
                    with contextlib.suppress(Exception):
                        encoded.update(zip(group, self._encoder([source for _, source in group]), strict=True))
        return encoded

    def _of(self, stream: Stream, encoded_now: Mapping[Key, Encoded]) -> Encoded:
        if isinstance(stream.encoded, Encoded):
            return stream.encoded
        key = (stream.salt, stream.source)
        encoded = self._known.get(key)
        if encoded is None:
            encoded = encoded_now.get(key) or self._encoder([stream.source])[0]
            self._known[key] = encoded
            stream.source_counts = (len(stream.source), 0)
        elif stream.encoded is not GIVEN_BACK:
            stream.source_counts = (0, len(stream.source))
        stream.encoded = self._kept[key] = encoded
        self._kept.move_to_end(key)
        size = sum(kept.states.nbytes for kept in self._kept.values())
        while size > self._states_budget:
            size -= self._kept.popitem(last=False)[1].states.nbytes
        return encoded

    def _place(self, row: int, encoded: Encoded, projected: Mapping[Encoded, Projected]) -> None:
        """Let the row hold the source. ``projected``: what need not be projected here."""
        held = self._held[row]
        if held.source() is encoded:
            return
        length = encoded.length
        other = next((i for i, one in enumerate(self._held) if one.source() is encoded), None)
        if other is not None:
            self._rows.copy(other, row, length)
        else:
            layers = projected.get(encoded) or self._encoder.project([encoded])[0]
            for index, (keys, values) in enumerate(layers):
                self._rows.keys[index][row, :, :length] = keys
                self._rows.values[index][row, :, :length] = values
        for tensors in (self._rows.keys, self._rows.values) if held.length > length else ():
            for tensor in tensors:
                tensor[row, :, length : held.length] = 0
        self._held[row] = Held(weakref.ref(encoded), length)

    def _empty(self, row: int) -> None:
        self._rows.clear(row)
        self._held[row] = EMPTY


@contextlib.contextmanager
def _noted(stream: Stream) -> Iterator[None]:
    """Let what fails inside be the stream's problem: other sources may well succeed."""
    try:
        yield
    except Exception as error:  # whatever the model's code raises, and no memory
        log.exception("a source failed")
        stream.problem = (str(error).splitlines() or [type(error).__name__])[0]


def _groups(several: Iterable[T], length: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """The sources, in groups of so many tokens at most; a longer one is a group of its own."""
    group: list[T] = []
    for one in several:
        if group and sum(map(length, group)) + length(one) > most:
            yield group
            group = []
        group.append(one)
    if group:
        yield group
