"""Settings from environment variables. The README lists them."""

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILE_CHOICES = ("auto", "off")


class SettingsError(ValueError):
    """An environment variable has an invalid value. The message names the variable and the valid values."""


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


def read() -> Settings:
    """Read the settings of this process. Raises SettingsError."""
    compile_ = os.environ.get("COMPILE") or "auto"
    if compile_ not in COMPILE_CHOICES:
        raise SettingsError(f"COMPILE is {compile_!r}; use one of {', '.join(COMPILE_CHOICES)}.")
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
        raise SettingsError(f"{name} is {value!r}; use a number of gigabytes above 0, such as 4 or 0.5.")
    return int(number * 2**30)
