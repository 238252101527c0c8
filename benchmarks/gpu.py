"""What a GPU does: `script/benchmark --gpu`. Each part is written once it is done, so that a cut run still reports.

The models are Llama's code with random weights, made on the spot.
"""

import asyncio
import contextlib
import functools
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks import gpu_report, prompts
from benchmarks.plan import ROOT, say
from lmtp.engine.engine import Engine, LoadedModel
from lmtp.protocol import Failure, Generate, Score
from lmtp.runners.flash import Pass, Rows
from lmtp.runners.model import limits_of
from lmtp.runners.runner import Runner, open_runner
from lmtp.runners.step import Step, Stream
from lmtp.weights.load import describe, load
from lmtp.weights.manifest import MANIFEST

TESTS = ("tests/runners/test_gpu.py",)
SIZES = {
    "135M": (576, 30, 9, 3, 1536, 49152),
    "1B": (2048, 16, 32, 8, 8192, 128256),
    "8B": (4096, 32, 32, 8, 14336, 128256),
}
"""Hidden size, layers, heads, key heads, MLP size, vocabulary."""
TINY = {"tiny": (64, 2, 4, 2, 128, 512)}
DECODED = ((1, 128), (8, 128), (64, 128), (1, 4000), (64, 4000))
"""Rows and columns."""
PARTS = ("setup", "decode", "prefill", "score", "engine", "generate", "continuous batching", "syncs", "vLLM")
WHOLE = ("tests", "loading", "grammar", "attention")
"""Parts of the model in weights/, or of none."""
NO_GPU = "not measured: there is no GPU"
WEIGHTS = ROOT / "weights"
NO_MODEL = "not measured: there is no model in weights/"
NO_VLLM = "not measured: vLLM is not installed"
VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
directory, prompts = json.load(sys.stdin)
model = LLM(model=directory, skip_tokenizer_init=True, dtype="bfloat16", enable_prefix_caching=False)
asked = [{"prompt_token_ids": prompt} for prompt in prompts]
model.generate(asked[:1], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False))
settings = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True, detokenize=False)
started = time.perf_counter()
answers = model.generate(asked, settings)
print(sum(len(each.outputs[0].token_ids) for each in answers) / (time.perf_counter() - started))
"""
"""In a process of its own, whose memory is free again when it ends."""

Part = Callable[[], Any]


def main(directory: Path, quick: bool = False, device: str | None = None) -> int:
    """Measure every part on a GPU, or on ``device``, and write the results into the directory. ``quick``: tiny sizes.

    Returns 1 if a part failed. Without a GPU nothing is measured or written.
    """
    sizes: Mapping[str, tuple[int, ...]] = TINY if quick else SIZES
    if not device and not torch.cuda.is_available():
        for name in (*WHOLE, *(f"{part} {size}" for size in sizes for part in PARTS)):
            print(f"{name}: {NO_GPU}")
        return 0
    place = torch.device(device or "cuda")
    found: dict[str, Any] = {"machine": describe(place), "torch": torch.__version__}
    if place.type == "cuda":
        found["GB/s of a copy"] = _bandwidth(place, 2**30) / 1e9
    card = torch.cuda.get_device_name(place) if place.type == "cuda" else str(place)
    path = directory / f"{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    directory.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, part in _parts(place, sizes, quick):
        started = time.monotonic()
        try:
            found[name] = part()
        except Exception as error:
            traceback.print_exc()
            found[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
            failed = 1
        say(f"{name}: {json.dumps(found[name])} ({time.monotonic() - started:.0f} s)")
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(gpu_report.page(found), encoding="utf-8")
    print(f"written: {path}")
    return failed


def _parts(place: torch.device, sizes: Mapping[str, tuple[int, ...]], quick: bool) -> Iterator[tuple[str, Part]]:
    if not quick:
        yield "tests", _tests
        yield "loading", functools.partial(_loading, place)
        yield "grammar", functools.partial(_grammar, place)
        yield "attention", functools.partial(_attention, place)
    for name, size in sizes.items():
        model = Model(size, place, quick)
        yield f"setup {name}", model.setup
        for rows, columns in DECODED[: 2 if quick else None]:
            yield f"decode {name} {rows}x{columns}", functools.partial(model.decode, rows, columns)
        yield f"prefill {name}", model.prefill
        yield f"score {name}", model.score
        for rows in (1, 8, 64)[: 2 if quick else None]:
            yield f"engine {name} {rows}", functools.partial(model.serve, rows)
            yield f"generate {name} {rows}", functools.partial(model.generate, rows)
        yield f"syncs {name}", model.syncs
        yield f"continuous batching {name}", model.continuous_batching
        model.close()
        yield f"vLLM {name}", functools.partial(_vllm, size, place)


def _tests() -> str:
    """The last line of the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", *TESTS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # for the small models on the CPU
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = (run.stdout.strip().splitlines() or [run.stderr[-200:]])[-1]
    if run.returncode:
        raise RuntimeError(last)
    return last


