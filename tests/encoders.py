"""Tiny random encoders with tokenizers of their own, and what a prompt is answered."""

import asyncio
import functools
import inspect
import json
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from predict import Predictor
from tests.tiny import randomize, start

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "paris",
    "london",
    "dog",
    "in",
    "with",
    "of",
    "is",
    "was",
    "red",
    "blue",
    "big",
    "old",
    "play",
    "##s",
    "##ed",
    "##ing",
    ".",
    ",",
    "!",
]
TEXTS = [
    "The cat sat on a mat.",
    "A big old dog saw Paris and London.",
    "The dog was playing with a red cat in Paris, London!",
]

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROBERTA = BASE | {"pad_token_id": 1, "max_position_embeddings": 66, "type_vocab_size": 1}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", BASE),
    "roberta": ("RobertaConfig", ROBERTA),
    "longformer": ("LongformerConfig", ROBERTA | {"attention_window": [8, 8]}),
    "modernbert": ("ModernBertConfig", BASE | {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}),
    "distilbert": ("DistilBertConfig", BASE | {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "fnet": ("FNetConfig", BASE),
    "big_bird": ("BigBirdConfig", BASE | {"block_size": 4, "num_random_blocks": 1}),
    "mobilebert": ("MobileBertConfig", BASE | {"embedding_size": 16, "true_hidden_size": 32, "intra_bottleneck_size": 32}),
    "reformer": ("ReformerConfig", {"vocab_size": 320, "hidden_size": 32, "attn_layers": ["lsh"], "num_attention_heads": 2, "attention_head_size": 16, "max_position_embeddings": 64, "axial_pos_embds": False, "is_decoder": False, "lsh_attn_chunk_length": 4, "num_buckets": 4, "eos_token_id": None}),
    "bart": ("BartConfig", BASE | {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "eos_token_id": 3}),
    "deberta": ("DebertaV2Config", BASE | {"legacy": False}),
    "qwen3": ("Qwen3Config", BASE | {"head_dim": 8, "num_key_value_heads": 2, "pad_token_id": None}),
}  # fmt: skip
FIVE = ("bert", "roberta", "longformer", "modernbert", "distilbert")


def build(name: str, head: str = "MaskedLM", **changes: Any) -> PreTrainedModel:
    """A float32 model with random weights; ``head`` is MaskedLM or SequenceClassification."""
    kind, arguments = ARCHITECTURES[name]
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{head}")
    return randomize(auto.from_config(getattr(transformers, kind)(**arguments | changes)))


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer like that of the architecture: RoBERTa's takes the space before a mask into the mask."""
    if name in ("roberta", "longformer"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        trainer = trainers.BpeTrainer(
            vocab_size=310,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(TEXTS, trainer)
        backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
        first, last, padding, unknown, mask = "<s>", "</s>", "<pad>", "<unk>", "<mask>"
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        vocabulary = {token: i for i, token in enumerate([*special, *WORDS, *map(str, range(10))])}
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.add_special_tokens(special)
        padding, unknown, first, last, mask = special
    ids = [(token, backend.token_to_id(token)) for token in (first, last)]
    backend.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token=first,
        sep_token=last,
        pad_token=padding,
        unk_token=unknown,
        mask_token=AddedToken(mask, lstrip=mask == "<mask>", special=True),
        model_input_names=["input_ids", "attention_mask"],
    )


class Served:
    """An encoder in an engine, behind the predictor."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.engine = start(model, tokenizer)
        self._predictor = Predictor()
        self._predictor.engine = self.engine
        self.passes: list[int] = []
        """The rows of each forward pass since setup."""
        self.columns: list[int] = []
        """The same: its tokens a row, padding included."""
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        self.passes.append(len(inputs["input_ids"]))
        self.columns.append(inputs["input_ids"].shape[1])

    def output(self, prompt: str | None = None, **inputs: Any) -> str:
        """What the predictor sends for its inputs."""

        async def predict() -> list[str]:
            chunks: Any = await self._predictor.predict(**defaults() | {"prompt": prompt} | inputs)
            return list(chunks)

        return "".join(asyncio.run(predict()))

    def document(self, prompt: str, **inputs: Any) -> dict[str, Any]:
        """The JSON document for a prompt."""
        document: dict[str, Any] = json.loads(self.output(prompt, output="json", **inputs))
        return document


@functools.cache
def defaults() -> dict[str, Any]:
    """The predictor's inputs as the runtime fills them in."""
    parameters = inspect.signature(Predictor.predict).parameters.values()
    return {p.name: p.default.default for p in parameters if p.name != "self"}


def serving(name: str, head: str = "MaskedLM", **changes: Any) -> Iterator[Served]:
    """An encoder, for a fixture to yield from; its engine is stopped after that."""
    served = Served(build(name, head, **changes), tokenizer_of(name))
    yield served
    served.engine.stop()
