"""One caller against the others: who waits how many steps, what is shared with whom, what comes back."""

import asyncio
import dataclasses
import gc
import math
import re
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoTokenizer, PreTrainedModel

from lmtp.engine import engine as engine_module
from lmtp.engine import sampling, scheduler
from lmtp.engine.compiler import Batch
from lmtp.engine.engine import Engine
from lmtp.engine.masks import Bias, stack
from lmtp.engine.stream import Generation, OperationStream, open_stream
from lmtp.protocol import BATCH_LIMIT, Failure, Generate, ModelInfo, RequestError, Score
from lmtp.runners import cache_runner, runner, step
from lmtp.runners.slots import Memory
from lmtp.runners.step import Step
from lmtp.settings import Bounds
from tests.tiny import VOCABULARY, Answers, answers, begin, build, collect, own_greedy, start
from tests.tiny import random_prompts as prompts


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    """`start`, and a stop for each engine at the end."""
    started: list[Engine] = []

    def start_one(*args: Any, **kwargs: Any) -> Engine:
        started.append(start(*args, **kwargs))
        return started[-1]

    yield start_one
    for engine in started:
        engine.stop()


class Watch:
    """Counts an engine's steps from a stream's opening to its end, and looks at what they compute."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waited: dict[object, int] = {}
        """Steps between opening and end of each stream, by its id."""
        self.preempted: Counter[object] = Counter()
        self.steps: list[tuple[list[object], list[int]]] = []
        """The ids and the counts of each step."""
        self._opened: dict[object, int] = {}
        turns, prepare = engine._scheduler, engine.runner.prepare
        add, remove, preempt = turns.add, turns.remove, turns._preempt

        def note_opened(stream: OperationStream) -> None:
            self._opened[stream.operation.stream_id] = len(self.steps)
            add(stream)

        def note_ended(stream: OperationStream, keep: bool = True) -> None:
            self.waited[stream.operation.stream_id] = len(self.steps) - self._opened[stream.operation.stream_id]
            remove(stream, keep)

        def note_preempted(stream: OperationStream) -> None:
            self.preempted[stream.operation.stream_id] += 1
            preempt(stream)

        def note_step(step: Step[OperationStream]) -> Callable[[], torch.Tensor]:
            self.steps.append(([stream.operation.stream_id for stream in step.streams], list(step.counts)))
            return prepare(step)

        monkeypatch.setattr(turns, "add", note_opened)
        monkeypatch.setattr(turns, "remove", note_ended)
        monkeypatch.setattr(turns, "_preempt", note_preempted)
        monkeypatch.setattr(engine.runner, "prepare", note_step)


VICTIM = 8
"""Tokens that the victim of each attack asks for. Alone it takes as many steps."""


VICTIM_OPERATION = Generate(stream_id="victim", prompt=[3, 4, 5, 6], max_tokens=VICTIM, min_tokens=VICTIM)


def dense_biases(count: int) -> Sequence[Generate]:
    biases = [{token: (token * i) % 7 / 10 for token in range(VOCABULARY)} for i in range(count)]
    return [
        Generate(stream_id=i, prompt=[5, 6, 7], max_tokens=300, min_tokens=300, logit_bias=bias)
        for i, bias in enumerate(biases)
    ]


LONG_PROMPTS = prompts(*[400] * 64, seed=1)
ATTACKS: dict[str, list[Sequence[Generate | Score]]] = {
    "as many long streams as a prediction may have": [
        [Generate(stream_id=i, prompt=[9, 8, 7], max_tokens=500, min_tokens=500) for i in range(BATCH_LIMIT)]
    ],
    "twice as many streams as there are slots": [
        [Generate(stream_id=f"{k}-{i}", prompt=[9, 8, 7], max_tokens=500, min_tokens=500) for i in range(BATCH_LIMIT)]
        for k in range(2)
    ],
    "the most likely tokens of long scores": [
        [Score(stream_id=i, prompt=[3], scored=prompt, top_logprobs=100) for i, prompt in enumerate(LONG_PROMPTS)]
    ],
    "long prompts": [
        [Generate(stream_id=i, prompt=prompt, max_tokens=100) for i, prompt in enumerate(LONG_PROMPTS)],
        [Generate(stream_id=i, prompt=prompt[::-1], max_tokens=100) for i, prompt in enumerate(LONG_PROMPTS)],
    ],
    "dense biases": [dense_biases(BATCH_LIMIT)] * 2,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_victim_waits_a_few_bounded_steps_whatever_others_ask_for(
    attack: str, model: PreTrainedModel, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(model)
    engine.runner.step_limits = dataclasses.replace(engine.runner.step_limits, chunk=256, busy_chunk=64)
    watch = Watch(engine, monkeypatch)
    attackers = [begin(engine, *operations) for operations in ATTACKS[attack]]
    next(iter(attackers[0]))
    victim = collect(begin(engine, VICTIM_OPERATION))
    for attacker in attackers:
        attacker.cancel()
    answers(engine, ModelInfo(stream_id=0))
    assert len(victim.ids("victim")) == VICTIM
    # Its prompt waits for one prefill of each attacker; while it decodes, every other step is a prefill of theirs.
    assert watch.waited["victim"] <= 2 * (VICTIM + len(attackers) + 1)
    limits = engine.runner.step_limits
    assert all(max(counts) * len(counts) <= max(limits.chunk, runner.MAX_SLOTS) for _, counts in watch.steps)


def test_streams_of_two_predictions_are_admitted_in_turns(
    model: PreTrainedModel, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MAX_SLOTS", 4)
    engine = engines(model)
    watch = Watch(engine, monkeypatch)
    many = [Generate(stream_id=f"a{i}", prompt=[9, 8, 7], max_tokens=20, min_tokens=20) for i in range(12)]
    first = begin(engine, *many)
    next(iter(first))
    second = begin(engine, *(replace(operation, stream_id=f"b{i}") for i, operation in enumerate(many)))
    collect(first)
    collect(second)
    begun = list(dict.fromkeys(stream for ids, _ in watch.steps for stream in ids))
    owners = "".join(str(stream)[0] for stream in begun)
    assert owners[:5] == "aaaab"  # four slots were taken, and one is given up
    assert sum(watch.preempted.values()) == 1
    halves = Counter(owners[5:17])
    assert abs(halves["a"] - halves["b"]) <= 2


def test_streams_that_give_way_go_on_where_they_were(
    model: PreTrainedModel, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled, greedy and scored ones, with and without what they had computed."""
    monkeypatch.setattr(runner, "MAX_SLOTS", 3)
    several = prompts(12, 30, 9, 20, seed=2)
    operations: list[Generate | Score] = [
        Generate(stream_id=0, prompt=several[0], max_tokens=60),
        Generate(stream_id=1, prompt=several[1], max_tokens=60, temperature=1.0, seed=5, presence_penalty=0.5),
        Score(stream_id=2, prompt=several[2], scored=prompts(300, seed=3)[0], top_logprobs=2),
        Score(stream_id=3, prompt=[], scored=prompts(200, seed=4)[0]),
        Generate(stream_id=4, prompt=several[3], max_tokens=60, temperature=1.0, seed=6, logit_bias={7: 2.0, 9: -100}),
    ]
    alone = engines(model)
    expected = {operation.stream_id: answers(alone, operation).tokens(operation.stream_id) for operation in operations}
    victim = answers(alone, VICTIM_OPERATION).ids("victim")
    engine = engines(model)
    engine.runner.step_limits = dataclasses.replace(engine.runner.step_limits, chunk=40, busy_chunk=20)
    watch = Watch(engine, monkeypatch)
    heavy = begin(engine, *operations)
    received = list(next(iter(heavy)))
    for _ in range(8):
        assert collect(begin(engine, VICTIM_OPERATION)).ids("victim") == victim
    batch = Answers(received + [reply for replies in heavy for reply in replies], heavy.counters)
    assert watch.preempted
    assert batch.counters.reused_tokens == 0  # a stream's own tokens were not computed for another
    for stream_id, tokens in expected.items():
        assert batch.ids(stream_id) == [token.token for token in tokens]
        assert [t.logprob for t in batch.tokens(stream_id)] == pytest.approx([t.logprob for t in tokens], abs=1e-4)
        assert batch.tokens(stream_id)[-1].finish_reason == tokens[-1].finish_reason


