"""On a GPU, against the same model in float32 on the CPU: `make gpu`. Without one, test_graphs.py runs on a stand-in."""

import gc
import itertools
import random
import subprocess
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from lmtp.engine.engine import Engine, LoadedModel
from lmtp.prediction import Prediction
from lmtp.protocol import Encode, Generate, Operation, Score
from lmtp.runners import flash, graphs
from lmtp.runners.cache_runner import CacheRunner
from lmtp.runners.encoder_decoder import EncoderDecoderRunner
from lmtp.runners.model import limits_of
from lmtp.runners.packed import PackedRunner
from lmtp.runners.runner import open_runner
from lmtp.runners.slot_runner import SlotRunner
from tests import encoders
from tests.runners.test_encoder_decoder import build as encoder_decoder
from tests.runners.test_graphs import SAMPLING, operations, random_operation
from tests.server import ROOT
from tests.tiny import answers, begin, build, collect, own_logits, random_prompts, start

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = "cuda"
PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama of large heads": {"head_dim": 128},
    "llama without groups": {"num_key_value_heads": 4, "head_dim": 64},
    "mistral": {},
    "mistral without groups": {"num_key_value_heads": 4, "sliding_window": 80},
    "gpt_oss": {},
    "gpt_oss without groups": {"num_key_value_heads": 4, "sliding_window": 80},
    "gpt2": {},
    "gpt_neox": {},
    "qwen3_moe": {},
}
OTHERS = ["llama", "gemma2", "mpt", "llama4", "gpt_oss", "qwen3_moe", "mamba", "phi3_longrope", "bloom"]
STEPS = 300
FLIPPED = {"gpt_oss": 0.02}
"""The share of tokens after which rounding may have decided which expert of a mixture is asked."""


LENGTHS, LONG = (16, 64), 32


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What depends on lengths does so in short texts, and memory is free again after a test."""
    monkeypatch.setattr(graphs, "LENGTHS", LENGTHS)
    monkeypatch.setattr(flash, "LONG", LONG)
    yield
    gc.collect()
    torch.cuda.empty_cache()


def start_on_gpu(model: PreTrainedModel, tokenizer: Any = None, **arguments: Any) -> Engine:
    """An engine for a copy of the model on the GPU; ``arguments`` are open_runner's."""

    def open_model() -> LoadedModel:
        moved: Any = model
        return LoadedModel(moved.to(GPU), tokenizer, open_runner(moved, **{"kv_budget": 2**24, **arguments}))

    return Engine(open_model)


def packed_model(name: str, **changes: Any) -> Any:
    """A model of PACKED, rounded to bfloat16; ``changes`` to its configuration."""
    model: Any = build(name.split(maxsplit=1)[0], **PACKED[name], **changes)
    return model.to(torch.bfloat16)


def texts() -> list[list[int]]:
    """Longer and shorter than a window, a chunk and what is recorded, of shared beginnings."""
    (longest, other) = random_prompts(500, 300, seed=2)
    return [longest, longest[:260] + other[:40], other, other[:9], longest[:33], longest[:70] + other[:2]]


