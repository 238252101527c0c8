"""A tiny random model with the demo model's tokenizer, installed as a user installs one."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from tests.server import ROOT
from tests.tiny import END, build

VOCABULARY = 49152
CONTEXT = 4096


def tiny_model(context: int = CONTEXT) -> PreTrainedModel:
    """A Llama of 3 million weights in float32."""
    return build("llama", vocab_size=VOCABULARY, max_position_embeddings=context, eos_token_id=END)


def tokenizer_of(demo_weights: Path) -> Any:
    """The demo model's tokenizer, by Transformers alone."""
    return AutoTokenizer.from_pretrained(demo_weights, local_files_only=True)


def install(model: PreTrainedModel, demo_weights: Path, directory: Path) -> Path:
    """Save the model and install it with script/download_weights. Returns the weights directory."""
    saved, weights = directory / "saved", directory / "weights"
    model.save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_weights / name, saved / name)
    command = [sys.executable, str(ROOT / "script/download_weights"), str(saved), "--to", str(weights)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return weights
