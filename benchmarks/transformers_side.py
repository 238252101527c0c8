"""Transformers as a peer: `generate` and a plain forward pass."""

import json
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LogitsProcessor, LogitsProcessorList

from lmtp import protocol
from lmtp.engine.masks import bias_of
from lmtp.protocol import Generate


class Bias(LogitsProcessor):
    """Adds a mask to the logits."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add the mask to the logits ``[rows, vocabulary]``."""
        return scores + self._bias


class Transformers:
    """The model in Transformers. No token ends a sequence."""

    def __init__(self, weights: str, dtype: str) -> None:
        reads = AutoConfig.from_pretrained(weights, local_files_only=True).is_encoder_decoder
        auto: Any = AutoModelForSeq2SeqLM if reads else AutoModelForCausalLM
        self._model: Any = auto.from_pretrained(weights, dtype=getattr(torch, dtype), local_files_only=True).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, float]:
        """Decode greedily, all prompts in one batch and of one length. Returns seconds and new tokens."""
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
            )
        seconds = time.perf_counter() - started
        begun = 1 if self._model.config.is_encoder_decoder else ids.shape[1]
        return {"seconds": seconds, "tokens": output[:, begun:].numel()}

    def one_at_a_time(self, operations: list[Any]) -> dict[str, float]:
        """Run GENERATE operations one after the other. Returns seconds and new tokens."""
        parsed = [each for each in protocol.parse_batch(json.dumps(operations)) if isinstance(each, Generate)]
        if len(parsed) != len(operations):
            raise ValueError("only valid GENERATE operations can run")
        produced = 0
        started = time.perf_counter()
        for operation in parsed:
            ids = torch.tensor([operation.prompt])
            bias = bias_of(operation, self._model.config.vocab_size)
            sampling = {"do_sample": True, "temperature": operation.temperature, "top_k": 0}
            with torch.inference_mode():
                output = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=operation.max_tokens,
                    logits_processor=LogitsProcessorList([Bias(bias)] if bias is not None else []),
                    **(sampling if operation.temperature else {"do_sample": False}),
                )
            produced += output.shape[1] - ids.shape[1]
        return {"seconds": time.perf_counter() - started, "tokens": produced}

    def forward(self, prompt: list[int]) -> float:
        """Seconds of one forward pass with a KV cache, for the logits of the last position."""
        ids = torch.tensor([prompt])
        started = time.perf_counter()
        with torch.inference_mode():
            int(self._model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return time.perf_counter() - started
