"""Drafts: steps saved where a text repeats itself, and nothing else changed."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmtp.engine.drafts import CHANCE, Drafter, width
from lmtp.engine.engine import Engine
from lmtp.protocol import Generate, Score
from tests.tiny import (
    ARCHITECTURES,
    VOCABULARY,
    answers,
    begin,
    build,
    collect,
    own_logits,
    random_prompts,
    running,
    start,
)

Pair = tuple[PreTrainedModel, Engine]
FEW = [11, 23, 35]
"""With only these tokens to choose from, a text repeats itself soon, but not always in the same way."""
ONLY_FEW = dict.fromkeys(FEW, 100.0)
EXPERTS = {"qwen3_moe", "gpt_oss", "llama4"}


def eager(engine: Engine, reading: int = 1000) -> Engine:
    """An engine whose steps take as many guesses as there are, as if the weights took long to read."""
    engine.runner.step_limits = dataclasses.replace(engine.runner.step_limits, drafts=reading)
    return engine


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES.keys() - EXPERTS))
def any_model(request: pytest.FixtureRequest) -> Iterator[Pair]:
    for model, engine in running(request.param):
        yield model, eager(engine)


@pytest.fixture(scope="module")
def llama() -> Iterator[Pair]:
    for model, engine in running("llama"):
        yield model, eager(engine)


def masked_logprobs(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    logits = own_logits(model, tokens)
    mask = torch.full((VOCABULARY,), -torch.inf)
    mask[FEW] = 0.0
    return torch.log_softmax(logits + mask, -1)


def own_choice_of_few(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(masked_logprobs(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


class TestDrafter:
    def test_what_followed_the_same_tokens_is_guessed_again(self) -> None:
        assert Drafter().draft([1, 2, 3, 4, 5, 1, 2], 3) == [3, 4, 5]

    def test_the_last_occurrence_counts(self) -> None:
        assert Drafter().draft([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]

    def test_a_repetition_is_guessed_to_go_on(self) -> None:
        assert Drafter().draft([7, 8, 9, 8, 9], 5) == [8, 9, 8, 9, 8]

    def test_a_right_guess_makes_it_surer_and_a_wrong_one_less_sure(self) -> None:
        sure, unsure = Drafter(), Drafter()
        for _ in range(20):
            sure.learn([7, 8], [7, 8])
            unsure.learn([7, 8], [9, 8])
        assert unsure.chance < 0.1 < CHANCE < 0.9 < sure.chance < 1

    def test_of_a_draft_the_guesses_up_to_the_first_wrong_one_count_as_far_as_the_text_goes(self) -> None:
        drafters = [Drafter() for _ in range(3)]
        for drafter, draft, tokens in zip(
            drafters, ([7, 8], [7, 8, 9, 9], [7, 8, 9]), ([7, 1], [7, 1, 9, 9], [7]), strict=True
        ):
            drafter.learn(draft, tokens)
        one_wrong, more, cut = (drafter.chance for drafter in drafters)
        assert one_wrong == more < cut

    @pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2, 3], [1, 2, 3, 2]])
    def test_nothing_is_guessed_where_nothing_like_it_came_before(self, tokens: list[int]) -> None:
        assert Drafter().draft(tokens, 4) == []

    def test_a_list_that_grows_gives_what_it_would_as_a_whole(self) -> None:
        tokens = torch.randint(4, (200,), generator=torch.Generator().manual_seed(0)).tolist()
        drafter = Drafter()
        for length in (0, 1, 2, 3, 50, 51, 120, 200):
            assert drafter.draft(tokens[:length], 6) == Drafter().draft(tokens[:length], 6)


class TestWidth:
    """How many tokens of each stream a step takes."""

    def test_without_drafts_it_takes_one(self) -> None:
        assert width([(0, 0.9), (0, 0.9)], 25, packed=False) == 1

    def test_surer_guesses_and_weights_that_take_longer_to_read_make_it_wider(self) -> None:
        def of(chance: float, reading: int) -> int:
            return width([(15, chance)], reading, packed=False)

        assert 1 < of(0.4, 7) < of(0.8, 7) < of(0.99, 7) == 16
        assert of(0.4, 7) < of(0.4, 100)
        assert of(0.01, 7) == 1

    def test_one_streams_guesses_do_not_widen_a_step_of_many_unless_nothing_is_padded(self) -> None:
        drafts = [(1, 0.9), *[(0, 0.0)] * 7]
        assert width(drafts, 7, packed=False) == 1
        assert width(drafts, 7, packed=True) == 2

    def test_the_tokens_expected_in_a_time_are_the_most(self) -> None:
        """Compared with all widths, one by one."""
        drafts, reading = [(3, 0.9), (5, 0.5), (0, 0.4)], 25
        rates = [
            sum(sum(chance**guess for guess in range(min(length + 1, tokens))) for length, chance in drafts)
            / (reading + 3 * tokens)
            for tokens in range(1, 7)
        ]
        assert width(drafts, reading, packed=False) == 1 + rates.index(max(rates))


def test_with_right_and_wrong_guesses_every_stream_says_what_the_model_does(any_model: Pair) -> None:
    model, engine = any_model
    several = [[FEW[token % 3] for token in prompt] for prompt in random_prompts(4, 19, 31, seed=2)]
    lengths = [40, 17, 33]
    batch = answers(
        engine,
        *(
            Generate(stream_id=i, prompt=prompt, max_tokens=length, logit_bias=ONLY_FEW, top_logprobs=3)
            for i, (prompt, length) in enumerate(zip(several, lengths, strict=True))
        ),
    )
    for i, (prompt, length) in enumerate(zip(several, lengths, strict=True)):
        assert batch.ids(i) == own_choice_of_few(model, prompt, length)
        logprobs = masked_logprobs(model, prompt + batch.ids(i))[len(prompt) - 1 :]
        expected = [row[token].item() for row, token in zip(logprobs, batch.ids(i), strict=False)]
        assert [token.logprob for token in batch.tokens(i)] == pytest.approx(expected, abs=1e-4)
    counters = batch.counters
    assert counters.computed_tokens == sum(map(len, several)) + sum(lengths) - 3
    assert 0 < counters.accepted_tokens < counters.drafted_tokens
    assert counters.steps < 1 + max(lengths)


def test_what_wrong_guesses_leave_behind_spoils_nothing(llama: Pair) -> None:
    model, engine = llama
    (prompt,) = random_prompts(21, seed=5)
    text = list(prompt)
    for _ in range(5):
        part = answers(engine, Generate(stream_id=0, prompt=text, max_tokens=9, logit_bias=ONLY_FEW))
        text += part.ids()
        assert part.counters.computed_tokens <= len(prompt) + 9
    assert text[len(prompt) :] == own_choice_of_few(model, prompt, 45)


def test_a_text_of_one_token_takes_few_steps(llama: Pair) -> None:
    _, engine = llama
    one = answers(engine, Generate(stream_id=0, prompt=[5, 6, 7], max_tokens=64, logit_bias={9: 100.0}))
    assert one.ids() == [9] * 64
    assert one.counters.steps <= 8
    assert one.tokens()[-1].finish_reason == "length"
    assert [token.finish_reason for token in one.tokens()][:-1] == [None] * 63


def test_a_text_that_ends_within_a_draft_ends_there() -> None:
    model = build("llama")
    model.generation_config.eos_token_id = 23
    engine = start(model)
    for prompt in random_prompts(*range(5, 25), seed=3):
        expected = own_choice_of_few(model, prompt, 40)
        expected = expected[: expected.index(23) + 1] if 23 in expected else expected
        tokens = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=40, logit_bias=ONLY_FEW)).tokens()
        assert [token.token for token in tokens] == expected
        assert tokens[-1].finish_reason == ("stop" if expected[-1] == 23 else "length")
    assert engine.counters.accepted_tokens > 0
    engine.stop()


@pytest.mark.parametrize(
    "settings", [{"min_tokens": 30}, {"top_logprobs": 100}], ids=lambda settings: next(iter(settings))
)
def test_what_a_guess_does_not_help_is_not_guessed(llama: Pair, settings: dict[str, Any]) -> None:
    _, engine = llama
    (prompt,) = random_prompts(20, seed=4)
    operation = Generate(stream_id=0, prompt=prompt, max_tokens=30, logit_bias=ONLY_FEW)
    assert answers(engine, operation).counters.drafted_tokens > 0
    assert answers(engine, replace(operation, **settings)).counters.drafted_tokens == 0


@pytest.fixture(scope="module")
def without_drafts(llama: Pair) -> Iterator[Engine]:
    engine = eager(start(llama[0]), reading=0)
    yield engine
    engine.stop()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.6, "top_logprobs": 3},
        {"temperature": 2.0, "top_k": 2, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.1},
        {"repetition_penalty": 1.2, "top_logprobs": 5},
        {"presence_penalty": 0.5, "frequency_penalty": 0.05},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_draws_and_penalties_are_the_same_with_and_without_guesses(
    llama: Pair, without_drafts: Engine, settings: dict[str, Any]
) -> None:
    prompts = random_prompts(*[20] * 6, seed=4)
    operations = [
        Generate(stream_id=i, prompt=prompt, max_tokens=40, logit_bias=ONLY_FEW, seed=i, **settings)
        for i, prompt in enumerate(prompts)
    ]
    with_guesses, plain = answers(llama[1], *operations), answers(without_drafts, *operations)
    assert 0 < with_guesses.counters.accepted_tokens < with_guesses.counters.drafted_tokens
    assert plain.counters.drafted_tokens == 0
    assert with_guesses.counters.steps < plain.counters.steps
    for i in range(len(prompts)):
        assert with_guesses.ids(i) == plain.ids(i)
        for token, expected in zip(with_guesses.tokens(i), plain.tokens(i), strict=True):
            assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert token.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-4)


def test_a_draw_of_repetitive_text_takes_half_the_steps(llama: Pair, without_drafts: Engine) -> None:
    operation = Generate(stream_id=0, prompt=[9, 9, 9], max_tokens=100, temperature=0.5, seed=1, logit_bias={9: 5.0})
    with_guesses, plain = answers(llama[1], operation), answers(without_drafts, operation)
    assert with_guesses.ids() == plain.ids()
    assert len(set(plain.ids())) > 1
    assert with_guesses.counters.steps * 2 <= plain.counters.steps


REPETITIVE = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 16, "maxItems": 16}


@pytest.fixture(scope="module")
def writing(tokenizer: PreTrainedTokenizerBase) -> Iterator[Engine]:
    engine = eager(start(build("llama", vocab_size=len(tokenizer), eos_token_id=[0, 2]), tokenizer))
    yield engine
    engine.stop()


@pytest.mark.parametrize(
    "settings",
    [
        {"json_schema": REPETITIVE},
        {"json_schema": REPETITIVE, "temperature": 1.0, "top_p": 0.9},
        {"regex": "((ab|cd|ef){3}-){6}x?", "temperature": 1.0, "top_logprobs": 3},
        {"regex": "(yes|no|yesterday)( (yes|no|yesterday)){15}", "frequency_penalty": 0.1},
    ],
    ids=["greedy", "drawn", "regex", "penalized"],
)
def test_constrained_text_is_the_same_with_and_without_guesses_that_its_grammar_refuses(
    writing: Engine, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = [
        Generate(stream_id=i, prompt=[5 + i, 6], max_tokens=120, seed=i, text=True, **settings) for i in range(3)
    ]
    with_guesses = answers(writing, *operations)
    monkeypatch.setattr(writing.runner, "step_limits", dataclasses.replace(writing.runner.step_limits, drafts=0))
    plain = answers(writing, *operations)
    assert with_guesses.counters.accepted_tokens > 0
    assert with_guesses.counters.rows < plain.counters.rows
    for i in range(len(operations)):
        assert with_guesses.ids(i) == plain.ids(i)
        assert [token.finish_reason for token in with_guesses.tokens(i)] == [t.finish_reason for t in plain.tokens(i)]
        for token, expected in zip(with_guesses.tokens(i), plain.tokens(i), strict=True):
            assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert token.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-4)


def test_a_stop_sequence_does_not_end_a_text_before_min_tokens(writing: Engine) -> None:
    operation = Generate(stream_id=0, prompt=[5, 6], max_tokens=40, regex="(ab|cd){30}", stop=["ab", "cd"], text=True)
    soon, later = (answers(writing, replace(operation, min_tokens=least)).tokens() for least in (0, 4))
    assert len(soon) < 4 <= len(later)
    assert [tokens[-1].finish_reason for tokens in (soon, later)] == ["stop", "stop"]
    assert "".join(str(token.text) for token in soon) == ""


@pytest.mark.parametrize("name", ["mamba", *sorted(EXPERTS)])
def test_a_model_of_experts_or_without_slots_is_not_guessed_for(name: str) -> None:
    engine = start(build(name))
    (prompt,) = random_prompts(20, seed=4)
    one = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=30, logit_bias=ONLY_FEW))
    assert len(one.ids()) == 30
    assert one.counters.drafted_tokens == 0
    engine.stop()


def test_many_streams_at_once_leave_no_room_for_guesses(llama: Pair) -> None:
    _, engine = llama
    several = [
        Generate(stream_id=i, prompt=prompt, max_tokens=20, logit_bias=ONLY_FEW)
        for i, prompt in enumerate(random_prompts(*[8] * 9, seed=6))
    ]
    assert answers(engine, *several).counters.drafted_tokens == 0
    assert answers(engine, *several[:8]).counters.drafted_tokens > 0


def test_eight_streams_guess_only_where_the_weights_take_longer_to_read_or_guesses_are_right(llama: Pair) -> None:
    engine = start(llama[0])
    assert engine.runner.step_limits.drafts == 7
    unlike, alike = (
        [
            Generate(stream_id=i, prompt=prompt, max_tokens=30, logit_bias=bias, temperature=1.0, seed=i)
            for i, prompt in enumerate(random_prompts(*[8] * 8, seed=6))
        ]
        for bias in (dict.fromkeys(range(10), 100.0), {9: 100.0})
    )
    assert answers(engine, *unlike).counters.drafted_tokens == 0
    assert answers(eager(engine), *unlike).counters.drafted_tokens > 0
    assert answers(eager(engine, reading=7), *alike).counters.steps < 20
    engine.stop()


def test_guesses_beside_scores_draws_and_a_long_prompt_in_chunks_change_none_of_them() -> None:
    model = build("llama")
    engine = start(model)
    engine.runner.step_limits = dataclasses.replace(engine.runner.step_limits, busy_chunk=40)
    few, drawn, long, scored = random_prompts(20, 20, 300, 12, seed=8)
    alone = answers(engine, Generate(stream_id=0, prompt=drawn, max_tokens=30, temperature=1.0, seed=3)).ids()
    first = begin(
        engine,
        Generate(stream_id="few", prompt=few, max_tokens=60, logit_bias=ONLY_FEW),
        Generate(stream_id="drawn", prompt=drawn, max_tokens=30, temperature=1.0, seed=3),
    )
    next(iter(first))
    late = answers(
        engine,
        Generate(stream_id="long", prompt=long, max_tokens=20, logit_bias=ONLY_FEW),
        Score(stream_id="scored", prompt=few, scored=scored),
    )
    beside = collect(first)
    assert beside.ids("few") == own_choice_of_few(model, few, 60)[-len(beside.ids("few")) :]
    assert beside.ids("drawn") == alone[-len(beside.ids("drawn")) :]
    assert late.ids("long") == own_choice_of_few(model, long, 20)
    logprobs = torch.log_softmax(own_logits(model, few + scored), -1)[len(few) - 1 :]
    expected = [row[token].item() for row, token in zip(logprobs, scored, strict=False)]
    assert [token.logprob for token in late.tokens("scored")] == pytest.approx(expected, abs=1e-4)
    assert engine.counters.accepted_tokens > 0
    engine.stop()


def test_a_prediction_cancelled_amid_its_drafts_leaves_what_others_can_use(llama: Pair) -> None:
    model, engine = llama
    (prompt,) = random_prompts(20, seed=9)
    operation = Generate(stream_id=0, prompt=prompt, max_tokens=300, logit_bias=ONLY_FEW)
    with begin(engine, operation) as abandoned:
        replies = iter(abandoned)
        for _ in range(4):
            next(replies)
    again = answers(engine, replace(operation, max_tokens=40))
    assert again.ids() == own_choice_of_few(model, prompt, 40)
    assert again.counters.reused_tokens == 19


def test_a_context_or_memory_that_ends_ends_a_draft() -> None:
    model = build("llama")
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, bytes
    engine = start(model, kv_budget=per_token * 50)
    (prompt,) = random_prompts(20, seed=10)
    tokens = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=100, logit_bias=ONLY_FEW)).tokens()
    assert [token.token for token in tokens] == own_choice_of_few(model, prompt, 30)
    assert tokens[-1].finish_reason == "length"
    assert engine.counters.accepted_tokens > 0
    engine.stop()
