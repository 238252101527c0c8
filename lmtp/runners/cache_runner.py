"""The runner that uses the model's own caches: for recurrent and hybrid models, and any whose cache is of its own kind.

Each stream is stepped alone, with the cache and the inputs that Transformers' generate makes for the model. The first
step computes all of its tokens at once, later ones a token at a time.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from lmtp.runners.adapters import Adapters
from lmtp.runners.model import (
    UnsupportedModel,
    accepts_positions,
    input_device,
    only_wanted,
    rope_kinds,
    token_types,
)
from lmtp.runners.slots import common_prefix
from lmtp.runners.step import Step, StepLimits, Stream
from lmtp.weights.kinds import PREFIX_LM

MAX_STREAMS = 16
"""Streams at once: each has its own cache, bounded only by the context."""

IDLE_CACHES = 8
"""How many finished streams' caches are kept for prompts that continue them."""

PROMPT_APART = ("unlimited_ocr",)
"""Types of models whose caches keep the prompt whole and bound what follows it: a text that continues another one has a
longer prompt, so nothing of the other is reused."""

CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""The arguments in which models take their caches."""


class Mode(StrEnum):
    """How a model carries what it has computed from step to step. The values describe it."""

    CACHES = "the model's own caches, one stream at a time"
    STATE = "the model's own state, one stream alone"
    """It is in the model's modules, so the next stream waits for the end of one."""
    NOTHING = "no cache, so that every token computes its whole text"
    PREFIX = "the model's own caches over whole prompts, one stream at a time"
    """A prompt attends both ways: what is computed of it depends on its end, so nothing of it is reused."""


def modes_of(model: PreTrainedModel) -> list[Mode]:
    """The modes that may serve a model; the fastest comes first."""
    prefixed = model.config.model_type in PREFIX_LM
    return [mode for mode in Mode if (mode is Mode.PREFIX) == prefixed]


@dataclass(eq=False)
class ModelCache:
    """One stream's cache: the keyword arguments that Transformers carries from step to step."""

    arguments: dict[str, Any] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    salt: object = Stream.SHARED
    scales: set[tuple[bool, ...]] = field(default_factory=set)
    """What `CacheRunner._scale` was as the tokens were computed; empty for a model without LongRoPE."""


