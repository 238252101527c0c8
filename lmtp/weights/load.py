"""Load a model and its tokenizer from a weights directory, without network.

Importing this module imports neither torch nor transformers; calling `load` does.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtp.weights.manifest import Manifest, WeightsError, fetch_command, read_manifest, verify_sizes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What `load` takes as dtype."""


@dataclass(frozen=True)
class Loaded:
    """A model ready for inference, and how it was loaded.

    `device` is where the model takes its input; `seconds` is the time `load` took, its imports included.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest
    dtype: torch.dtype
    device: torch.device
    seconds: float


def load(directory: Path, dtype: str = "auto", device: str | None = None) -> Loaded:
    """Load the directory's model and tokenizer, without network, ready for inference.

    `dtype` is one of DTYPES. `auto` is bfloat16 on CUDA and on processors that compute it in hardware, else float32.
    `device` is what torch takes, such as `cpu` or `cuda:1`. None is the first GPU if there is one, several GPUs if the
    model does not fit on one, else the CPU. Raises WeightsError if the dtype is unknown, if files are missing or differ
    in size from the manifest, or if they are no causal language model.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise WeightsError(f"Unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    manifest = read_manifest(directory)
    verify_sizes(directory, manifest)

    # Set before huggingface_hub is imported, so that no code path of Transformers asks the hub anything.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    number = _auto_dtype(place) if dtype == "auto" else getattr(torch, dtype)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=number,
            device_map=_device_map(place, device is not None, number, manifest),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=manifest.trust_remote_code,
            output_loading_info=True,
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
            f"{type(model).__name__}, {missing[0]} among them: choose a model made for text generation."
        )
    model.eval().requires_grad_(False)
    return Loaded(model, tokenizer, manifest, number, model.device, time.perf_counter() - started)


def _auto_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16 where the hardware computes it, else float32."""
    import torch

    # Processor flags: AMX and AVX-512 on x86, and ARM's extension.
    processor = torch.cpu.get_capabilities()
    if device.type == "cuda" or any(processor.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16")):
        return torch.bfloat16
    return torch.float32


def _device_map(
    device: torch.device, chosen: bool, dtype: torch.dtype, manifest: Manifest
) -> dict[str, torch.device] | str | None:
    """Where Transformers puts the model's layers; None is the CPU, without accelerate's hooks.

    A device that the caller has `chosen` gets the whole model.
    """
    import torch

    if device.type != "cuda":
        return None
    stored = sum(file.size for name, file in manifest.files.items() if name.endswith(".safetensors"))
    # Most files hold at most 16 bits a weight; a fifth of the memory stays free for keys, values and activations.
    needed = stored * 2 if dtype == torch.float32 else stored
    free, _ = torch.cuda.mem_get_info(device)
    return {"": device} if chosen or needed < 0.8 * free else "auto"


def _why_not_loaded(directory: Path, manifest: Manifest, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        command = fetch_command(directory, manifest, "--trust-remote-code")
        return f"{manifest.source} runs code of its own: if you trust it, run `{command}`."
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"Transformers cannot load {manifest.source} from {directory}: {reason}"
