"""Encoders behind the engine: masks filled and scored, texts classified, as Transformers' own pipelines do."""

import base64
import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import pipeline

from lmtp.protocol import Encode, Generate, ModelInfo, RequestError, Score
from lmtp.runners.model import UnsupportedModel
from lmtp.text import encode
from tests.encoders import FIVE, TEXTS, Served, build, serving, tokenizer_of
from tests.tiny import answers, start

Labels = dict[str, float]


@pytest.fixture(scope="module", params=FIVE)
def masked(request: pytest.FixtureRequest) -> Iterator[Served]:
    yield from serving(request.param)


@pytest.fixture(scope="module", params=FIVE)
def classifier(request: pytest.FixtureRequest) -> Iterator[Served]:
    yield from serving(request.param, "SequenceClassification", num_labels=3)


@pytest.fixture(scope="module")
def bert() -> Iterator[Served]:
    yield from serving("bert")


@pytest.fixture(scope="module", params=[1, 3])
def independent(request: pytest.FixtureRequest) -> Iterator[Served]:
    changes = {} if request.param == 1 else {"problem_type": "multi_label_classification"}
    yield from serving("bert", "SequenceClassification", num_labels=request.param, **changes)


@pytest.fixture(scope="module")
def exclusive() -> Iterator[Served]:
    yield from serving("bert", "SequenceClassification", id2label={0: "bad", 1: "mixed", 2: "good"})


def with_mask(served: Served, text: str) -> str:
    """The text with a mask in place of its fourth word."""
    words = text.split()
    return " ".join([*words[:3], str(served.tokenizer.mask_token), *words[4:]])


def own_fillings(served: Served, text: str, **arguments: Any) -> list[dict[str, Any]]:
    fill: Any = pipeline("fill-mask", model=served.model, tokenizer=served.tokenizer, device="cpu")
    found: list[dict[str, Any]] = fill(text, **arguments)
    return found


def own_labels(served: Served, text: str) -> Labels:
    classify: Any = pipeline("text-classification", model=served.model, tokenizer=served.tokenizer, device="cpu")
    return {row["label"]: row["score"] for row in classify(text, top_k=None)}


def ids(served: Served, text: str) -> list[int]:
    tokens: list[int] = served.tokenizer(text).input_ids
    return tokens


# Masked LMs


def test_a_mask_is_filled_as_transformers_own_pipeline_fills_it(masked: Served) -> None:
    for text in TEXTS:
        prompt = with_mask(masked, text)
        own = own_fillings(masked, prompt, top_k=5)
        document = masked.document(prompt, top_logprobs=5)
        (completion,) = document["choices"]
        (token,) = completion["tokens"]
        assert completion["text"] == own[0]["sequence"] == masked.output(prompt)
        assert (token["token"], token["text"]) == (own[0]["token"], own[0]["token_str"])
        assert token["logprob"] == pytest.approx(math.log(own[0]["score"]), abs=1e-4)
        assert completion["finish_reason"] == "stop"
        assert list(token["top_logprobs"]) == [str(row["token"]) for row in own]
        assert [math.exp(p) for p in token["top_logprobs"].values()] == pytest.approx(
            [r["score"] for r in own], abs=1e-4
        )
        line = masked.output(prompt, top_logprobs=5, output="lmtp")
        fields = {"stream_id": 0, "finish_reason": "stop"}
        assert json.loads(line.removeprefix("TOKEN ")) == token | fields


def test_choices_are_compared_as_the_pipelines_targets_are(masked: Served) -> None:
    prompt = with_mask(masked, TEXTS[0])
    space = " " if masked.tokenizer.mask_token == "<mask>" else ""
    targets = [f"{space}cat", f"{space}a", f"{space}on"]
    tokens = ["Ġ" + target[1:] if space else target for target in targets]
    own = {row["token_str"]: row["score"] for row in own_fillings(masked, prompt, targets=tokens)}
    document = masked.document(prompt, choices=json.dumps(targets))
    distribution = {row["choice"]: row for row in document["distribution"]}
    assert {choice: math.exp(row["logprob"]) for choice, row in distribution.items()} == pytest.approx(own, abs=1e-4)
    best = max(own, key=lambda target: own[target])
    assert document["distribution"][0]["choice"] == best == document["choices"][0]["tokens"][0]["text"]
    filled = masked.output(prompt, choices=json.dumps(targets))
    assert filled == document["choices"][0]["text"] == own_fillings(masked, prompt, targets=tokens)[0]["sequence"]


