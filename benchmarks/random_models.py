"""Random models of the shapes that rows need, each in a weights directory.

They are made once: a T5 of Flan-T5-base's shape, 248 million weights, and the demo model with heads that two can share.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, PreTrainedModel, T5Config

from benchmarks.plan import ROOT, Plan
from benchmarks.prompts import VOCABULARY
from lmtp.weights.install import download
from lmtp.weights.manifest import MANIFEST
from tests.soak.model import tokenizer

CACHE = ROOT / ".cache" / "benchmarks"
T5_VOCABULARY = 32128


def t5(plan: Plan) -> Path:
    """The T5's directory, half a gigabyte. script/build with WEIGHTS_DIR can compile its step."""

    def make() -> PreTrainedModel:
        model: Any = AutoModelForSeq2SeqLM.from_config(T5Config(**_t5_sizes(plan)))
        # As Flan-T5's: the configuration ties it to the embeddings, unless the files hold one.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        return model

    return _made_once(plan.size("t5-250m", "t5-tiny"), make)


def llama(plan: Plan) -> Path:
    """The directory of a model of the demo model's shape but for its heads: 12, and 4 for keys and values."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": plan.size(576, 48),
        "intermediate_size": plan.size(1536, 96),
        "num_hidden_layers": plan.size(30, 2),
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig(**sizes)
    return _made_once(plan.size("llama-135m", "llama-tiny"), lambda: AutoModelForCausalLM.from_config(config))


def _made_once(name: str, make: Callable[[], PreTrainedModel]) -> Path:
    directory = CACHE / name
    if not (directory / MANIFEST).is_file():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        torch.manual_seed(0)
        model: Any = make()
        model.to(torch.bfloat16).save_pretrained(directory)
        tokenizer().save_pretrained(directory)
        download(str(directory), None, directory, False, {})
    return directory


def _t5_sizes(plan: Plan) -> dict[str, Any]:
    return {
        "vocab_size": T5_VOCABULARY,
        "d_model": plan.size(768, 64),
        "d_kv": plan.size(64, 16),
        "d_ff": plan.size(2048, 128),
        "num_layers": plan.size(12, 2),
        "num_heads": plan.size(12, 4),
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
