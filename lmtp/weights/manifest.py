"""The manifest of a weights directory: where a model's files came from and their expected sizes and hashes.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

MANIFEST = "manifest.json"
"""The manifest's file name; a weights directory without it is not loaded."""

STAGING = ".download-"
"""Prefix of the directories inside a weights directory in which new files are collected."""

SEAL = "sealed.json"
"""The manifest of a staging directory whose files are complete and ready to be exchanged in."""


class WeightsError(Exception):
    """The weights cannot be fetched or loaded; the message says what to do about it."""


def printable(text: str) -> str:
    """The text in one line: what a terminal would take for a command is escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def first_line(error: BaseException) -> str:
    """The first line of what a library says, printable, or the error's type if it says nothing."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])


ADAPTER_NAME = re.compile(r"[A-Za-z0-9-]{1,64}", re.ASCII)
"""What an adapter beside a model may be called: no character that a path or a parameter's name has."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one file must be: `size` in bytes, `sha256` in hexadecimal."""

    size: int
    sha256: str


class Adapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an adapter came from: a repository and its commit, or an absolute directory and None."""

    source: str
    revision: str | None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a model's files came from and their expected sizes and hashes.

    `source` is a Hugging Face repository, an absolute directory, or `demo`. `revision` is the repository's commit, the
    demo package's version, or None for a directory. `files` maps names relative to the weights directory. `model_args`
    say how Transformers loads the model: `trust_remote_code`, `load_in` (one of quantization.LOAD_IN), and keywords of
    `from_pretrained`. `adapter` is merged into the weights when they are loaded;
    `adapters` stay beside them, by name, for callers to choose.
    """

    source: str
    revision: str | None
    files: dict[str, File]
    model_args: dict[str, Any]
    adapter: Adapter | None = None
    adapters: dict[str, Adapter] = {}

    def __post_init__(self) -> None:
        for name in self.adapters:
            if not ADAPTER_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of an adapter")
        for name in self.files:
            if PurePosixPath(name).is_absolute() or ".." in name.split("/"):
                raise ValueError(f"{name!r} is outside the weights directory")
        if not isinstance(self.trust_remote_code, bool):
            raise ValueError("trust_remote_code is neither true nor false")

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(file.size for file in self.files.values())

    @property
    def trust_remote_code(self) -> bool:
        """Whether the model's own Python code may run."""
        trusted: bool = self.model_args.get("trust_remote_code", False)
        return trusted


def read_manifest(directory: Path, name: str = MANIFEST) -> Manifest:
    """Read the directory's manifest.

    Raises WeightsError if it is missing, naming the command that makes one, or if it cannot be read.
    """
    try:
        content = (directory / name).read_bytes()
    except FileNotFoundError:
        raise WeightsError(_why_no_manifest(directory)) from None
    try:
        return msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WeightsError(
            f"{directory / name} is damaged ({error}): delete it and run script/download_weights again."
        ) from None


def write_manifest(directory: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Write the directory's manifest; an old one is replaced atomically."""
    unfinished = directory / f".{name}"
    unfinished.unlink(missing_ok=True)  # It may be a symbolic link to somewhere else.
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    unfinished.replace(directory / name)


def verify_sizes(directory: Path, manifest: Manifest) -> None:
    """Raise WeightsError naming the first file that is missing or has the wrong size. Nothing is hashed."""
    for name, file in manifest.files.items():
        path = directory / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != file.size:
            found = "is missing" if actual is None else f"has {actual:,} bytes"
            raise WeightsError(
                f"{path} {found}, its manifest says {file.size:,} bytes: run `{fetch_command(directory, manifest)}`."
            )


def fetch_command(directory: Path, manifest: Manifest, *options: str) -> str:
    """The command that fetches the manifest's files again, with further options."""
    if manifest.revision is not None and manifest.source != "demo":
        options = ("--revision", manifest.revision, *options)
    if manifest.adapter is not None and manifest.adapter.source != manifest.source:
        options = (*options, "--adapter", _written(manifest.adapter))
    for name, adapter in manifest.adapters.items():
        options = (*options, "--adapter", f"{name}={_written(adapter)}")
    return download_command(directory, manifest.source, *options, *_options(manifest.model_args))


def _written(adapter: Adapter) -> str:
    return f"{adapter.source}@{adapter.revision}" if adapter.revision else adapter.source


def _options(model_args: Mapping[str, Any]) -> list[str]:
    """The options of script/download_weights that give these arguments."""
    options = []
    for name, value in model_args.items():
        if name == "trust_remote_code":
            options += ["--trust-remote-code"] if value else []
        elif name == "load_in":
            options += ["--load-in", value]
        else:
            options += ["--model-arg", f"{name}={json.dumps(value)}"]
    return options


def download_command(directory: Path, source: str, *options: str) -> str:
    """The command that fetches the source into the directory."""
    # `weights` is the script's default target, in the container too.
    target = () if directory.name == "weights" else ("--to", str(directory))
    return shlex.join(["script/download_weights", source, *options, *target])


def _why_no_manifest(directory: Path) -> str:
    if any(directory.glob(f"{STAGING}*/{SEAL}")):
        return f"{directory} is half exchanged for other weights: run script/download_weights again to finish."
    if (directory / "config.json").exists():
        command = download_command(directory, str(directory))
        return f"{directory} holds a model but no {MANIFEST}: run `{command}` to write it."
    return f"No weights in {directory}: run `{download_command(directory, 'demo')}` (or `make weights`) first."