def test_a_stream_whose_memory_nobody_took_computes_one_token_again_at_most(
    model: PreTrainedModel, engines: Callable[..., Engine]
) -> None:
    engine = engines(model)
    (prompt,) = prompts(50, seed=5)
    turns = engine._scheduler
    next_step = turns.next_step
    preempted = []

    def preempt_often() -> Step[OperationStream] | None:
        for stream in list(turns._active()):
            if stream.computed > 50 and stream.computed % 7 == 0 and stream.computed not in preempted:
                preempted.append(stream.computed)
                turns._preempt(stream)
        return next_step()

    turns.next_step = preempt_often  # type: ignore[method-assign]
    batch = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=60, min_tokens=60))
    assert len(preempted) > 3
    assert batch.counters.computed_tokens == 50 + 59
    assert (
        batch.ids() == answers(start(model), Generate(stream_id=0, prompt=prompt, max_tokens=60, min_tokens=60)).ids()
    )


def test_a_constrained_stream_that_gives_way_stays_within_its_constraint(
    model: PreTrainedModel, engines: Callable[..., Engine], demo_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_weights)
    monkeypatch.setattr(runner, "MAX_SLOTS", 2)
    wide = build("llama", vocab_size=49152)
    constrained = [
        Generate(
            stream_id=i, prompt=[3 + i], max_tokens=120, regex="(ab|cd|ef){30}x", temperature=1.0, seed=i, text=True
        )
        for i in range(4)
    ]
    alone = engines(wide, tokenizer)
    expected = [
        [token.token for token in answers(alone, operation).tokens(i)] for i, operation in enumerate(constrained)
    ]
    engine = engines(wide, tokenizer)
    watch = Watch(engine, monkeypatch)
    heavy = begin(engine, *constrained)
    received = list(next(iter(heavy)))
    for _ in range(5):
        collect(begin(engine, VICTIM_OPERATION))
    batch = Answers(received + [reply for replies in heavy for reply in replies], heavy.counters)
    assert watch.preempted
    assert [batch.ids(i) for i in range(4)] == expected
    for i in range(4):
        assert re.fullmatch("(ab|cd|ef){30}x", "".join(str(token.text) for token in batch.tokens(i)))


