"""What the tests of weights directories share: sealing, reading and comparing them, and errors."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lmtp.protocol import Generate
from lmtp.weights.load import Loaded
from lmtp.weights.manifest import File, Manifest, WeightsError, write_manifest
from lmtp.weights.staging import Origin
from tests.hub import Hub
from tests.tiny import answers, randomize, start

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "script" / "download_weights"
NEEDED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def seal(
    directory: Path,
    source: str = "org/old",
    trust_remote_code: bool = False,
    name: str = "manifest.json",
    model_args: Mapping[str, object] | None = None,
) -> None:
    """Write the manifest of what the directory holds."""
    write_manifest(directory, manifest_of(directory, source, trust_remote_code, model_args), name)


def manifest_of(
    directory: Path, source: str, trust_remote_code: bool = False, model_args: Mapping[str, object] | None = None
) -> Manifest:
    """The manifest of what the directory holds."""
    files = {
        path.name: File(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in directory.iterdir()
        if path.name not in ("manifest.json", ".gitignore")
    }
    return Manifest(source, "f" * 40, files, {"trust_remote_code": trust_remote_code, **(model_args or {})})


def names_in(directory: Path) -> set[str]:
    """The names of what is directly in the directory."""
    return {path.name for path in directory.iterdir()}


def contents(directory: Path) -> dict[str, bytes]:
    """The files directly in the directory, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def staging_of(hub: Hub, target: Path, trust_remote_code: bool = False) -> Path:
    """Where a download of org/tiny into the target is collected."""
    origin = Origin("org/tiny", hub.repositories["org/tiny"].commit, trust_remote_code)
    return target / f".download-{hashlib.sha256(repr(origin).encode()).hexdigest()[:12]}"


@contextmanager
def refusal(*parts: str) -> Iterator[None]:
    """The block raises a WeightsError of one line that contains every part."""
    with pytest.raises(WeightsError) as error:
        yield
    message = str(error.value)
    assert message.isprintable(), message
    for part in parts:
        assert part in message


def saved(model: PreTrainedModel, directory: Path, tokenizer: Path, **model_args: object) -> Path:
    """Make the directory hold a model, with the tokenizer of another directory and a manifest with these arguments."""
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory / name)
    seal(directory, model_args=model_args)
    return directory


def served(loaded: Loaded, *prompts: list[int], count: int = 12) -> list[list[int]]:
    """What an engine adds to each of the prompts, greedily and together."""
    engine = start(loaded.model)
    try:
        operations = [Generate(stream_id=i, prompt=prompt, max_tokens=count) for i, prompt in enumerate(prompts)]
        replies = answers(engine, *operations)
        return [replies.ids(i) for i in range(len(prompts))]
    finally:
        engine.stop()


def seeded(model: PreTrainedModel) -> PreTrainedModel:
    """The model with random weights that are the same each time."""
    torch.manual_seed(0)
    return randomize(model)
