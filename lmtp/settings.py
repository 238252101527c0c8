"""Settings from environment variables. The README lists them."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
COMPILE_CHOICES = ("auto", "off")
MAX_PROCESSES = 64
PREFIX_REUSE_CHOICES = ("shared", "salted", "off")


class SettingsError(ValueError):
    """An environment variable has an invalid value. The message names the variable and the valid values."""


@dataclass(frozen=True)
class Bounds:
    """What one caller may take from the others; docs/security.md explains them."""

    prefix_reuse: str = "shared"
    """One of PREFIX_REUSE_CHOICES."""
    max_seconds: float = 600.0
    """The longest that a prediction may take; 0 is no limit."""
    max_unread_seconds: float = 60.0
    """How long a prediction may wait for its output to be taken; 0 is no limit."""
    max_unread_bytes: int = 2**24
    """Replies that a prediction may have waiting, estimated in bytes, before its streams pause; 0 is no limit."""
    max_top_logprobs: int = 100
    """0 is no limit."""
    max_prompt_bytes: int | None = None
    """UTF-8 bytes of one text to tokenize; None is BYTES_PER_TOKEN for each token of the context, 0 is no limit."""
    tokenizer_threads: int = 2


@dataclass(frozen=True)
class Settings:
    """One server's settings."""

    weights: Path
    """The directory that holds the model's files."""
    dtype: str
    """One of weights.load.DTYPES."""
    kv_budget: int | None
    """Bytes for keys and values; None takes a share of the free memory."""
    compile: bool
    """Whether to use a compiled step that script/build made, or CUDA graphs on a GPU."""
    compiled: Path
    """The directory that holds compiled steps."""
    bounds: Bounds
    parallel: int | None = 1
    """How many processes share the model; None: as many as there are GPUs, if one has no room for it."""


def read() -> Settings:
    """Read the settings of this process. Raises SettingsError."""
    gigabytes = _number("KV_CACHE_GB", None, "a number of gigabytes above 0, such as 4 or 0.5", lowest=2.0**-30)
    seconds = "a number of seconds; 0 is no limit"
    count = "a number such as {}; 0 is no limit"
    prompt_bytes = _number("MAX_PROMPT_BYTES", None, count.format(131072))
    return Settings(
        weights=Path(os.environ.get("WEIGHTS_DIR") or ROOT / "weights"),
        dtype=os.environ.get("DTYPE") or "auto",
        kv_budget=None if gigabytes is None else int(gigabytes * 2**30),
        compile=_choice("COMPILE", COMPILE_CHOICES) == "auto",
        compiled=Path(os.environ.get("COMPILED_DIR") or ROOT / "compiled"),
        bounds=Bounds(
            prefix_reuse=_choice("PREFIX_REUSE", PREFIX_REUSE_CHOICES),
            max_seconds=_number("MAX_SECONDS", Bounds.max_seconds, seconds),
            max_unread_seconds=_number("MAX_UNREAD_SECONDS", Bounds.max_unread_seconds, seconds),
            max_unread_bytes=int(
                _number("MAX_UNREAD_MB", Bounds.max_unread_bytes / 2**20, "a number of megabytes; 0 is no limit")
                * 2**20
            ),
            max_top_logprobs=int(_number("MAX_TOP_LOGPROBS", Bounds.max_top_logprobs, count.format(100))),
            max_prompt_bytes=None if prompt_bytes is None else int(prompt_bytes),
            tokenizer_threads=max(int(_number("TOKENIZER_THREADS", Bounds.tokenizer_threads, "a number such as 2")), 1),
        ),
        parallel=_parallel(),
    )


def _parallel() -> int | None:
    value = os.environ.get("PARALLEL") or "off"
    if value in ("off", "auto"):
        return 1 if value == "off" else None
    if not (value.isascii() and value.isdecimal() and 1 <= int(value) <= MAX_PROCESSES):
        raise SettingsError(f"PARALLEL is {value!r}; use off, auto or a number of processes such as 2.")
    return int(value)


def _choice(name: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        raise SettingsError(f"{name} is {value!r}; use one of {', '.join(choices)}.")
    return value


Default = TypeVar("Default", float, None)


def _number(name: str, default: Default, what: str, lowest: float = 0.0) -> float | Default:
    """The variable's number, at least ``lowest``; the default if it is not set."""
    value = os.environ.get(name)
    if not value:
        return default
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not lowest <= number < 2**31:
        raise SettingsError(f"{name} is {value!r}; use {what}.")
    return number
