"""One prompt's completions as text, as protocol lines and as a JSON document."""

import asyncio
import json
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtp.completions import Completions
from lmtp.engine.engine import Engine
from lmtp.prediction import Counters
from lmtp.protocol import Generate, RequestError, Score, parse_choices, parse_json_schema
from lmtp.text import encode, render_prompt
from lmtp.weights import load as weights
from lmtp.weights.load import Loaded
from tests.tiny import answers, begin, own_logits, start

Demo = tuple[Loaded, Engine]


@pytest.fixture(scope="module")
def demo(demo_weights: Path) -> Iterator[Demo]:
    loaded = weights.load(demo_weights, dtype="float32")
    engine = start(loaded.model, loaded.tokenizer)
    yield loaded, engine
    engine.stop()


def completions(demo: Demo, output: str, question: str = "Name three colours.", **settings: Any) -> Completions:
    own = {name: settings.pop(name) for name in ("n", "prompt_logprobs", "normalize") if name in settings}
    tokenizer = demo[0].tokenizer
    prompt = render_prompt(tokenizer, question)
    generate = Generate(stream_id=0, prompt=prompt, text=True, max_tokens=settings.pop("max_tokens", 12), **settings)
    return Completions(generate, tokenizer, output, **own)


def read(demo: Demo, output: str, **settings: Any) -> tuple[str, Counters]:
    """The output that predict.py would send, and the counters."""
    asked = completions(demo, output, **settings)

    prediction = begin(demo[1], *asked.operations)
    sent = "".join(map(asked.add, prediction))
    counters = prediction.counters
    return sent + asked.end(counters.reused_tokens, counters.computed_tokens, demo[1].compiler.check), counters


def test_n_completions_match_their_seeds_and_share_one_computed_prompt(demo: Demo) -> None:
    sent, counters = read(demo, "json", n=4, temperature=1.0, seed=10, top_logprobs=2)
    document = json.loads(sent)
    assert [completion["index"] for completion in document["choices"]] == [0, 1, 2, 3]
    for i, completion in enumerate(document["choices"]):
        assert completion["text"] == read(demo, "text", temperature=1.0, seed=10 + i)[0]
        assert completion["text"] == "".join(token["text"] for token in completion["tokens"])
        assert completion["finish_reason"] in ("length", "stop")
        assert all(len(token["top_logprobs"]) >= 2 for token in completion["tokens"])
    prompt = document["usage"]["input_token_count"]
    assert prompt == len(render_prompt(demo[0].tokenizer, "Name three colours."))
    assert document["usage"]["output_token_count"] == sum(len(c["tokens"]) for c in document["choices"])
    assert counters.computed_tokens <= prompt + 4 * 12


def test_prompt_logprobs_match_a_forward_pass_and_cost_no_second_one(demo: Demo) -> None:
    loaded, _ = demo
    question = "Which of the colours of the rainbow has the longest wavelength? " + "Explain it step by step. " * 6
    sent, counters = read(demo, "json", question=question, prompt_logprobs=True)
    document = json.loads(sent)
    ids = render_prompt(loaded.tokenizer, question)
    logprobs = torch.log_softmax(own_logits(loaded.model, ids), -1)
    assert [token["token"] for token in document["prompt_logprobs"]] == ids
    expected = [0.0] + [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
    assert [token["logprob"] for token in document["prompt_logprobs"]] == pytest.approx(expected, abs=1e-4)
    assert document["choices"][0]["text"] == read(demo, "text", question=question)[0]
    assert document["usage"]["input_token_count"] == len(ids)
    assert document["usage"]["output_token_count"] == len(document["choices"][0]["tokens"])
    assert counters.computed_tokens == len(ids) + len(document["choices"][0]["tokens"]) - 1


def test_the_distribution_over_choices_is_exact_and_the_best_is_the_answer(demo: Demo) -> None:
    loaded, _ = demo
    review = "We had a great stay. Hiking in the mountains was fabulous, and the food in the hotel was good, too. "
    question = review * 2 + "Is the sentiment of this review positive, negative or neutral?"
    options = ["positive", "negative", "neutral", "a mixture of all"]
    settings = {"question": question, "choices": options}
    sent, counters = read(demo, "json", **settings)
    document = json.loads(sent)
    prompt = render_prompt(loaded.tokenizer, question)
    expected = {}
    for option in options:
        ids = loaded.tokenizer.encode(option)
        logprobs = torch.log_softmax(own_logits(loaded.model, prompt + ids), -1)
        expected[option] = sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))
    total = sum(math.exp(logprob) for logprob in expected.values())
    rows = document["distribution"]
    assert [row["choice"] for row in rows] == sorted(options, key=lambda option: -expected[option])
    for row in rows:
        assert row["logprob"] == pytest.approx(expected[row["choice"]], abs=1e-3)
        assert row["probability"] == pytest.approx(math.exp(expected[row["choice"]]) / total, abs=1e-3)
    assert document["choices"][0]["text"] == rows[0]["choice"]
    assert read(demo, "text", **settings)[0] == rows[0]["choice"]
    assert counters.computed_tokens < len(prompt) + 20


