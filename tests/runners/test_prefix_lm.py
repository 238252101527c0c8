"""PaliGemma's text: its prompt attends both ways, what follows attends backwards."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM, PaliGemmaConfig, PreTrainedModel

from lmtp.engine.engine import Engine
from lmtp.protocol import Generate, Score
from lmtp.runners.cache_runner import CacheRunner, Mode
from lmtp.runners.runner import open_runner
from lmtp.runners.step import Step, Stream
from tests import models
from tests.probe import differences, greedy
from tests.tiny import BASE, answers, random_prompts, randomize, start

Pair = tuple[PreTrainedModel, Engine]
GEMMA2 = {**BASE, "model_type": "gemma2", "head_dim": 8, "sliding_window": 8}


def paligemma(text: dict[str, Any]) -> PreTrainedModel:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    config = PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32)
    return randomize(AutoModelForMultimodalLM.from_config(config))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """One like PaliGemma 2, whose windows are shorter than its prompts."""
    model = paligemma(GEMMA2)
    engine = start(model)
    yield model, engine
    engine.stop()


def test_its_streams_and_scores_are_those_of_transformers_with_token_types(pair: Pair) -> None:
    model, engine = pair
    assert engine.runner.description == Mode.PREFIX
    assert differences(model, engine) == []


def test_what_stands_at_the_end_of_a_prompt_changes_what_is_computed_of_its_beginning(pair: Pair) -> None:
    """So that nothing is reused, not even of an equal prompt."""
    _, engine = pair
    prompt, end = random_prompts(9, 3)
    for _ in range(2):
        got = answers(engine, Generate(stream_id=0, prompt=prompt + end, max_tokens=4))
        assert got.counters.reused_tokens == 0
    as_prompt = answers(engine, Score(stream_id=0, prompt=prompt + end, scored=[5])).tokens()[0].logprob
    as_scored = answers(engine, Score(stream_id=0, prompt=prompt, scored=[*end, 5])).tokens()[-1].logprob
    assert abs(as_prompt - as_scored) > 0.01


def test_a_stream_that_lost_its_memory_keeps_its_prompt(pair: Pair) -> None:
    """It is computed again with what it has generated, which is no prompt."""
    model, _ = pair
    runner = open_runner(model)
    (prompt,) = random_prompts(12)
    expected = greedy(model, prompt, 8)
    stream = Stream(list(prompt), 20)
    for token in expected:
        assert runner.admit(stream)
        assert stream.computed == 0
        logits = runner.prepare(Step([stream], [stream.pending]))()
        assert logits.argmax(-1).tolist() == [token]
        stream.computed = len(stream.tokens)
        stream.tokens.append(token)
        runner.release(stream)


def test_a_prompt_that_comes_in_pieces_is_computed_once_it_is_whole(pair: Pair) -> None:
    model, _ = pair
    runner = open_runner(model)
    (prompt,) = random_prompts(12)
    stream = Stream(list(prompt), 20)
    runner.admit(stream)
    for count in (5, 6):
        assert runner.prepare(Step([stream], [count]))().numel() == 0
        stream.computed += count
    assert runner.prepare(Step([stream], [1]))().argmax(-1).tolist() == greedy(model, prompt, 1)


def test_attention_that_makes_masks_for_everything_does_not_lead_it_into_slots() -> None:
    """There a plain forward pass is causal, as slots are."""
    model = models.build("paligemma", AutoModelForMultimodalLM)
    model.set_attn_implementation("eager")
    runner = open_runner(model)
    assert isinstance(runner, CacheRunner)
    assert runner.reason == "slots do not serve it: its prompt attends both ways, so no prefix of it can be reused"
