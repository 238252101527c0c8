"""Models' own caches: what is reused gives what a text computed from its beginning gives."""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel

from lmtp.engine.engine import Engine
from lmtp.protocol import Generate
from tests.tiny import answers, build, own_greedy, random_prompts, start

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
