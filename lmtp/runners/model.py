"""What every runner asks of a Transformers model: its limits, where its input goes, logits at some positions only."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

UNBOUNDED_CONTEXT = 2**20
"""Tokens, for a model whose configuration names no limit."""


class UnsupportedModel(Exception):
    """The runner cannot serve the model; the message says what was found."""


@dataclass(frozen=True)
class SourceLimits:
    """The vocabulary of an encoder, and its context in tokens."""

    vocabulary: int
    context: int


@dataclass(frozen=True)
class Limits:
    """A model's vocabulary and context in tokens, and the ids that end a sequence."""

    vocabulary: int
    context: int
    end_of_sequence: tuple[int, ...]
    source: SourceLimits | None = None
    """The limits of an encoder-decoder model's encoder; the others are then its decoder's."""
    target_start: tuple[int, ...] = ()
    """What the target of an encoder-decoder model begins with: the start token, then the one that generate() forces."""


def limits_of(model: PreTrainedModel) -> Limits:
    """Read the limits from the model's configuration and generation configuration."""
    config = model.config.get_text_config(decoder=True)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    context = (
        getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or UNBOUNDED_CONTEXT
    )
    ends: set[int] = set()
    for source in (model.generation_config, config, model.config):
        ids = getattr(source, "eos_token_id", None)
        ends.update([ids] if isinstance(ids, int) else ids or [])
    limits = Limits(vocabulary, context, tuple(sorted(end for end in ends if 0 <= end < vocabulary)))
    return _with_source(model, limits) if model.config.is_encoder_decoder else limits


def _with_source(model: PreTrainedModel, limits: Limits) -> Limits:
    """The limits of an encoder-decoder model. LED names the positions of both sides."""

    def own(name: str) -> int | None:
        return next(
            (value for c in (model.generation_config, model.config) if (value := getattr(c, name, None)) is not None),
            None,
        )

    start = own("decoder_start_token_id")
    start = own("bos_token_id") if start is None else start
    if start is None:
        raise UnsupportedModel("its configuration names no decoder_start_token_id")
    forced = own("forced_bos_token_id")
    encoder = getattr(model.config, "encoder", None) or model.config
    names = ("max_encoder_position_embeddings", "max_position_embeddings")
    positions = next((value for name in names if (value := getattr(encoder, name, None))), UNBOUNDED_CONTEXT)
    embeddings: nn.Module = model.get_input_embeddings()
    source = SourceLimits(next(embeddings.parameters()).shape[0], positions)
    context = getattr(model.config, "max_decoder_position_embeddings", None) or limits.context
    return replace(limits, context=context, source=source, target_start=(start,) if forced is None else (start, forced))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids have to be: a large model is spread over several devices."""
    embeddings: nn.Module = model.get_input_embeddings()
    return next(embeddings.parameters()).device


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