def test_uneven_prompts_in_one_batch_are_filled_as_each_alone(masked: Served) -> None:
    prompts = [ids(masked, with_mask(masked, TEXTS[i % 3] + " Paris" * (i % 16))) for i in range(32)]
    alone = [
        answers(masked.engine, Encode(stream_id=0, prompt=prompt, top_logprobs=9)).tokens()[0] for prompt in prompts
    ]
    masked.passes.clear()
    batch = answers(masked.engine, *(Encode(stream_id=i, prompt=p, top_logprobs=9) for i, p in enumerate(prompts)))
    assert masked.passes == [32]
    assert batch.counters.steps == 1
    for i, own in enumerate(alone):
        (token,) = batch.tokens(i)
        assert token.token == own.token
        assert token.top_logprobs == pytest.approx(own.top_logprobs, abs=1e-4)


def test_each_of_several_masks_gets_a_token_and_the_text_has_all_of_them(bert: Served) -> None:
    prompt = "The [MASK] sat on a [MASK] and saw [MASK]."
    own: Any = own_fillings(bert, prompt, top_k=3)  # a list for each mask
    document = bert.document(prompt, top_logprobs=3, max_tokens=1)
    (completion,) = document["choices"]
    assert [token["token"] for token in completion["tokens"]] == [rows[0]["token"] for rows in own]
    for token, rows in zip(completion["tokens"], own, strict=True):
        assert [math.exp(p) for p in token["top_logprobs"].values()] == pytest.approx(
            [r["score"] for r in rows], abs=1e-4
        )
    filled = ids(bert, prompt)
    for token in completion["tokens"]:
        filled[filled.index(bert.tokenizer.mask_token_id)] = token["token"]
    assert completion["text"] == bert.tokenizer.decode(filled, skip_special_tokens=True)
    assert document["usage"]["output_token_count"] == 3
    lines = bert.output(prompt, output="lmtp").splitlines()
    assert [json.loads(line.removeprefix("TOKEN "))["finish_reason"] for line in lines] == [None, None, "stop"]


def test_draws_follow_the_seed_alone_and_in_a_batch(bert: Served) -> None:
    prompt = "The [MASK] sat on a [MASK]."
    settings: dict[str, Any] = {"temperature": 2.0, "top_p": 0.9}
    several = bert.document(prompt, n=4, seed=7, **settings)["choices"]
    alone = [bert.document(prompt, seed=7 + i, **settings)["choices"][0] for i in range(4)]
    assert several == [own | {"index": i} for i, own in enumerate(alone)]
    assert len({tuple(token["token"] for token in completion["tokens"]) for completion in several}) > 1


def test_draws_have_the_models_distribution(bert: Served) -> None:
    prompt = "The cat [MASK] on a mat."
    own = {row["token"]: row["score"] for row in own_fillings(bert, prompt, top_k=2)}
    drawn = [
        answers(
            bert.engine,
            *(Encode(stream_id=i, prompt=ids(bert, prompt), temperature=1.0, seed=s * 256 + i) for i in range(256)),
        )
        for s in range(2)
    ]
    tokens = [batch.ids(i)[0] for batch in drawn for i in range(256)]
    for token, probability in own.items():
        deviation = math.sqrt(512 * probability * (1 - probability))
        assert abs(tokens.count(token) - 512 * probability) < 5 * deviation