def test_a_prediction_that_fills_the_memory_gives_way_after_its_turn(
    model: PreTrainedModel, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "TURN", 50)
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, bytes
    engine = engines(model, kv_budget=per_token * 400)
    watch = Watch(engine, monkeypatch)
    long = Generate(stream_id="long", prompt=[9, 8, 7], max_tokens=380, min_tokens=380)
    first = begin(engine, long)
    received = list(next(iter(first)))
    collect(begin(engine, VICTIM_OPERATION))
    assert watch.waited["victim"] <= 50 + VICTIM + 1
    received += [reply for replies in first for reply in replies]
    assert Answers(received, first.counters).ids("long") == answers(engine, long).ids("long")


def test_the_models_own_caches_are_given_up_and_taken_back_too(
    engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_runner, "MAX_STREAMS", 3)
    mamba = build("mamba")
    engine = engines(mamba)
    watch = Watch(engine, monkeypatch)
    several = prompts(5, 9, 13, 7, seed=6)
    heavy = begin(engine, *(Generate(stream_id=i, prompt=p, max_tokens=40) for i, p in enumerate(several)))
    received = list(next(iter(heavy)))
    for _ in range(3):
        assert collect(begin(engine, VICTIM_OPERATION)).tokens("victim")
    batch = Answers(received + [reply for replies in heavy for reply in replies], heavy.counters)
    assert watch.preempted
    assert [batch.ids(i) for i in range(4)] == [own_greedy(mamba, prompt, 40) for prompt in several]


SECRET = prompts(40, seed=7)[0]


