"""An adapter: a small change to a model's weights, trained apart from it (LoRA and its relatives, as peft stores them).

Its two files lie in the folder `adapter/` of the weights directory and obey the rules of a model's own files.
"""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lmtp.weights.manifest import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "adapter"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)

MERGEABLE = ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "VERA", "FOURIERFT", "HRA", "RANDLORA")
"""The kinds of adapters whose change can be added to the weights."""

MAX_CONFIG_BYTES = 1_000_000


class AdapterFound(Exception):
    """The source of a model is an adapter, or has one beside the model.

    `base` is the model that the adapter names, `revision` the one it names; None if the model is beside it.
    """

    def __init__(self, base: str | None, revision: str | None) -> None:
        super().__init__(base, revision)
        self.base = base
        self.revision = revision


def read_config(path: Path, source: str) -> dict[str, Any]:
    """The adapter's configuration. Raises WeightsError if it cannot be merged, or if peft is not installed."""
    config = _parsed(path, source)
    kind = config.get("peft_type")
    if kind not in MERGEABLE:
        raise WeightsError(
            f"{source} is an adapter of type {ascii(kind)[:40]}, which cannot be merged: choose one of"
            f" {', '.join(MERGEABLE)}."
        )
    if config.get("megatron_config"):  # peft would import a module that this file names
        raise WeightsError(f"{source} is an adapter for Megatron: choose one for Transformers.")
    if util.find_spec("peft") is None:
        raise WeightsError(
            f"{source} needs peft==0.21.2 (adapter), which is not installed: run `python -m pip install -r"
            " requirements/peft.txt`, and add the same to requirements.txt for the image."
        )
    return config


def _parsed(path: Path, source: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is too large")
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise WeightsError(f"{source} has a malformed {CONFIG}: {ascii(str(error))[:100]}.") from None


def raise_found(model_beside: bool, path: Path, source: str) -> NoReturn:
    """Raise AdapterFound, with the base that the adapter's configuration names where no model is beside it.

    Raises WeightsError if it names none.
    """
    if model_beside:
        raise AdapterFound(None, None)
    config = _parsed(path, source)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise WeightsError(
            f"{source} is no Transformers model: it has no config.json, and its {CONFIG} names no base model; name the"
            f" model, and give --adapter {source}."
        )
    raise AdapterFound(base, revision if isinstance(revision, str) else None)


def apply(model: PreTrainedModel, folder: Path, quantized: bool, source: str) -> PreTrainedModel:
    """The model with the folder's adapter merged into its weights.

    Over quantized weights the adapter stays beside them and is added in each step: merged, it would be rounded. Raises
    WeightsError if the adapter does not fit the model.
    """
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        adapted = PeftModel(model, config)
        loaded = adapted.load_adapter(str(folder), "default", torch_device=str(model.device))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise WeightsError(f"The adapter {source} does not fit the model: {first}") from error
    # peft leaves what does not match as it was initialized, and carries on.
    wrong = sorted(loaded.missing_keys) + sorted(loaded.unexpected_keys)
    if wrong:
        raise WeightsError(
            f"The adapter {source} does not fit the model: {len(wrong)} tensors differ, {wrong[0][:200]} among them;"
            " choose the model that it was trained for."
        )
    merged: Any = adapted.get_base_model() if quantized else adapted.merge_and_unload(safe_merge=True)
    return merged.eval().requires_grad_(False)