def test_logit_bias_applies_to_each_mask_and_to_its_log_probabilities(bert: Served) -> None:
    prompt = "The [MASK] sat on a [MASK]."
    allowed = [bert.tokenizer.convert_tokens_to_ids(word) for word in ("cat", "dog")]
    names = [str(token) for token in allowed]
    inputs = torch.tensor([ids(bert, prompt)])
    logits = bert.model(input_ids=inputs).logits[0][inputs[0] == bert.tokenizer.mask_token_id]
    own = torch.log_softmax(logits[:, allowed], -1)
    document = bert.document(prompt, logit_bias=json.dumps(dict.fromkeys(names, 100)), top_logprobs=5)
    for token, row in zip(document["choices"][0]["tokens"], own, strict=True):
        expected = dict(zip(names, row.tolist(), strict=True))
        assert token["top_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_a_mask_of_the_vocabulary_applies(bert: Served) -> None:
    dog = bert.tokenizer.convert_tokens_to_ids("dog")
    bits = np.arange(320) == dog
    mask = base64.b64encode(np.packbits(bits, bitorder="little").tobytes()).decode()
    operation = Encode(stream_id=0, prompt=ids(bert, "The [MASK] sat."), mask=mask)
    assert answers(bert.engine, operation).ids() == [dog]


def test_score_gives_the_log_probabilities_of_tokens_in_the_places_of_masks(masked: Served) -> None:
    mask = masked.tokenizer.mask_token_id
    prompt = ids(masked, with_mask(masked, TEXTS[0]))
    prompt = [*prompt[:2], mask, *prompt[2:]]
    logits = masked.model(input_ids=torch.tensor([prompt])).logits[0]
    own = torch.log_softmax(logits[[i for i, token in enumerate(prompt) if token == mask]], -1)
    scored = [7, 9]
    got = answers(masked.engine, Score(stream_id=0, prompt=prompt, scored=scored, top_logprobs=2, text=True)).tokens()
    assert [token.token for token in got] == scored
    expected = [own[i, token].item() for i, token in enumerate(scored)]
    assert [token.logprob for token in got] == pytest.approx(expected, abs=1e-4)
    assert [token.finish_reason for token in got] == [None, "stop"]
    assert [token.text for token in got] == [masked.tokenizer.decode([token]) for token in scored]


def test_only_the_mask_token_is_special_in_a_prompt(masked: Served) -> None:
    mask, end = masked.tokenizer.mask_token, masked.tokenizer.sep_token
    prompt = f"The cat {end} sat on a {mask}."
    expected = encode(masked.tokenizer, prompt, mask=mask)
    assert expected.count(masked.tokenizer.mask_token_id) == 1
    assert expected.count(masked.tokenizer.sep_token_id) == 1  # the tokenizer's own, at the end
    usage = masked.document(prompt)["usage"]
    assert usage["input_token_count"] == len(expected)
    allowed = masked.document(prompt, allow_special_tokens=True)["usage"]
    assert allowed["input_token_count"] == len(ids(masked, prompt))
    scored = answers(masked.engine, Score(stream_id=0, prompt=f"The cat {mask}.", scored=mask)).error()
    assert scored.startswith("scored is ")  # there it is plain text


def test_choices_of_one_prompt_are_one_row(bert: Served) -> None:
    bert.passes.clear()
    bert.output("The [MASK] sat.", choices='["cat", "dog", "mat", "paris"]')
    assert bert.passes == [1]


def test_a_template_and_a_system_prompt_surround_the_prompt(bert: Served) -> None:
    whole = bert.output("Big red [MASK].")
    assert bert.output("red [MASK]", prompt_template="Big {prompt}.") == whole
    assert bert.output("red [MASK].", system_prompt="Big") == whole


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"regex": "a+"}, "regex: this model is a masked language model, which chooses tokens for its masks, each by itself"),
        ({"json_schema": "true"}, "json_schema: "),
        ({"grammar": 'start: "a"'}, "grammar: "),
        ({"stop_sequences": "cat"}, "stop: "),
        ({"prompt_logprobs": True, "output": "json"}, "prompt_logprobs: this model reads the whole prompt at once"),
        ({"choices": '["cat"]', "logit_bias": '{"7": -100}'}, "choices: this model compares at most 64"),
        ({"choices": '["cat sat"]'}, "choices[0] is 2 tokens; give 1, one for each [MASK]."),
        ({"prompt": "The cat sat."}, "prompt has no [MASK]; put it where a token is to be filled in."),
        ({"prompt": "cat " * 63 + "[MASK]"}, "prompt is 66 tokens; the model's context is 64."),
        ({"logit_bias": '{"320": 1}'}, "logit_bias: token id 320 is outside the vocabulary of 320."),
    ],
)  # fmt: skip
def test_what_a_masked_model_cannot_do_is_refused_in_a_sentence(bert: Served, inputs: Any, expected: str) -> None:
    with pytest.raises(RequestError) as error:
        bert.output(**{"prompt": "The [MASK] sat."} | inputs)
    assert str(error.value).startswith(expected)


def test_generate_is_refused_and_others_of_its_batch_are_answered(bert: Served) -> None:
    prompt = ids(bert, "The [MASK] sat.")
    got = answers(
        bert.engine,
        Generate(stream_id=0, prompt=prompt),
        Score(stream_id=1, prompt=prompt, scored=[7]),
        Score(stream_id=2, prompt=prompt, scored=[7, 8]),
    )
    assert got.error(0) == (
        "GENERATE: this model is a masked language model, which fills masks and does not continue a text: "
        "send the input prompt, or SCORE."
    )
    assert got.ids(1) == [7]
    assert got.error(2) == "scored is 2 tokens; give 1, one for each [MASK] of prompt."


