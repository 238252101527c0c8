"""Weights of fewer bits: quantized while they are loaded, or by whoever made the checkpoint.

Formats need packages that the base image does not have. What is missing is found from config.json, before the weights
are fetched. Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtp.weights.manifest import WeightsError, printable

if TYPE_CHECKING:
    import torch

REQUIREMENTS = {
    "bitsandbytes": "bitsandbytes==0.50.2",
    "torchao": "torchao==0.18.0",
    "compressed-tensors": "compressed-tensors==0.20.0",
    "gptq": "gptqmodel>=1.4.3, optimum>=1.24.0",
    "awq": "gptqmodel>=1.4.3",
    "auto-round": "auto-round>=0.5.0",
    "aqlm": "aqlm",
    "quanto": "optimum-quanto",
    "hqq": "hqq>=0.2.1",
    "vptq": "vptq>=0.0.4",
    "spqr": "spqr_quant",
    "quark": "amd-quark",
    "sinq": "sinq",
}
"""The packages that a format needs. Those with an exact version are tested, and are in requirements/<format>.txt."""

PEFT = "peft==0.21.2"
"""What adapters need, as in requirements/peft.txt."""

DEQUANTIZED = ("fp8", "mxfp8", "mxfp4")
"""Checkpoints that are loaded as 16 bits a weight: their kernels come from the hub when they first run."""

SERVED_AS_THEY_ARE = ("bitnet",)
"""Formats that Transformers computes by itself."""

LOAD_IN = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
"""What `--load-in` takes, and the format of each."""

BITS = {"4bit": 4.5, "8bit": 8, "int8": 8, "fp8": 8}
"""Bits a weight, with scales; an estimate from above."""


def check(stored: Any, load_in: str | None, source: str, given: Any = None) -> None:
    """Raise WeightsError if the source cannot be loaded quantized so.

    At most one of the three may quantize it: `stored`, the `quantization_config` of its config.json; `load_in`; or
    `given`, the argument `quantization_config`.
    """
    option = "--model-arg quantization_config" if given is not None else "--load-in" if load_in else None
    if load_in and given is not None:
        raise WeightsError(f"--load-in and {option} exclude each other: give one of them.")
    if stored and option:
        raise WeightsError(f"{source} is quantized already ({printable(format_of(stored)):.40}): leave out {option}.")
    if given is not None and format_of(given) not in REQUIREMENTS:
        raise WeightsError(
            f"{option} names {format_of(given)!a:.40}: give a JSON object whose quant_method is one of"
            f" {', '.join(REQUIREMENTS)}, or use --load-in."
        )
    if stored and format_of(stored) not in (*REQUIREMENTS, *DEQUANTIZED, *SERVED_AS_THEY_ARE):
        raise WeightsError(
            f"{source} is quantized by {format_of(stored)!a:.40}, which is not loaded: choose one of"
            f" {', '.join(REQUIREMENTS)}, or the original and --load-in."
        )
    chosen = LOAD_IN[load_in] if load_in else format_of(stored or given) if stored or given else None
    if chosen in REQUIREMENTS:
        require(chosen, source)


def require(name: str, source: str) -> None:
    """Raise WeightsError if a package is missing that the source needs; `name` is a format, or `peft` for adapters."""
    packages = PEFT if name == "peft" else REQUIREMENTS[name]
    if missing := _missing(packages):
        what = f"-r requirements/{name}.txt" if "==" in packages else " ".join(f"'{each}'" for each in missing)
        raise WeightsError(
            f"{source} needs {' and '.join(missing)} ({name}), which {'is' if len(missing) == 1 else 'are'} not"
            f" installed: run `python -m pip install {what}`, and add the same to requirements.txt for the image."
        )


def format_of(quantization: Any) -> str:
    """The format that a `quantization_config` names; Transformers' older bitsandbytes checkpoints name none."""
    if not isinstance(quantization, Mapping):
        return "an unnamed method"
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    return str(quantization.get("quant_method") or "an unnamed method")


def config_for(stored: Mapping[str, Any] | None, load_in: str | None, given: Mapping[str, Any] | None) -> Any:
    """The `quantization_config` that Transformers' `from_pretrained` takes for what `check` has let pass; None if a
    checkpoint is loaded as it is."""
    if stored and format_of(stored) in DEQUANTIZED:
        return _dequantized(format_of(stored))
    return _CONFIGS[load_in]() if load_in else given


def check_device(load_in: str | None, device: torch.device) -> None:
    """Raise WeightsError if the device does not compute this format."""
    import torch

    if load_in == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise WeightsError(
            "fp8 needs a GPU of compute capability 8.9 or higher, such as an L4 or H100: fetch the model again with"
            " --load-in int8."
        )


def _missing(requirements: str) -> list[str]:
    from packaging.requirements import Requirement

    missing = []
    for each in requirements.split(", "):
        wanted = Requirement(each)
        try:
            fits = wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
        except metadata.PackageNotFoundError:
            fits = False
        if not fits:
            missing.append(each)
    return missing


def _dequantized(method: str) -> Any:
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    return Mxfp4Config(dequantize=True) if method == "mxfp4" else FineGrainedFP8Config(dequantize=True)


def _bitsandbytes(bits: int) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    # NF4 with double quantization: Dettmers et al., QLoRA (2023), https://arxiv.org/abs/2305.14314, section 3.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _torchao(name: str) -> Any:
    from torchao import quantization
    from transformers import TorchAoConfig

    if name == "int8":
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    # A scale for each row, so that a text's numbers do not depend on its neighbours in the batch.
    return TorchAoConfig(quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow()))


_CONFIGS: dict[str, Callable[[], Any]] = {
    "4bit": functools.partial(_bitsandbytes, 4),
    "8bit": functools.partial(_bitsandbytes, 8),
    "int8": functools.partial(_torchao, "int8"),
    "fp8": functools.partial(_torchao, "fp8"),
}


_STORED_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16}
"""Bits a number in safetensors; what is not listed has 8, or is packed into bytes."""


def bytes_loaded(
    paths: Iterable[Path], dtype_bytes: int, quantization: Mapping[str, Any] | None, load_in: str | None
) -> int:
    """The memory in bytes that the tensors of these safetensors files take once they are loaded.

    Floating-point tensors become ``dtype_bytes`` a number, or fewer where `load_in` quantizes them: matrices but the
    embeddings and the output layer. Packed tensors stay what they are, unless their format is dequantized.
    """
    from safetensors import safe_open

    unpacked = {"mxfp4": 2 * dtype_bytes, "fp8": dtype_bytes, "mxfp8": dtype_bytes}
    packed = unpacked.get(format_of(quantization), 1) if quantization else 1
    total = 0.0
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_slice(name)
                numbers, kind = math.prod(tensor.get_shape()), tensor.get_dtype()
                matrix = len(tensor.get_shape()) == 2 and name.endswith(".weight")
                if load_in and matrix and not any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
                    total += numbers * BITS[load_in] / 8
                elif kind in ("F64", "F32", "F16", "BF16"):
                    total += numbers * dtype_bytes
                else:
                    total += numbers * packed * _STORED_BITS.get(kind, 8) / 8
    return math.ceil(total)
