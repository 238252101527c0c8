"""Weights of fewer bits: quantized while they are loaded, or by whoever made the checkpoint.

Formats need packages that the base image does not have. What is missing is found from config.json, before the weights
are fetched. Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtp.weights.manifest import WeightsError

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

DEQUANTIZED = ("fp8", "mxfp8", "mxfp4")
"""Checkpoints that are loaded as 16 bits a weight: their kernels come from the hub when they first run."""

SERVED_AS_THEY_ARE = ("bitnet",)
"""Formats that Transformers computes by itself."""

LOAD_IN = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
"""What `--load-in` takes, and the format of each."""

BITS = {"4bit": 4.5, "8bit": 8, "int8": 8, "fp8": 8}
"""Bits a weight, with scales; an estimate from above."""


def check(quantization: Mapping[str, Any] | None, load_in: str | None, source: str) -> None:
    """Raise WeightsError if the source cannot be loaded with this `quantization_config` of its config.json, or cannot
    be quantized by `load_in`."""
    stored = format_of(quantization) if quantization else None
    if stored and load_in:
        raise WeightsError(f"{source} is quantized already ({stored}): leave out --load-in.")
    if stored and stored not in (*REQUIREMENTS, *DEQUANTIZED, *SERVED_AS_THEY_ARE):
        raise WeightsError(
            f"{source} is quantized by {stored!a:.40}, which is not loaded: choose one of {', '.join(REQUIREMENTS)}, or"
            " the original and --load-in."
        )
    if load_in:
        stored = LOAD_IN[load_in]
    if stored in REQUIREMENTS and (missing := _missing(REQUIREMENTS[stored])):
        tested = "==" in REQUIREMENTS[stored]
        what = f"-r requirements/{stored}.txt" if tested else " ".join(f"'{name}'" for name in missing)
        raise WeightsError(
            f"{source} needs {' and '.join(missing)} ({stored}), which {'is' if len(missing) == 1 else 'are'} not"
            f" installed: run `python -m pip install {what}`, and add the same to requirements.txt for the image."
        )


def format_of(quantization: Mapping[str, Any]) -> str:
    """The format that a `quantization_config` names; Transformers' older bitsandbytes checkpoints name none."""
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    return str(quantization.get("quant_method") or "an unnamed method")


def arguments(quantization: Mapping[str, Any] | None, load_in: str | None) -> dict[str, Any]:
    """What Transformers' `from_pretrained` takes besides for a checkpoint quantized so, or to quantize one."""
    if quantization and format_of(quantization) in DEQUANTIZED:
        return {"quantization_config": _dequantized(format_of(quantization))}
    return {"quantization_config": _CONFIGS[load_in]()} if load_in else {}


def check_device(load_in: str | None, device: torch.device) -> None:
    """Raise WeightsError if the device does not compute this format."""
    import torch

    if load_in == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise WeightsError(
            "fp8 needs a GPU of compute capability 8.9 or higher, such as an L4 or H100: fetch the model again with"
            " --load-in int8."
        )


def _missing(requirements: str) -> list[str]:
    missing = []
    for requirement in requirements.split(", "):
        name, least = re.split("[=>]=|$", requirement, maxsplit=1)
        try:
            installed = metadata.version(name)
            if ">=" in requirement and _release(installed) < _release(least):
                missing.append(requirement)
        except metadata.PackageNotFoundError:
            missing.append(requirement)
    return missing


def _release(version: str) -> tuple[int, ...]:
    from packaging.version import Version

    return Version(version).release


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
    unpacked = {"mxfp4": 2 * dtype_bytes, "fp8": dtype_bytes, "mxfp8": dtype_bytes}
    packed = unpacked.get(format_of(quantization), 1) if quantization else 1
    total = 0.0
    for path in paths:
        for name, tensor in _header(path).items():
            if name == "__metadata__":
                continue
            numbers, kind = math.prod(tensor["shape"]), tensor["dtype"]
            matrix = len(tensor["shape"]) == 2 and name.endswith(".weight")
            if load_in and matrix and not any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
                total += numbers * BITS[load_in] / 8
            elif kind in ("F64", "F32", "F16", "BF16"):
                total += numbers * dtype_bytes
            else:
                total += numbers * packed * _STORED_BITS.get(kind, 8) / 8
    return math.ceil(total)


def _header(path: Path) -> dict[str, Any]:
    """A safetensors file's table of tensors. https://huggingface.co/docs/safetensors, Format."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        table: dict[str, Any] = json.loads(file.read(size))
    return table