def reused(engine: Engine, operation: Generate | Score) -> int:
    return answers(engine, operation).counters.reused_tokens


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
@pytest.mark.parametrize(
    ("prefix_reuse", "first", "second", "shared"),
    [
        ("shared", None, None, True),
        ("shared", "a", "a", True),
        ("shared", None, "a", False),
        ("shared", "a", None, False),
        ("shared", "a", "b", False),
        ("shared", "", None, True),
        ("salted", None, None, False),
        ("salted", "a", "a", True),
        ("salted", "a", None, False),
        ("off", None, None, False),
        ("off", "a", "a", False),
    ],
)
def test_prefixes_are_shared_only_under_equal_salts(
    engines: Callable[..., Engine],
    architecture: str,
    prefix_reuse: str,
    first: str | None,
    second: str | None,
    shared: bool,
) -> None:
    engine = engines(build(architecture), bounds=Bounds(prefix_reuse=prefix_reuse))
    answers(engine, Generate(stream_id=0, prompt=SECRET, max_tokens=1, cache_salt=first))
    guess = [*SECRET, 5]
    assert (reused(engine, Generate(stream_id=0, prompt=guess, max_tokens=1, cache_salt=second)) > 0) == shared


@pytest.mark.parametrize(("salt", "waits"), [("a", True), ("b", False), (None, False)])
def test_a_stream_waits_for_and_copies_a_running_prefix_only_under_its_own_salt(
    engines: Callable[..., Engine], model: PreTrainedModel, salt: str | None, waits: bool
) -> None:
    engine = engines(model)
    running = begin(engine, Generate(stream_id=0, prompt=SECRET, max_tokens=300, min_tokens=300, cache_salt="a"))
    next(iter(running))
    again = answers(engine, Score(stream_id=0, prompt=SECRET, scored=[5, 6], cache_salt=salt))
    assert (again.counters.reused_tokens > 0) == waits
    running.cancel()


def test_streams_of_one_prediction_share_their_prompt_unless_reuse_is_off(
    engines: Callable[..., Engine], model: PreTrainedModel
) -> None:
    scores = [Score(stream_id=i, prompt=SECRET, scored=[i + 5, 6]) for i in range(4)]
    alone = len(SECRET) + 1
    for prefix_reuse, computed in (("shared", alone + 3 * 2), ("salted", alone + 3 * 2), ("off", 4 * alone)):
        engine = engines(model, bounds=Bounds(prefix_reuse=prefix_reuse))
        assert answers(engine, *scores).counters.computed_tokens <= computed
        assert (answers(engine, *scores).counters.reused_tokens == 0) == (prefix_reuse == "off")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_prediction_is_ended_after_max_seconds_and_no_other(
    engines: Callable[..., Engine], model: PreTrainedModel
) -> None:
    clock = Clock()
    engine = engines(model, bounds=Bounds(max_seconds=10), clock=clock)
    endless = Generate(stream_id=0, prompt=[5, 6], max_tokens=500, min_tokens=500)
    first = begin(engine, endless, replace(endless, stream_id=1))
    next(iter(first))
    clock.now = 9.0
    second = begin(engine, replace(endless, max_tokens=5, min_tokens=5))
    next(iter(second))
    clock.now = 10.5
    replies = [reply for replies in first for reply in replies]
    assert [(r.stream_id, r.error) for r in replies if isinstance(r, Failure)] == [
        (0, "took longer than MAX_SECONDS (10 s)."),
        (1, "took longer than MAX_SECONDS (10 s)."),
    ]
    assert not any(isinstance(reply, Failure) for replies in second for reply in replies)
    assert engine.runner.active == []
    unbounded = engines(model, bounds=Bounds(max_seconds=0), clock=clock)
    third = begin(unbounded, replace(endless, max_tokens=50, min_tokens=50))
    clock.now = 10_000.0
    assert len(collect(third).ids()) == 50


