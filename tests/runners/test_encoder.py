"""The runner of encoders: every text of a batch as alone, or not in a batch."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from typing_extensions import override

from lmtp.protocol import Encode
from lmtp.runners.encoder import MAX_STREAMS, Forward, Text
from lmtp.runners.model import UnsupportedModel, limits_of
from lmtp.runners.runner import Runner, open_runner
from lmtp.runners.step import Step, Stream
from tests import models
from tests.encoders import FIVE, build, tokenizer_of
from tests.tiny import answers, start

HEADS = ("MaskedLM", "SequenceClassification")
PADDED = "encoder, all texts of a step in one padded pass"
EQUAL = "encoder, texts of equal length in one pass"
ALONE = "encoder, one text at a time"


class Wanting(Stream):
    """A text with one row of logits wanted, at a place."""

    def __init__(self, tokens: list[int], place: int) -> None:
        super().__init__(tokens, len(tokens))
        self.place = place

    @override
    def wanted(self, count: int) -> int:
        return len(self.places(count))

    @override
    def places(self, count: int) -> Sequence[int]:
        return [self.place] if self.computed <= self.place < self.computed + count else []


def texts(*lengths: int, end: int = 9) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [[*torch.randint(10, 300, (n - 1,), generator=generator).tolist(), end] for n in lengths]


def run(runner: Runner, tokens: list[list[int]]) -> Tensor:
    """One step of all the texts, in the order in which the runner keeps them; returned in theirs."""
    streams = [Wanting(text, len(text) - 1) for text in tokens]
    assert all(map(runner.admit, streams))
    active = list(runner.active)
    logits = runner.prepare(Step(active, [stream.pending for stream in active]))()
    for stream in streams:
        runner.release(stream)
    return torch.stack([logits[active.index(stream)] for stream in streams])


@torch.inference_mode()
def own(model: PreTrainedModel, tokens: list[list[int]]) -> Tensor:
    """The logits of plain forward passes, one text each."""
    rows = [model(input_ids=torch.tensor([text])).logits[0] for text in tokens]
    return torch.stack([row if row.dim() == 1 else row[-1] for row in rows])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", FIVE)
def test_uneven_texts_in_one_padded_pass_equal_each_alone(name: str, head: str) -> None:
    model = build(name, head)
    runner = open_runner(model)
    assert (runner.description, runner.reason) == (PADDED, "")
    some = texts(3, 17, 64, 8, 40)
    torch.testing.assert_close(run(runner, some), own(model, some), rtol=0, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["fnet", "big_bird", "mobilebert"])
def test_a_model_that_padding_changes_runs_texts_of_equal_length_together(name: str, head: str) -> None:
    model = build(name, head)
    runner = open_runner(model)
    assert runner.description == EQUAL
    assert "answers differ from the model's own forward pass" in runner.reason
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    some = texts(3, 17, 17, 60, 3, 8)
    got = run(runner, some)
    assert rows == [2, 1, 2, 1]
    if name != "big_bird":  # its plain code remembers short texts; see below
        torch.testing.assert_close(got, own(model, some), rtol=0, atol=1e-4)


def test_the_vocabulary_is_that_of_the_embeddings_where_the_output_layer_ends_in_them() -> None:
    model = build("deberta")
    runner = open_runner(model)
    assert limits_of(model).vocabulary == 320
    some = texts(3, 17, 8)
    torch.testing.assert_close(run(runner, some), own(model, some), rtol=0, atol=1e-4)


def test_a_short_text_changes_nothing_about_a_long_one_after_it() -> None:
    """BigBird's plain code turns to full attention for good at the first short text."""
    (long,) = texts(60)
    expected = own(build("big_bird"), [long])
    model = build("big_bird")
    runner = open_runner(model)
    torch.testing.assert_close(run(runner, texts(5)), own(model, texts(5)), rtol=0, atol=1e-4)
    torch.testing.assert_close(run(runner, [long]), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(own(model, [long, texts(5)[0], long])[2], expected[0], atol=1e-3)


def test_a_classifier_without_a_padding_token_runs_texts_alone() -> None:
    model = build("qwen3", "SequenceClassification")
    runner = open_runner(model)
    assert runner.description == ALONE
    assert "no padding token is defined" in runner.reason
    some = texts(3, 17, 8)
    torch.testing.assert_close(run(runner, some), own(model, some), rtol=0, atol=1e-4)


def test_texts_that_a_model_refuses_side_by_side_run_alone() -> None:
    """BART's classifier raises for different numbers of end tokens in a batch."""
    model = build("bart", "SequenceClassification")
    runner = open_runner(model)
    assert runner.description == PADDED
    one, two = texts(6, 9, end=3)
    two[4] = 3
    torch.testing.assert_close(run(runner, [one, two]), own(model, [one, two]), rtol=0, atol=1e-4)


def test_a_text_too_short_for_a_models_pooling_fails_alone_and_in_a_sentence() -> None:
    model = models.build("funnel", AutoModelForSequenceClassification, decoder=False)
    engine = start(model, tokenizer_of("bert"))
    short, long = [5, 6, 7], [5, 6, 7, 8, 9]
    batch = answers(engine, *(Encode(stream_id=i, prompt=p) for i, p in enumerate([short, long, short])))
    engine.stop()
    assert batch.error(0) == batch.error(2)
    assert batch.error(0) == "the model failed: its code cannot read a text of 3 tokens; give at least 5."
    assert len(batch.tokens(1)) == 1


def test_a_model_that_answers_differently_each_time_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"does not answer a text the same way twice .*; choose another model"):
        open_runner(build("reformer"))


