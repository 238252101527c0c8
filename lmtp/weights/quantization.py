"""Weights of fewer bits: quantized while they are loaded, or by whoever made the checkpoint.

Formats need packages that the base image does not have. What is missing is found from config.json, before the weights
are fetched. Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtp.weights.manifest import WeightsError, first_line, printable

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

PACKAGES = {**REQUIREMENTS, "adapter": "peft==0.21.2"}

QUANTIZING = ("bitsandbytes", "torchao", "quanto", "hqq")
"""Formats that quantize a model while it is loaded, without data to measure."""

DEQUANTIZED = ("fp8", "mxfp8", "mxfp4")
"""Checkpoints that are loaded as 16 bits a weight: their kernels come from the hub when they first run."""

SERVED_AS_THEY_ARE = ("bitnet",)
"""Formats that Transformers computes by itself."""

LOAD_IN = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
"""What `--load-in` takes, and the format of each."""

BITS = {"4bit": 4.5, "8bit": 8, "int8": 8, "fp8": 8}
"""Bits a weight, with scales; an estimate from above."""


def check(stored: Mapping[str, Any] | None, model_args: Mapping[str, Any], source: str) -> None:
    """Raise WeightsError if the source cannot be loaded with the `quantization_config` of its config.json, which is
    `stored`, or cannot be quantized as the arguments say: by `load_in`, or by a `quantization_config` of their own."""
    load_in = model_args.get("load_in")
    if load_in not in (None, *LOAD_IN):
        raise WeightsError(f"--load-in is {load_in!r}: choose one of {', '.join(LOAD_IN)}.")
    given = "quantization_config" in model_args
    if load_in and given:
        raise WeightsError("--load-in and --model-arg quantization_config exclude each other: give one of them.")
    if stored and (load_in or given):
        option = "--load-in" if load_in else "--model-arg quantization_config"
        raise WeightsError(f"{source} is quantized already ({printable(format_of(stored))}): leave out {option}.")
    if given:
        check_package(_format_given(model_args["quantization_config"]), source)
        _check_given(model_args["quantization_config"])
    elif load_in:
        check_package(LOAD_IN[load_in], source)
    elif stored:
        method = format_of(stored)
        if method not in (*REQUIREMENTS, *DEQUANTIZED, *SERVED_AS_THEY_ARE):
            raise WeightsError(
                f"{source} is quantized by {method!a:.40}, which is not loaded: choose one of"
                f" {', '.join(REQUIREMENTS)}, or the original and --load-in."
            )
        check_package(method, source)


def _format_given(given: Any) -> str:
    method = format_of(given) if isinstance(given, dict) else None
    if method not in QUANTIZING:
        raise WeightsError(
            f"The argument quantization_config is {ascii(given)[:60]}: give an object whose quant_method is one of"
            f" {', '.join(QUANTIZING)}, the formats that quantize while they load."
        )
    return method


def _check_given(given: dict[str, Any]) -> None:
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        AutoQuantizationConfig.from_dict(dict(given))
    except Exception as error:
        raise WeightsError(
            f"Transformers refuses the argument quantization_config: {first_line(error)[:200]}"
        ) from None


def check_package(purpose: str, source: str) -> None:
    """Raise WeightsError if packages are missing that a format, or `adapter`, needs."""
    requirements = PACKAGES.get(purpose, "")
    if missing := [each for each in filter(None, requirements.split(", ")) if not _installed(each)]:
        file = "peft" if purpose == "adapter" else purpose
        what = f"-r requirements/{file}.txt" if "==" in requirements else " ".join(f"'{name}'" for name in missing)
        raise WeightsError(
            f"{source} needs {' and '.join(missing)} ({purpose}), which {'is' if len(missing) == 1 else 'are'} not"
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


def _installed(requirement: str) -> bool:
    """Whether the package is installed in a version that the requirement allows."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        return wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


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
        for name, shape, kind in _tensors(path):
            numbers = math.prod(shape)
            matrix = len(shape) == 2 and name.endswith(".weight")
            if load_in and matrix and not any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
                total += numbers * BITS[load_in] / 8
            elif kind in ("F64", "F32", "F16", "BF16"):
                total += numbers * dtype_bytes
            else:
                total += numbers * packed * _STORED_BITS.get(kind, 8) / 8
    return math.ceil(total)


def _tensors(path: Path) -> Iterator[tuple[str, list[int], str]]:
    """Name, shape and dtype of each tensor of a safetensors file. Raises WeightsError if it is malformed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_slice(name)
                yield name, tensor.get_shape(), tensor.get_dtype()
    except SafetensorError as error:
        raise WeightsError(f"{path} is malformed: {first_line(error)[:200]}.") from None
