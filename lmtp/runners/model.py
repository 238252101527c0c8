"""What every runner asks of a Transformers model: its limits, where its input goes, logits at some positions only."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

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
