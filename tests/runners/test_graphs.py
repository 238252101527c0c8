"""The CUDA paths on a stand-in for a GPU, compared with the same model on the CPU; and on a GPU where there is one."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lmtp.engine.engine import Engine, LoadedModel
from lmtp.protocol import Generate, Operation, Score
from lmtp.runners import flash, graphs
from lmtp.runners.packed import PackedRunner
from lmtp.runners.runner import open_runner
from lmtp.runners.selfcheck import Reference, check_packed
from lmtp.runners.slot_runner import SlotRunner
from tests import pretend_cuda
from tests.pretend_cuda import Device, pretend_from_now_on, pretending, to_cuda
from tests.tiny import answers, build, random_prompts, start

SIZES = (1, 4, 16)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The stand-in, whose FlashAttention takes float32 too, so that tokens can be compared."""
    monkeypatch.setattr(flash, "DTYPES", (torch.float32,))
    monkeypatch.setattr(graphs, "BUCKETS", SIZES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small operations are faster without helping threads
    yield pretend_cuda.install(monkeypatch)
    torch.set_num_threads(threads)


def start_on(model: PreTrainedModel, **arguments: Any) -> Engine:
    """An engine whose thread takes the stand-in for a GPU, and keeps it; ``arguments`` are open_runner's."""
    tokenizer: Any = None

    def open_model() -> LoadedModel:
        pretend_from_now_on()
        return LoadedModel(to_cuda(model), tokenizer, open_runner(model, **arguments))

    return Engine(open_model)


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
    model = build("llama")
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
    "top-k and min-p": {"temperature": 0.8, "top_k": 40, "min_p": 0.1},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "biases": {"logit_bias": {7: 3.0}},
    "no end yet": {"min_tokens": 6},
}


def test_a_step_of_a_gpu_waits_once_however_its_streams_sample(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the numbers that it brings back."""
    step = Engine._step
    waited: list[int] = []

    def counted(self: Engine, some: Any) -> Any:
        device.log.clear()
        choices = step(self, some)
        if max(some.counts) == 1:
            waited.append(len(device.of_kind("sync")))
        return choices

    monkeypatch.setattr(Engine, "_step", counted)
    engine = start_on(build("llama"), kv_budget=2**19, graphs=False)
    try:
        for options in SAMPLING.values():
            waited.clear()
            answers(engine, *(Generate(stream_id=i, prompt=[5, i], max_tokens=8, seed=i, **options) for i in range(4)))
            assert waited
            assert set(waited) == {1}, options
        waited.clear()
        several = [Generate(stream_id=i, prompt=[5, i], max_tokens=8, **o) for i, o in enumerate(SAMPLING.values())]
        answers(engine, *several)
        assert set(waited) == {1}
    finally:
        engine.stop()


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

    def fail(self: graphs.Graphs, tokens: int) -> graphs.Graph:
        if tokens == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return record(self, tokens)

    monkeypatch.setattr(graphs.Graphs, "_record", fail)
    with caplog.at_level(logging.WARNING):
        runner = open_on(device, build("llama"))
    assert runner.recorded.sizes == [1, 16]
    assert caplog.messages == ["no CUDA graph for 4 tokens: OutOfMemoryError: CUDA out of memory."]
    assert runner.recorded.shape(3).tokens == 16
    assert runner.recorded.shape(17) is None


def test_the_self_check_replays_every_recording_on_different_tokens(device: Device) -> None:
    open_on(device, build("llama"))
    assert all(graph.replays >= 2 for graph in device.recorded)


class Freeing(graphs.Graphs):
    """Does not keep what its graphs read."""

    def _record(self, tokens: int) -> graphs.Graph:
        graph = super()._record(tokens)
        graph.packed = graph.packed.clone()
        graph.inputs = self._shape(tokens).split(graph.packed)
        return graph


class Stale(graphs.Graphs):
    """Replays on the tokens of the step before."""

    def run(self, shape: Any, packed: torch.Tensor, wanted: int) -> torch.Tensor:
        graph = self._graphs[shape.tokens]
        graph.recorded.replay()
        graph.packed.copy_(packed)
        return graph.logits[:wanted]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Freeing, "an illegal memory access"), (Stale, "positions differ from the model's own forward pass")],
)
def test_recordings_that_read_other_memory_than_the_steps_are_not_used(
    kind: type[graphs.Graphs], reason: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmtp.runners.runner.Graphs", kind)
    runner = open_on(device, build("llama"))
    assert runner.recorded is None
    assert reason in runner.reason


def test_an_engine_whose_device_has_failed_says_so_and_answers_everyone(device: Device) -> None:
    """Then the health check fails, and the platform replaces the container."""
    engine = start_on(build("llama"), kv_budget=2**16, graphs=False)
    greedy = Generate(stream_id=0, prompt=[5, 6, 7], max_tokens=4)
    assert len(answers(engine, greedy).ids()) == 4
    assert engine.problem == ""
    device.failed = True
    assert "CUDA error: device-side assert triggered" in answers(engine, greedy).error()
    assert "CUDA error: device-side assert triggered" in engine.problem
    assert answers(engine, greedy).error() == engine.problem
    engine.stop()


def test_graphs_can_be_switched_off(device: Device) -> None:
    runner = open_on(device, build("llama"), graphs=False)
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


def test_float32_and_an_old_gpu_get_slots(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (7, 5))
    reason = "FlashAttention needs a GPU of compute capability 8.0 or newer"
    assert open_on(device, build("llama")).reason == f"no packed tokens: {reason}"
    monkeypatch.setattr(flash, "DTYPES", (torch.bfloat16, torch.float16))
    assert open_on(device, build("llama")).reason == "no packed tokens: FlashAttention does not compute in float32"


def test_attention_by_cudnn_which_plans_anew_for_each_length_is_off(device: Device) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    open_on(device, build("llama"), graphs=False)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_pool_takes_what_is_free_but_a_reserve(device: Device) -> None:
    runner = open_on(device, build("llama"), kv_budget=None, graphs=False)
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, numbers, bytes
    assert runner.pool.tokens == int(pretend_cuda.MEMORY * 0.9) // per_token


@pytest.fixture
def real() -> PreTrainedModel:
    """A model in bfloat16 on the GPU."""
    model: Any = build("llama", head_dim=64)
    moved: PreTrainedModel = model.to("cuda", torch.bfloat16)
    return moved


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_attention_and_graphs_pass_the_self_check_on_a_gpu(real: PreTrainedModel) -> None:
    runner = open_runner(real)
    assert isinstance(runner, PackedRunner), runner.reason
    assert runner.recorded is not None, runner.reason
    assert runner.recorded.sizes == list(graphs.BUCKETS)
    check_packed(runner, Reference.of(real))