def test_a_step_is_bounded_and_takes_texts_of_like_length(bert: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = replace(bert.engine.runner.step_limits, chunk=128, busy_chunk=128)
    monkeypatch.setattr(bert.engine.runner, "step_limits", limits)
    mask: Any = bert.tokenizer.mask_token_id
    prompts = [[mask, *[7] * (i * 29 % 60)] for i in range(48)]
    bert.passes.clear()
    bert.columns.clear()
    answers(bert.engine, *(Score(stream_id=i, prompt=p, scored=[7]) for i, p in enumerate(prompts)))
    padded = [rows * columns for rows, columns in zip(bert.passes, bert.columns, strict=True)]
    assert sum(bert.passes) == len({len(prompt) for prompt in prompts})
    assert max(padded) <= 128
    assert sum(padded) < 1.25 * sum({len(prompt) for prompt in prompts})


def test_a_text_longer_than_a_step_is_computed_once(bert: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = replace(bert.engine.runner.step_limits, chunk=16, busy_chunk=16)
    monkeypatch.setattr(bert.engine.runner, "step_limits", limits)
    bert.passes.clear()
    document = bert.document("[MASK] " * 62)
    assert len(document["choices"][0]["tokens"]) == 62
    assert bert.passes == [1]


def test_a_prompt_of_masks_alone_is_answered_beside_longer_ones(bert: Served) -> None:
    """A prompt of one token looks like a decoding stream to the scheduler."""
    mask = bert.tokenizer.mask_token_id
    prompts = [[mask], [mask, 7], [mask] * 64]
    got = answers(
        bert.engine, *(Score(stream_id=i, prompt=p, scored=[7] * p.count(mask)) for i, p in enumerate(prompts))
    )
    for i, prompt in enumerate(prompts):
        own = torch.log_softmax(bert.model(input_ids=torch.tensor([prompt])).logits[0], -1)[:, 7]
        expected = [own[j].item() for j, token in enumerate(prompt) if token == mask]
        assert [token.logprob for token in got.tokens(i)] == pytest.approx(expected, abs=1e-4)


def test_model_info_says_what_kind_of_model_it_is(bert: Served, exclusive: Served) -> None:
    (reply,) = answers(bert.engine, ModelInfo(stream_id=0)).replies[0]
    info: Any = reply
    assert info.model_info["kind"] == "masked language model"
    assert info.model_info["mask_token"] == bert.tokenizer.mask_token_id
    assert info.model_info["context"] == info.model_info["longest_stream"] == 64
    assert info.model_info["runner"] == "encoder, all texts of a step in one padded pass"
    (reply,) = answers(exclusive.engine, ModelInfo(stream_id=0)).replies[0]
    info = reply
    assert info.model_info["kind"] == "sequence classifier"
    assert info.model_info["labels"] == ["bad", "mixed", "good"]


# Sequence classifiers


def test_a_text_is_classified_as_transformers_own_pipeline_does(classifier: Served) -> None:
    for text in TEXTS:
        own = own_labels(classifier, text)
        document = classifier.document(text)
        got = {row["choice"]: row["probability"] for row in document["distribution"]}
        assert list(got) == list(own)
        assert got == pytest.approx(own, abs=1e-4)
        (completion,) = document["choices"]
        (token,) = completion["tokens"]
        best = next(iter(own))
        assert completion["text"] == token["text"] == best == classifier.output(text)
        assert math.exp(token["logprob"]) == pytest.approx(own[best], abs=1e-4)
        line = json.loads(classifier.output(text, output="lmtp").removeprefix("TOKEN "))
        assert line == token | {"stream_id": 0, "finish_reason": "stop"}


def test_uneven_texts_in_one_batch_are_classified_as_each_alone(classifier: Served) -> None:
    texts = [TEXTS[i % 3] + " Paris" * (i % 16) for i in range(32)]
    operations = [Encode(stream_id=i, prompt=ids(classifier, text)) for i, text in enumerate(texts)]
    classifier.passes.clear()
    batch = answers(classifier.engine, *operations)
    assert classifier.passes == [32]
    for operation in operations[::4]:
        (token,) = batch.tokens(operation.stream_id)
        (own,) = answers(classifier.engine, operation).tokens(operation.stream_id)
        assert token.token == own.token
        assert token.top_logprobs == pytest.approx(own.top_logprobs, abs=1e-4)


def test_independent_labels_have_the_pipelines_sigmoids(independent: Served) -> None:
    for text in TEXTS:
        own = own_labels(independent, text)
        got = {row["choice"]: row["probability"] for row in independent.document(text)["distribution"]}
        assert got == pytest.approx(own, abs=1e-4)
        assert independent.output(text) == max(own, key=lambda label: own[label])


def test_logit_bias_excludes_labels_and_a_temperature_draws_one(exclusive: Served) -> None:
    best = exclusive.output(TEXTS[0])
    label = ["bad", "mixed", "good"].index(best)
    without = exclusive.document(TEXTS[0], logit_bias=json.dumps({str(label): -100}))
    assert best not in {row["choice"] for row in without["distribution"]}
    assert sum(row["probability"] for row in without["distribution"]) == pytest.approx(1.0, abs=1e-5)
    drawn = exclusive.document(TEXTS[0], n=16, temperature=5.0, seed=1)["choices"]
    assert len({completion["text"] for completion in drawn}) > 1


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"choices": '["good"]'}, "choices: this model chooses among its labels"),
        ({"regex": "a+"}, "regex: this model is a sequence classifier, which chooses labels"),
        ({"prompt_logprobs": True, "output": "json"}, "prompt_logprobs: "),
        ({"logit_bias": '{"3": -100}'}, "logit_bias: token id 3 is outside the vocabulary of 3."),
    ],
)
def test_what_a_classifier_cannot_do_is_refused_in_a_sentence(exclusive: Served, inputs: Any, expected: str) -> None:
    with pytest.raises(RequestError) as error:
        exclusive.output("The cat sat.", **inputs)
    assert str(error.value).startswith(expected)


