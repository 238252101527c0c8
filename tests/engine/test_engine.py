"""What must always hold (docs/architecture.md), against Transformers itself, on many architectures."""

import asyncio
import base64
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lmtp.engine import sampling
from lmtp.engine.engine import Engine, LoadedModel
from lmtp.engine.masks import Allowed
from lmtp.engine.stream import OperationStream
from lmtp.protocol import Failure, Generate, ModelInfo, Score
from lmtp.runners.cache_runner import CacheRunner
from lmtp.runners.runner import open_runner
from lmtp.runners.slot_runner import SlotRunner
from lmtp.runners.slots import Memory
from lmtp.runners.step import Step
from tests.tiny import (
    ARCHITECTURES,
    CACHE_MODELS,
    END,
    VOCABULARY,
    answers,
    begin,
    build,
    collect,
    own_greedy,
    own_logits,
    running,
    start,
)
from tests.tiny import random_prompts as prompts

Pair = tuple[PreTrainedModel, Engine]


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *CACHE_MODELS])
def any_model(request: pytest.FixtureRequest) -> Iterator[Pair]:
    for model, engine in running(request.param):
        assert isinstance(engine.runner, CacheRunner if request.param in CACHE_MODELS else SlotRunner)
        yield model, engine


@pytest.fixture(scope="module")
def llama() -> Iterator[Pair]:
    yield from running("llama")


def test_greedy_streams_equal_generate_alone_and_in_a_batch_of_uneven_prompts(any_model: Pair) -> None:
    model, engine = any_model
    several = prompts(3, 17, 41, 9)
    several.append(several[2][:30] + several[0])
    batch = answers(engine, *(Generate(stream_id=i, prompt=p, max_tokens=24) for i, p in enumerate(several)))
    for i, prompt in enumerate(several):
        expected = own_greedy(model, prompt, 24)
        assert batch.ids(i) == expected
        assert answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=24)).ids() == expected


def test_a_text_continued_in_chunks_equals_generate_in_one_go(any_model: Pair) -> None:
    model, engine = any_model
    (prompt,) = prompts(20, seed=5)
    expected = own_greedy(model, prompt, 32)
    text = list(prompt)
    for _ in range(4):
        text += answers(engine, Generate(stream_id=0, prompt=text, max_tokens=8)).ids()
        if text[-1] == END:
            break
    assert text[len(prompt) :] == expected


def test_logprobs_of_generated_tokens_are_those_of_one_plain_forward_pass(any_model: Pair) -> None:
    model, engine = any_model
    several = prompts(5, 30, 12, seed=1)
    batch = answers(
        engine,
        *(
            Generate(stream_id=i, prompt=p, max_tokens=10, temperature=0.9, seed=i, top_logprobs=4)
            for i, p in enumerate(several)
        ),
    )
    for i, prompt in enumerate(several):
        logprobs = torch.log_softmax(own_logits(model, prompt + batch.ids(i)), -1)
        for offset, token in enumerate(batch.tokens(i)):
            row = logprobs[len(prompt) - 1 + offset]
            assert token.logprob == pytest.approx(row[token.token].item(), abs=1e-4)
            assert isinstance(token.top_logprobs, dict)
            best = row.topk(4)
            assert list(token.top_logprobs.values())[:4] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert set(token.top_logprobs) >= set(best.indices.tolist())
            assert token.token in token.top_logprobs


def test_scores_are_those_of_one_plain_forward_pass(any_model: Pair) -> None:
    model, engine = any_model
    prompt, *scored = prompts(25, 1, 4, 9, seed=2)
    batch = answers(
        engine, *(Score(stream_id=i, prompt=prompt, scored=s, top_logprobs=2) for i, s in enumerate(scored))
    )
    for i, tokens in enumerate(scored):
        logprobs = torch.log_softmax(own_logits(model, prompt + tokens), -1)
        expected = [logprobs[len(prompt) - 1 + j, token].item() for j, token in enumerate(tokens)]
        assert batch.ids(i) == tokens
        assert [t.logprob for t in batch.tokens(i)] == pytest.approx(expected, abs=1e-4)
        assert [t.finish_reason for t in batch.tokens(i)] == [None] * (len(tokens) - 1) + ["stop"]