def test_the_time_of_a_prediction_includes_tokenizing_and_compiling(
    engines: Callable[..., Engine], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    engine = engines(model, bounds=Bounds(max_seconds=10), clock=clock)

    async def slowly(*_: object) -> None:
        clock.now += 6.0

    monkeypatch.setattr(Batch, "grammar", slowly)
    endless = Generate(stream_id=0, prompt=[5, 6], max_tokens=500, min_tokens=500)
    assert "MAX_SECONDS" in answers(engine, endless, replace(endless, stream_id=1)).error(1)
    clock.now = 100.0
    prediction = asyncio.run(engine.predict([endless], began=95.0))
    assert "MAX_SECONDS" in collect(prediction).error()


def test_what_takes_too_long_before_the_streams_open_is_ended(
    engines: Callable[..., Engine], model: PreTrainedModel
) -> None:
    engine = engines(model, bounds=Bounds(max_seconds=10), clock=lambda: 100.0)

    async def prepare(began: float) -> bool:
        async with engine.preparing(began):
            await asyncio.sleep(0.001)
        return True

    assert asyncio.run(prepare(began=99.0))
    with pytest.raises(RequestError, match=r"took longer than MAX_SECONDS \(10 s\)"):
        asyncio.run(prepare(began=80.0))
    assert asyncio.run(engines_without_limit(engine, prepare))


async def engines_without_limit(engine: Engine, prepare: Callable[[float], Awaitable[bool]]) -> bool:
    engine.bounds = Bounds(max_seconds=0)
    return await prepare(0.0)


def test_zero_unread_bytes_and_top_logprobs_are_no_limits(
    engines: Callable[..., Engine], model: PreTrainedModel
) -> None:
    engine = engines(model, bounds=Bounds(max_unread_bytes=0, max_top_logprobs=0, max_prompt_bytes=0))
    unread = begin(engine, Generate(stream_id=0, prompt=[5, 6], max_tokens=50, min_tokens=50, top_logprobs=120))
    for _ in range(8):
        collect(begin(engine, VICTIM_OPERATION))
    assert not unread.turns.paused
    assert len(collect(unread).ids()) == 50
    engine.tokenizers.check("prompt", "x" * 1_000_000)


def test_a_prediction_pauses_while_its_replies_are_not_taken_and_loses_nothing(
    engines: Callable[..., Engine], model: PreTrainedModel
) -> None:
    engine = engines(model, bounds=Bounds(max_unread_bytes=20_000))
    operation = Generate(stream_id=0, prompt=[5, 6], max_tokens=400, min_tokens=400, top_logprobs=3)
    slow = begin(engine, operation)
    while not slow.turns.paused:  # the engine goes on until then
        collect(begin(engine, VICTIM_OPERATION))
    assert engine.runner.active == []
    assert slow.unread < 25_000
    assert len(collect(begin(engine, VICTIM_OPERATION)).ids("victim")) == VICTIM
    assert collect(slow).ids() == answers(engine, operation).ids()
    assert slow.unread == 0


def test_a_prediction_whose_replies_nobody_takes_is_ended(
    engines: Callable[..., Engine], model: PreTrainedModel
) -> None:
    clock = Clock()
    engine = engines(model, bounds=Bounds(max_unread_bytes=20_000, max_unread_seconds=60), clock=clock)
    operation = Generate(stream_id=0, prompt=[5, 6], max_tokens=400, min_tokens=400)
    unread = begin(engine, operation)
    while not unread.turns.paused:
        collect(begin(engine, VICTIM_OPERATION))
    clock.now = 61.0
    collect(begin(engine, VICTIM_OPERATION))
    *_, last = (reply for replies in unread for reply in replies)
    assert isinstance(last, Failure)
    assert "not taken within MAX_UNREAD_SECONDS (60 s)" in last.error


def test_top_logprobs_over_the_limit_are_refused(engines: Callable[..., Engine], model: PreTrainedModel) -> None:
    engine = engines(model, bounds=Bounds(max_top_logprobs=5))
    batch = answers(
        engine,
        Generate(stream_id=0, prompt=[5], top_logprobs=6),
        Score(stream_id=1, prompt=[5], scored=[6], top_logprobs=2**31 - 1),
        Generate(stream_id=2, prompt=[5], top_logprobs=5, max_tokens=2, min_tokens=2),
    )
    assert batch.error(0) == "top_logprobs is 6; MAX_TOP_LOGPROBS is 5."
    assert batch.error(1) == "top_logprobs is 2147483647; MAX_TOP_LOGPROBS is 5."
    assert len(batch.ids(2)) == 2


def test_the_memory_of_what_was_refused_ended_or_cancelled_comes_back(
    engines: Callable[..., Engine], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(model, bounds=Bounds(max_top_logprobs=5))
    streams: list[weakref.ref[Any]] = []

    def noting(*arguments: Any) -> OperationStream:
        stream = open_stream(*arguments)
        streams.append(weakref.ref(stream))
        if isinstance(stream, Generation) and stream.bias:
            streams.append(weakref.ref(stream.bias))
        return stream

    monkeypatch.setattr(engine_module, "open_stream", noting)
    cancelled = begin(engine, *dense_biases(64))
    next(iter(cancelled))
    cancelled.cancel()
    refused = answers(engine, *(Score(stream_id=i, prompt=[3], scored=[4], top_logprobs=99) for i in range(64)))
    answers(engine, Generate(stream_id=0, prompt=[3], max_tokens=2))
    predictions = [weakref.ref(cancelled)]
    del cancelled, refused
    answers(engine, ModelInfo(stream_id=0))
    gc.collect()
    assert len(streams) >= 129
    assert [ref for ref in [*streams, *predictions] if ref()] == []
    assert sampling.stacked_biases.cache_info().currsize == 0


def test_biases_take_a_bit_a_token_and_their_numbers(engines: Callable[..., Engine], model: PreTrainedModel) -> None:
    dense = torch.zeros(50_000)
    dense[7:40_000] = -math.inf
    dense[3], dense[49_999] = 2.5, -1.0
    bias = Bias.of(dense)
    assert sum(tensor.numel() * tensor.element_size() for tensor in (bias.bits, bias.ids, bias.numbers)) < 6_300
    assert torch.equal(stack([bias, bias], 50_000, dense.device), torch.stack([dense, dense]))
    assert [bias.forbids(token) for token in (6, 7, 39_999, 40_000, 49_999)] == [False, True, True, False, False]


@pytest.mark.parametrize("depth", [100, 300, 600, 900])
def test_a_constraint_nested_deep_fails_alone(
    engines: Callable[..., Engine], model: PreTrainedModel, depth: int
) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    batch = answers(
        engines(model),
        Generate(stream_id=0, prompt=[5], json_schema=schema),
        Generate(stream_id=1, prompt=[5], max_tokens=2, min_tokens=2),
    )
    assert batch.error(0)
    assert len(batch.ids(1)) == 2


PER_TOKEN = 2 * 2 * 2 * 8 * 4
"""Bytes: layers, keys and values, heads, dim, float32."""


def test_one_that_finds_no_room_lets_others_pass_and_does_not_starve(
    model: PreTrainedModel, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "TURN", 60)
    engine = engines(model, kv_budget=PER_TOKEN * 450)
    watch = Watch(engine, monkeypatch)
    runs = begin(engine, Generate(stream_id="runs", prompt=[9, 8, 7], max_tokens=100, min_tokens=100))
    next(iter(runs))
    big = begin(engine, Generate(stream_id="big", prompt=LONG_PROMPTS[0], max_tokens=5, min_tokens=5))
    small = replace(VICTIM_OPERATION, max_tokens=20, min_tokens=20)
    while "big" not in watch.waited:
        collect(begin(engine, replace(small, stream_id="small")))
        assert watch.waited["small"] <= 20 + 3 + 2 * (60 + 20) * ("big" in watch.waited)
    assert watch.waited["big"] <= 3 * 60
    assert len([ids for ids, _ in watch.steps if "small" in ids and "runs" in ids]) >= 40
    assert len(collect(big).ids("big")) == 5
    runs.cancel()


def test_those_that_gave_way_do_not_pass_the_one_they_gave_way_to(
    model: PreTrainedModel, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "TURN", 60)
    engine = engines(model, kv_budget=PER_TOKEN * 450)
    watch = Watch(engine, monkeypatch)
    many = begin(engine, *(Generate(stream_id=i, prompt=[9, 8, 7], max_tokens=90, min_tokens=90) for i in range(4)))
    next(iter(many))
    big = begin(engine, Generate(stream_id="big", prompt=LONG_PROMPTS[0], max_tokens=5, min_tokens=5))
    assert len(collect(big).ids("big")) == 5
    assert sum(watch.preempted.values()) <= 4 + 1  # each at most once for it, and none in turn with it
    assert watch.waited["big"] <= 2 * 60
    many.cancel()


def test_nobody_gives_way_where_the_system_has_no_memory(
    model: PreTrainedModel, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(model)
    watch = Watch(engine, monkeypatch)
    many = begin(engine, *(Generate(stream_id=i, prompt=[9, 8], max_tokens=30, min_tokens=30) for i in range(4)))
    next(iter(many))

    resize = Memory.resize

    def full(memory: Memory, slots: int, capacity: int, held: Sequence[int] = ()) -> None:
        if capacity > memory.capacity:
            raise torch.OutOfMemoryError("no memory for keys and values")
        resize(memory, slots, capacity, held)

    monkeypatch.setattr(Memory, "resize", full)
    late = begin(engine, Generate(stream_id="late", prompt=LONG_PROMPTS[0], max_tokens=5))
    short = begin(engine, VICTIM_OPERATION)
    collect(many)
    assert "no memory for keys and values" in collect(late).error("late")
    assert len(collect(short).ids("victim")) == VICTIM
    assert not watch.preempted


@pytest.mark.parametrize("others", ["prompts", "streams"])
def test_a_step_has_a_bound_on_its_tokens_and_what_they_attend_to(
    others: str, model: PreTrainedModel, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(model)
    monkeypatch.setattr(step, "DECODE_COLUMNS", 50)
    monkeypatch.setattr(step, "CHUNK_COLUMNS", 100)
    limits = engine.runner.step_limits = dataclasses.replace(
        engine.runner.step_limits, work=30, busy_chunk=30, chunk=100, drafts=0
    )
    costs: list[float] = []
    prepare = engine.runner.prepare

    def noting(taken: Step[OperationStream]) -> Callable[[], torch.Tensor]:
        columns = max(stream.computed for stream in taken.streams)
        chunk = max(taken.counts)
        costs.append(len(taken.streams) * chunk * limits.cost(columns, together=chunk > 1))
        return prepare(taken)

    monkeypatch.setattr(engine.runner, "prepare", noting)
    watch = Watch(engine, monkeypatch)
    many = [Generate(stream_id=i, prompt=p, max_tokens=20, min_tokens=20) for i, p in enumerate(LONG_PROMPTS[:8])]
    if others == "streams":
        many = [replace(each, prompt=each.prompt[:40], max_tokens=90, min_tokens=90) for each in many]
    attacker = begin(engine, *many)
    received = list(next(iter(attacker)))
    for _ in range(3):
        assert len(collect(begin(engine, VICTIM_OPERATION)).ids("victim")) == VICTIM
        assert watch.waited["victim"] <= 2 * (VICTIM + 2)
    batch = Answers(received + [reply for replies in attacker for reply in replies], attacker.counters)
    assert max(costs) <= 30 * 1.05 + 1
    assert any(len(ids) > 1 for ids, _ in watch.steps)
    for i in (0, 7):
        assert batch.ids(i) == answers(engine, many[i]).ids(i)


def test_streams_that_do_not_fit_into_one_step_decode_in_turn(
    model: PreTrainedModel, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(model)
    engine.runner.step_limits = dataclasses.replace(engine.runner.step_limits, work=4, drafts=0)
    watch = Watch(engine, monkeypatch)
    several = [begin(engine, replace(VICTIM_OPERATION, stream_id=i, max_tokens=40, min_tokens=40)) for i in range(10)]
    for prediction in several:
        collect(prediction)
    decoded = [ids for ids, counts in watch.steps if max(counts) == 1]
    assert max(map(len, decoded)) <= 4
    alone = [i for i, ids in enumerate(decoded) if len(set(ids)) == 1 and i > 20]
    assert len(alone) < len(decoded) // 2  # they share steps although they did not begin together
    assert max(watch.waited.values()) <= 40 * 10 // 2 + 10  # and a step for each prompt


def test_prompts_of_different_predictions_are_computed_in_turn(
    model: PreTrainedModel, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(model)
    engine.runner.step_limits = dataclasses.replace(engine.runner.step_limits, chunk=64, busy_chunk=64)
    watch = Watch(engine, monkeypatch)
    attacker = begin(engine, *ATTACKS["long prompts"][0])
    next(iter(attacker))
    answers(engine, Generate(stream_id="victim", prompt=prompts(200, seed=9)[0], max_tokens=1))
    attacker.cancel()
    answers(engine, ModelInfo(stream_id=0))
    assert (
        watch.waited["victim"] <= 2 * 2 * 4
    )  # four chunks; a chunk of theirs and a decode step between two of its own