def logprobs_of(model: PreTrainedModel, text: Sequence[int]) -> torch.Tensor:
    """The log-probability of each token after the first, by one plain forward pass, ``[tokens - 1]``."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([text], device=model.device)).logits[0, :-1].float().cpu()
    return logits.log_softmax(-1).gather(-1, torch.tensor(text[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", PACKED)
def test_packed_steps_are_as_exact_as_the_models_own_pass(name: str) -> None:
    """Both are compared with the same weights in float32: the one must not be further from it than the other."""
    exact, model = packed_model(name).float(), packed_model(name).to(GPU)
    own = [(logprobs_of(model, text) - logprobs_of(exact, text)).abs() for text in texts()]
    engine = start_on_gpu(model)
    try:
        runner = engine.runner
        assert isinstance(runner, PackedRunner), runner.reason
        assert runner.recorded is not None, runner.reason
        recorded = {(shape.tokens, shape.max_length) for shape in runner.recorded.shapes}
        few = [(tokens, length) for tokens in range(1, graphs.FEW + 1) for length in LENGTHS]
        assert recorded == {*few, *((tokens, 512) for tokens in graphs.BUCKETS)}
        scores = [Score(stream_id=i, prompt=text[:1], scored=text[1:]) for i, text in enumerate(texts())]
        running = [Generate(stream_id=-i, prompt=[5, 6, i], max_tokens=40, min_tokens=40) for i in range(1, 6)]
        for _ in range(2):
            got = answers(engine, *running, *scores)
            for i, text in enumerate(texts()):
                logprobs = torch.tensor([token.logprob for token in got.tokens(i)])
                far = (logprobs - logprobs_of(exact, text)).abs()
                assert far.mean() < 1.5 * own[i].mean() + 0.01
                assert far.quantile(0.9) < 1.5 * own[i].quantile(0.9) + 0.02
    finally:
        engine.stop()


def unlikely(exact: PreTrainedModel, operation: Generate, ids: Sequence[int]) -> int:
    """How many tokens of a greedy answer are not nearly the best ones: less likely by more than a fifth of the spread of
    the logits."""
    logits = own_logits(exact, [*operation.prompt, *ids])[len(operation.prompt) - 1 : -1]
    chosen = logits.gather(-1, torch.tensor(list(ids))[:, None])[:, 0]
    return int(((logits.amax(-1) - chosen) / logits.std(-1) > 0.2).sum())


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_whatever_64_streams_ask_for_they_get_by_graphs_in_a_pool_that_is_too_small(name: str) -> None:
    """Texts are evicted and moved; greedy tokens are the best ones of the model in float32, but for rounding."""
    exact, model = packed_model(name).float(), packed_model(name)
    engine = start_on_gpu(model, kv_budget=2**20)
    runner: Any = engine.runner
    generator, ids = random.Random(0), itertools.count()
    begun: deque[tuple[list[Operation], Prediction]] = deque()
    greedy = wrong = 0
    try:
        assert runner.recorded is not None, runner.reason
        while engine.counters.steps < STEPS or begun:
            while engine.counters.steps < STEPS and sum(len(some) for some, _ in begun) <= 56:
                some = [random_operation(generator, next(ids)) for _ in range(generator.randint(1, 8))]
                begun.append((some, begin(engine, *some)))
            some, prediction = begun.popleft()
            got = collect(prediction)
            for operation in some:
                tokens = got.ids(operation.stream_id)
                if isinstance(operation, Score):
                    assert tokens == operation.scored
                elif (
                    isinstance(operation, Generate)
                    and not operation.temperature
                    and not operation.logit_bias
                    and not operation.min_tokens
                ):
                    greedy += len(tokens)
                    wrong += unlikely(exact, operation, tokens)
    finally:
        engine.stop()
    assert greedy > 300
    assert wrong <= FLIPPED.get(name, 0) * greedy
    assert engine.counters.reused_tokens > 0


@pytest.mark.parametrize("name", OTHERS)
def test_a_float32_model_gives_the_tokens_of_the_cpu(name: str) -> None:
    cpu, gpu = start(build(name)), start_on_gpu(build(name))
    assert isinstance(gpu.runner, SlotRunner | CacheRunner)
    check_equal(cpu, gpu, operations())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_model_gives_the_tokens_of_the_cpu(name: str) -> None:
    cpu, gpu = start(encoder_decoder(name)), start_on_gpu(encoder_decoder(name))
    assert isinstance(gpu.runner, EncoderDecoderRunner)
    check_equal(cpu, gpu, operations())


def check_equal(cpu: Engine, gpu: Engine, some: Sequence[Operation]) -> None:
    """Ask both twice, so that the second time finds what the first has left. Stops them."""
    try:
        for _ in range(2):
            expected, got = answers(cpu, *some), answers(gpu, *some)
            for operation in some:
                assert got.ids(operation.stream_id) == expected.ids(operation.stream_id)
    finally:
        cpu.stop()
        gpu.stop()


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_an_encoder_gives_the_answers_of_the_cpu(head: str) -> None:
    tokenizer = encoders.tokenizer_of("bert")
    cpu, gpu = (run(encoders.build("bert", head), tokenizer) for run in (start, start_on_gpu))
    mask = tokenizer.mask_token if head == "MaskedLM" else "cat"
    some = [
        Encode(stream_id=i, prompt=text.replace("cat", mask).replace("dog", mask), top_logprobs=2)
        for i, text in enumerate(encoders.TEXTS)
    ]
    try:
        expected, got = answers(cpu, *some), answers(gpu, *some)
        for i in range(len(some)):
            both = zip(got.replies[i], expected.replies[i], strict=True)
            assert all(vars_of(ours) == pytest.approx(vars_of(theirs), abs=1e-4) for ours, theirs in both)
    finally:
        cpu.stop()
        gpu.stop()


def vars_of(reply: Any) -> dict[str, Any]:
    """The numbers of a reply."""
    return {name: getattr(reply, name) for name in ("token", "logprob") if hasattr(reply, name)}


def test_nothing_in_a_step_waits_for_the_gpu_but_the_copy_that_brings_its_numbers_back(demo_weights: Path) -> None:
    """By CUDA's own account, however the streams sample, and under a grammar too."""
    tokenizer = AutoTokenizer.from_pretrained(demo_weights, local_files_only=True)
    model = packed_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1, head_dim=64)
    engine = start_on_gpu(model, tokenizer)
    prompt = tokenizer.encode("Say:")
    some: list[Operation] = [
        Generate(stream_id=i, prompt=[*prompt, i], max_tokens=12, seed=i, **options)
        for i, options in enumerate(SAMPLING.values())
    ]
    some += [Generate(stream_id=100, prompt=prompt, max_tokens=12, seed=1, regex="[a-z]{9,}", temperature=0.7)]
    some += [Score(stream_id=101, prompt=prompt, scored=[9, 8, 7], top_logprobs=3)]
    try:
        answers(engine, *some)  # libraries initialize themselves
        steps = engine.counters.steps
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            got = answers(engine, *some)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engine.stop()
    waits = Counter(Path(each.filename).name for each in told if "called a synchronizing" in str(each.message))
    assert waits.keys() == {"streams.py"}  # torch's, by which _fetch waits
    assert waits["streams.py"] <= engine.counters.steps - steps
    for operation in some:
        assert got.ids(operation.stream_id)


