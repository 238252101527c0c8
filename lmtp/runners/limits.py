"""What a model can take: its vocabulary, its context, its end-of-sequence ids."""

from dataclasses import dataclass

from transformers import PreTrainedModel

UNBOUNDED_CONTEXT = 2**20
"""Tokens, for a model whose configuration names no limit."""


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
    context = (
        getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or UNBOUNDED_CONTEXT
    )
    ends: set[int] = set()
    for source in (model.generation_config, config, model.config):
        ids = getattr(source, "eos_token_id", None)
        ends.update([ids] if isinstance(ids, int) else ids or [])
    return Limits(vocabulary, context, tuple(sorted(end for end in ends if 0 <= end < vocabulary)))
