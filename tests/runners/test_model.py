"""What is read from a model's configurations."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from lmtp.runners.model import UNBOUNDED_CONTEXT, Defaults, defaults_of, limits_of
from tests.models import config_of
from tests.tiny import build, random_prompts


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.fixture
def model(llama: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model, for tests that change its generation configuration."""
    own = llama.generation_config
    yield llama
    llama.generation_config = own


def defaults(model: PreTrainedModel, **settings: Any) -> Defaults:
    model.generation_config = GenerationConfig(**settings)
    return defaults_of(model)


def test_a_configuration_that_sets_nothing_changes_nothing(model: PreTrainedModel) -> None:
    assert defaults(model) == Defaults()
    assert defaults(model).described == {}


def test_a_repetition_penalty_holds_without_sampling(model: PreTrainedModel) -> None:
    found = defaults(model, repetition_penalty=1.05, temperature=0.7, top_p=0.8, top_k=20)
    assert found == Defaults(repetition_penalty=1.05)
    assert found.described == {"repetition_penalty": 1.05}


def test_sampling_takes_temperature_top_p_and_top_k(model: PreTrainedModel) -> None:
    found = defaults(model, do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0.1)
    assert found == Defaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1)


def test_sampling_alone_means_what_generate_makes_of_it(model: PreTrainedModel) -> None:
    assert defaults(model, do_sample=True) == Defaults(temperature=1.0, top_k=50)
    assert defaults(model, do_sample=True, top_k=0, top_p=1.0) == Defaults(temperature=1.0)


def test_suppressed_tokens_and_biases_of_single_tokens_become_one_bias(model: PreTrainedModel) -> None:
    found = defaults(model, suppress_tokens=[4, 500], bad_words_ids=[[5]], sequence_bias=[[[6], 2.5]])
    assert found.logit_bias == {4: -math.inf, 5: -math.inf, 6: 2.5}
    assert found.described == {"logit_bias": {4: -100.0, 5: -100.0, 6: 2.5}}
    assert found.ignored == ()


def test_what_has_no_counterpart_is_named(model: PreTrainedModel) -> None:
    found = defaults(model, num_beams=4, no_repeat_ngram_size=3, bad_words_ids=[[5, 6]], forced_eos_token_id=2)
    assert found.ignored == ("num_beams", "no_repeat_ngram_size", "forced_eos_token_id", "bad_words_ids")
    assert found.described == {"ignored": found.ignored}
    assert not defaults(model, num_beams=1, no_repeat_ngram_size=0, typical_p=1.0, guidance_scale=1.0).ignored


def test_the_defaults_give_the_tokens_that_generate_gives(model: PreTrainedModel) -> None:
    """The penalties as `generate` applies them to the logits of one step."""
    found = defaults(model, repetition_penalty=1.8, suppress_tokens=[7, 9], pad_token_id=0)
    ids = torch.tensor(random_prompts(12))
    generate: Any = model.generate
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, -1].clone()
        chosen = generate(ids, max_new_tokens=1, attention_mask=torch.ones_like(ids))[0, -1].item()
        seen = logits[ids[0]]
        logits[ids[0]] = torch.where(seen < 0, seen * found.repetition_penalty, seen / found.repetition_penalty)
        for token, bias in found.logit_bias.items():
            logits[token] += bias
    assert logits.argmax().item() == chosen


@pytest.mark.parametrize(
    ("model_type", "context"),
    [("llama", 512), ("gpt2", 512), ("mpt", 512), ("whisper", 512), ("xlnet", UNBOUNDED_CONTEXT), ("rwkv", 512)],
)
def test_the_context_is_what_the_configuration_names(llama: PreTrainedModel, model_type: str, context: int) -> None:
    own = llama.config
    llama.config = config_of(model_type)
    try:
        assert limits_of(llama).context == context
    finally:
        llama.config = own


@pytest.mark.parametrize(("attention", "context"), [("block_sparse", (5 + 2 * 1) * 2), ("original_full", 512)])
def test_a_causal_bigbird_ends_where_its_blocks_would_let_it_see_later_tokens(
    llama: PreTrainedModel, attention: str, context: int
) -> None:
    own = llama.config
    llama.config = config_of("big_bird")
    llama.config.attention_type = attention
    try:
        assert limits_of(llama).context == context
    finally:
        llama.config = own
