"""Tiny random models of many architectures, and an engine's answers gathered in one call."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmtp.engine.engine import Engine, LoadedModel
from lmtp.prediction import Counters, Prediction
from lmtp.protocol import Failure, Operation, Reply, StreamId, Token
from lmtp.runners.runner import open_runner
from lmtp.settings import Bounds

VOCABULARY = 128
END = 2
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "eos_token_id": END}),
    "gemma2": ("Gemma2Config", {**BASE, "head_dim": 8, "sliding_window": 8}),
    "mistral": ("MistralConfig", {**BASE, "sliding_window": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", {**BASE, **EXPERTS, "head_dim": 8, "num_experts": 4}),
    "gpt_oss": ("GptOssConfig", {**BASE, "num_experts_per_tok": 2, "head_dim": 8, "num_local_experts": 4, "sliding_window": 8}),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in BASE.items() if k != "num_key_value_heads"}),
    "mpt": ("MptConfig", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "eos_token_id": END}),
    "llama4": ("Llama4TextConfig", {**BASE, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 64}),
}  # fmt: skip
CACHE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "rwkv": ("RwkvConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 512, "eos_token_id": END}),
    "mamba": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "eos_token_id": END}),
    "phi3_longrope": ("Phi3Config", {**BASE, "original_max_position_embeddings": 48, "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 48}}),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "eos_token_id": END}),
}  # fmt: skip


def build(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model with random weights large enough that its choices differ from each other; ``changes`` to its
    configuration."""
    kind, arguments = (ARCHITECTURES | CACHE_MODELS)[name]
    torch.manual_seed(seed)
    return randomize(AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments | changes)))


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Give the model random weights large enough that its choices differ from each other, and let it only infer."""
    for parameter in model.eval().requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.15)
    return model


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def start(
    model: PreTrainedModel,
    tokenizer: Any = None,
    bounds: Bounds = Bounds(),  # noqa: B008 - immutable
    clock: Callable[[], float] = time.monotonic,
    **arguments: Any,
) -> Engine:
    """An engine for a model. Tests that speak in token ids need no tokenizer; ``arguments`` are open_runner's."""
    names = arguments.get("names", ())
    return Engine(lambda: LoadedModel(model, tokenizer, open_runner(model, **arguments), names), bounds, clock)


def running(name: str) -> Iterator[tuple[PreTrainedModel, Engine]]:
    """A model of an architecture and its engine, for a fixture to yield from; the engine is stopped after that."""
    model = build(name)
    engine = start(model)
    yield model, engine
    engine.stop()


class Answers:
    """Every stream's replies, and the prediction's counters."""

    def __init__(self, replies: list[Reply], counters: Counters) -> None:
        self.counters = counters
        self.replies: dict[StreamId | None, list[Reply]] = {}
        for reply in replies:
            self.replies.setdefault(reply.stream_id, []).append(reply)

    def tokens(self, stream_id: StreamId = 0) -> list[Token]:
        """The TOKEN replies of a stream that must not have failed."""
        replies = self.replies[stream_id]
        assert all(isinstance(reply, Token) for reply in replies), replies
        return [reply for reply in replies if isinstance(reply, Token)]

    def ids(self, stream_id: StreamId = 0) -> list[int]:
        """The token ids of a stream."""
        return [token.token for token in self.tokens(stream_id)]

    def error(self, stream_id: StreamId = 0) -> str:
        """The error of a stream that must have failed with just one."""
        (reply,) = self.replies[stream_id]
        assert isinstance(reply, Failure), reply
        return reply.error


def begin(engine: Engine, *operations: Operation | Failure) -> Prediction:
    """Begin operations as one prediction."""
    return asyncio.run(engine.predict(operations))


def collect(prediction: Prediction) -> Answers:
    """Wait for all replies of a prediction."""
    return Answers([reply for replies in prediction for reply in replies], prediction.counters)


def answers(engine: Engine, *operations: Operation | Failure) -> Answers:
    """Run operations as one prediction."""
    return collect(begin(engine, *operations))


def own_greedy(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What Transformers' own greedy generate adds to the prompt."""
    with torch.inference_mode():
        generate: Any = model.generate  # typed as a tensor
        output = generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


def own_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """The logits ``[tokens, vocabulary]`` of one plain forward pass."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    return logits.float()