SKY = {"question": "Is the sky blue? Answer yes or no.", "choices": ["Yes", "No", "Not sure", "Not at all", ""]}


def test_choices_are_drawn_from_their_exact_distribution(demo: Demo) -> None:
    sent, _ = read(demo, "json", **SKY, temperature=4.0, n=16, seed=0)
    document = json.loads(sent)
    rows = {row["choice"]: row for row in document["distribution"]}
    weights = {choice: math.exp(row["logprob"] / 4.0) for choice, row in rows.items()}
    for choice, weight in weights.items():
        assert rows[choice]["probability"] == pytest.approx(weight / sum(weights.values()), abs=1e-4)
    drawn = [json.loads(read(demo, "json", **SKY, temperature=4.0, n=16, seed=16 * i)[0])["choices"] for i in range(6)]
    texts = [completion["text"] for choices in drawn for completion in choices]
    assert texts[:16] == [completion["text"] for completion in document["choices"]]
    assert texts[3] == read(demo, "text", **SKY, temperature=4.0, seed=3)[0]
    for choice, row in rows.items():
        share, expected = texts.count(choice) / len(texts), row["probability"]
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(texts)) + 1e-9


def test_an_empty_choice_counts_as_the_end_of_the_text(demo: Demo) -> None:
    loaded, _ = demo
    sent, _ = read(demo, "json", **SKY)
    row = next(row for row in json.loads(sent)["distribution"] if row["choice"] == "")
    prompt = render_prompt(loaded.tokenizer, str(SKY["question"]))
    end = torch.log_softmax(own_logits(loaded.model, prompt)[-1], -1)[loaded.tokenizer.eos_token_id].item()
    assert row["logprob"] == pytest.approx(end, abs=1e-3)
    assert read(demo, "text", question="Say nothing.", choices=["", ""])[0] == ""


def test_the_prompt_counts_once_however_many_streams_begin_with_it(demo: Demo) -> None:
    asked = completions(demo, "json", choices=["Yes", "No"], n=3, prompt_logprobs=True)
    assert len(asked.operations) == 2 + 1
    assert asked.input_tokens == len(render_prompt(demo[0].tokenizer, "Name three colours."))


