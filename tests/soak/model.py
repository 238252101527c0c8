"""A tiny random model with a small tokenizer, installed as a user installs one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.server import ROOT
from tests.tiny import build

VOCABULARY = 1000
CONTEXT = 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
"""The last one, of id tests.tiny.END, ends the text."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def tiny_model(context: int = CONTEXT) -> PreTrainedModel:
    """A Llama of 100,000 weights in float32."""
    model = build("llama", vocab_size=VOCABULARY, max_position_embeddings=context)
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[len(SPECIAL) : len(SPECIAL) + 256] *= 0.1  # it seldom chooses single bytes: many are no characters
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on the licence's text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = Decoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(ROOT / "LICENSE")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[-1], chat_template=CHAT_TEMPLATE)


def install(model: PreTrainedModel, directory: Path) -> Path:
    """Save the model and install it with script/download_weights. Returns the weights directory."""
    saved, weights = directory / "saved", directory / "weights"
    model.save_pretrained(saved)
    tokenizer().save_pretrained(saved)
    command = [sys.executable, str(ROOT / "script/download_weights"), str(saved), "--to", str(weights)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return weights
