"""The CUDA paths on a stand-in for a GPU, compared with the same model on the CPU. test_gpu.py needs a GPU."""

import itertools
import logging
import os
import random
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from lmtp.engine import sampling
from lmtp.engine.engine import Engine, LoadedModel
from lmtp.engine.masks import packed_bias
from lmtp.engine.stream import Generation, open_stream
from lmtp.prediction import Prediction
from lmtp.protocol import Encode, Failure, Generate, Operation, Score, Token
from lmtp.runners import flash, graphs
from lmtp.runners.cache_runner import CacheRunner
from lmtp.runners.encoder_decoder import EncoderDecoderRunner
from lmtp.runners.model import limits_of
from lmtp.runners.packed import PackedRunner, Shape
from lmtp.runners.runner import open_runner
from lmtp.runners.slot_runner import SlotRunner
from lmtp.settings import Bounds
from tests import encoders, pretend_cuda
from tests.pretend_cuda import Device, pretend_from_now_on, pretending, to_cuda
from tests.runners.test_encoder_decoder import build as encoder_decoder
from tests.tiny import VOCABULARY, answers, begin, build, collect, own_logits, random_prompts, start

SIZES = (1, 4, 16)
BUCKETS = graphs.BUCKETS


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The stand-in, whose FlashAttention takes float32 too, so that tokens can be compared."""
    monkeypatch.setattr(flash, "DTYPES", (torch.float32,))
    monkeypatch.setattr(graphs, "BUCKETS", SIZES)
    monkeypatch.setattr(graphs, "LENGTHS", ())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small operations are faster without helping threads
    yield pretend_cuda.install(monkeypatch)
    torch.set_num_threads(threads)


def start_on(model: PreTrainedModel, tokenizer: Any = None, **arguments: Any) -> Engine:
    """An engine whose thread takes the stand-in for a GPU, and keeps it; ``arguments`` are open_runner's."""

    def open_model() -> LoadedModel:
        pretend_from_now_on()
        return LoadedModel(to_cuda(model), tokenizer, open_runner(model, **arguments))

    return Engine(open_model)


def one_layer() -> PreTrainedModel:
    """For tests of what surrounds the layers."""
    return build("llama", num_hidden_layers=1)


def operations() -> list[Operation]:
    """Prompts longer and shorter than what is recorded, of shared beginnings; greedy and drawn streams, and scores."""
    prompts = random_prompts(3, 60, 41, 9, 17)
    made: list[Operation] = [Generate(stream_id=i, prompt=p, max_tokens=12) for i, p in enumerate(prompts)]
    drawn = [prompt[: len(prompt) // 2] for prompt in prompts]
    made += [Generate(stream_id=5 + i, prompt=p, max_tokens=7, temperature=0.9, seed=i) for i, p in enumerate(drawn)]
    return [*made, Score(stream_id=10, prompt=prompts[1][:30], scored=prompts[2][:6])]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "gpt2", "gpt_neox", "qwen3_moe"])
def test_a_gpu_gives_the_tokens_of_the_cpu_and_records_nothing_while_it_serves(name: str, device: Device) -> None:
    """In a pool in which texts are evicted and moved."""
    cpu, gpu = start(build(name)), start_on(build(name), kv_budget=2**16)
    try:
        assert isinstance(gpu.runner, PackedRunner)
        assert gpu.runner.description.endswith(" of them, 3 CUDA graphs of up to 16 tokens")
        assert gpu.runner.pool.tokens < 600
        assert len(device.recorded) == len(SIZES)
        replays = sum(graph.replays for graph in device.recorded)
        device.log.clear()
        for _ in range(2):
            expected, got = answers(cpu, *operations()), answers(gpu, *operations())
            for i in range(len(operations())):
                assert got.ids(i) == expected.ids(i)
        assert len(device.recorded) == len(SIZES)
        assert sum(graph.replays for graph in device.recorded) > replays
        assert got.counters.reused_tokens > 0
    finally:
        cpu.stop()
        gpu.stop()