def test_a_seeded_stream_is_the_same_alone_and_in_any_batch(any_model: Pair) -> None:
    _, engine = any_model
    wanted, *others = prompts(14, 3, 33, 14, seed=3)
    seeded = Generate(stream_id=0, prompt=wanted, max_tokens=16, temperature=1.2, top_p=0.95, seed=7)
    alone = answers(engine, seeded).ids()
    crowd = [Generate(stream_id=i + 1, prompt=p, max_tokens=16, temperature=0.7, seed=i) for i, p in enumerate(others)]
    assert answers(engine, *crowd[:2], seeded, *crowd[2:]).ids() == alone
    assert answers(engine, seeded).ids() == alone


def test_a_cancelled_prediction_holds_no_slot_and_harms_no_other(any_model: Pair) -> None:
    model, engine = any_model
    long, short = prompts(10, 12, seed=4)

    with begin(engine, Generate(stream_id=0, prompt=long, max_tokens=400, min_tokens=400)) as abandoned:
        other = begin(engine, Generate(stream_id=0, prompt=short, max_tokens=20))
        next(iter(abandoned))
    ids = collect(other).ids()
    answers(engine, ModelInfo(stream_id=0))  # the engine has taken the cancellation once it answers this
    assert engine.runner.active == []
    assert ids == own_greedy(model, short, 20)


def test_iterating_over_a_cancelled_prediction_raises(any_model: Pair) -> None:
    _, engine = any_model
    prediction = begin(engine, Generate(stream_id=0, prompt=prompts(10)[0], max_tokens=400, min_tokens=400))
    prediction.cancel()
    with pytest.raises(asyncio.CancelledError):
        collect(prediction)
    answers(engine, ModelInfo(stream_id=0))
    assert engine.runner.active == []


def test_only_tokens_that_a_mask_allows_are_generated_and_their_logprobs_sum_to_one(any_model: Pair) -> None:
    _, engine = any_model
    (prompt,) = prompts(8)
    allowed = {5, 17, 40, 99}
    one_of = Generate(
        stream_id=0,
        prompt=prompt,
        max_tokens=30,
        temperature=3.0,
        seed=1,
        top_logprobs=10,
        logit_bias=dict.fromkeys(allowed, 100.0),
    )
    bits = np.packbits([i in allowed for i in range(VOCABULARY)], bitorder="little").tobytes()
    by_bits = Generate(
        stream_id=1,
        prompt=prompt,
        max_tokens=30,
        temperature=3.0,
        seed=1,
        top_logprobs=10,
        mask=base64.b64encode(bits).decode(),
    )
    others = dict.fromkeys(set(range(VOCABULARY)) - allowed, -100.0)
    but_others = Generate(
        stream_id=2, prompt=prompt, max_tokens=30, temperature=3.0, seed=1, top_logprobs=10, logit_bias=others
    )
    batch = answers(engine, one_of, by_bits, but_others, Generate(stream_id=3, prompt=prompt))
    assert batch.ids(0) == batch.ids(1) == batch.ids(2)
    assert set(batch.ids(0)) <= allowed
    for token in batch.tokens(0):
        assert isinstance(token.top_logprobs, dict)
        assert set(token.top_logprobs) == allowed
        assert np.exp(list(token.top_logprobs.values())).sum() == pytest.approx(1.0, abs=1e-4)