def test_a_model_whose_code_fails_is_refused_with_the_error() -> None:
    model = build("bert")

    def fail(*_: Any) -> None:
        raise ValueError("no such kernel")

    model.register_forward_pre_hook(fail)
    with pytest.raises(UnsupportedModel, match="its own code fails: ValueError: no such kernel; choose another model"):
        open_runner(model)


def test_a_regression_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="its problem_type is regression: it answers with numbers"):
        open_runner(build("bert", "SequenceClassification", problem_type="regression"))


def test_the_output_layer_sees_only_the_wanted_positions() -> None:
    model = build("bert")
    runner = open_runner(model)
    seen: list[int] = []
    output: Any = model.get_output_embeddings()
    output.register_forward_hook(lambda _, args, result: seen.append(result.shape[-2]))
    run(runner, texts(3, 17, 64))
    assert seen == [3]


def test_equal_texts_run_once_unless_their_salts_differ() -> None:
    model = build("bert")
    runner = open_runner(model)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    (text,) = texts(9)
    streams = [Wanting(text, 3) for _ in range(4)]
    streams[0].salt = "own"
    assert all(map(runner.admit, streams))
    logits = runner.prepare(Step(runner.active, [9] * 4))()
    assert rows == [2]
    torch.testing.assert_close(logits, logits[:1].expand(4, -1), rtol=0, atol=1e-5)


def test_a_step_that_takes_only_part_of_a_text_answers_the_places_in_it() -> None:
    model = build("bert")
    runner = open_runner(model)
    (text,) = texts(9)
    early, late = Wanting(text, 2), Wanting(text, 8)
    assert runner.admit(early)
    assert runner.admit(late)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([text])).logits[0]
    logits = runner.prepare(Step([early, late], [4, 4]))()
    torch.testing.assert_close(logits, expected[[2]], rtol=0, atol=1e-4)
    late.computed = 4
    torch.testing.assert_close(runner.prepare(Step([late], [5]))(), expected[[8]], rtol=0, atol=1e-4)
    assert len(runner.prepare(Step([early], [2]))()) == 0


def test_streams_are_kept_in_order_of_length_and_leave_nothing_behind() -> None:
    runner = open_runner(build("bert"))
    streams = [Wanting(text, 0) for text in texts(*[2 + i * 37 % 60 for i in range(MAX_STREAMS)])]
    assert all(map(runner.admit, streams))
    assert not runner.admit(Wanting([7], 0))
    lengths = [len(stream.tokens) for stream in runner.active]
    assert lengths == sorted(lengths)
    assert [stream.slot for stream in runner.active] == list(range(MAX_STREAMS))
    for stream in streams:
        runner.release(stream)
    assert not runner.active
    assert {stream.slot for stream in streams} == {-1}


@pytest.mark.parametrize("name", FIVE)
def test_a_text_may_be_as_long_as_the_models_positions_reach(name: str) -> None:
    """RoBERTa's begin after its padding id: 66 of them hold 64 tokens."""
    model = build(name)
    limits = limits_of(model)
    assert limits.context == 64
    whole, longer = texts(64, 65)
    assert Forward(model, limits).own(Text(tuple(whole), (0,))).shape == (1, 320)
    if name != "modernbert":  # its positions are computed, not looked up
        with pytest.raises((IndexError, RuntimeError)):
            Forward(model, limits).own(Text(tuple(longer), (0,)))


def test_padding_that_hardly_changes_a_half_precision_model_is_found_out() -> None:
    """A leak far smaller than bfloat16's rounding is allowed to be."""
    model: Any = build("bert")
    model.to(torch.bfloat16)
    assert open_runner(model).description == PADDED

    def leak(_: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + 0.02 * output.last_hidden_state.mean(1, keepdim=True)
        return output

    model.base_model.register_forward_hook(leak)
    runner = open_runner(model)
    assert runner.description == EQUAL
    assert "what stands in the padding changes" in runner.reason