def test_a_step_goes_to_the_device_in_one_copy_that_nobody_waits_for(device: Device) -> None:
    model = one_layer()
    engine = start_on(model, kv_budget=2**19)
    runner = engine.runner
    assert isinstance(runner, PackedRunner)
    run = runner.prepare
    steps: list[tuple[int, list[pretend_cuda.Event]]] = []

    def logged(step: Any) -> Any:
        device.log.clear()
        compute = run(step)

        def computed() -> Any:
            logits = compute()
            steps.append((sum(step.counts), [event for event in device.log if event.kind != "launch"]))
            return logits

        return computed

    runner.prepare = logged  # type: ignore[method-assign]
    try:
        answers(engine, *operations())
    finally:
        engine.stop()
    recorded = [events for tokens, events in steps if tokens <= SIZES[-1]]
    others = [events for tokens, events in steps if tokens > SIZES[-1]]
    assert [[event.kind for event in events] for events in recorded] == [["copy", "replay"]] * len(recorded)
    assert recorded
    # Without a recording, the stand-in's own reference of FlashAttention is no sync either.
    assert [[event.kind for event in events] for events in others] == [["copy"]] * len(others)
    assert others


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "likely tokens": {"top_logprobs": 5},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k": {"temperature": 0.8, "top_k": 40},
    "min-p": {"temperature": 0.8, "min_p": 0.1},
    "top-k, top-p and min-p": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.1},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.1},
    "biases": {"logit_bias": {7: 3.0}},
    "masks": {"logit_bias": {7: -100.0, 8: -100.0}},
    "no end yet": {"min_tokens": 6},
}