def test_a_finished_prediction_ends_before_the_others_have_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(build("llama"))
    ended, seen = threading.Event(), set[object]()
    prepare = engine.runner.prepare

    def prepare_waiting(step: Step[OperationStream]) -> Callable[[], torch.Tensor]:
        active = {stream.operation.stream_id for stream in step.streams}
        finished = "short" in seen - active
        seen.update(active)
        run = prepare(step)

        def run_waiting() -> torch.Tensor:
            assert not finished or ended.wait(30)
            return run()

        return run_waiting

    monkeypatch.setattr(engine.runner, "prepare", prepare_waiting)
    long = begin(engine, Generate(stream_id="long", prompt=prompts(6)[0], max_tokens=40, min_tokens=40))
    answers(engine, Generate(stream_id="short", prompt=prompts(5)[0], max_tokens=3))
    ended.set()
    assert len(collect(long).ids("long")) == 40
    engine.stop()


def test_what_one_prediction_leaves_changes_no_other(llama: Pair) -> None:
    model, _ = llama
    engine = start(model)
    shared, *tails = prompts(50, 3, 5, 7, 9, seed=6)
    for tail in tails * 2:
        assert answers(engine, Generate(stream_id=0, prompt=shared + tail)).ids() == own_greedy(
            model, shared + tail, 32
        )
    engine.stop()


def test_no_prompt_token_whose_keys_are_in_a_slot_is_computed_again_but_the_last(llama: Pair) -> None:
    model, _ = llama
    engine = start(model)
    prompt, tail = prompts(60, 10, seed=7)
    first = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=8, min_tokens=8))
    assert first.counters.computed_tokens == 60 + 7
    again = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=1))
    assert (again.counters.reused_tokens, again.counters.computed_tokens) == (59, 1)
    longer = answers(engine, Generate(stream_id=0, prompt=prompt + tail, max_tokens=1))
    assert (longer.counters.reused_tokens, longer.counters.computed_tokens) == (60, 10)
    engine.stop()


def test_streams_of_one_moment_share_their_steps(llama: Pair) -> None:
    model, _ = llama
    engine = start(model)
    several = prompts(*[12] * 8, seed=11)
    batch = answers(
        engine, *(Generate(stream_id=i, prompt=p, max_tokens=9, min_tokens=9) for i, p in enumerate(several))
    )
    assert batch.counters.steps == 1 + 8  # the prompts as one batch, then a token of each
    assert batch.counters.rows == 8 * batch.counters.steps
    assert engine.counters.steps == batch.counters.steps
    engine.stop()


def test_a_long_prompt_is_computed_in_turns_with_the_streams_that_decode(
    llama: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = llama
    engine = start(model)
    engine.runner.step_limits = replace(engine.runner.step_limits, busy_chunk=50)
    short, long = prompts(5, 400, seed=12)

    prepare = engine.runner.prepare
    steps: list[Sequence[int]] = []

    def noting(step: Step[OperationStream]) -> Callable[[], torch.Tensor]:
        steps.append(step.counts)
        return prepare(step)

    monkeypatch.setattr(engine.runner, "prepare", noting)
    first = begin(engine, Generate(stream_id=0, prompt=short, max_tokens=40, min_tokens=40))
    next(iter(first))
    answers(engine, Generate(stream_id=1, prompt=long, max_tokens=1))
    collect(first)
    chunks = [i for i, counts in enumerate(steps) if max(counts) > 1][1:]  # the first one is the short prompt
    assert len(chunks) == 8
    assert all(steps[i] in ([50], [42]) for i in chunks)
    assert all(steps[i - 1] == [1, 1] for i in chunks)  # a decode step before each, where the long one rides along
    engine.stop()


def test_options_scored_at_once_compute_their_prompt_once(llama: Pair) -> None:
    model, _ = llama
    engine = start(model)
    prompt, *options = prompts(200, *[3] * 16, seed=8)

    predictions = [begin(engine, Score(stream_id=0, prompt=prompt, scored=option)) for option in options]
    computed = [collect(prediction).counters.computed_tokens for prediction in predictions]
    assert computed[0] == 202
    assert sum(computed[1:]) <= 15 * 3
    engine.stop()


def test_every_end_of_sequence_id_of_either_configuration_ends_a_stream() -> None:
    model = build("llama")
    (prompt,) = prompts(6)
    following = own_greedy(model, prompt, 3)
    model.generation_config.eos_token_id = [END, following[1]]
    engine = start(model)
    tokens = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=3)).tokens()
    assert [t.token for t in tokens] == following[:2]
    assert tokens[-1].finish_reason == "stop"
    longer = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=3, min_tokens=3)).ids()
    assert len(longer) == 3
    assert following[1] not in longer[:2]
    engine.stop()


