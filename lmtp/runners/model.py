"""What is asked of a Transformers model: its limits, its defaults, where input goes, logits at some positions only."""

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

UNBOUNDED_CONTEXT = 2**20
"""Tokens, for a model whose configuration names no limit."""

CONTEXT_NAMES = (
    "max_position_embeddings",
    "max_target_positions",
    "max_seq_len",
    "context_length",
    "model_max_length",
)
"""How configurations name the context. Whisper's encoder has max_source_positions, XLNet none."""

CONSISTENT_UP_TO = {"doge": "keep_window_size", "moshi": "sliding_window", "moshi_text": "sliding_window"}
"""Longer texts differ in Transformers itself, depending on how many of their tokens it computes at once."""


class UnsupportedModel(Exception):
    """The runner cannot serve the model; the message says what was found."""


@dataclass(frozen=True)
class Limits:
    """A model's vocabulary and context in tokens, and the ids that end a sequence."""

    vocabulary: int
    context: int
    end_of_sequence: tuple[int, ...]


def limits_of(model: PreTrainedModel) -> Limits:
    """Read the limits from the model's configuration and generation configuration."""
    config = model.config.get_text_config(decoder=True)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    lengths = [getattr(config, name, None) for name in CONTEXT_NAMES]
    context = next((length for length in lengths if isinstance(length, int) and length > 0), UNBOUNDED_CONTEXT)
    if bound := CONSISTENT_UP_TO.get(config.model_type):
        context = min(context, getattr(config, bound))
    ends: set[int] = set()
    for source in (model.generation_config, config, model.config):
        ids = getattr(source, "eos_token_id", None)
        ends.update([ids] if isinstance(ids, int) else ids or [])
    return Limits(vocabulary, context, tuple(sorted(end for end in ends if 0 <= end < vocabulary)))


@dataclass(frozen=True)
class Defaults:
    """What a model's generation configuration sets for every prompt, in the words of `protocol.Generate`."""

    temperature: float = 0.0
    """0 where the configuration does not ask for sampling."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Tokens that are never generated (negative infinity) and those that are made more or less likely."""
    ignored: tuple[str, ...] = ()
    """Names of settings that change what `generate` does and have no counterpart here."""

    @property
    def set(self) -> dict[str, Any]:
        """The settings that change something, by name, for MODEL_INFO."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name))}


TURNED_OFF: dict[str, Any] = {
    "num_beams": 1,
    "typical_p": 1.0,
    "top_h": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "guidance_scale": 1.0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "stop_strings": None,
    "watermarking_config": None,
}
"""Settings of a generation configuration with no counterpart, and the values at which they change nothing."""


def defaults_of(model: PreTrainedModel) -> Defaults:
    """Read the defaults from the model's generation configuration, as `generate` does."""
    config = model.generation_config

    def given(name: str, neutral: Any = None) -> Any:
        value = getattr(config, name, None)
        return None if value in (None, neutral) else value

    bias = dict.fromkeys(given("suppress_tokens") or (), -math.inf)
    longer = []
    words = [(ids, -math.inf) for ids in given("bad_words_ids") or ()]
    for ids, value in [*words, *((ids, value) for ids, value in _sequence_bias(given("sequence_bias")))]:
        if len(ids) == 1:
            bias[ids[0]] = bias.get(ids[0], 0.0) + value
        else:
            longer.append("bad_words_ids" if value == -math.inf else "sequence_bias")
    vocabulary = limits_of(model).vocabulary
    sampling = bool(given("do_sample"))
    others = [name for name, neutral in TURNED_OFF.items() if given(name, neutral) not in (None, [])]
    return Defaults(
        temperature=(given("temperature") or 1.0) if sampling else 0.0,
        top_p=given("top_p", 1.0) if sampling else None,
        # generate keeps the 50 most likely tokens unless told otherwise.
        top_k=(50 if config.top_k is None else given("top_k", 0)) if sampling else None,
        min_p=given("min_p", 0.0) if sampling else None,
        repetition_penalty=given("repetition_penalty", 1.0),
        min_tokens=given("min_new_tokens") or 0,
        logit_bias={token: value for token, value in bias.items() if 0 <= token < vocabulary},
        ignored=tuple(dict.fromkeys([*others, *longer])),
    )


def _sequence_bias(given: Any) -> list[tuple[Sequence[int], float]]:
    """Token sequences and their biases: a dictionary, or a list of pairs as JSON has it."""
    pairs = given.items() if isinstance(given, dict) else given or ()
    return [(tuple(ids), float(value)) for ids, value in pairs]


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids have to be: a large model is spread over several devices."""
    embeddings: nn.Module = model.get_input_embeddings()
    return next(embeddings.parameters()).device


def accepts_positions(model: PreTrainedModel) -> bool:
    """Whether the model takes ``position_ids``."""
    return "position_ids" in inspect.signature(model.forward).parameters


@contextlib.contextmanager
def only_wanted(model: PreTrainedModel, index: Tensor) -> Iterator[None]:
    """Let the output layer see only the positions ``index`` of the flattened batch, whatever the model does before and
    after it. The logits are then ``[1, wanted, vocabulary]``."""

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden.flatten(0, 1)[index.to(hidden.device)][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