def test_a_step_that_finds_no_memory_is_retried_smaller_and_no_stream_fails(caplog: pytest.LogCaptureFixture) -> None:
    """The process may use 24 MB more than it has after setup: a chunk of 8,192 tokens takes more."""
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 2048,
        "max_position_embeddings": 16384,
        "head_dim": 64,
    }
    model = packed_model("llama", **shape)
    engine = start_on_gpu(model, kv_budget=2**26)
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    (prompt,) = random_prompts(9000)
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 24 * 2**20) / total)
        got = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=4, min_tokens=4))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        engine.stop()
    assert len(got.ids()) == 4
    assert "no memory for a step of 8192 tokens" in caplog.text


ASSERTION = """
import os
import torch
from lmtp.protocol import Generate
from tests.runners.test_gpu import packed_model, start_on_gpu
from tests.tiny import answers

engine = start_on_gpu(packed_model("llama"))
assert len(answers(engine, Generate(stream_id=0, prompt=[5, 6, 7], max_tokens=4, min_tokens=4)).ids()) == 4
prepare = engine.runner.prepare

def failing(step):
    run = prepare(step)
    return lambda: (torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")], run())[1]

try:
    engine.runner.prepare = failing
    first = answers(engine, Generate(stream_id=0, prompt=[5, 6, 7], max_tokens=4)).error()
    engine.runner.prepare = prepare
    second = answers(engine, Generate(stream_id=0, prompt=[5, 6, 7], max_tokens=4)).error()
    print(first, second, engine.problem, sep="\\n", flush=True)
    engine.stop()
finally:
    os._exit(0)  # at exit, freeing memory of the failed GPU ends the process by a signal
"""


def test_after_an_assertion_in_a_kernel_the_engine_says_so_and_answers_everyone() -> None:
    """In a process of its own, whose GPU is of no use after that."""
    run = subprocess.run([sys.executable, "-c", ASSERTION], cwd=ROOT, capture_output=True, text=True, timeout=120)
    first, second, problem = run.stdout.splitlines()[-3:]
    assert first == second == problem, run.stderr[-2000:]
    assert "CUDA error: device-side assert triggered" in problem


def test_few_streams_draft_on_a_gpu_and_get_the_tokens_that_they_get_without() -> None:
    model = packed_model("llama")
    repeated = random_prompts(6)[0] * 4
    some = [
        Generate(stream_id=i, prompt=[*repeated, 9 + i], max_tokens=40, logit_bias={9 + i: 100.0}) for i in range(2)
    ]
    engine = start_on_gpu(model)
    try:
        drafted = answers(engine, *some)
        engine.runner.step_limits = replace(engine.runner.step_limits, drafts=0)
        plain = answers(engine, *some)
    finally:
        engine.stop()
    assert drafted.counters.accepted_tokens > 40
    assert [drafted.ids(i) for i in range(2)] == [plain.ids(i) for i in range(2)] == [[9] * 40, [10] * 40]


def test_the_pool_takes_what_is_free_but_a_reserve() -> None:
    model = packed_model("llama").to(GPU)
    runner: Any = open_runner(model)
    free, total = torch.cuda.mem_get_info()
    assert 0.07 * total < free < 0.11 * total
    assert runner.longest == limits_of(model).context == 512
