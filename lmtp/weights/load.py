"""Load a model and its tokenizer from a weights directory, without network.

Importing this module imports neither torch nor transformers; calling `load` does.
"""

from __future__ import annotations

import copy
import glob
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtp.weights import adapters, quantization
from lmtp.weights.arguments import DTYPES
from lmtp.weights.kinds import Kind, auto_class
from lmtp.weights.manifest import Manifest, WeightsError, fetch_command, first_line, read_manifest, verify_sizes
from lmtp.weights.plan import Plan, plan_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


GPUS = "/dev/nvidia[0-9]*"
DRIVER_VERSION = "/sys/module/nvidia/version"


@dataclass(frozen=True)
class Loaded:
    """A model ready for inference, and how it was loaded.

    `dtype` is what it computes in; its weights may have fewer bits. `device` is where the model takes its input;
    `seconds` is the time `load` took, its imports included.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest
    dtype: torch.dtype
    device: torch.device
    seconds: float

    @property
    def rate(self) -> float:
        """Gigabytes of weights in a second."""
        shards = (file.size for name, file in self.manifest.files.items() if name.endswith(".safetensors"))
        return sum(shards) / self.seconds / 1e9


def load(directory: Path, dtype: str = "auto", device: str | None = None, processes: int = 1) -> Loaded:
    """Load the directory's model and tokenizer, without network, ready for inference.

    `dtype` is one of DTYPES. `auto` is what the manifest says; without that bfloat16 on hardware that computes it, else
    float16 on a GPU and float32 on a CPU.
    `device` is what torch takes, such as `cpu` or `cuda:1`. None is the first GPU if there is one, several GPUs if the
    model does not fit on one, else the CPU. With several `processes`, which torch.distributed connects and which all
    call this, each gets its part of the model by Transformers' plan. Raises WeightsError if a GPU cannot be used, if
    the dtype is unknown, if files are missing or differ in size from the manifest, or if they are no model that is
    served.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise WeightsError(f"Unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    manifest = read_manifest(directory)
    verify_sizes(directory, manifest)

    # Set before huggingface_hub is imported, so that no code path of Transformers asks the hub anything.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    plan = read_plan(directory, manifest)
    place = _device(device)
    quantization.check_device(plan.load_in, place)
    number = _dtype(dtype, place, manifest)
    device_map = manifest.model_args.get("device_map") if device is None else None
    placed: dict[str, Any] = {}
    if processes > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        placed["distributed_config"] = DistributedConfig(tp_size=processes, tp_plan="auto")
    else:
        chosen = device is not None
        placed["device_map"] = device_map or _device_map(place, chosen, number, directory, manifest, plan)
    try:
        loaded: Any = auto_class(plan.kind).from_pretrained(
            directory,
            config=plan.config,
            dtype=number,
            **placed,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=manifest.trust_remote_code,
            output_loading_info=True,
            **plan.keywords,
            **quantization.arguments(plan.quantization, plan.load_in),
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=manifest.trust_remote_code
        )
    except Exception as error:
        raise WeightsError(_why_not_loaded(directory, manifest, error)) from error
    # Transformers fills missing tensors with random numbers and carries on.
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(
            f"The files of {manifest.source} in {directory} lack {len(missing)} of the tensors of a "
            f"{type(model).__name__}, {missing[0]} among them: choose a model that was trained and stored as one."
        )
    model.eval().requires_grad_(False)
    if manifest.adapter is not None:
        quantized = bool(plan.load_in or getattr(model, "is_quantized", False))
        model = adapters.apply(model, directory / adapters.FOLDER, quantized, manifest.adapter.source)
    if manifest.adapters:
        adapters.attach(model, directory, manifest.adapters)
    if plan.kind is Kind.MULTIMODAL:
        from lmtp.weights.text_only import keep_text_only

        keep_text_only(model)
    return Loaded(model, tokenizer, manifest, model.dtype, model.device, time.perf_counter() - started)


def read_plan(directory: Path, manifest: Manifest) -> Plan:
    """How the directory's model is loaded. Raises as plan_of."""
    with_code = fetch_command(directory, manifest, "--trust-remote-code")
    return plan_of(directory, manifest.model_args, manifest.source, with_code)


def without_weights(plan: Plan, manifest: Manifest) -> PreTrainedModel:
    """The model's code with tensors that have shapes only. It takes no memory and cannot compute."""
    import torch
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

    with torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights():
        model: PreTrainedModel = auto_class(plan.kind).from_config(
            copy.deepcopy(plan.config), trust_remote_code=manifest.trust_remote_code
        )
    return model


def fits(directory: Path, dtype: str) -> bool:
    """Whether the first GPU has room for the directory's model."""
    manifest = read_manifest(directory)
    place = _device(None)
    number = _dtype(dtype, place, manifest)
    return _device_map(place, False, number, directory, manifest, read_plan(directory, manifest)) != "auto"


def describe(device: torch.device) -> str:
    """The device, for setup's log: of a GPU also its name, its memory and its driver."""
    import torch

    if device.type != "cuda":
        return str(device)
    card = torch.cuda.get_device_properties(device)
    driver = Path(DRIVER_VERSION).read_text().strip() if Path(DRIVER_VERSION).exists() else "unknown"
    return (
        f"{device} ({card.name}, {card.total_memory / 2**30:.0f} GB, "
        f"compute capability {card.major}.{card.minor}, driver {driver})"
    )


def _device(chosen: str | None) -> torch.device:
    """The device that a caller has chosen, or the first GPU, or the CPU.

    Raises WeightsError where there is a GPU that PyTorch cannot use, rather than serve from the CPU unnoticed.
    """
    import torch

    if chosen or torch.cuda.is_available():
        return torch.device(chosen or "cuda")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda and not hidden and glob.glob(GPUS):
        try:
            torch.cuda.init()
            reason = "it is not available"
        except Exception as error:  # a driver too old, for instance
            reason = first_line(error).rstrip(".")
        raise WeightsError(
            f"This machine has an NVIDIA GPU, and PyTorch with CUDA {torch.version.cuda} cannot use it: {reason}."
            " Update its driver, or set CUDA_VISIBLE_DEVICES=-1 to serve from the CPU."
        )
    return torch.device("cpu")


def _dtype(chosen: str, device: torch.device, manifest: Manifest) -> torch.dtype:
    """One of DTYPES as torch's: `auto` is the manifest's."""
    import torch

    if chosen == "auto":
        chosen = manifest.model_args.get("dtype", "auto")
    number: torch.dtype = _auto_dtype(device) if chosen == "auto" else getattr(torch, chosen)
    return number


def _auto_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16 where the hardware computes it; else float16 on a GPU and float32 on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Processor flags: AMX and AVX-512 on x86, and ARM's extension.
    processor = torch.cpu.get_capabilities()
    if any(processor.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16")):
        return torch.bfloat16
    return torch.float32


def _device_map(
    device: torch.device, chosen: bool, dtype: torch.dtype, directory: Path, manifest: Manifest, plan: Plan
) -> dict[str, torch.device] | str | None:
    """Where Transformers puts the model's layers; None is the CPU, without accelerate's hooks.

    A device that the caller has `chosen` gets the whole model.
    """
    import torch

    if device.type != "cuda":
        return None
    shards = [directory / name for name in manifest.files if name.endswith(".safetensors")]
    needed = quantization.bytes_loaded(shards, dtype.itemsize, plan.quantization, plan.load_in)
    free, _ = torch.cuda.mem_get_info(device)
    # A fifth of the memory stays free for keys, values and activations.
    return {"": device} if chosen or needed < 0.8 * free else "auto"


def _why_not_loaded(directory: Path, manifest: Manifest, error: Exception) -> str:
    if "trust_remote_code" in str(error):  # of the tokenizer
        command = fetch_command(directory, manifest, "--trust-remote-code")
        return f"{manifest.source} runs code of its own: if you trust it, run `{command}`."
    return f"Transformers cannot load {manifest.source} from {directory}: {first_line(error)}"
