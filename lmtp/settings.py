"""What the environment variables of the container say; the README lists them."""

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILE_CHOICES = ("auto", "off")


class SettingsError(ValueError):
    """An environment variable has a value that cannot be used; the message says which and what can."""


@dataclass(frozen=True)
class Settings:
    """One server's settings."""

    weights: Path
    """The directory with the model's files."""
    dtype: str
    """As weights.load takes it."""
    kv_budget: int | None
    """Bytes for keys and values; None for a part of the free memory."""
    compile: bool
    """Whether to use a compiled step that script/build made, or CUDA graphs."""
    compiled: Path
    """The directory of compiled steps."""


def read() -> Settings:
    """The settings of this process. Raises SettingsError."""
    compile_ = os.environ.get("COMPILE") or "auto"
    if compile_ not in COMPILE_CHOICES:
        raise SettingsError(f"COMPILE is {compile_!r}; it can be {', '.join(COMPILE_CHOICES)}.")
    return Settings(
        weights=Path(os.environ.get("WEIGHTS_DIR") or ROOT / "weights"),
        dtype=os.environ.get("DTYPE") or "auto",
        kv_budget=_gigabytes("KV_CACHE_GB"),
        compile=compile_ == "auto",
        compiled=Path(os.environ.get("COMPILED_DIR") or ROOT / "compiled"),
    )


def _gigabytes(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise SettingsError(f"{name} is {value!r}; it has to be a number of gigabytes over 0, such as 4 or 0.5.")
    return int(number * 2**30)