def _loading(place: torch.device) -> dict[str, float] | str:
    """Seconds and GB a second for the model in weights/."""
    if not (WEIGHTS / MANIFEST).exists():
        return NO_MODEL
    loaded = load(WEIGHTS, device=str(place))
    return {"seconds": round(loaded.seconds, 2), "GB/s": round(loaded.rate, 2)}


def _grammar(place: torch.device, directory: Path = WEIGHTS, length: int = 128) -> dict[str, float] | str:
    """Tokens a second of eight rows of the model in weights/: alone, and under grammars that force no token. One counts
    letters: llguidance computes its masks anew for every token."""
    if not (directory / MANIFEST).exists():
        return NO_MODEL
    loaded = load(directory, device=str(place))
    engine = Engine(lambda: LoadedModel(loaded.model, loaded.tokenizer, open_runner(loaded.model)))
    found = {}
    constraints: dict[str, dict[str, Any]] = {
        "no grammar": {},
        "grammar": {"regex": "[a-z ]+"},
        "grammar that counts": {"regex": f"[a-z ]{{{20 * length},}}"},
    }
    try:
        for name, constraint in constraints.items():
            settings: dict[str, Any] = {"max_tokens": length, "min_tokens": length, **constraint}
            operations = [
                Generate(stream_id=i, prompt=prompts.tokens(128, "grammar", name, i), **settings) for i in range(8)
            ]
            _answer(engine, [Generate(stream_id=0, prompt=[1000], max_tokens=1, **constraint)])  # compiles it
            tokens, seconds = _answer(engine, operations)
            found[name] = tokens / seconds
    finally:
        engine.stop()
    return found


