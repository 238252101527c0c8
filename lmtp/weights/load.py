"""`weights/`: one model's files and their manifest, and the model and tokenizer read from them, offline.

script/download_weights writes the directory, `load` reads it. Importing this module imports neither torch nor
transformers; `load` does.
"""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "manifest.json"
"""The manifest's name in the weights directory; a directory without it is not loaded."""

STAGING = ".download-"
"""What the name of a directory inside the weights directory begins with while a download is collected in it."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What `load` takes as dtype."""


class WeightsError(Exception):
    """The weights cannot be fetched or loaded as they are; the message says what to do about it."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one file must be: `size` in bytes, `sha256` in hexadecimal."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a model's files came from and what they must be.

    `source` is a Hugging Face repository, an absolute directory, or `demo`; `revision` the repository's commit, the
    demo package's version, or None for a directory. `files` maps names relative to the weights directory. `model_args`
    are passed on to Transformers: `trust_remote_code`.
    """

    source: str
    revision: str | None
    files: dict[str, File]
    model_args: dict[str, bool]

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(file.size for file in self.files.values())


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


def read_manifest(directory: Path) -> Manifest:
    """Read the directory's manifest.

    Raises WeightsError when there is none, naming the command that makes one, or when it cannot be read.
    """
    try:
        content = (directory / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise WeightsError(_why_no_manifest(directory)) from None
    try:
        return msgspec.json.decode(content, type=Manifest)
    except msgspec.DecodeError as error:
        raise WeightsError(
            f"{directory / MANIFEST} is damaged ({error}): delete it and run script/download_weights again."
        ) from None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the directory's manifest, replacing an old one in one step."""
    unfinished = directory / f".{MANIFEST}"
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    unfinished.replace(directory / MANIFEST)


def verify_sizes(directory: Path, manifest: Manifest) -> None:
    """Raise WeightsError naming the first file that is missing or not of its manifest's size. Nothing is hashed."""
    for name, file in manifest.files.items():
        path = directory / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != file.size:
            found = "is missing" if actual is None else f"has {actual:,} bytes"
            raise WeightsError(
                f"{path} {found}, its manifest says {file.size:,} bytes: run `{_fetch_again(directory, manifest)}`."
            )


def load(directory: Path, dtype: str = "auto", device: str | None = None) -> Loaded:
    """Load the directory's model and tokenizer, without network, ready for inference.

    `dtype` is one of DTYPES. `auto` is bfloat16 on CUDA and on processors that compute it in hardware, else float32.
    `device` is what torch takes, such as `cpu` or `cuda:1`; None is the first GPU if there is one, several GPUs if the
    model does not fit on one, else the CPU. Raises WeightsError when the files are missing, are not what the manifest
    says, or make no causal language model, and when the dtype is unknown.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise WeightsError(f"Unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    manifest = read_manifest(directory)
    verify_sizes(directory, manifest)

    # Read when huggingface_hub is imported: no code path of Transformers then asks the hub anything, local_files_only
    # or not.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    number = _auto_dtype(place) if dtype == "auto" else getattr(torch, dtype)
    trusted = manifest.model_args.get("trust_remote_code", False)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=number,
            device_map=_device_map(place, device is not None, number, manifest),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trusted,
            output_loading_info=True,
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:
        raise WeightsError(_why_not_loaded(directory, manifest, error)) from error
    # Transformers fills them with random numbers and goes on.
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(
            f"The files of {manifest.source} in {directory} lack {len(missing)} of the tensors of a "
            f"{type(model).__name__}, {missing[0]} among them: choose a model made for text generation."
        )
    model.eval().requires_grad_(False)
    return Loaded(model, tokenizer, manifest, number, model.device, time.perf_counter() - started)


def _auto_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16 where it is computed in hardware, else float32."""
    import torch

    # The processor flags: AMX and AVX-512 on x86, and ARM's extension.
    processor = torch.cpu.get_capabilities()
    if device.type == "cuda" or any(processor.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16")):
        return torch.bfloat16
    return torch.float32


def _device_map(
    device: torch.device, chosen: bool, dtype: torch.dtype, manifest: Manifest
) -> dict[str, torch.device] | str | None:
    """Where Transformers puts the model's layers: None is the CPU, without accelerate's hooks.

    A device that the caller has `chosen` gets the whole model.
    """
    import torch

    if device.type != "cuda":
        return None
    stored = sum(file.size for name, file in manifest.files.items() if name.endswith(".safetensors"))
    # Files hold 16 bits a weight or fewer, as a rule; a fifth of the memory is left for keys, values and activations.
    needed = stored * 2 if dtype == torch.float32 else stored
    free, _ = torch.cuda.mem_get_info(device)
    return {"": device} if chosen or needed < 0.8 * free else "auto"


def _fetch_again(directory: Path, manifest: Manifest, *options: str) -> str:
    """The command that fetches the manifest's files once more, with further options."""
    if manifest.revision is not None and manifest.source != "demo":
        options = ("--revision", manifest.revision, *options)
    if manifest.model_args.get("trust_remote_code"):
        options = (*options, "--trust-remote-code")
    return _download_command(directory, manifest.source, *options)


def _download_command(directory: Path, source: str, *options: str) -> str:
    # The project's own directory, which the script takes for granted, has this name in the container too.
    target = () if directory.name == "weights" else ("--to", str(directory))
    return shlex.join(["script/download_weights", source, *options, *target])


def _why_no_manifest(directory: Path) -> str:
    if any(directory.glob(f"{STAGING}*/{MANIFEST}")):
        return f"{directory} is half exchanged for other weights: run script/download_weights again to finish."
    if (directory / "config.json").exists():
        command = _download_command(directory, str(directory))
        return f"{directory} holds a model but no {MANIFEST}: run `{command}` to write it."
    return f"No weights in {directory}: run `{_download_command(directory, 'demo')}` (or `make weights`) first."


def _why_not_loaded(directory: Path, manifest: Manifest, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        command = _fetch_again(directory, manifest, "--trust-remote-code")
        return f"{manifest.source} runs code of its own: if you trust it, run `{command}`."
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"Transformers cannot load {manifest.source} from {directory}: {reason}"
