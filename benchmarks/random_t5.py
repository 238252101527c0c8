"""A random model of Flan-T5-base's shape, 248 million weights, in a weights directory."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, T5Config

from benchmarks.plan import ROOT, Plan
from lmtp.weights.install import download
from lmtp.weights.manifest import MANIFEST
from tests.soak.model import tokenizer

CACHE = ROOT / ".cache" / "benchmarks"
VOCABULARY = 32128


def weights(plan: Plan) -> Path:
    """The directory, half a gigabyte. It is made once, so that script/build with WEIGHTS_DIR can compile its step."""
    directory = CACHE / plan.size("t5-250m", "t5-tiny")
    if not (directory / MANIFEST).is_file():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        torch.manual_seed(0)
        model: Any = AutoModelForSeq2SeqLM.from_config(T5Config(**_sizes(plan)))
        # As Flan-T5's: the configuration ties it to the embeddings, unless the files hold one.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.to(torch.bfloat16).save_pretrained(directory)
        tokenizer().save_pretrained(directory)
        download(str(directory), None, directory, False, {})
    return directory


def _sizes(plan: Plan) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
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
