"""Llama 4's attention temperature by each row's own positions, against the model's own code."""

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lmtp.protocol import Score
from lmtp.runners.temperature import scale_by_position
from tests.tiny import answers, build, own_logits, random_prompts, start

CHANGES: dict[str, Any] = {"floor_scale": 5, "attn_scale": 2.0, "no_rope_layers": [1, 0]}


@pytest.fixture(scope="module")
def llama4() -> PreTrainedModel:
    """Its temperature changes every five tokens."""
    return build("llama4", **CHANGES)


def test_rows_of_different_lengths_have_their_own_temperature(llama4: PreTrainedModel) -> None:
    engine = start(copy.deepcopy(llama4))
    try:
        assert engine.runner.description == "slots"
        texts = random_prompts(40, 7, 23)
        got = answers(engine, *(Score(stream_id=i, prompt=text[:3], scored=text[3:]) for i, text in enumerate(texts)))
        for i, text in enumerate(texts):
            expected = torch.log_softmax(own_logits(llama4, text)[2:-1], -1)
            for token, logprobs in zip(got.tokens(i), expected, strict=True):
                assert abs(token.logprob - logprobs[token.token].item()) < 1e-3
    finally:
        engine.stop()


def test_a_changed_model_computes_one_text_as_before_and_is_changed_only_once(llama4: PreTrainedModel) -> None:
    changed = copy.deepcopy(llama4)
    assert scale_by_position(changed) == scale_by_position(changed) == {"floor_scale"}
    ids = torch.tensor(random_prompts(40))
    assert torch.equal(changed(input_ids=ids).logits, llama4(input_ids=ids).logits)
    cold = build("llama4", **CHANGES, attn_temperature_tuning=False)
    assert not torch.allclose(cold(input_ids=ids).logits, llama4(input_ids=ids).logits, atol=1e-2)


def test_a_model_without_temperature_stays_as_it_is() -> None:
    assert scale_by_position(build("llama")) == set()
