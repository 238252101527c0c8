"""The real LMQL client runs queries on the demo model, on Replicate and over the gateway's WebSocket."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmql
import pytest

from benchmarks import lmql_client, lmql_queries
from tests.replicate_stand_in import StandIn
from tests.server import Server


@pytest.fixture(params=["replicate", "websocket"])
def model(request: pytest.FixtureRequest, api: StandIn, demo_weights: Path, tmp_path: Path) -> Iterator[str]:
    """The `from` clause of a query."""
    with lmql_client.redirected(lambda: api.url, tmp_path):
        if request.param == "replicate":
            yield lmql_client.model_clause(demo_weights)
        else:
            gateway: Server = request.getfixturevalue("gateway")
            endpoint = gateway.url.replace("http://127.0.0.1", "localhost")
            yield f'lmql.model("ignored", endpoint="{endpoint}", tokenizer="{demo_weights}")'


async def run(query: str) -> Any:
    """The result of a query; a list of results if it samples several."""
    result = await lmql.run(query)
    return result[0] if isinstance(result, list) and len(result) == 1 else result


def argmax(model: str, prompt: str, where: str) -> str:
    """An argmax query."""
    return f'argmax\n    "{prompt}"\nfrom\n    {model}\nwhere\n    {where}\n'


async def test_the_sentiment_query_gives_its_distribution(model: str, api: StandIn) -> None:
    before = len(api.predictions)
    result = await run(lmql_queries.text("sentiment", model))
    probabilities = dict(result.variables["P(CLASSIFICATION)"])
    assert set(probabilities) == {" positive", " negative", " neutral"}
    assert math.isclose(sum(probabilities.values()), 1, rel_tol=1e-6)
    assert max(probabilities, key=lambda option: probabilities[option]) == " positive"
    assert len(result.variables["ANALYSIS"]) > 20
    if "replicate:" not in model:
        return
    operations = [prediction.input["ops_batch_json"] for prediction in list(api.predictions.values())[before:]]
    assert sum('"SCORE"' in operation for operation in operations) == 3


async def test_a_choice_is_one_of_the_options(model: str) -> None:
    result = await run(lmql_queries.text("choice", model))
    assert result.variables["COLOUR"] in (" blue", " red", " extremely green")
    assert result.variables["OTHER"] in (" extremely green", " purple")


async def test_stops_at_ends_with_the_phrase(model: str) -> None:
    prompt = "The first three letters of the alphabet are A, B and C. The last three are[LETTERS]"
    result = await run(argmax(model, prompt, 'STOPS_AT(LETTERS, ".") and len(TOKENS(LETTERS)) < 60'))
    assert result.variables["LETTERS"].endswith(".")
    assert result.variables["LETTERS"].count(".") == 1


@pytest.mark.parametrize("maximum", [2, 9, 30])
async def test_a_variable_keeps_to_its_maximum_length(model: str, maximum: int) -> None:
    result = await run(argmax(model, "Once upon a time[STORY]", f"len(TOKENS(STORY)) < {maximum}"))
    tokenizer = lmql.tokenizer(model.split('"')[-2])
    assert 0 < len(tokenizer.tokenize(result.variables["STORY"])) < maximum


async def test_an_int_variable_is_an_integer(model: str) -> None:
    result = await run(lmql_queries.text("integer", model))
    assert isinstance(result.variables["DAYS"], int)


async def test_samples_vary_and_obey_their_constraints(model: str) -> None:
    results = await run(lmql_queries.text("sample", model))
    assert len(results) == 3
    assert {result.variables["ANIMAL"] for result in results} <= {" a cat", " a dog", " an eel"}
    assert len({result.prompt for result in results}) > 1


async def test_a_beam_search_gives_all_its_beams(model: str) -> None:
    results = await run(lmql_queries.text("beam", model))
    assert len(results) == 2
    assert results[0].prompt != results[1].prompt


async def test_an_argmax_query_gives_the_same_text_twice(model: str) -> None:
    query = argmax(model, "A list of things to do today:[LIST]", "len(TOKENS(LIST)) < 24")
    assert (await run(query)).prompt == (await run(query)).prompt


async def test_the_model_can_be_scored_without_a_query(model: str) -> None:
    described = eval(model, {"lmql": lmql})
    result = await described.score("The capital of France is", [" Paris", " London", " a"])
    assert result.argmax() in (" Paris", " a")
    assert all(score < 0 for score in result.scores())
