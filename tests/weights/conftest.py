"""A tiny model, weights directories made of it, a hub that has it, and two ways to run a download."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants, file_download
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmtp.weights import install
from tests.hub import Hub, Repository, serving
from tests.weights.helpers import SCRIPT, seal

Download = Callable[..., str]
Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 25 MB with a tokenizer of its own."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50_000,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(special_tokens=["<eos>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["the capital of France is Paris"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return directory


@pytest.fixture
def weights(tiny: Path, tmp_path: Path) -> Path:
    """A weights directory as a download of the tiny model leaves it."""
    directory = tmp_path / "weights"
    shutil.copytree(tiny, directory)
    (directory / ".gitignore").write_text("*\n")
    seal(directory)
    return directory


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    """A hub with org/tiny: the tiny model, and around it what else repositories hold."""
    clutter = {
        "README.md": b"# Tiny",
        "LICENSE": b"Apache-2.0",
        "chat_template.jinja": b"{{ messages[0]['content'] }}",
        "modeling_tiny.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "tiny.Q4_0.gguf": b"gguf",
        "consolidated.safetensors": b"the same again",
        "original/tokenizer.model": b"the same again",
        "onnx/model.onnx": b"onnx",
        ".gitattributes": b"*.bin filter=lfs",
    }
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    with serving(Hub({"org/tiny": Repository(files | clutter)})) as running:
        yield running


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """What a script's process sees: this hub, and nothing of the user's own settings."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PIP_"))}
    return settings | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}


@pytest.fixture
def script(environment: dict[str, str]) -> Script:
    """Runs script/download_weights with these arguments, and these environment variables besides."""

    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Download]:
    """Calls what script/download_weights calls, in this process, against this hub. Returns what it prints."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 1)
    close_session()

    def run(
        source: object,
        to: Path,
        revision: str | None = None,
        trust_remote_code: bool = False,
        adapter: object = None,
        named: dict[str, object] | None = None,
        **model_args: object,
    ) -> str:
        chosen = str(adapter) if adapter else None
        others = {name: str(each) for name, each in (named or {}).items()}
        install.download(str(source), revision, to, trust_remote_code, model_args, chosen, others)
        return capsys.readouterr().out

    yield run
    close_session()


@pytest.fixture(autouse=True)
def transfers_end() -> Iterator[None]:
    """Wait for transfers that a failed download has left behind: huggingface_hub closes the connections of all threads
    when one of them fails."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("fetch"):
            thread.join(60)