class CacheRunner:
    """Runs streams one after the other, each through a cache of its own. A recurrent cache cannot go back, so only a
    whole one can be taken over."""

    longest_source = 0

    def __init__(
        self,
        model: PreTrainedModel,
        context: int,
        reason: str,
        mode: Mode = Mode.CACHES,
        adapters: Adapters | None = None,
    ) -> None:
        """Raises UnsupportedModel for a mode in which the results would depend on how a text is cut."""
        if mode is not Mode.NOTHING and getattr(model.config, "use_learned_position_embeddings", True) is False:
            raise UnsupportedModel("with a cache its positions count padding, without one they do not")  # TrOCR
        self.description = mode.value
        self.reason = reason
        self.refusal = ""
        self.longest = context
        self.active: list[Stream] = []
        self.step_limits = StepLimits(chunk=context, busy_chunk=0, logits=context, drafts=0)
        self.adapters = adapters or Adapters(model)
        self._mode = mode
        self._model: Any = model  # PreTrainedModel types its generation methods as tensors
        self._accepts_positions = accepts_positions(model)
        self._bounds = _longrope_bounds(model)
        self._keeps = mode is Mode.CACHES and model.config.model_type not in PROMPT_APART
        self._device = input_device(model)
        self._caches: list[ModelCache] = []
        self._idle: list[ModelCache] = []

    def shared_prefix(self, stream: Stream) -> tuple[int, int]:
        """See Runner.shared_prefix. Running streams share nothing."""
        cache = self._whole_prefix(stream)
        length = len(cache.tokens) if cache else 0
        return length, length

    def admit(self, stream: Stream) -> bool:
        """Let the stream run, from the longest idle cache that its tokens begin with; False where too many run."""
        if len(self.active) >= (1 if self._mode is Mode.STATE else MAX_STREAMS):
            return False
        cache = self._whole_prefix(stream)
        if cache is None:
            cache = ModelCache()
        else:
            self._idle.remove(cache)
        stream.computed = stream.reused = len(cache.tokens)
        stream.slot = len(self.active)
        self.active.append(stream)
        self._caches.append(cache)
        return True

    def release(self, stream: Stream, keep: bool = True) -> None:
        """See Runner.release."""
        cache = self._caches[stream.slot]
        cache.tokens, cache.salt = stream.tokens[: stream.computed], stream.salt
        if keep and cache.tokens and self._keeps:
            self._idle = [*self._idle[-IDLE_CACHES + 1 :], cache]
        del self.active[stream.slot], self._caches[stream.slot]
        for slot, other in enumerate(self.active):
            other.slot = slot
        stream.slot = -1

    def prepare(self, step: Step[Stream]) -> Callable[[], Tensor]:
        """See Runner.prepare."""
        return functools.partial(self._run, step)

    def _whole_prefix(self, stream: Stream) -> ModelCache | None:
        usable = [
            cache
            for cache in self._idle
            if cache.salt == stream.salt
            and cache.scales <= {self._scale(len(stream.tokens))}
            and len(cache.tokens) <= stream.first_wanted
            and common_prefix(cache.tokens, stream.tokens) == len(cache.tokens)
        ]
        return max(usable, key=lambda cache: len(cache.tokens), default=None)

    def _scale(self, length: int) -> tuple[bool, ...]:
        """Which of its factors LongRoPE takes for a text of this length. A text computed whole has one for all tokens,
        so nothing computed by another one is reused for it."""
        return tuple(length > bound for bound in self._bounds)

    @torch.inference_mode()
    def _run(self, step: Step[Stream]) -> Tensor:
        wanted = []
        for stream, count in zip(step.streams, step.counts, strict=True):
            cache = self._caches[stream.slot]
            first, last = stream.computed, stream.computed + count
            if self._mode is Mode.PREFIX and first < stream.prompt_length:
                if last < stream.prompt_length:  # wait for the whole prompt
                    continue
                first = 0
            positions = [(first, last)] if first == 0 else [(i, i + 1) for i in range(first, last)]
            for a, b in positions:
                first_wanted = max(stream.first_wanted, a)
                forward = functools.partial(self._forward, cache, stream, a, b, first_wanted)
                logits = self.adapters.run([stream.adapter], forward)
                wanted.append(logits[: max(b - first_wanted, 0)])
        return torch.cat(wanted) if wanted else torch.empty(0)

    def _forward(self, cache: ModelCache, stream: Stream, first: int, last: int, wanted: int) -> Tensor:
        """Compute tokens ``first`` to ``last``; the cache then holds them. Returns the logits
        ``[last - wanted, vocabulary]``, at least the last one."""
        model = self._model
        ids = torch.tensor([stream.tokens[:last]], device=self._device)
        if first == 0:
            cache.arguments = self._new_cache(ids)
        elif not any(cache.arguments.get(name) is not None for name in CACHE_NAMES):
            return self._forward(cache, stream, 0, last, wanted)  # a model without a cache computes all of it again
        arguments = dict(cache.arguments)
        if self._accepts_positions:
            arguments["position_ids"] = torch.arange(last, device=self._device)[None]
        if self._mode is Mode.PREFIX:
            arguments["token_type_ids"] = token_types(ids, stream.prompt_length)
        inputs = model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=last - first,
            is_first_iteration=first == 0,
            attention_mask=torch.ones_like(ids),
            **arguments,
        )
        inputs.pop("logits_to_keep", None)  # some models ask for the last position only
        # Counted from the end: some models compute more tokens, Phi-3 all of them where its embedding changes.
        with only_wanted(model, torch.arange(min(wanted, last - 1) - last, 0)):
            output = model(**inputs, return_dict=True)
        cache.arguments = model._update_model_kwargs_for_generation(output, cache.arguments)
        if self._bounds:
            kept = set() if inputs["input_ids"].shape[1] == last else cache.scales
            cache.scales = kept | {self._scale(last)}
        return output.logits[0]

    def _new_cache(self, ids: Tensor) -> dict[str, Any]:
        """An empty cache as generate makes it, under the name that the model gives it."""
        if self._mode is Mode.NOTHING:
            return {"use_cache": False}
        if self._mode is Mode.STATE:
            self._model(input_ids=ids[:, :1], use_cache=False)  # forgets the state of the stream before
        arguments: dict[str, Any] = {"use_cache": True}
        self._model._prepare_cache_for_generation(
            GenerationConfig(), arguments, GenerationMode.GREEDY_SEARCH, batch_size=1, max_cache_length=self.longest
        )
        return arguments


def _longrope_bounds(model: PreTrainedModel) -> list[int]:
    """The lengths beyond which rotary embeddings of the kind LongRoPE take their other factors."""
    return [
        kind["original_max_position_embeddings"]
        for kind in rope_kinds(model)
        if kind.get("rope_type", kind.get("type")) == "longrope"
    ]