def test_a_stream_ends_with_length_at_max_tokens_and_at_the_end_of_the_context(llama: Pair) -> None:
    _, engine = llama
    short, full = prompts(4, 510, seed=9)
    batch = answers(
        engine,
        Generate(stream_id=0, prompt=short, max_tokens=5, min_tokens=5),
        Generate(stream_id=1, prompt=full, max_tokens=50, min_tokens=50),
    )
    assert [t.finish_reason for t in batch.tokens(0)] == [None] * 4 + ["length"]
    assert [t.finish_reason for t in batch.tokens(1)] == [None, "length"]


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (Generate(stream_id=0, prompt=[]), "prompt is empty"),
        (Generate(stream_id=0, prompt=[3, VOCABULARY]), "prompt[1]: token id 128 is outside the vocabulary of 128"),
        (Generate(stream_id=0, prompt=[3] * 512), "prompt is 512 tokens; the model's context of 512"),
        (Generate(stream_id=0, prompt=[3], logit_bias={VOCABULARY: 100.0}), "logit_bias: token id 128 is outside"),
        (Generate(stream_id=0, prompt=[3], logit_bias=dict.fromkeys(range(VOCABULARY), -100.0)), "leave no token"),
        (Generate(stream_id=0, prompt=[3], mask="!"), "mask: not valid base64"),
        (Generate(stream_id=0, prompt=[3], mask="AA=="), "mask: 1 bytes; a vocabulary of 128 takes 16"),
        (Generate(stream_id=0, prompt=[3], min_tokens=2, logit_bias={END: 100.0}), "nothing but the end"),
        (Score(stream_id=0, prompt=[3], scored=[]), "scored is empty"),
        (Score(stream_id=0, prompt=[3], scored=[VOCABULARY]), "scored[0]: token id 128 is outside"),
        (Score(stream_id=0, prompt=[3] * 500, scored=[3] * 13), "prompt and scored are 513 tokens"),
        (Failure(stream_id=0, error="GENERATE has no such field.", kind="TOKEN"), "has no such field"),
    ],
)
def test_what_is_wrong_with_one_operation_ends_that_stream_and_no_other(
    llama: Pair, operation: Generate | Score | Failure, message: str
) -> None:
    model, engine = llama
    (prompt,) = prompts(7)
    batch = answers(engine, operation, Generate(stream_id="good", prompt=prompt))
    assert message in batch.error(0)
    assert batch.ids("good") == own_greedy(model, prompt, 32)


def test_a_step_that_fails_ends_its_streams_with_an_error_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    engine = start(model)
    (prompt,) = prompts(7)
    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "prepare", lambda step: lambda: 1 / 0)
        batch = answers(engine, Generate(stream_id=0, prompt=prompt), Score(stream_id=1, prompt=prompt, scored=[3]))
    assert "division by zero" in batch.error(0)
    assert "division by zero" in batch.error(1)
    assert answers(engine, Generate(stream_id=0, prompt=prompt)).ids() == own_greedy(model, prompt, 32)
    engine.stop()


