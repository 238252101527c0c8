"""Which kind of model a configuration describes, and the Auto class that loads it. Importing this imports no torch."""

from __future__ import annotations

import inspect
import re
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from lmtp.weights.manifest import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Kind(StrEnum):
    """What a model does with text."""

    CAUSAL = "causal language model"
    MULTIMODAL = "multimodal language model"
    """A decoder whose input may also hold images, video or sound; plain text goes through it as well."""
    SEQ2SEQ = "encoder-decoder"
    MASKED = "masked language model"
    CLASSIFIER = "sequence classifier"


AUTO_CLASSES = {
    Kind.SEQ2SEQ: "AutoModelForSeq2SeqLM",
    Kind.MULTIMODAL: "AutoModelForMultimodalLM",
    Kind.CAUSAL: "AutoModelForCausalLM",
    Kind.MASKED: "AutoModelForMaskedLM",
    Kind.CLASSIFIER: "AutoModelForSequenceClassification",
}
"""The Auto class of Transformers for each kind. Where several know an architecture, the first counts."""


OTHER = re.compile(r"EncoderModel$|For(?!CausalLM|ConditionalGeneration|MaskedLM|PreTraining)")
"""Classes whose output is none of these kinds', such as rewards: their type says nothing of it."""


PREFIX_LM = ("paligemma",)
"""Types of models whose prompt is one block that attends both ways, and what follows it attends backwards. Their token
types tell them apart: 0 and 1."""


def kind_of(config: PreTrainedConfig, source: str) -> Kind:
    """The kind of model that the source's configuration describes.

    `architectures` decides, or the model type where it names no class that Transformers loads as one of these kinds.
    Raises WeightsError if the model is of none of these kinds.
    """
    named = (config.architectures or [""])[0]
    # A BERT without `architectures` is a masked language model, though Transformers has a decoder of that type, too.
    by_type = (Kind.SEQ2SEQ, Kind.MULTIMODAL, Kind.MASKED, Kind.CAUSAL)
    kind = (
        _first(lambda name: named in _classes(name).values(), _possible(config, tuple(AUTO_CLASSES)))
        or _first(lambda name: name in (getattr(config, "auto_map", None) or {}), AUTO_CLASSES)
        or (
            None
            if OTHER.search(named)
            else _first(lambda name: config.model_type in _classes(name), _possible(config, by_type))
        )
    )
    if kind is None:
        raise WeightsError(
            f"{source} is no language model but a {ascii(named or config.model_type)[1:-1]:.99}: choose a causal, an"
            " encoder-decoder or a masked language model, or a sequence classifier."
        )
    return kind


def refuse_without_text(kind: Kind, config: PreTrainedConfig, source: str) -> None:
    """Raise WeightsError if a decoder, multimodal or not, does not continue a plain text token by token.

    The signature of a multimodal model's class tells what a forward pass needs. Classes of the model's own code are not
    looked at.
    """
    import transformers

    classes = _classes(AUTO_CLASSES[kind])
    named = (config.architectures or [""])[0]
    name = named if named in classes.values() else classes.get(config.model_type)
    if name is None:
        return
    why = _why_not_text(getattr(transformers, name)) if kind is Kind.MULTIMODAL else ""
    both_ways = getattr(config.get_text_config(decoder=True), "use_bidirectional_attention", None) in (True, "all")
    if not why and both_ways and config.model_type not in PREFIX_LM:
        why = "lets all tokens of a prompt see each other, which no runner computes (use_bidirectional_attention)"
    if why:
        raise WeightsError(f"{source} is a {name}, which {why}: choose a model that continues plain text.")


def _why_not_text(model: Any) -> str:
    """What keeps a class from continuing plain text; empty if nothing does."""
    taken = inspect.signature(model.forward).parameters
    needed = [
        each.name
        for each in list(taken.values())[1:]
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "input_ids"
    ]
    if "input_ids" not in taken or not model.can_generate():
        return "does not generate text from text"
    if needed:
        return f"needs {needed[0]} besides text"
    return "has a decoder apart from the part that reads its input" if "decoder_input_ids" in taken else ""


def auto_class(kind: Kind) -> Any:
    """The Auto class of Transformers that loads models of this kind."""
    import transformers

    return getattr(transformers, AUTO_CLASSES[kind])


def _possible(config: PreTrainedConfig, kinds: tuple[Kind, ...]) -> list[Kind]:
    # Transformers' table of sequence-to-sequence models also lists decoders that listen, such as Qwen2-Audio.
    return [kind for kind in kinds if kind is not Kind.SEQ2SEQ or config.is_encoder_decoder]


def _first(fits: Any, kinds: Any) -> Kind | None:
    return next((kind for kind in kinds if fits(AUTO_CLASSES[kind])), None)


def _classes(auto_class: str) -> dict[str, str]:
    """The class of each model type that the Auto class loads."""
    from transformers.models.auto import modeling_auto

    mapping = getattr(modeling_auto, auto_class)._model_mapping._model_mapping
    # Some types have several classes, for configurations of one name.
    return {key: names if isinstance(names, str) else names[0] for key, names in mapping.items()}
