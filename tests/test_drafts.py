"""Drafts: steps saved where a text repeats itself, and nothing else changed."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from lmtp.drafts import Drafter
from lmtp.engine import Engine
from lmtp.protocol import Generate
from tests.tiny import ARCHITECTURES, VOCABULARY, answers, build, own_logits, random_prompts, start

Pair = tuple[PreTrainedModel, Engine]
FEW = [11, 23, 35]
"""With only these tokens to choose from, a text repeats itself soon, but not always in the same way."""
ONLY_FEW = dict.fromkeys(FEW, 100.0)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest) -> Iterator[Pair]:
    model = build(request.param)
    engine = start(model)
    yield model, engine
    engine.stop()


@pytest.fixture(scope="module")
def llama() -> Iterator[Pair]:
    model = build("llama")
    engine = start(model)
    yield model, engine
    engine.stop()


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

    def test_a_draft_is_as_long_as_the_last_one_was_right(self) -> None:
        drafter = Drafter()
        lengths = []
        for right in (8, 18, 0, 1, 4):
            lengths.append(len(drafter.draft([7, 7, 7], 100)))
            drafter.learn(right)
        assert lengths == [8, 18, 38, 2, 4]

    @pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2, 3], [1, 2, 3, 2]])
    def test_nothing_is_guessed_where_nothing_like_it_came_before(self, tokens: list[int]) -> None:
        assert Drafter().draft(tokens, 4) == []

    def test_a_list_that_grows_gives_what_it_would_as_a_whole(self) -> None:
        tokens = torch.randint(4, (200,), generator=torch.Generator().manual_seed(0)).tolist()
        drafter = Drafter()
        for length in (0, 1, 2, 3, 50, 51, 120, 200):
            assert drafter.draft(tokens[:length], 6) == Drafter().draft(tokens[:length], 6)


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
    "settings",
    [{"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.2}, {"presence_penalty": 0.5}, {"min_tokens": 30}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_depends_on_more_than_the_logits_is_not_guessed(llama: Pair, settings: dict[str, float]) -> None:
    _, engine = llama
    (prompt,) = random_prompts(20, seed=4)
    operation = Generate(stream_id=0, prompt=prompt, max_tokens=30, logit_bias=ONLY_FEW, **settings)  # type: ignore[arg-type]
    assert answers(engine, operation).counters.drafted_tokens == 0


def test_a_model_that_slots_cannot_serve_is_not_guessed_for() -> None:
    engine = start(build("mamba"))
    (prompt,) = random_prompts(20, seed=4)
    one = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=30, logit_bias=ONLY_FEW))
    assert len(one.ids()) == 30
    assert one.counters.drafted_tokens == 0
    engine.stop()


def test_many_streams_at_once_leave_no_room_for_guesses(llama: Pair) -> None:
    _, engine = llama
    several = random_prompts(*[8] * 16, seed=6)
    batch = answers(
        engine,
        *(Generate(stream_id=i, prompt=p, max_tokens=20, logit_bias=ONLY_FEW) for i, p in enumerate(several)),
    )
    assert batch.counters.drafted_tokens == 0