def test_after_a_fault_that_memory_cannot_recover_from_every_stream_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an illegal access on a GPU, where every later call fails, too."""
    engine = start(build("llama"))
    several = [Generate(stream_id=i, prompt=p, max_tokens=50, min_tokens=50) for i, p in enumerate(prompts(5, 6, 7))]
    prepare = engine.runner.prepare

    def fail(*_: object) -> None:
        raise RuntimeError("illegal memory access")

    def run_some(step: Step[OperationStream]) -> Callable[[], torch.Tensor]:
        if engine.counters.steps > 5:
            monkeypatch.setattr(Memory, "clear", fail)
            monkeypatch.setattr(Memory, "swap", fail)
            fail()
        return prepare(step)

    monkeypatch.setattr(engine.runner, "prepare", run_some)
    batch = answers(engine, *several)
    for i in range(3):
        assert [isinstance(reply, Failure) for reply in batch.replies[i]].count(True) == 1
        assert isinstance(batch.replies[i][-1], Failure)
    assert "must be restarted" in answers(engine, several[0]).error()


def test_a_row_that_cannot_be_sampled_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    engine = start(model)
    sample = sampling.sample

    def picky(
        logits: torch.Tensor, rows: Sequence[sampling.Draw], allowed: Allowed | None, meanwhile: Callable[[], None]
    ) -> list[sampling.Choice]:
        if any(row.operation.stream_id == "bad" for row in rows):
            raise IndexError("out of bounds")
        return sample(logits, rows, allowed, meanwhile)

    monkeypatch.setattr(sampling, "sample", picky)
    one, other = prompts(7, 9, seed=13)
    batch = answers(engine, Generate(stream_id="bad", prompt=one), Generate(stream_id=0, prompt=other))
    assert "sampling failed: out of bounds" in batch.error("bad")
    assert batch.ids() == own_greedy(model, other, 32)
    engine.stop()


def test_scoring_the_first_token_of_nothing_is_zero(llama: Pair) -> None:
    model, engine = llama
    batch = answers(engine, Score(stream_id=0, prompt=[], scored=[9]), Score(stream_id=1, prompt=[], scored=[9, 8, 7]))
    assert [t.logprob for t in batch.tokens(0)] == [0.0]
    logprobs = torch.log_softmax(own_logits(model, [9, 8, 7]), -1)
    expected = [0.0, logprobs[0, 8].item(), logprobs[1, 7].item()]
    assert [t.logprob for t in batch.tokens(1)] == pytest.approx(expected, abs=1e-4)


def test_many_streams_of_all_kinds_each_get_one_terminal_reply_within_a_small_memory(llama: Pair) -> None:
    model, _ = llama
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, bytes
    engine = start(model, kv_budget=per_token * 700)
    lengths = [3, 40, 100, 7, 64, 200, 12, 33] * 4
    several = prompts(*lengths, seed=10)

    predictions = [
        begin(engine, Generate(stream_id=0, prompt=prompt, max_tokens=10 + i)) for i, prompt in enumerate(several)
    ]
    results = [collect(prediction) for prediction in predictions]
    for i, (prompt, result) in enumerate(zip(several, results, strict=True)):
        assert result.ids() == own_greedy(model, prompt, 10 + i)
        assert [t.finish_reason is not None for t in result.tokens()].count(True) == 1
    assert engine.runner.active == []
    too_long = answers(start(model, kv_budget=per_token * 50), Generate(stream_id=0, prompt=several[2]))
    assert "memory for keys and values (KV_CACHE_GB) holds 50" in too_long.error()
    engine.stop()


def test_the_model_is_opened_on_the_thread_that_runs_it() -> None:
    names: list[str] = []

    def open_model() -> LoadedModel:
        names.append(threading.current_thread().name)
        model = build("llama")
        tokenizer: Any = None
        return LoadedModel(model, tokenizer, open_runner(model))

    engine = Engine(open_model)
    assert names == ["engine"]
    assert len(answers(engine, Generate(stream_id=0, prompt=[5], max_tokens=3, min_tokens=3)).ids()) == 3
    engine.stop()


def test_an_error_while_opening_the_model_is_raised_by_the_engines_constructor() -> None:
    def open_model() -> LoadedModel:
        raise RuntimeError("no such model")

    with pytest.raises(RuntimeError, match="no such model"):
        Engine(open_model)
