"""A hub with a tiny model and an adapter, and a models.toml beside which containers are built."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from lmtp.deploy import commands
from lmtp.deploy.commands import Workshop
from tests.hub import Hub, Repository
from tests.tiny import build as tiny_model
from tests.weights.conftest import Download, download, environment, hub, transfers_end
from tests.weights.test_adapters import lora

__all__ = ["download", "environment", "hub", "lora", "transfers_end"]

MODELS = """\
dest_prefix = "r8.im/acct/"

[models.tiny--4bit]
huggingface.repo = "org/tiny"
quantization = "4bit"
hardware = "gpu-t4"
environment.KV_CACHE_GB = 2

[models.tiny--lora]
huggingface.repo = "org/tiny"
adapters = "org/lora"
"""
"""Two variants of one repository."""

Build = Callable[..., str]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What org/tiny holds: a random Llama with a vocabulary of words."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(directory)
    words = ["<eos>", *["the", "capital", "of", "France", "is", "Paris"]]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return directory


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    """A directory with the two variants' models.toml."""
    file = tmp_path / "project" / "models.toml"
    file.parent.mkdir()
    file.write_text(MODELS)
    return Workshop(file)


@pytest.fixture
def repositories(hub: Hub, lora: Path) -> Hub:
    """The hub, which also has org/lora."""
    hub.repositories["org/lora"] = Repository({path.name: path.read_bytes() for path in lora.iterdir()}, "a" * 40)
    return hub


@pytest.fixture
def build(repositories: Hub, download: Download, shop: Workshop, capsys: pytest.CaptureFixture[str]) -> Build:
    """Builds these models, or all; returns what is printed."""

    def run(*names: str, update: bool = False) -> str:
        commands.build(shop, names, update)
        return capsys.readouterr().out

    return run
