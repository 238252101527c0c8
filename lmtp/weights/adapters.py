"""An adapter: a small change to a model's weights, trained apart from it (LoRA and its relatives, as peft stores them).

Its two files lie in the weights directory and obey the rules of a model's own files: in `adapter/` if it is merged, in
`adapters/NAME/` if it is served beside others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lmtp.weights.manifest import Adapter, WeightsError, first_line, printable
from lmtp.weights.quantization import check_package

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER, FOLDERS = "adapter", "adapters"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)

MERGEABLE = ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "VERA", "FOURIERFT", "HRA", "RANDLORA")
"""The kinds of adapters whose change can be added to the weights."""

UNMERGED = ("LORA", "ADALORA", "IA3", "VERA", "OFT")
"""The kinds that peft adds to quantized weights; it fails on the others, or gives other numbers."""

UNMIXED = (
    "use_dora",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
"""Settings of a LoRA that peft cannot apply to some rows of a batch only."""

INITIAL = (None, True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base's own weights alone."""

MAX_CONFIG_BYTES = 1_000_000


class AdapterFound(Exception):
    """The source of a model is an adapter, or has one beside the model.

    `base` is the model that the adapter names, `revision` the one it names; None if the model is beside it.
    """

    def __init__(self, base: str | None, revision: str | None) -> None:
        super().__init__(base, revision)
        self.base = base
        self.revision = revision


def folder_of(name: str) -> str:
    """The folder of a named adapter's files, in the weights directory."""
    return f"{FOLDERS}/{name}"


def key_of(name: str) -> str:
    """The name by which peft knows the adapter: its modules have no attribute of such a name."""
    return f"-{name}"


def read_config(path: Path, source: str, mixed: bool = False) -> dict[str, Any]:
    """The adapter's configuration. ``mixed``: it is to be served beside others.

    Raises WeightsError if it cannot be merged, or mixed with others, or if peft is not installed.
    """
    config = _parsed(path, source)
    kind = config.get("peft_type")
    if kind not in MERGEABLE:
        raise WeightsError(
            f"{source} is an adapter of type {ascii(kind)[:40]}, which cannot be merged: choose one of"
            f" {', '.join(MERGEABLE)}."
        )
    if config.get("alora_invocation_tokens"):  # peft leaves it out where the caller does not say where it begins
        raise WeightsError(f"{source} is an activated LoRA, which begins within a text: choose one for whole texts.")
    if config.get("layer_replication"):  # the repeated layers share their weights, and would get each other's change
        raise WeightsError(
            f"{source} sets layer_replication, so it cannot be merged: merge it with peft into a checkpoint, and fetch"
            " that."
        )
    if mixed and (why := _why_unmixed(config)):
        raise WeightsError(f"{source} {why}{MERGE_IT.format(source)}")
    if config.get("megatron_config"):  # peft would import a module that this file names
        raise WeightsError(f"{source} is an adapter for Megatron: choose one for Transformers.")
    check_package("adapter", source)
    return config


MERGE_IT = ", which is not served beside other adapters: give --adapter {} without a name, which merges it."


def _why_unmixed(config: Mapping[str, Any]) -> str:
    """What keeps an adapter from being applied to some rows of a batch only; empty if nothing does."""
    if config.get("peft_type") != "LORA":
        return f"is an adapter of type {config.get('peft_type')}"
    if used := next((name for name in UNMIXED if config.get(name)), None):
        return f"sets {used}"
    if config.get("bias", "none") != "none":
        return "trains biases"
    initial = config.get("init_lora_weights")
    return "" if initial in INITIAL else f"sets init_lora_weights to {ascii(initial)[:40]}"


def check_tensors(folder: Path, source: str) -> None:
    """Raise WeightsError if the adapter's tensors cannot be mixed with those of others.

    Weights of the model's own would replace them for all streams. Experts see tokens, but not whose they are.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            names = sorted(file.keys())
    except SafetensorError as error:
        raise WeightsError(f"{source} has a malformed {WEIGHTS}: {ascii(str(error))[:100]}.") from None
    if unmixed := next((name for name in names if ".lora_" not in name or ".experts." in name), None):
        raise WeightsError(f"{source} holds {ascii(unmixed)[1:-1]:.99}{MERGE_IT.format(source)}")


def check_quantized(path: Path, source: str) -> None:
    """Raise WeightsError if the adapter, of this configuration, cannot be added to quantized weights in each step."""
    config = _parsed(path, source)
    kind = config.get("peft_type")
    if kind not in UNMERGED or config.get("use_dora"):
        what = "uses DoRA" if kind in UNMERGED else f"is an adapter of type {ascii(kind)[:40]}"
        raise WeightsError(
            f"{source} {what}, which is not added to quantized weights: choose a LoRA, or load the model unquantized."
        )


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
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if quantized:
        check_quantized(folder / CONFIG, source)
    adapted = _load(model, None, folder, "default", source)
    base = adapted.get_base_model()
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    if model.config.get_text_config().tie_word_embeddings and any(
        isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer) for layer in embeddings
    ):
        raise WeightsError(
            f"The adapter {source} changes one of two layers that share their weights, so it cannot be merged: merge it"
            " with peft into a checkpoint with tie_word_embeddings off, and fetch that."
        )
    merged: Any = base if quantized else adapted.merge_and_unload(safe_merge=True)
    return merged.eval().requires_grad_(False)


def attach(model: PreTrainedModel, directory: Path, named: Mapping[str, Adapter]) -> None:
    """Put the adapters of a weights directory beside the model's weights; runners/adapters.py chooses among them.

    Raises WeightsError for one that does not fit the model or cannot be mixed with others.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = None
    for name, adapter in named.items():
        read_config(directory / folder_of(name) / CONFIG, adapter.source, mixed=True)
        adapted = _load(model, adapted, directory / folder_of(name), key_of(name), adapter.source)
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise WeightsError(f"{adapter.source} changes the output layer{MERGE_IT.format(adapter.source)}")
        layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        if not all(isinstance(layer, LoraLayer) and key_of(name) not in layer.lora_variant for layer in layers):
            raise WeightsError(f"{adapter.source} is a LoRA of its own kind{MERGE_IT.format(adapter.source)}")
    model.eval().requires_grad_(False)


def _load(model: PreTrainedModel, adapted: Any, folder: Path, name: str, source: str) -> Any:
    """Add the folder's adapter to the model, which `adapted` wraps if it has adapters already. Returns the wrapper."""
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        if adapted is None:
            adapted = PeftModel(model, config, name)
        loaded = adapted.load_adapter(str(folder), name, torch_device=str(model.device))
    except Exception as error:
        raise WeightsError(f"The adapter {source} does not fit the model: {first_line(error)[:300]}") from error
    # peft leaves what does not match as it was initialized, and carries on.
    wrong = sorted(loaded.missing_keys) + sorted(loaded.unexpected_keys)
    if wrong:
        raise WeightsError(
            f"The adapter {source} does not fit the model: {len(wrong)} tensors differ,"
            f" {printable(wrong[0])[:200]} among them; choose the model that it was trained for."
        )
    return adapted
