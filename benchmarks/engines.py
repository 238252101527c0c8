"""The engines that rows compare, each in a process of its own."""

import json
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from runtime import container_environment

from benchmarks import peers
from benchmarks.plan import ROOT, Plan, say
from benchmarks.report import Skipped
from benchmarks.side import Caller, Side, SideError


def our_variables(plan: Plan, root: Path = ROOT) -> dict[str, str]:
    """Environment variables of this project's predictor in a checkout.

    Another checkout uses its own demo model, because manifests change between versions, and ours if it has none.
    """
    manifest = root / "weights" / "manifest.json"
    has_own = root != ROOT and manifest.exists() and json.loads(manifest.read_text()).get("source") == "demo"
    weights = manifest.parent if has_own else plan.weights
    return {**container_environment(root), "WEIGHTS_DIR": str(weights), "DTYPE": plan.dtype}


def our_engine(plan: Plan, stack: ExitStack, endless: bool = True, root: Path = ROOT) -> Side:
    """Start this project's engine, of this checkout or of another one.

    `endless`: no token ends a stream, so that every stream has the requested length.
    """
    own = root / ".venv" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    side = Side("benchmarks.our_side:Engine", our_variables(plan, root), python=python, root=root)
    stack.enter_context(side).make(endless=endless)
    say(f"  engine{'' if root == ROOT else f' of {root}'}: runner", side.call("describe"))
    return side


def transformers(plan: Plan, stack: ExitStack) -> Side:
    """Start Transformers."""
    side = stack.enter_context(Side("benchmarks.transformers_side:Transformers", {"HF_HUB_OFFLINE": "1"}))
    side.make(weights=str(plan.weights), dtype=plan.dtype)
    return side


def vllm(plan: Plan, stack: ExitStack, rows: list[str]) -> Side | Skipped:
    """Start vLLM; or say why the rows that need it are skipped."""
    python = peers.vllm_python()
    if python is None:
        return Skipped(rows, peers.VLLM_HOW_TO)
    say("  starting vLLM, which takes a minute or two")
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    variables["HF_HUB_OFFLINE"] = "1"
    try:
        side = Side("benchmarks.vllm_side:VLLM", variables, python=python)
        stack.enter_context(side).make(weights=str(plan.weights), dtype=plan.dtype)
    except (SideError, OSError) as error:
        say(f"  {error}")
        return Skipped(rows, f"vLLM does not start with {python}. {_last_line(error)}")
    return side


def llama_cpp(plan: Plan, stack: ExitStack, rows: list[str], quantized: bool = False) -> Side | Skipped:
    """Write the model for llama.cpp, in the checkpoint's dtype or in Q8_0; or say why the rows that need it are
    skipped."""
    bench = peers.llama_bench()
    if bench is None:
        return Skipped(rows, peers.LLAMA_HOW_TO)
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="llama.cpp-"))
    side = stack.enter_context(Side("benchmarks.llama_cpp_side:LlamaCpp", {}))
    try:
        side.make(bench=bench, weights=str(plan.weights), quantized=quantized, directory=directory)
    except SideError as error:
        say(f"  {error}")
        return Skipped(rows, f"llama.cpp does not start with LLAMA_BENCH={bench}. {_last_line(error)}")
    return side


def _last_line(error: Exception) -> str:
    """The end of an error: of a traceback, its exception."""
    return str(error).strip().splitlines()[-1]


def run(engine: Caller, operations: list[Any], expected: int | None = None) -> dict[str, Any]:
    """Run one prediction in this project's engine; see our_side.Engine.run for the result."""
    return checked(engine.call("run", predictions=[{"operations": operations}]), expected)


def checked(result: dict[str, Any], expected: int | None) -> dict[str, Any]:
    """The result. Raises RuntimeError if it has another number of tokens than expected."""
    if expected is not None and result["tokens"] != expected:
        raise RuntimeError(f"expected {expected} tokens, got {result['tokens']}")
    return result


def rates(results: Iterable[dict[str, Any]]) -> list[float]:
    """Tokens a second of each result."""
    return [result["tokens"] / result["seconds"] for result in results]


def seconds(results: Iterable[dict[str, Any]]) -> list[float]:
    """Seconds of each result."""
    return [result["seconds"] for result in results]
