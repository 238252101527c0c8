"""The scheduler alone, without a model: what it compares, and how long each of many predictions waits."""

import itertools
from dataclasses import replace

import pytest
import torch

from lmtp.engine import scheduler
from lmtp.engine.sampling import Choice
from lmtp.engine.scheduler import MAX_PASSED, Scheduler
from lmtp.engine.stream import Generation, OperationStream
from lmtp.prediction import Prediction
from lmtp.protocol import Generate
from lmtp.runners import slots
from lmtp.runners.model import Limits
from lmtp.runners.slots import Layer, Memory, Slots
from lmtp.runners.step import Step, StepLimits

CONTEXT = 8192
LIMITS = Limits(vocabulary=50_000, context=CONTEXT, end_of_sequence=())
PROMPT = list(range(1_000, 3_000))


class Loop:
    """A scheduler over slots whose every step computes nothing."""

    def __init__(self, max_slots: int = 64, chunk: int = 64, work: int = StepLimits.work) -> None:
        memory = Memory([Layer(heads=1, key_dim=1, value_dim=1, device=torch.device("cpu"))], torch.float32)
        self.runner = Slots(memory, 2**24, max_slots, CONTEXT)
        limits = StepLimits(chunk=chunk, busy_chunk=min(64, work), logits=10_000, drafts=0, work=work)
        self.runner.step_limits = limits  # type: ignore[attr-defined]
        self.scheduler = Scheduler(self.runner)  # type: ignore[arg-type]
        self.steps = 0

    def open(self, prompt: list[int], max_tokens: int, prediction: Prediction | None = None) -> Generation:
        """Add a stream, to a new prediction by default."""
        operation = Generate(stream_id=0, prompt=prompt, max_tokens=max_tokens)
        prediction = prediction or Prediction(lambda _: None)
        stream = Generation(prediction, operation, prompt, LIMITS, None, None)
        self.scheduler.add(stream)
        return stream

    def step(self) -> Step[OperationStream]:
        """One step. Streams that end are taken out."""
        step = self.scheduler.next_step()
        assert step is not None
        self.steps += 1
        for stream, count in zip(step.streams, step.counts, strict=True):
            wanted = stream.wanted(count)
            stream.advance(count)
            if wanted:
                stream.receive([Choice(7, 0.0, {})] * wanted)
        for stream in step.streams:
            if stream.finished:
                self.scheduler.remove(stream)
        return step

    def until(self, stream: OperationStream, most: int) -> int:
        """Steps until the stream takes part in one."""
        for count in range(1, most + 1):
            if stream in self.step().streams:
                return count
        raise AssertionError(f"it does not run within {most} steps")


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each comparison of two lists of tokens."""
    made: list[int] = []
    common_prefix = slots.common_prefix

    def counting(one: list[int], other: list[int]) -> int:
        made.append(len(other))
        return common_prefix(one, other)

    monkeypatch.setattr(slots, "common_prefix", counting)
    return made


def open_many(loop: Loop, predictions: int, streams: int) -> list[Generation]:
    """Streams with one long prefix."""
    opened = []
    for i in range(predictions):
        prediction = Prediction(lambda _: None)
        opened += [loop.open([*PROMPT, i, j], 2_000, prediction) for j in range(streams)]
    return opened


def test_streams_that_wait_for_a_prefix_are_compared_once_and_not_in_every_step(compared: list[int]) -> None:
    loop = Loop()
    leader = loop.open(PROMPT, 200)
    loop.step()
    many = open_many(loop, 40, 8)
    loop.step()
    assert 0 < len(compared) <= 2 * MAX_PASSED
    compared.clear()
    while leader.computed < len(PROMPT) - 2 * 64:
        loop.step()
    assert compared == []
    while not many[0].computed:
        loop.step()
    assert loop.steps <= len(PROMPT) // 64 + 3
    assert many[0].reused == len(PROMPT)


def test_streams_that_find_no_room_are_compared_once_and_not_in_every_step(compared: list[int]) -> None:
    loop = Loop(max_slots=4)
    running = open_many(loop, 1, 4)
    while not all(stream.decoding for stream in running):
        loop.step()
    open_many(loop, 40, 8)
    loop.step()
    while any(stream.slot >= 0 for stream in running[1:]):  # others take the places of all but one
        loop.step()
    compared.clear()
    for _ in range(100):
        loop.step()
    assert compared == []


def test_in_a_step_few_waiting_streams_are_compared_whoever_comes_and_goes(compared: list[int]) -> None:
    loop = Loop(max_slots=32)
    running = open_many(loop, 31, 1)
    while not all(stream.decoding for stream in running):
        loop.step()
    open_many(loop, 40, 8)
    prediction = Prediction(lambda _: None)
    for i in range(50):
        loop.open([5, i], 1, prediction)  # it ends with its first step
        compared.clear()
        loop.step()
        assert len(compared) <= 3 * MAX_PASSED


def test_a_new_prediction_is_admitted_at_once_however_many_wait_for_a_prefix() -> None:
    loop = Loop()
    loop.open(PROMPT, 200)
    loop.step()
    open_many(loop, 62, 16)
    victim = loop.open([3, 4, 5], 8)
    assert loop.until(victim, 2)


def test_a_stream_that_waits_for_a_prefix_goes_on_when_the_one_that_computes_it_is_gone() -> None:
    loop = Loop()
    leader = loop.open(PROMPT, 200)
    loop.step()
    follower = loop.open([*PROMPT, 5], 200)
    for _ in range(3):
        loop.step()
    assert follower.slot < 0
    loop.scheduler.remove(leader)
    assert loop.until(follower, 1)
    assert follower.reused == 4 * 64


def test_a_prediction_that_gave_way_runs_again_before_those_that_came_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "TURN", 20)
    loop = Loop(max_slots=2)
    long = [loop.open([i], 2_000) for i in (1, 2)]
    loop.step()
    for i in range(5):
        loop.open([10 + i], 2_000)
    for number in itertools.count():
        loop.open([100 + number], 2_000)  # in every step one more
        loop.step()
        if long[0].slot < 0:
            break
    before = 5 + number + 1
    for _ in range(before * 20):
        loop.open([5], 2_000)
        if long[0] in loop.step().streams:
            break
    assert long[0].slot >= 0
    assert loop.steps <= (before / 2 + 2) * 20


def test_a_long_prompt_is_computed_although_new_ones_come_in_every_step() -> None:
    loop = Loop()
    long = loop.open(PROMPT, 1)
    while not long.finished:
        loop.open([loop.steps] * 20, 1)
        loop.step()
        assert loop.steps < 3 * len(PROMPT) / 64


def test_a_new_prompt_does_not_wait_for_the_rest_of_the_one_that_had_the_last_step() -> None:
    loop = Loop()
    loop.open(PROMPT, 1)
    for _ in range(3):
        loop.step()
    assert loop.until(loop.open([3] * 20, 1), 1) == 1


WORK = 50
"""Tokens of a step that others wait for."""


def test_a_prompt_alone_is_computed_at_once_only_while_nobody_else_has_come_lately() -> None:
    loop = Loop(chunk=2_048, work=WORK)

    def most_tokens() -> int:
        """Of one step, while a new long prompt is computed alone."""
        long, counts = loop.open([loop.steps, *PROMPT[:1_500]], 1), [0]
        while not long.finished:
            counts.append(max(loop.step().counts))
        return max(counts)

    assert most_tokens() == 1_501
    both = [loop.open([i], 5) for i in (1, 2)]
    while not both[1].finished:
        loop.step()
    assert most_tokens() <= WORK
    alone = loop.open([3], scheduler.QUIET)
    while not alone.finished:
        loop.step()
    assert most_tokens() == 1_501


@pytest.mark.parametrize("decodes", [False, True])
def test_while_several_predictions_run_a_step_of_prompts_is_bounded_by_what_it_costs(decodes: bool) -> None:
    loop = Loop(chunk=2_048, work=WORK)
    others = [loop.open([i, *PROMPT[: 1 if decodes else 1_900]], 300) for i in range(3)]
    long = loop.open([9, *PROMPT], 2)
    while not long.finished:
        columns = long.computed
        step = loop.step()
        if long in step.streams and columns < len(PROMPT):
            tokens = max(step.counts) * len(step.streams)
            ends_all = not decodes and all(stream.decoding for stream in (*others, long))
            limit = scheduler.LAST_PROMPTS * WORK if ends_all else WORK
            assert tokens * StepLimits.cost(columns, together=True) <= limit + 1
    assert loop.steps > len(PROMPT) / WORK


def test_short_prompts_that_end_together_may_take_one_step() -> None:
    loop = Loop(chunk=2_048, work=WORK)
    several = [loop.open([i] * 45, 1) for i in range(scheduler.LAST_PROMPTS)]
    loop.step()
    assert all(stream.finished for stream in several)


@pytest.mark.parametrize(("packed", "counts"), [(False, [1, 1, 1]), (True, [6, 1, 1])])
def test_a_forced_run_rides_along_a_token_at_a_time_unless_nothing_is_padded(packed: bool, counts: list[int]) -> None:
    loop = Loop()
    loop.runner.step_limits = replace(loop.runner.step_limits, packed=packed)  # type: ignore[attr-defined]
    streams = [loop.open([i], 100) for i in range(3)]
    while not all(stream.decoding for stream in streams):
        loop.step()
    streams[0].tokens += [9] * 5
    assert loop.step().counts == counts


def test_after_a_step_that_found_no_memory_prompts_are_computed_in_shorter_chunks() -> None:
    loop = Loop(chunk=1000)
    loop.open(PROMPT, 9)
    step = loop.scheduler.next_step()
    assert step is not None
    assert step.counts == [1000]
    smaller = loop.scheduler.smaller(step)
    assert smaller is not None
    assert smaller.counts == [500]
    loop.scheduler.shorten(step)
    assert loop.step().counts == [500]
    while step.counts != [1]:
        loop.scheduler.shorten(step)
        step = loop.scheduler.smaller(step)
        assert step is not None
    assert loop.scheduler.smaller(step) is None
    assert loop.step().counts == [64]
