"""Models' own caches: what is reused gives what a text computed from its beginning gives."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TrOCRConfig

from lmtp.engine.engine import Engine
from lmtp.protocol import Generate
from tests.tiny import END, VOCABULARY, answers, build, own_greedy, own_logits, random_prompts, randomize, start

BOUND = 48
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": BOUND,
}


@pytest.fixture(scope="module")
def longrope() -> Iterator[tuple[PreTrainedModel, Engine]]:
    """A Llama: unlike Phi-3's, its code keeps what it has computed when its factors change."""
    model = build("llama", rope_parameters=LONGROPE)
    engine = start(model)
    yield model, engine
    engine.stop()


@pytest.mark.parametrize(
    ("first", "then", "reused"),
    [(BOUND - 20, BOUND - 5, True), (BOUND - 6, BOUND + 12, False), (BOUND - 2, BOUND + 12, False), (BOUND + 2, BOUND + 16, True)],
    ids=["short", "short, then long", "across the bound, then long", "long"],
)  # fmt: skip
def test_a_continued_text_equals_generate_where_the_rotary_embedding_changes_with_the_length(
    longrope: tuple[PreTrainedModel, Engine], first: int, then: int, reused: bool
) -> None:
    model, engine = longrope
    (text,) = random_prompts(BOUND * 2, seed=first)
    begun = answers(engine, Generate(stream_id=0, prompt=text[:first], max_tokens=4)).ids()
    assert begun == own_greedy(model, text[:first], 4)
    more = [*text[:first], *begun, *text[first + 4 : then]]
    continued = answers(engine, Generate(stream_id=0, prompt=more, max_tokens=8))
    assert continued.ids() == own_greedy(model, more, 8)
    assert (continued.counters.reused_tokens > 0) == reused


def test_a_model_whose_cache_counts_padding_that_a_whole_text_does_not_gets_none() -> None:
    """TrOCR with sinusoidal positions, and token 0 as padding inside a prompt."""
    config = TrOCRConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        pad_token_id=0,
        eos_token_id=END,
        use_learned_position_embeddings=False,
    )
    torch.manual_seed(0)
    model = randomize(AutoModelForCausalLM.from_config(config))
    engine = start(model)
    begun, more = random_prompts(9, 8)
    padded = [*begun[:4], 0, *begun[4:]]
    try:
        assert "with a cache its positions count padding" in engine.runner.reason
        for prompt in (begun, padded, padded + more):
            tokens = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=6)).tokens()
            ids = [token.token for token in tokens]
            with torch.inference_mode():
                generate: Any = model.generate  # typed as a tensor
                given = {"attention_mask": torch.ones(1, len(prompt), dtype=torch.long), "use_cache": False}
                output = generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0, **given)
            assert ids == output[0, len(prompt) :].tolist()
            own = torch.log_softmax(own_logits(model, prompt + ids)[len(prompt) - 1 :], -1)
            expected = [own[i, token].item() for i, token in enumerate(ids)]
            assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-4)
    finally:
        engine.stop()


def test_a_model_that_prepares_embeddings_of_its_own_is_served() -> None:
    model: Any = build("mamba")
    prepare, embed = model.prepare_inputs_for_generation, model.get_input_embeddings()

    def embedded(*arguments: Any, **named: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = prepare(*arguments, **named)
        return inputs | {"inputs_embeds": embed(inputs.pop("input_ids"))}

    (prompt,) = random_prompts(20)
    expected = own_greedy(model, prompt, 6)
    model.prepare_inputs_for_generation = embedded
    engine = start(model)
    try:
        assert answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=6)).ids() == expected
    finally:
        engine.stop()