@torch.inference_mode()
def _attention(place: torch.device) -> dict[str, dict[str, float]]:
    """Microseconds of one layer's attention of a decode step over 4,000 columns, in a graph, and what reading them
    takes at least: for heads in groups of four and without groups, and with a window of 512."""
    size, columns, found = 128, 4000, {}
    for rows, key_heads, window in ((1, 8, 0), (64, 8, 0), (1, 32, 0), (4, 32, 0), (1, 8, 512), (64, 8, 512)):
        read = 4 * rows * min(columns, window or columns) * key_heads * size
        layers = max(2, 2**28 // read)  # what they read all together fits into no cache
        shape = (2, layers, rows * columns, key_heads, size)
        keys, values = torch.randn(shape, device=place, dtype=torch.bfloat16)
        query = torch.randn(rows, 32, size, device=place, dtype=torch.bfloat16)
        numbers = torch.arange(rows + 1, device=place, dtype=torch.int32)
        packed = Rows(numbers, numbers * columns, torch.full_like(numbers[1:], columns), 1, 4096)
        step = functools.partial(_layers, packed, window, query, keys, values)
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        _wait(place)
        started = time.perf_counter()
        for _ in range(5):
            graph.replay()
        _wait(place)
        seconds = (time.perf_counter() - started) / 5 / layers
        floor = read / _bandwidth(place, 2**30)
        name = f"{rows}x{columns}, {key_heads} key heads" + (f", window {window}" if window else "")
        found[name] = {"us": seconds * 1e6, "floor us": floor * 1e6, "of the floor": floor / seconds}
        del keys, values, graph, step
    return found


def _layers(rows: Rows, window: int, query: Tensor, keys: Tensor, values: Tensor) -> None:
    one = Pass(rows, {}, ())
    for key, value in zip(keys, values, strict=True):
        one.flash(query, key, value, window, 128**-0.5)


def _bandwidth(place: torch.device, size: int) -> float:
    """Bytes a second that a copy of so many bytes reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    target.copy_(source)
    _wait(place)
    started = time.perf_counter()
    for _ in range(8):
        target.copy_(source)
    _wait(place)
    return 16 * size / (time.perf_counter() - started)


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()


def _vllm(size: tuple[int, ...], place: torch.device) -> float | str:
    """Tokens a second of vLLM for what `Model.serve` asks with 64 rows."""
    if place.type != "cuda":
        return NO_GPU
    if importlib.util.find_spec("vllm") is None:
        return NO_VLLM
    with tempfile.TemporaryDirectory() as directory:
        _random_model(size, torch.device("cpu")).save_pretrained(directory)
        asked = [[token % size[5] for token in prompts.tokens(128, "gpu", "serve", 64, i)] for i in range(64)]
        run = subprocess.run(
            [sys.executable, "-c", VLLM], input=json.dumps([directory, asked]), capture_output=True, text=True
        )
    if run.returncode:
        raise RuntimeError(run.stderr[-200:])
    return float(run.stdout.split()[-1])


def _answer(engine: Engine, operations: list[Any]) -> tuple[int, float]:
    """Tokens and seconds of a prediction. Raises RuntimeError for a stream that fails."""
    started = time.perf_counter()
    replies = [reply for some in asyncio.run(engine.predict(operations)) for reply in some]
    if failures := [reply.error for reply in replies if isinstance(reply, Failure)]:
        raise RuntimeError(failures[0])
    return len(replies), time.perf_counter() - started


class Model:
    """A random model, its engine, and what can be measured of them."""

    def __init__(self, size: tuple[int, ...], place: torch.device, quick: bool) -> None:
        self._size, self._place, self._quick = size, place, quick
        self._vocabulary = size[5]
        self._model: PreTrainedModel
        self._runner: Runner

    def setup(self) -> dict[str, Any]:
        """Make the model and open its runner."""
        self._model = _random_model(self._size, self._place)
        started = time.perf_counter()
        runner = self._runner = open_runner(self._model)
        return {"runner": runner.description, "reason": runner.reason, "seconds": time.perf_counter() - started}

    def close(self) -> None:
        """Free the memory."""
        self._free()
        self.__dict__.pop("_model", None)
        _collect()

    def _free(self) -> None:
        """End the engine, and free the runner's memory."""
        if "_engine" in self.__dict__:
            self._engine.stop()
        for name in ("_engine", "_runner"):
            self.__dict__.pop(name, None)
        _collect()

    @torch.inference_mode()
    def decode(self, rows: int, columns: int) -> dict[str, float]:
        """Median milliseconds of a step of the model alone, and what reading what it reads takes at least."""
        runner, steps = self._runner, 4 if self._quick else 32
        columns = min(columns, 32) if self._quick else columns
        seconds = []
        with self._admitted(rows, columns, steps) as streams:
            for _ in range(steps):
                started = time.perf_counter()
                runner.prepare(Step(streams, [1] * rows))()
                _wait(self._place)
                seconds.append(time.perf_counter() - started)
                for stream in streams:
                    stream.computed += 1
                    stream.tokens.append(7)
        config: Any = self._model.config
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        parameters: dict[int, Tensor] = {id(p): p for p in self._model.parameters()}
        if not config.tie_word_embeddings:
            del parameters[id(self._model.get_input_embeddings().weight)]  # only the rows of the step's tokens are read
        numbers = sum(p.numel() for p in parameters.values()) + rows * columns * per_token
        floor = numbers * self._model.dtype.itemsize / self._bandwidth
        return {"ms": median(seconds) * 1e3, "floor ms": floor * 1e3, "of the floor": floor / median(seconds)}

    @torch.inference_mode()
    def prefill(self) -> float:
        """Tokens a second of one long prompt."""
        columns = 64 if self._quick else 8000
        started = time.perf_counter()
        with self._admitted(1, columns, 1):
            _wait(self._place)
            return columns / (time.perf_counter() - started)

    def score(self) -> float:
        """Seconds for 16 scores of five tokens after one prompt."""
        (prompt,) = self._prompts(1, 64 if self._quick else 500, "score")
        scores = [Score(stream_id=i, prompt=prompt, scored=self._prompts(1, 5, i)[0]) for i in range(16)]
        return _answer(self._engine, scores)[1]

    def serve(self, rows: int, salt: str = "serve") -> float:
        """Tokens a second of the engine, greedy, for prompts of its own."""
        length = 8 if self._quick else 128
        batch = self._prompts(rows, 32 if self._quick else 128, salt, rows)
        tokens, seconds = _answer(
            self._engine,
            [Generate(stream_id=i, prompt=prompt, max_tokens=length) for i, prompt in enumerate(batch)],
        )
        return tokens / seconds

    @torch.inference_mode()
    def generate(self, rows: int) -> float:
        """Tokens a second of Transformers' generate."""
        length = 8 if self._quick else 128
        ids = torch.tensor(self._prompts(rows, 32 if self._quick else 128, "serve", rows), device=self._place)
        generate: Any = self._model.generate
        arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        generate(ids, max_new_tokens=2, **arguments)
        _wait(self._place)
        started = time.perf_counter()
        generate(ids, max_new_tokens=length, min_new_tokens=length, **arguments)
        _wait(self._place)
        return rows * length / (time.perf_counter() - started)

    def continuous_batching(self) -> float | str:
        """Tokens a second of Transformers' continuous batching, 64 rows, once it is warm, with the runner's memory.

        It has PyTorch's own attention: its faster ones are packages or come from the hub.
        """
        if self._place.type != "cuda":
            return NO_GPU
        self._free()
        model: Any = self._model
        config = model.generation_config
        config.max_new_tokens, config.do_sample = 128, False
        try:
            for salt in ("warm", "serve"):
                batch = self._prompts(64, 128, salt, 64)
                started = time.perf_counter()
                answers = model.generate_batch(inputs=batch, generation_config=config, persistent_manager=True)
                seconds = time.perf_counter() - started
        finally:
            model.destroy_cached_continuous_batching_manager()
        return sum(len(each.generated_tokens) for each in answers.values()) / seconds

    def syncs(self) -> dict[str, int] | str:
        """What waits for the device in a greedy step of eight rows, by CUDA's own account."""
        if self._place.type != "cuda":
            return NO_GPU
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                self.serve(8, "syncs")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return dict(Counter(f"{Path(each.filename).name}:{each.lineno}" for each in told))

    @functools.cached_property
    def _engine(self) -> Engine:
        """Begun once the runner has been measured by itself: its thread would look after the streams."""
        tokenizer: Any = None
        engine = Engine(lambda: LoadedModel(self._model, tokenizer, self._runner))
        _answer(engine, [Generate(stream_id=0, prompt=[7], max_tokens=2)])  # libraries initialize themselves
        return engine

    @functools.cached_property
    def _bandwidth(self) -> float:
        return _bandwidth(self._place, 2**20 if self._quick else 2**30)

    def _prompts(self, rows: int, length: int, *salt: object) -> list[list[int]]:
        return [[token % self._vocabulary for token in prompts.tokens(length, "gpu", *salt, i)] for i in range(rows)]

    @contextlib.contextmanager
    def _admitted(self, rows: int, columns: int, more: int) -> Iterator[list[Stream]]:
        """Streams that have computed so many tokens each, with one more to compute."""
        runner = self._runner
        streams = [Stream(tokens, columns + more + 1) for tokens in self._prompts(rows, columns, "decode", columns)]
        try:
            for stream in streams:
                if not runner.admit(stream):
                    raise RuntimeError(f"there is no memory for {rows} rows of {columns} columns")
                while stream.pending:
                    count = min(stream.pending, runner.step_limits.chunk)
                    runner.prepare(Step([stream], [count]))()
                    stream.computed += count
                stream.tokens.append(7)
            yield streams
        finally:
            for stream in list(runner.active):
                runner.release(stream, keep=False)


def _random_model(size: tuple[int, ...], place: torch.device) -> PreTrainedModel:
    hidden, layers, heads, key_heads, intermediate, vocabulary = size
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        max_position_embeddings=16384,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(place):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert limits_of(model).end_of_sequence == ()
    return model.eval().requires_grad_(False)
