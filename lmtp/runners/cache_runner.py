"""The runner for models that slots cannot serve: recurrent and hybrid ones, and any whose cache is of its own kind.

Each stream is stepped alone, with the cache that Transformers itself makes for the model: the first step computes all
its tokens at once, later ones a token at a time. Slower than slots, never wrong.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lmtp.engine.scheduler import Step
from lmtp.engine.stream import Stream
from lmtp.runners.slot_runner import input_device, only_wanted
from lmtp.runners.slots import common_prefix

IDLE_CACHES = 8
"""How many finished streams' caches are kept for prompts that go on from them."""

CACHE_NAMES = ("past_key_values", "cache_params", "state")


@dataclass(eq=False)
class ModelCache:
    """One stream's cache: the keyword arguments that Transformers carries from step to step."""

    arguments: dict[str, Any] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)


class ModelCaches:
    """Who runs with which cache. A recurrent cache cannot go back, so only a whole one can be taken over."""

    def __init__(self, most_streams: int, context: int) -> None:
        self.longest = context
        self.active: list[Stream] = []
        self.caches: list[ModelCache] = []
        self._most_streams = most_streams
        self._idle: list[ModelCache] = []

    def shared_prefix(self, stream: Stream) -> tuple[int, int]:
        """Tokens of the stream that an idle cache has computed; nothing can be had from running ones."""
        cache = self._whole_prefix(stream)
        length = len(cache.tokens) if cache else 0
        return length, length

    def admit(self, stream: Stream) -> bool:
        """Let the stream run, from the longest idle cache that its tokens begin with."""
        if len(self.active) >= self._most_streams:
            return False
        cache = self._whole_prefix(stream)
        if cache is None:
            cache = ModelCache()
        else:
            self._idle.remove(cache)
        stream.computed = stream.reused = len(cache.tokens)
        stream.slot = len(self.active)
        self.active.append(stream)
        self.caches.append(cache)
        return True

    def release(self, stream: Stream, keep: bool = True) -> None:
        """Take the stream's cache back."""
        cache = self.caches[stream.slot]
        cache.tokens = stream.tokens[: stream.computed]
        if keep and cache.tokens:
            self._idle = [*self._idle[-IDLE_CACHES + 1 :], cache]
        del self.active[stream.slot], self.caches[stream.slot]
        for slot, other in enumerate(self.active):
            other.slot = slot
        stream.slot = -1

    def _whole_prefix(self, stream: Stream) -> ModelCache | None:
        usable = [
            cache
            for cache in self._idle
            if len(cache.tokens) <= stream.first_wanted
            and common_prefix(cache.tokens, stream.tokens) == len(cache.tokens)
        ]
        return max(usable, key=lambda cache: len(cache.tokens), default=None)


class FallbackRunner:
    """Runs steps through the model's own caches, one stream after the other."""

    def __init__(self, model: PreTrainedModel, caches: ModelCaches) -> None:
        self._model: Any = model  # PreTrainedModel: its generation methods are typed as tensors
        self._caches = caches
        self._device = input_device(model)

    def prepare(self, step: Step) -> Callable[[], Tensor]:
        """What runs the model. It returns the logits at the step's wanted positions, ``[wanted, vocabulary]``, row by
        row in order of position."""
        return functools.partial(self._run, step)

    @torch.inference_mode()
    def _run(self, step: Step) -> Tensor:
        wanted = []
        for stream, count in zip(step.streams, step.counts, strict=True):
            cache = self._caches.caches[stream.slot]
            first, last = stream.computed, stream.computed + count
            positions = [(first, last)] if first == 0 else [(i, i + 1) for i in range(first, last)]
            for a, b in positions:
                logits = self._forward(cache, stream.tokens, a, b, max(stream.first_wanted, a))
                wanted.append(logits[: max(b - max(stream.first_wanted, a), 0)])
        return torch.cat(wanted)

    def _forward(self, cache: ModelCache, tokens: list[int], first: int, last: int, wanted: int) -> Tensor:
        """Compute these tokens, which the cache then holds too; the logits ``[last - wanted, vocabulary]``, and at
        least the last."""
        model = self._model
        if first == 0:
            cache.arguments = {"use_cache": True}
            if model._supports_default_dynamic_cache():  # named as generate() names it
                name = "cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values"
                cache.arguments[name] = DynamicCache(config=model.config.get_text_config(decoder=True))
        elif not any(cache.arguments.get(name) is not None for name in CACHE_NAMES):
            return self._forward(cache, tokens, 0, last, wanted)  # a model without a cache: all again
        ids = torch.tensor([tokens[:last]], device=self._device)
        inputs = model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=last - first,
            is_first_iteration=first == 0,
            attention_mask=torch.ones_like(ids),
            **cache.arguments,
        )
        begin = last - inputs["input_ids"].shape[1]  # models may compute more again: Phi-3 where its embedding changes
        with only_wanted(model, torch.arange(min(wanted, last - 1), last) - begin):
            output = model(**inputs, return_dict=True)
        cache.arguments = model._update_model_kwargs_for_generation(output, cache.arguments)
        return output.logits[0]