@pytest.mark.parametrize(
    ("choices", "context", "message"),
    [
        (["yes", "\ue000"], 8192, "choices[1] is no token of this model: '\\ue000'."),
        (["yes", "no", "perhaps not at all"], 10, "prompt and choices[2] are 12 tokens; the model's context is 10."),
        (["yes", "yes", "n" * 200_000], 8192, "choices[2] is 200000 bytes of text; 131072 is the limit"),
        (["\ud800", "no"], 8192, "choices[0]: character 0 is a lone surrogate"),
    ],
)
def test_a_choice_that_cannot_be_scored_is_named(
    demo: Demo, choices: list[str], context: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, engine = demo

    def nothing(tokenizer: Any, text: str, *args: Any, **kwargs: Any) -> list[int]:
        return [] if text == "\ue000" else encode(tokenizer, text, *args, **kwargs)

    monkeypatch.setattr("lmtp.text.encode", nothing)
    asked = Completions(Generate(stream_id=0, prompt=[5] * 8, choices=choices), loaded.tokenizer, "json")
    with pytest.raises(RequestError, match=re.escape(message)):
        asyncio.run(asked.tokenize(engine.tokenizers, context))


def test_choices_are_tokenized_before_their_streams_open(demo: Demo) -> None:
    choices = ["Yes", "Not at all", ""]
    asked = completions(demo, "json", choices=choices)
    asyncio.run(asked.tokenize(demo[1].tokenizers, 8192))
    scored = [operation.scored for operation in asked.operations if isinstance(operation, Score)]
    assert scored == [demo[0].tokenizer.encode(choice) or [demo[0].tokenizer.eos_token_id] for choice in choices]


def test_choices_can_be_compared_by_their_mean_per_token(demo: Demo) -> None:
    sent, mean = (json.loads(read(demo, "json", **SKY, normalize=kind)[0])["distribution"] for kind in ("sum", "mean"))
    by_sum = {row["choice"]: row["logprob"] for row in sent}
    for row in mean:
        count = len(demo[0].tokenizer.encode(row["choice"])) or 1
        assert row["logprob"] == pytest.approx(by_sum[row["choice"]] / count, abs=1e-4)


def test_compared_choices_come_as_token_lines_of_the_answer_alone(demo: Demo) -> None:
    sent, _ = read(demo, "lmtp", **SKY, n=2, prompt_logprobs=True)
    lines = [json.loads(line.removeprefix("TOKEN ")) for line in sent.splitlines()]
    answer = read(demo, "text", **SKY)[0]
    assert answer in SKY["choices"]
    for index in range(2):
        assert "".join(line["text"] for line in lines if line["stream_id"] == index) == answer
        assert [line["finish_reason"] for line in lines if line["stream_id"] == index][-1] == "stop"
    assert {line["stream_id"] for line in lines} == {0, 1, "prompt"}


def test_a_compared_choice_is_cut_at_max_tokens_and_then_not_valid(demo: Demo) -> None:
    asked = completions(demo, "json", choices=["one two three four", "one two three five"], max_tokens=2)
    prediction = begin(demo[1], *asked.operations)
    assert "".join(map(asked.add, prediction)) == ""
    (completion,) = json.loads(asked.end(0, 0, demo[1].compiler.check))["choices"]
    assert (completion["text"], completion["finish_reason"]) == ("one two", "length")
    assert completion["constraint_valid"] is False
    assert (asked.finished, list(asked.valid)) == (False, [False])


@pytest.mark.parametrize(
    "settings",
    [
        {"choices": [str(number) for number in range(65)]},
        {"choices": ["yes", "no"], "logit_bias": {5: 1.0}},
        {"choices": ["yes", "no"], "stop": ["."]},
    ],
)
def test_other_choices_are_generated_token_by_token(demo: Demo, settings: dict[str, Any]) -> None:
    (operation,) = completions(demo, "json", **settings).operations
    assert isinstance(operation, Generate)
    document = json.loads(read(demo, "json", **settings)[0])
    assert "distribution" not in document
    assert document["choices"][0]["text"] in settings["choices"]
    assert document["choices"][0]["constraint_valid"] is True


def test_a_text_that_ends_as_its_constraint_allows_is_checked_all_the_same(demo: Demo) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    document = json.loads(read(demo, "json", json_schema=schema, n=2, temperature=1.0, seed=1, max_tokens=60)[0])
    for completion in document["choices"]:
        assert completion["constraint_valid"] is (completion["finish_reason"] == "stop")
    cut = json.loads(read(demo, "json", json_schema=schema, max_tokens=2)[0])["choices"][0]
    assert (cut["finish_reason"], cut["constraint_valid"]) == ("length", False)
    free = json.loads(read(demo, "json")[0])["choices"][0]
    assert "constraint_valid" not in free


def test_output_lmtp_holds_the_streams_of_every_completion_and_of_the_prompt(demo: Demo) -> None:
    sent, _ = read(demo, "lmtp", n=2, prompt_logprobs=True, max_tokens=3, temperature=1.0, seed=1)
    streams = [json.loads(line.removeprefix("TOKEN "))["stream_id"] for line in sent.splitlines()]
    assert (streams.count(0), streams.count(1)) == (3, 3)
    assert streams.count("prompt") == len(render_prompt(demo[0].tokenizer, "Name three colours."))


@pytest.mark.parametrize(
    ("output", "settings", "message"),
    [
        ("text", {"n": 2}, "n is 2: choose output json or lmtp"),
        ("text", {"prompt_logprobs": True}, "prompt_logprobs: choose output json or lmtp"),
        ("json", {"choices": ["a"], "regex": "a"}, "choices and regex: give one constraint"),
    ],
)
def test_contradictory_settings_are_refused(demo: Demo, output: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        completions(demo, output, **settings)


def test_one_failed_stream_fails_the_whole_answer(demo: Demo) -> None:
    with pytest.raises(RequestError, match="unclosed character class"):
        read(demo, "json", n=2, regex="[0-9")


def test_constraints_are_parsed_from_json() -> None:
    assert parse_choices("") is None
    assert parse_choices('["a", "b"]') == ["a", "b"]
    assert parse_json_schema(" true ") is True
    assert parse_json_schema('{"type": "object"}') == {"type": "object"}
    for wrong in ("a, b", '{"a": 1}', "[1]"):
        with pytest.raises(RequestError, match="choices must be a JSON list of strings like"):
            parse_choices(wrong)
    for wrong in ("{", "[]", '"object"'):
        with pytest.raises(RequestError, match="json_schema must be a JSON object, or true for any JSON"):
            parse_json_schema(wrong)


def test_a_document_is_one_json_value_for_any_tokens(demo: Demo) -> None:
    sent, _ = read(demo, "json", temperature=5.0, seed=3, n=3, top_logprobs=5)
    document = json.loads(sent, parse_constant=lambda name: pytest.fail(name))
    assert len(document["choices"]) == 3
    whole = answers(demo[1], *completions(demo, "json", temperature=5.0, seed=3, n=3, top_logprobs=5).operations)
    assert [[t["token"] for t in c["tokens"]] for c in document["choices"]] == [whole.ids(i) for i in range(3)]


class Client:
    """A minimal LMQL client: it sends the prompt as token ids and masks every token in a separate prediction."""

    def __init__(self, demo: Demo, prompt: str) -> None:
        self.loaded, self.engine = demo
        tokenizer = self.loaded.tokenizer
        self.ids = [int(tokenizer.bos_token_id), *encode(tokenizer, prompt)]
        self.pieces = [str(tokenizer.decode([token])) for token in range(self.engine.limits.vocabulary)]

    def predict(self, **constraint: Any) -> str:
        """The whole answer in one prediction. The client's prompt does not change."""
        tokens = answers(self.engine, Generate(stream_id=0, prompt=self.ids, text=True, **constraint)).tokens()
        return "".join(str(token.text) for token in tokens)

    def next(self, allowed: Collection[int] | None) -> int:
        """Append the most likely of the allowed tokens to the prompt; None allows all."""
        mask = None if allowed is None else dict.fromkeys(allowed, 100.0)
        operation = Generate(stream_id=0, prompt=self.ids, max_tokens=1, logit_bias=mask)
        self.ids += answers(self.engine, operation).ids()
        return self.ids[-1]

    def one_of(self, options: list[str]) -> str:
        """LMQL's `VARIABLE in [...]`: allow only tokens that continue an option."""
        text = ""
        while text not in options:
            rest = [option.removeprefix(text) for option in options if option.startswith(text)]
            fits = {i for i, piece in enumerate(self.pieces) if piece and any(r.startswith(piece) for r in rest)}
            text += self.pieces[self.next(fits)]
        return text

    def integer(self, max_tokens: int) -> int:
        """LMQL's `INT(VARIABLE)`: a first digit, then any token until the text is no longer a number."""
        text = ""
        for _ in range(max_tokens):
            begin = "[1-9][0-9]*" if text else "[ 1-9][0-9]*"
            if text.strip():
                if not re.fullmatch(r"[0-9,\s]*", text):
                    break
                token = self.next(None)
            else:
                token = self.next({i for i, piece in enumerate(self.pieces) if re.fullmatch(begin, piece)})
            if token in self.engine.limits.end_of_sequence:
                break
            text += self.pieces[token]
        return digits(text)


def digits(text: str) -> int:
    """The value that LMQL reads from an integer variable's text."""
    return int("".join(character for character in text if character in "0123456789"))


def test_an_lmql_choice_query_is_one_prediction_with_the_same_answer(demo: Demo) -> None:
    prompt, between = "Between red and blue, the colour of the sky is", " and that of blood is"
    colours, others = [" blue", " red", " extremely green"], [" extremely green", " purple"]
    answer = Client(demo, prompt).predict(
        choices=[f"{colour}{between}{other}" for colour in colours for other in others]
    )
    lmql = Client(demo, prompt)
    colour = lmql.one_of(colours)
    lmql.ids += encode(demo[0].tokenizer, between, begins_sequence=False)
    assert answer == f"{colour}{between}{lmql.one_of(others)}"


def test_an_lmql_integer_query_is_one_prediction_with_the_same_answer(demo: Demo) -> None:
    prompt = "Q: How many days does a week have?\nA: "
    # As in LMQL, the model ends the number by continuing with something else.
    answer = Client(demo, prompt).predict(regex=r" ?[1-9][0-9]*([^0-9](.|\n)*)?", max_tokens=3)
    assert digits(answer) == Client(demo, prompt).integer(3)
