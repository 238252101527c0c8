"""What is asked of a Transformers model: its limits, its defaults, where input goes, logits at some positions only."""

import contextlib
import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmtp.protocol import FORCE

log = logging.getLogger(__name__)

UNBOUNDED_CONTEXT = 2**20
"""Tokens, for a model whose configuration names no limit."""

UNBOUNDED_TEXT = 2**12
"""The same for an encoder, which looks at all pairs of tokens at once."""

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


def in_words(error: Exception) -> str:
    """What was found, whatever the model's code has raised."""
    return str(error) if isinstance(error, UnsupportedModel) else f"{type(error).__name__}: {error}"


def why_refused(error: Exception, otherwise: str) -> str:
    """What was found, for the person who reads why a model is refused: ``otherwise`` where the model's code has raised
    something about itself, which the log keeps."""
    if isinstance(error, UnsupportedModel | torch.OutOfMemoryError):
        return str(error).splitlines()[0]
    log.warning("%s: %s: %s", otherwise, type(error).__name__, error)
    return otherwise


@dataclass(frozen=True)
class SourceLimits:
    """The vocabulary of an encoder, and its context in tokens."""

    vocabulary: int
    context: int


@dataclass(frozen=True)
class Head:
    """What an encoder answers about a text that it reads as a whole: a masked LM fills masks, a classifier names
    labels."""

    labels: tuple[str, ...] = ()
    """What a classifier chooses among, by id; empty for a masked LM, which chooses tokens."""
    independent: bool = False
    """Whether each label is true or false by itself: its probability is its logit's sigmoid, no share of a softmax."""

    @property
    def kind(self) -> str:
        """What such a model is called."""
        return "sequence classifier" if self.labels else "masked language model"


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
    head: Head | None = None
    """An encoder's head; None for a model that generates."""

    @property
    def classes(self) -> int:
        """How many tokens, or labels, an answer is chosen among."""
        return len(self.head.labels) if self.head and self.head.labels else self.vocabulary


def limits_of(model: PreTrainedModel) -> Limits:
    """Read the limits from the model's configuration and generation configuration.

    Raises UnsupportedModel for a regression, and for a model that has no layers for token ids.
    """
    if head := _head_of(model):
        return _encoder_limits(model, head)
    config = model.config.get_text_config(decoder=True)
    try:
        model.get_input_embeddings()
        vocabulary = model.get_output_embeddings().weight.shape[0]
    except Exception:  # whatever the model's code raises: BLIP has no such layers at its top
        raise UnsupportedModel("it has no layers that read and write token ids; choose another model.") from None
    lengths = [getattr(config, name, None) for name in CONTEXT_NAMES]
    context = next((length for length in lengths if isinstance(length, int) and length > 0), UNBOUNDED_CONTEXT)
    if bound := CONSISTENT_UP_TO.get(config.model_type):
        context = min(context, getattr(config, bound))
    if config.model_type == "big_bird" and config.attention_type == "block_sparse":  # full for shorter texts
        context = min(context, (5 + 2 * config.num_random_blocks) * config.block_size)
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


def _head_of(model: PreTrainedModel) -> Head | None:
    """The head of a masked LM or a sequence classifier. Labels are independent where Transformers' text-classification
    pipeline takes the sigmoid of each."""
    config: Any = model.config
    name = type(model).__name__
    if name.endswith("ForMaskedLM"):
        return Head()
    if not name.endswith("ForSequenceClassification"):
        return None
    if config.problem_type == "regression":
        raise UnsupportedModel("its problem_type is regression: it answers with numbers; choose one that has labels.")
    labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return Head(labels, config.problem_type == "multi_label_classification" or len(labels) == 1)


def _encoder_limits(model: PreTrainedModel, head: Head) -> Limits:
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    positions = next((size for name in names if (size := getattr(config, name, None) or 0) > 0), UNBOUNDED_TEXT)
    # RoBERTa and its relatives count positions from the padding id on.
    tables: list[Any] = [m for name, m in model.named_modules() if name.endswith("embeddings.position_embeddings")]
    unused = max((t.padding_idx + 1 for t in tables if getattr(t, "padding_idx", None) is not None), default=0)
    try:
        embeddings: nn.Module = model.get_output_embeddings() or model.get_input_embeddings()
        vocabulary = next(embeddings.parameters()).shape[0]
        if getattr(config, "legacy", True) is False:  # DeBERTa's output layer ends in its embeddings of tokens
            vocabulary = next(model.get_input_embeddings().parameters()).shape[0]
    except Exception:  # whatever the model's code raises; Perceiver's embeddings are a parameter, CANINE's are hashed
        raise UnsupportedModel("it has no layer that embeds token ids; choose another model.") from None
    return Limits(vocabulary, positions - unused, (), head=head)


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
    def described(self) -> dict[str, Any]:
        """The settings that change something, by name, as JSON has them."""
        set_ = {item.name: value for item in fields(self) if (value := getattr(self, item.name))}
        if self.logit_bias:
            set_["logit_bias"] = {token: max(value, -FORCE) for token, value in self.logit_bias.items()}
        return set_


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
    """Read the defaults from the model's generation configuration, as `generate` does. Encoders have none."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return Defaults()

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
    if model.config.is_encoder_decoder and "forced_bos_token_id" in others:
        others.remove("forced_bos_token_id")  # targets begin with it
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


def rope_kinds(model: PreTrainedModel) -> list[Mapping[str, Any]]:
    """The parameters of the model's rotary embeddings, of which kinds of layers may have their own."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def token_types(ids: Tensor, prompt_length: int) -> Tensor:
    """The token types of texts ``ids`` ``[rows, tokens]`` for a prefix LM: 0 in the prompt, 1 after it."""
    return (torch.arange(ids.shape[1], device=ids.device) >= prompt_length).long().expand_as(ids)


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
