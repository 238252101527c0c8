"""How a model will be loaded, decided from its config.json: before the weights are fetched, and again to load them.

Whatever cannot be loaded is refused here, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtp.weights import arguments, quantization
from lmtp.weights.kinds import Kind, kind_of, refuse_without_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Plan:
    """What to load, and how."""

    kind: Kind
    config: PreTrainedConfig
    quantization: Mapping[str, Any] | None
    """The checkpoint's own `quantization_config`; None if its weights are plain numbers."""
    load_in: str | None
    """One of quantization.LOAD_IN to quantize the weights while they are loaded."""
    keywords: dict[str, Any]
    """What `from_pretrained` takes besides, but for dtype and device."""

    @property
    def quantized(self) -> bool:
        """Whether the loaded weights are: an adapter is then added to them in each step."""
        stored = self.quantization and quantization.format_of(self.quantization) not in quantization.DEQUANTIZED
        return bool(stored or self.load_in or "quantization_config" in self.keywords)


def quantizes(model_args: Mapping[str, Any]) -> bool:
    """Whether the arguments alone make `Plan.quantized` true."""
    return bool(model_args.get("load_in") or "quantization_config" in model_args)


def plan_without_code(directory: Path, model_args: Mapping[str, Any], source: str, with_code: str) -> Plan | None:
    """`plan_of`, without running code of the model; None if the arguments trust its code and only that can tell."""
    if model_args["trust_remote_code"] and b'"auto_map"' in (directory / "config.json").read_bytes():
        return None
    return plan_of(directory, model_args, source, with_code)


def plan_of(directory: Path, model_args: Mapping[str, Any], source: str, with_code: str) -> Plan:
    """Decide from the directory's config.json. No other file of the model has to be there.

    ``with_code`` is the command that fetches the model with its own code, for the error if it needs that. Raises
    WeightsError if the model is no language model, if a package is missing that its quantization needs, or
    if an argument is unknown.
    """
    config = arguments.configuration(directory, model_args, source, with_code)
    kind = kind_of(config, source)
    if kind in (Kind.CAUSAL, Kind.MULTIMODAL):
        refuse_without_text(kind, config, source)
    stored = getattr(config, "quantization_config", None)
    stored = stored or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    quantization.check(stored, model_args, source)
    keywords = {name: value for name, value in model_args.items() if name in arguments.KEYWORDS and name not in PLACED}
    return Plan(kind, config, stored, model_args.get("load_in"), keywords)


PLACED = ("dtype", "device_map")
"""Arguments that the loader decides together with the server's own settings."""