def test_a_step_of_a_gpu_waits_once_however_its_streams_sample(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the numbers that it brings back; where it brings none back, not at all."""
    step = Engine._step
    waited: list[int] = []
    mixed: list[bool] = []

    def counted(self: Engine, some: Any) -> Any:
        device.log.clear()
        wants = any(stream.wanted(count) for stream, count in zip(some.streams, some.counts, strict=True))
        choices = step(self, some)
        waits = len(device.of_kind("sync"))
        if wants:
            waited.append(waits)
        else:
            assert waits == 0
        kinds = {isinstance(stream, Generation) for stream in some.streams}
        mixed.append(len(kinds) == 2)
        return choices

    monkeypatch.setattr(Engine, "_step", counted)
    engine = start_on(one_layer(), kv_budget=2**19, graphs=False)
    try:
        for options in SAMPLING.values():
            waited.clear()
            answers(engine, *(Generate(stream_id=i, prompt=[5, i], max_tokens=8, seed=i, **options) for i in range(4)))
            assert waited
            assert set(waited) == {1}, options
        waited.clear()
        several = [Generate(stream_id=i, prompt=[5, i], max_tokens=8, **o) for i, o in enumerate(SAMPLING.values())]
        (prompt,) = random_prompts(400, seed=3)
        scores = [Score(stream_id=-i, prompt=prompt[i:], scored=prompt[:7], top_logprobs=i) for i in (1, 2, 3, 4)]
        answers(engine, *several, *scores)
        assert set(waited) == {1}
        assert sum(mixed) > 1
    finally:
        engine.stop()


def test_masks_go_to_a_gpu_as_a_bit_a_token(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only when the rows of a step are others than those of the step before."""
    copied: list[int] = []
    copy = Device.copy

    def counted(self: Device, host: torch.Tensor, *arguments: Any) -> None:
        copied.append(host.nbytes)
        copy(self, host, *arguments)

    monkeypatch.setattr(Device, "copy", counted)
    vocabulary, rows, steps = 4096, 16, 8
    engine = start_on(build("llama", num_hidden_layers=1, vocab_size=vocabulary), kv_budget=2**19, graphs=False)
    masked: dict[str, Any] = {
        "logit_bias": dict.fromkeys(range(3, 40), 100.0),
        "min_tokens": steps,
        "max_tokens": steps,
    }
    try:
        copied.clear()
        answers(engine, *(Generate(stream_id=i, prompt=[5, i], **masked) for i in range(rows)))
    finally:
        engine.stop()
    assert len(copied) >= 2 * steps
    assert rows * vocabulary // 8 < sum(copied) < rows * vocabulary  # in every step, bits alone would be as many bytes


def test_a_step_finds_its_places_in_the_pool_once_and_not_in_each_layer(device: Device) -> None:
    """A layer adds the operations of its own computing alone: two of them write to the pool."""
    launches = []
    for layers in (1, 2):
        engine = start_on(build("llama", num_hidden_layers=layers), kv_budget=2**17, graphs=False)
        device.log.clear()
        answers(engine, Generate(stream_id=0, prompt=[5, 6], max_tokens=1))
        launches.append(Counter(device.of_kind("launch")))
        engine.stop()
    more = launches[1] - launches[0]
    assert more["aten.index_copy_.default"] == 2
    assert not [name for name in more if re.search(r"arange|index\.|index_put|gather|repeat_interleave|cumsum", name)]


def test_all_recordings_are_made_on_one_stream(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream keeps memory of its own."""
    made: list[pretend_cuda.Stream] = []
    used: list[object] = []

    class Noted(pretend_cuda.Stream):
        def __init__(self, device: Any = None) -> None:
            made.append(self)

    graph = torch.cuda.graph

    def recording(*arguments: Any, **named: Any) -> Any:
        used.append(named["stream"])
        return graph(*arguments, **named)

    monkeypatch.setattr("torch.cuda.Stream", Noted)
    monkeypatch.setattr("torch.cuda.graph", recording)
    open_on(device, one_layer())
    assert used == made * len(SIZES)
    assert len(made) == 1


def test_while_a_gpu_computes_the_host_prepares_sampling_and_hands_over_the_last_replies(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, rows, deliver = Engine._step, Generation.rows, Prediction.deliver
    steps: list[list[str]] = []

    def logged(self: Engine, some: Any) -> Any:
        device.log.clear()
        choices = step(self, some)
        kinds = [kind for kind, _ in itertools.groupby(event.kind for event in device.log)]
        steps.append([kind for kind in kinds if kind != "launch"])
        return choices

    def noting(kind: str, method: Any) -> Any:
        def noted(*arguments: Any, **named: Any) -> Any:
            device.note(kind, "")
            return method(*arguments, **named)

        return noted

    monkeypatch.setattr(Engine, "_step", logged)
    monkeypatch.setattr(Generation, "rows", noting("rows", rows))
    monkeypatch.setattr(Prediction, "deliver", noting("replies", deliver))
    engine = start_on(one_layer(), kv_budget=2**19)
    try:
        answers(engine, *(Generate(stream_id=i, prompt=[5, i], max_tokens=8, min_tokens=8) for i in range(4)))
    finally:
        engine.stop()
    first, *others = steps
    assert "replies" not in first
    # Copies of the step's inputs, of the ids that min_tokens forbids, and of the numbers that come back.
    assert others == [["copy", "replay", "rows", "copy", "copy", "replies", "sync"]] * 7


def test_a_step_with_grammars_waits_once_too(
    device: Device, demo_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are computed on the host while the model runs, and go to the device in a copy that nobody waits for."""
    step = Engine._step
    waited: list[int] = []

    def counted(self: Engine, some: Any) -> Any:
        device.log.clear()
        choices = step(self, some)
        waited.append(len(device.of_kind("sync")))
        return choices

    monkeypatch.setattr(Engine, "_step", counted)
    tokenizer = AutoTokenizer.from_pretrained(demo_weights, local_files_only=True)
    model = build("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    engine = start_on(model, tokenizer, kv_budget=2**19, graphs=False)
    try:
        prompt = tokenizer.encode("Say:")
        plain = Generate(stream_id="plain", prompt=prompt, max_tokens=3)
        for options in SAMPLING.values():
            waited.clear()
            some = Generate(stream_id=0, prompt=prompt, max_tokens=3, seed=1, regex="[a-z]{9,}", **options)
            got = answers(engine, some, plain)
            assert re.fullmatch("[a-z]+", str(tokenizer.decode(got.ids())))
            assert len(waited) > 1
            assert set(waited) == {1}, options
    finally:
        engine.stop()


STEPS, LARGEST = (4000, 256) if os.environ.get("NIGHTLY") else (40, 80)


def random_operation(generator: random.Random, stream_id: int) -> Operation:
    """A text of few beginnings, some of them repetitive; any kind of sampling, or a score."""
    beginning = generator.choice(random_prompts(150, 150, 150, seed=1))
    prompt = beginning[: generator.choice((1, 9, 40, 150))] + random_prompts(3, seed=stream_id)[0]
    if generator.random() < 0.2:
        prompt = prompt[-8:] * 4
    if generator.random() < 0.1:
        return Score(stream_id=stream_id, prompt=prompt, scored=prompt[:5], top_logprobs=generator.choice((0, 3)))
    options = generator.choice(list(SAMPLING.values()))
    return Generate(
        stream_id=stream_id, prompt=prompt, max_tokens=generator.randint(1, 60), seed=stream_id + 1000, **options
    )


ROUNDING = 1e-6
"""What rounding to float32 may change: a logit by this part of the largest one, and by as much where a draw falls. In
4,000 tokens of `one_layer`, compared with float64, it was 7e-7 of the largest logit and 2.3e-7 of a draw."""


def disputed(model: PreTrainedModel, operation: Generate, ids: Sequence[int]) -> int:
    """Check each token of an answer, after those before it, by the model's own forward pass: it is the one that is
    chosen there, and the last one ends the stream. Returns how many are not, but could be if logits and draws differed
    by up to `ROUNDING`."""
    limits = limits_of(model)
    bias = packed_bias(operation, limits)
    stream = open_stream(Prediction(lambda _: None), operation, limits, cast(Any, None), bias, None)
    logits = own_logits(model, [*operation.prompt, *ids])
    found = 0
    for token in ids:
        assert not stream.finished
        (row,) = stream.rows(stream.pending)
        assert isinstance(row, sampling.Draw)
        own = logits[len(stream.tokens) - 1]
        if sampling.sample(own[None], [row])[0].token != token:
            assert token in nearby(own, row)
            found += 1
        stream.advance(stream.pending)
        stream.receive([sampling.Choice(token, 0.0, {})])
    assert stream.finished
    return found


def nearby(logits: torch.Tensor, row: sampling.Draw) -> set[int]:
    """The tokens that are chosen if the logits ``[vocabulary]`` and the draws differ by up to `ROUNDING`."""
    generator = torch.Generator().manual_seed(0)
    moved = (2 * torch.rand(500, len(logits) + 2, generator=generator, dtype=torch.float64) - 1) * ROUNDING
    draws = (torch.tensor(row.uniforms, dtype=torch.float64) + moved[:, :2]).clamp(0, 1 - 2.0**-53).tolist()
    rows = [row._replace(uniforms=(first, second)) for first, second in draws]
    changed = logits + moved[:, 2:] * logits.abs().max()
    return {choice.token for choice in sampling.sample(changed.float(), rows)}


def test_a_token_is_disputed_only_where_rounding_decides_its_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    model, operation = one_layer(), Generate(stream_id=0, prompt=[5, 6, 7], max_tokens=1, temperature=0.8)
    cumulative = (own_logits(model, [5, 6, 7])[-1].double() / 0.8).softmax(-1).cumsum(-1)
    token = int(torch.searchsorted(cumulative, 0.5))
    below, above = cumulative[token - 1 : token + 1].tolist()
    for first, allowed in ((above - ROUNDING / 9, (token, token + 1)), ((below + above) / 2, (token,))):
        monkeypatch.setattr("lmtp.engine.stream.uniforms_of", lambda seed, at=first: lambda place: (at, 0.5))
        assert [disputed(model, operation, [each]) for each in allowed] == [0, 1][: len(allowed)]
        for other in {0, token - 1, token + 1, token + 2, VOCABULARY - 1} - {*allowed}:
            with pytest.raises(AssertionError, match="nearby"):
                disputed(model, operation, [other])


def test_no_token_of_a_cpu_is_disputed_and_any_other_one_is() -> None:
    model, engine = one_layer(), start(one_layer())
    repeated = random_prompts(6)[0] * 4
    some = [
        Generate(stream_id=i, prompt=repeated, max_tokens=9, seed=i, **options)
        for i, options in enumerate(SAMPLING.values())
    ]
    try:
        got = answers(engine, *some)
    finally:
        engine.stop()
    for i, operation in enumerate(some):
        ids = got.ids(i)
        assert disputed(model, operation, ids) == 0
        with pytest.raises(AssertionError):
            disputed(model, operation, [*ids[:5], (ids[5] + 64) % VOCABULARY, *ids[6:]])
        with pytest.raises(AssertionError, match="finished"):
            disputed(model, operation, ids[:-1])


@dataclass
class Watch:
    """What an engine's steps ask of the device."""

    engine: Engine
    device: Device
    steps: int = 0
    streams: int = 0
    """The most in one step."""
    waits: Counter[int] = field(default_factory=Counter)
    """How many steps wait so often for the device."""
    recorded: int = 0
    """Tokens of recorded steps, their filler included."""
    unrecorded: int = 0
    """Tokens of the others."""
    padding: int = 0
    """Those of `unrecorded` that are no stream's."""
    owned: float = 0.0
    """The most room of running streams, as a multiple of what they may come to hold."""

    def __post_init__(self) -> None:
        runner: Any = self.engine.runner
        step, prepare = self.engine._step, runner.prepare

        def watched_step(some: Any) -> Any:
            self.device.log.clear()
            choices = step(some)
            self.waits[len(self.device.of_kind("sync"))] += 1
            return choices

        def watched(some: Any) -> Any:
            compute, tokens = prepare(some), sum(some.counts)
            self.steps += 1
            self.streams = max(self.streams, len(some.streams))
            self.owned = max(self.owned, runner.owned / sum(stream.max_length for stream in runner.active))
            if tokens <= max(shape.tokens for shape in runner.recorded.shapes):
                size = compute.args[0].tokens
                assert size == min(size for size in BUCKETS if size >= tokens)
                self.recorded += size
            else:
                self.unrecorded += compute.args[0].ids.numel()
                self.padding += compute.args[0].ids.numel() - tokens
            return compute

        self.engine._step = watched_step  # type: ignore[method-assign,assignment]
        runner.prepare = watched


def test_whatever_64_streams_ask_for_nothing_is_recorded_padded_or_waited_for_twice(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filler of recorded steps is counted for itself: it costs no reading of weights. NIGHTLY=1 runs 4,000 steps."""
    sizes = [size for size in BUCKETS if size <= LARGEST]
    monkeypatch.setattr(graphs, "BUCKETS", sizes)
    model = one_layer()
    cpu, gpu = start(model), start_on(one_layer(), kv_budget=2**20)
    runner = gpu.runner
    assert isinstance(runner, PackedRunner)
    assert len(device.recorded) == len(sizes)
    cpu.bounds = gpu.bounds = Bounds(max_unread_seconds=0)  # each prediction is read when those before it are done
    watch, generator, drafted, ids = Watch(gpu, device), random.Random(0), 0, itertools.count()
    tokens = unsure = 0
    begun: deque[tuple[list[Operation], Prediction]] = deque()
    padded = runner.padded_tokens
    try:
        while watch.steps < STEPS or begun:
            while watch.steps < STEPS and sum(len(some) for some, _ in begun) <= 56:
                some = [random_operation(generator, next(ids)) for _ in range(generator.randint(1, 8))]
                begun.append((some, begin(gpu, *some)))
            some, prediction = begun.popleft()
            got, expected = collect(prediction), answers(cpu, *some)
            drafted += got.counters.drafted_tokens
            for operation in some:
                both = [each.ids(operation.stream_id) for each in (got, expected)]
                tokens += len(both[0])
                if both[0] != both[1]:
                    assert isinstance(operation, Generate)
                    unsure += sum(disputed(one_layer(), operation, each) for each in both)
    finally:
        cpu.stop()
        gpu.stop()
    assert unsure <= tokens // 20_000  # none but in a long run
    assert len(device.recorded) == len(sizes)
    assert watch.waits.keys() <= {0, 1}  # a step of a prompt's beginning wants no numbers back
    assert watch.padding == 0
    assert 5 * (runner.padded_tokens - padded) < watch.recorded
    assert watch.owned <= 1.15
    assert watch.streams > 32
    assert watch.unrecorded > 0
    assert drafted > 0


def test_few_streams_draft_in_recorded_steps_and_get_the_tokens_of_the_cpu(device: Device) -> None:
    """The last wrong guesses are overwritten; streams of other texts in the same steps draft too, or not at all."""
    cpu, gpu = start(one_layer()), start_on(one_layer(), kv_budget=2**19)
    try:
        one_token = [
            Generate(stream_id=i, prompt=[5, 6, i], max_tokens=40, logit_bias={9 + i: 100.0}) for i in range(2)
        ]
        repeated = random_prompts(6)[0] * 4
        some = [*one_token, Generate(stream_id=2, prompt=repeated, max_tokens=30, temperature=0.5, seed=1)]
        replays = sum(graph.replays for graph in device.recorded)
        got, expected = answers(gpu, *some), answers(cpu, *some)
        assert [got.ids(i) for i in range(3)] == [expected.ids(i) for i in range(3)]
        assert got.counters.accepted_tokens > 40
        assert got.counters.steps < 40
        assert sum(graph.replays for graph in device.recorded) - replays == got.counters.steps - 1  # but the prompts'
    finally:
        cpu.stop()
        gpu.stop()


def open_on(device: Device, model: PreTrainedModel, **arguments: Any) -> Any:
    """The runner of a model on the stand-in, with little memory."""
    with pretending():
        return open_runner(to_cuda(model), **{"kv_budget": 2**19, **arguments})


def test_a_step_that_waits_for_the_device_is_not_recorded_and_leaves_nothing_behind(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mixture's may that loops over its experts."""
    stream = device.stream
    runner = open_on(device, build("qwen3_moe", experts_implementation="eager"))
    assert isinstance(runner, PackedRunner)
    assert runner.recorded is None
    assert runner.reason.startswith("no CUDA graphs: no step can be recorded: RuntimeError: CUDA error: ")
    assert (device.recorded, device.stream, device.allocating) == ([], stream, None)


def test_one_recording_that_fails_is_left_out_and_named_in_the_log(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = graphs.Graphs._record

    def fail(self: graphs.Graphs, shape: Shape) -> graphs.Graph:
        if shape.tokens == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return record(self, shape)

    monkeypatch.setattr(graphs.Graphs, "_record", fail)
    with caplog.at_level(logging.WARNING):
        runner = open_on(device, one_layer())
    assert [shape.tokens for shape in runner.recorded.shapes] == [1, 16]
    assert caplog.messages == ["no CUDA graph for 4 tokens of up to 512: OutOfMemoryError: CUDA out of memory."]
    assert runner.recorded.shape(3, 9).tokens == 16
    assert runner.recorded.shape(17, 9) is None


def test_few_tokens_are_recorded_for_several_lengths_and_a_step_takes_the_shortest_that_fits(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention divides long rows among processors by the greatest length, which a recording fixes."""
    monkeypatch.setattr(graphs, "LENGTHS", (16, 64, 4096))
    monkeypatch.setattr(graphs, "FEW", 4)
    cpu, gpu = start(one_layer()), start_on(one_layer(), kv_budget=2**19)
    runner: Any = gpu.runner
    found = [(shape.tokens, shape.max_length) for shape in runner.recorded.shapes]
    assert found == [(1, 16), (1, 64), (1, 512), (4, 16), (4, 64), (4, 512), (16, 512)]
    assert len(device.recorded) == len(found)
    prepare, taken = runner.prepare_recorded, []

    def noted(step: Any, shape: Shape) -> Any:
        taken.append(max(stream.computed + count for stream, count in zip(step.streams, step.counts, strict=True)))
        assert shape.max_length == min(most for size, most in found if size == shape.tokens and most >= taken[-1])
        return prepare(step, shape)

    runner.prepare_recorded = noted
    try:
        long = Generate(stream_id=0, prompt=[5, 6], max_tokens=80, min_tokens=80)
        assert answers(gpu, long).ids() == answers(cpu, long).ids()
    finally:
        cpu.stop()
        gpu.stop()
    assert taken == list(range(2, 82))


def test_the_self_check_replays_every_recording_on_different_tokens(device: Device) -> None:
    open_on(device, one_layer())
    assert all(graph.replays >= 2 for graph in device.recorded)


def test_the_sizes_that_are_recorded_leave_less_than_a_fifth_of_a_step_to_filler() -> None:
    for tokens in range(1, 257):
        size = min(size for size in BUCKETS if size >= tokens)
        assert size == tokens or (tokens > 8 and 5 * (size - tokens) < size)


class Freeing(graphs.Graphs):
    """Does not keep what its graphs read."""

    def _record(self, shape: Shape) -> graphs.Graph:
        graph = super()._record(shape)
        graph.packed = graph.packed.clone()
        graph.inputs = shape.split(graph.packed)
        return graph


class Stale(graphs.Graphs):
    """Replays on the tokens of the step before."""

    def run(self, shape: Any, packed: torch.Tensor, wanted: int) -> torch.Tensor:
        graph = self._graphs[shape]
        graph.recorded.replay()
        graph.packed.copy_(packed, non_blocking=True)
        return graph.logits[:wanted]


class OneStale(graphs.Graphs):
    """Keeps what one recording's first replay computed."""

    stale: tuple[int, int]
    first: torch.Tensor | None = None

    def run(self, shape: Any, packed: torch.Tensor, wanted: int) -> torch.Tensor:
        graph = self._graphs[shape]
        if (shape.tokens, shape.max_length) != self.stale:
            return super().run(shape, packed, wanted)
        if self.first is None:
            self.first = super().run(shape, packed, graph.logits.shape[0]).clone()
        return self.first[:wanted]


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("length", [64, 512])
def test_the_self_check_finds_any_recording_that_computes_the_same_each_time(
    tokens: int, length: int, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "LENGTHS", (64,))
    monkeypatch.setattr(graphs, "FEW", 16)
    monkeypatch.setattr(OneStale, "stale", (tokens, length), raising=False)
    monkeypatch.setattr("lmtp.runners.runner.Graphs", OneStale)
    assert "positions differ" in open_on(device, one_layer()).reason


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Freeing, "an illegal memory access"), (Stale, "positions differ from the model's own forward pass")],
)
def test_recordings_that_read_other_memory_than_the_steps_are_not_used(
    kind: type[graphs.Graphs], reason: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmtp.runners.runner.Graphs", kind)
    runner = open_on(device, one_layer())
    assert runner.recorded is None
    assert reason in runner.reason


def test_an_engine_whose_device_has_failed_says_so_and_answers_everyone(device: Device) -> None:
    """Then the health check fails, and the platform replaces the container."""
    engine = start_on(one_layer(), kv_budget=2**16, graphs=False)
    greedy = Generate(stream_id=0, prompt=[5, 6, 7], max_tokens=4)
    assert len(answers(engine, greedy).ids()) == 4
    assert engine.problem == ""
    device.failed = True
    assert "CUDA error: device-side assert triggered" in answers(engine, greedy).error()
    assert "CUDA error: device-side assert triggered" in engine.problem
    assert answers(engine, greedy).error() == engine.problem
    engine.stop()


@pytest.mark.parametrize("part", ["the model", "sampling"])
def test_a_device_that_fails_in_a_step_stops_the_engine_at_once(
    part: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever runs when it is found out, and however many streams there are."""
    engine = start_on(one_layer(), kv_budget=2**16, graphs=False)
    sample, run, failures = sampling.sample, engine.runner.prepare, [0]

    def fail(*_: Any) -> None:
        if engine.counters.steps > 3:
            device.failed = True
            failures[0] += 1

    def sampled(*arguments: Any) -> Any:
        if part == "sampling":
            fail()
        return sample(*arguments)

    def prepare(step: Any) -> Any:
        if part == "the model":
            fail()
        return run(step)

    monkeypatch.setattr(sampling, "sample", sampled)
    monkeypatch.setattr(engine.runner, "prepare", prepare)
    got = answers(engine, *(Generate(stream_id=i, prompt=[5, i], max_tokens=50, min_tokens=50) for i in range(4)))
    for i in range(4):
        *tokens, failure = got.replies[i]
        assert all(isinstance(token, Token) for token in tokens)
        assert isinstance(failure, Failure)
        assert failure.error == engine.problem
    assert "CUDA error: device-side assert triggered" in engine.problem
    assert failures == [1]
    engine.stop()


class LittleMemory:
    """A runner of an engine that has memory for steps of so many tokens only."""

    def __init__(self, engine: Engine, most: int) -> None:
        self.most = most
        self.refused: list[int] = []
        self.computed: list[int] = []
        self._prepare = engine.runner.prepare
        engine.runner.prepare = self.prepare  # type: ignore[method-assign]

    def prepare(self, step: Any) -> Any:
        run, tokens = self._prepare(step), sum(step.counts)

        def limited() -> Any:
            if tokens > self.most:
                self.refused.append(tokens)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has none.")
            self.computed.append(tokens)
            return run()

        return limited


def test_a_step_that_finds_no_memory_is_retried_in_halves_and_no_stream_fails(device: Device) -> None:
    cpu, gpu = start(one_layer()), start_on(one_layer(), kv_budget=2**19, graphs=False)
    little = LittleMemory(gpu, 40)
    try:
        long = [Generate(stream_id=i, prompt=p, max_tokens=3) for i, p in enumerate(random_prompts(300, 200))]
        expected, got = answers(cpu, *long), answers(gpu, *long)
        assert [got.ids(i) for i in range(2)] == [expected.ids(i) for i in range(2)]
        assert len(little.refused) < 24
        assert device.freed == len(little.refused)
        assert gpu.runner.step_limits.chunk == 64  # later prompts begin with what is likely to fit
        little.refused.clear()
        some = operations()
        expected, got = answers(cpu, *some), answers(gpu, *some)
        assert [got.ids(i) for i in range(len(some))] == [expected.ids(i) for i in range(len(some))]
        assert max(little.refused, default=0) <= 80
        little.most = 3
        many = [Generate(stream_id=i, prompt=[5, i], max_tokens=9) for i in range(8)]
        expected, got = answers(cpu, *many), answers(gpu, *many)
        assert [got.ids(i) for i in range(8)] == [expected.ids(i) for i in range(8)]
    finally:
        cpu.stop()
        gpu.stop()


def test_where_not_even_one_token_finds_memory_its_stream_fails_alone(device: Device) -> None:
    engine = start_on(one_layer(), kv_budget=2**19, graphs=False)
    little = LittleMemory(engine, 0)
    try:
        two = [Generate(stream_id=i, prompt=[5, 6, i], max_tokens=4) for i in range(2)]
        got = answers(engine, *two)
        error = "the model failed: CUDA out of memory. Tried to allocate 2.00 GiB."
        assert [got.error(i) for i in range(2)] == [error, error]
        assert little.computed == []
        little.most = 100
        assert len(answers(engine, two[0]).ids()) == 4
        assert engine.problem == ""
    finally:
        engine.stop()


def test_graphs_can_be_switched_off(device: Device) -> None:
    runner = open_on(device, one_layer(), graphs=False)
    assert isinstance(runner, PackedRunner)
    assert (runner.recorded, runner.reason, device.recorded) == (None, "", [])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "its attention takes softcap"),
        ("mpt", "it takes no positions"),
        ("llama4", "FlashAttention has no chunked_attention"),
    ],
)
def test_a_model_that_is_not_served_exactly_gets_slots_on_the_gpu(name: str, reason: str, device: Device) -> None:
    cpu, gpu = start(build(name)), start_on(build(name))
    try:
        assert isinstance(gpu.runner, SlotRunner)
        assert (gpu.runner.fast, gpu.runner.reason) == (None, f"no packed tokens: {reason}")
        some = operations()[:3]
        expected, got = answers(cpu, *some), answers(gpu, *some)
        assert [got.ids(i) for i in range(3)] == [expected.ids(i) for i in range(3)]
    finally:
        cpu.stop()
        gpu.stop()


def check_equal(device: Device, cpu: Engine, gpu: Engine, some: Sequence[Operation]) -> None:
    """Ask both twice, so that the second time finds what the first has left. Stops them."""
    try:
        for _ in range(2):
            expected, got = answers(cpu, *some), answers(gpu, *some)
            for operation in some:
                assert got.ids(operation.stream_id) == expected.ids(operation.stream_id)
        assert device.of_kind("launch")
    finally:
        cpu.stop()
        gpu.stop()


@pytest.mark.parametrize("name", ["mamba", "phi3_longrope", "bloom"])
def test_a_model_that_is_served_by_its_own_caches_gives_the_tokens_of_the_cpu(name: str, device: Device) -> None:
    cpu, gpu = start(build(name)), start_on(build(name))
    assert isinstance(gpu.runner, CacheRunner)
    some = operations()
    check_equal(device, cpu, gpu, [some[0], some[2], some[6], some[10]])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_model_gives_the_tokens_of_the_cpu(name: str, device: Device) -> None:
    cpu, gpu = start(encoder_decoder(name)), start_on(encoder_decoder(name))
    assert isinstance(gpu.runner, EncoderDecoderRunner)
    some = operations()
    check_equal(device, cpu, gpu, [*some[:2], some[6], some[10]])


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_an_encoder_gives_the_answers_of_the_cpu(name: str, head: str, device: Device) -> None:
    tokenizer = encoders.tokenizer_of(name)
    cpu, gpu = (run(encoders.build(name, head), tokenizer) for run in (start, start_on))
    mask = tokenizer.mask_token if head == "MaskedLM" else "cat"
    texts = [text.replace("cat", mask).replace("dog", mask) for text in encoders.TEXTS]
    some = [Encode(stream_id=i, prompt=text, top_logprobs=2) for i, text in enumerate(texts)]
    try:
        expected, got = answers(cpu, *some), answers(gpu, *some)
        assert got.replies == expected.replies
        assert not any(isinstance(reply, Failure) for replies in got.replies.values() for reply in replies)
        assert device.of_kind("launch")
    finally:
        cpu.stop()
        gpu.stop()


def test_float32_and_an_old_gpu_get_slots(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (7, 5))
    reason = "FlashAttention needs a GPU of compute capability 8.0 or newer"
    assert open_on(device, one_layer()).reason == f"no packed tokens: {reason}"
    monkeypatch.setattr(flash, "DTYPES", (torch.bfloat16, torch.float16))
    assert open_on(device, one_layer()).reason == "no packed tokens: FlashAttention does not compute in float32"


def test_attention_by_cudnn_which_plans_anew_for_each_length_is_off(device: Device) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    open_on(device, one_layer(), graphs=False)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_pool_takes_what_is_free_but_a_reserve(device: Device) -> None:
    runner = open_on(device, build("llama"), kv_budget=None, graphs=False)
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, numbers, bytes
    assert runner.pool.tokens == int(pretend_cuda.MEMORY * 0.9) // per_token