def test_lmtp_operations_on_a_classifier_are_refused_with_the_reason(exclusive: Served) -> None:
    prompt = ids(exclusive, "The cat sat.")
    got = answers(exclusive.engine, Generate(stream_id=0, prompt=prompt), Score(stream_id=1, prompt=prompt, scored=[7]))
    reason = "this model is a sequence classifier, which labels a text and has no tokens to add: send the input prompt."
    assert [got.error(0), got.error(1)] == [f"GENERATE: {reason}", f"SCORE: {reason}"]


def test_labels_that_exclude_nothing_take_no_logit_bias(independent: Served) -> None:
    with pytest.raises(RequestError, match="logit_bias: this model is a sequence classifier whose labels exclude none"):
        independent.output("The cat sat.", logit_bias='{"0": -100}')


def test_many_texts_with_independent_labels_are_answered_as_each_alone(independent: Served) -> None:
    prompts = [ids(independent, TEXTS[i % 3] + " cat" * i) for i in range(40)]
    got = answers(independent.engine, *(Encode(stream_id=i, prompt=prompt) for i, prompt in enumerate(prompts)))
    for i, prompt in enumerate(prompts):
        own = torch.nn.functional.logsigmoid(independent.model(input_ids=torch.tensor([prompt])).logits[0])
        (token,) = got.tokens(i)
        assert token.top_logprobs == pytest.approx(dict(enumerate(own.tolist())), abs=1e-4)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_text_that_the_models_code_refuses_fails_alone(labels: int) -> None:
    """BART's classifier raises for a text without an end token."""
    engine = start(build("bart", "SequenceClassification", num_labels=labels), tokenizer_of("bert"))
    prompts = [[7, 8, 3], [7, 8, 9, 10], [7, 3, 8, 3]]
    got = answers(engine, *(Encode(stream_id=i, prompt=prompt) for i, prompt in enumerate(prompts)))
    assert got.error(1) == "the model failed: Each example must contain at least one <eos> token."
    for i in (0, 2):
        alone = answers(engine, Encode(stream_id=i, prompt=prompts[i])).tokens(i)
        assert got.tokens(i)[0].top_logprobs == pytest.approx(alone[0].top_logprobs, abs=1e-4)
    assert "must contain at least one <eos>" in answers(engine, Encode(stream_id=0, prompt=prompts[1])).error()
    engine.stop()


# Setup


def test_a_tokenizer_without_a_mask_token_is_refused_at_setup() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("bert"))
    tokenizer.mask_token = None
    with pytest.raises(UnsupportedModel, match="its tokenizer has no mask token"):
        start(build("bert"), tokenizer)


def test_a_tokenizer_whose_other_inputs_matter_is_refused_at_setup() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("bert"))  # XLNet's has another type for its last token
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    start(build("bert"), tokenizer).stop()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    processor = processors.TemplateProcessing(single="[CLS]:0 $A:0 [SEP]:2", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = processor
    with pytest.raises(UnsupportedModel, match="its tokenizer gives it token_type_ids, which are not passed on here"):
        start(build("bert"), tokenizer)


def test_a_chat_template_of_an_encoder_is_not_applied() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("bert"))
    tokenizer.chat_template = "cat {{ messages[0]['content'] }}"
    served = Served(build("bert"), tokenizer)
    assert served.document("The [MASK] sat.")["usage"]["input_token_count"] == len(ids(served, "The [MASK] sat."))
    served.engine.stop()
