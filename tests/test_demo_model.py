"""The demo model, in float32, against Transformers: what a user of it sees."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import GenerationConfig

from lmtp.engine.engine import Engine
from lmtp.protocol import Generate, Score
from lmtp.runners.model import Defaults, UnsupportedModel, defaults_of
from lmtp.runners.selfcheck import Reference, check_slots
from lmtp.runners.slot_runner import SlotRunner, SlotStep, layers_of
from lmtp.text import render_prompt
from lmtp.weights import load as weights
from lmtp.weights.load import Loaded
from predict import Predictor
from tests.encoders import defaults
from tests.tiny import answers, own_greedy, own_logits, start

Demo = tuple[Loaded, Engine]
QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
    "Why is the sky blue? Answer in detail, with an example.",
]


@pytest.fixture(scope="module")
def demo(demo_weights: Path) -> Iterator[Demo]:
    loaded = weights.load(demo_weights, dtype="float32")
    engine = start(loaded.model, loaded.tokenizer)
    assert engine.runner.description == "slots"
    yield loaded, engine
    engine.stop()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_check_passes_slots_and_refuses_a_wrong_mask(
    demo_weights: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = weights.load(demo_weights, dtype=dtype).model
    step, layers, reference = SlotStep(model), layers_of(model), Reference.of(model)
    check_slots(step, layers, reference)
    right = SlotRunner._masks
    monkeypatch.setattr(SlotRunner, "_masks", lambda *arguments: [torch.zeros_like(m) for m in right(*arguments)])
    with pytest.raises(UnsupportedModel, match="positions differ from the model's own forward pass"):
        check_slots(step, layers, reference)


def test_answers_equal_generate_alone_and_together(demo: Demo) -> None:
    loaded, engine = demo
    prompts = [render_prompt(loaded.tokenizer, question) for question in QUESTIONS]
    together = answers(engine, *(Generate(stream_id=i, prompt=p, max_tokens=24) for i, p in enumerate(prompts)))
    for i, prompt in enumerate(prompts):
        expected = own_greedy(loaded.model, prompt, 24)
        assert together.ids(i) == expected
        assert answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=24)).ids() == expected


def test_logprobs_agree_with_one_plain_forward_pass(demo: Demo) -> None:
    loaded, engine = demo
    prompt = render_prompt(loaded.tokenizer, QUESTIONS[1])
    operation = Generate(stream_id=0, prompt=prompt, max_tokens=30, temperature=1.0, seed=3, top_logprobs=20)
    tokens = answers(engine, operation).tokens()
    logprobs = torch.log_softmax(own_logits(loaded.model, prompt + [t.token for t in tokens]), -1)
    for offset, token in enumerate(tokens):
        row = logprobs[len(prompt) - 1 + offset]
        assert token.logprob == pytest.approx(row[token.token].item(), abs=1e-4)
        assert isinstance(token.top_logprobs, dict)
        for other, logprob in token.top_logprobs.items():
            assert logprob == pytest.approx(row[other].item(), abs=1e-4)


def test_scores_of_text_agree_with_one_plain_forward_pass(demo: Demo) -> None:
    loaded, engine = demo
    scored = " Paris, the city of light."
    tokens = answers(engine, Score(stream_id=0, prompt="The capital of France is", scored=scored, text=True)).tokens()
    ids = loaded.tokenizer.encode("The capital of France is") + loaded.tokenizer.encode(scored)
    logprobs = torch.log_softmax(own_logits(loaded.model, ids), -1)
    first = len(ids) - len(tokens)
    assert [t.token for t in tokens] == ids[first:]
    expected = [logprobs[first + i - 1, t.token].item() for i, t in enumerate(tokens)]
    assert [t.logprob for t in tokens] == pytest.approx(expected, abs=1e-4)
    assert "".join(str(t.text) for t in tokens) == scored


def test_the_text_ends_before_a_stop_sequence_and_generation_ends_with_it(demo: Demo) -> None:
    loaded, engine = demo
    prompt = render_prompt(loaded.tokenizer, QUESTIONS[0])
    whole = answers(engine, Generate(stream_id=0, prompt=prompt, text=True)).tokens()
    stopped = answers(engine, Generate(stream_id=0, prompt=prompt, text=True, stop=["of Fr", "zzz"])).tokens()
    assert "".join(str(t.text) for t in whole) == "The capital of France is Paris."
    assert "".join(str(t.text) for t in stopped) == "The capital "
    assert stopped[-1].finish_reason == "stop"
    assert len(stopped) < len(whole)


def test_a_text_that_repeats_itself_takes_few_steps_and_a_stop_sequence_within_a_draft_ends_it(demo: Demo) -> None:
    loaded, engine = demo
    prompt = loaded.tokenizer.encode("one two three four five six " * 5)
    operation = Generate(stream_id=0, prompt=prompt, max_tokens=48, text=True)
    whole = answers(engine, operation)
    assert whole.ids() == own_greedy(loaded.model, prompt, 48)
    assert whole.counters.steps < 24
    stopped = answers(engine, replace(operation, stop=["five six one two three"]))
    text = "".join(str(token.text) for token in whole.tokens())
    assert "".join(str(token.text) for token in stopped.tokens()) == text[: text.index("five six one two three")]
    assert stopped.tokens()[-1].finish_reason == "stop"
    assert stopped.counters.accepted_tokens > 0


def test_a_prompt_is_answered_with_the_defaults_of_the_models_generation_config(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, engine = demo
    predictor = Predictor()
    predictor.engine = engine
    prompt = render_prompt(loaded.tokenizer, QUESTIONS[0])
    own = GenerationConfig(repetition_penalty=1.5, suppress_tokens=[int(loaded.tokenizer.encode(" Paris")[0])])
    monkeypatch.setattr(loaded.model, "generation_config", own)
    monkeypatch.setattr(engine, "defaults", defaults_of(loaded.model))
    ids = torch.tensor([prompt])
    generate: Any = loaded.model.generate
    generated = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, eos_token_id=2, pad_token_id=2)
    expected = loaded.tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True)

    def answer(**inputs: Any) -> str:
        async def predict() -> str:
            chunks: Any = await predictor.predict(**defaults() | inputs)
            return "".join(chunks)

        return asyncio.run(predict())

    assert answer(prompt=QUESTIONS[0], max_tokens=20) == expected
    monkeypatch.setattr(engine, "defaults", Defaults(temperature=1.0))
    assert len({answer(prompt=QUESTIONS[1], max_tokens=8) for _ in range(4)}) > 1
    assert len({answer(prompt=QUESTIONS[1], max_tokens=8, temperature=0.0) for _ in range(3)}) == 1
