"""The real LMQL client, with an endpoint on Replicate, running queries against the demo model."""

import math
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import aiohttp
import lmql
import lmql.runtime.caching
import pytest
from lmql.models.lmtp.lmtp_replicate_client import LMTPReplicateClient

from tests.replicate_stand_in import MODEL, OWNER, TOKEN, StandIn, stand_in
from tests.server import Server

SUMMARIZING = (
    'Q: Summarizing the above analysis in a single word -- of the options "positive", "negative", and "neutral" -- how'
    " is the review best described?"
)


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[StandIn]:
    """Replicate's API in front of the server."""
    with stand_in(server.url) as api:
        yield api


class Redirected:
    """An HTTP session for LMQL's client, whose address of Replicate is fixed: to the stand-in, and nowhere else."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    def request(self, method: str, url: Any, **options: Any) -> Any:
        address = str(url).replace("https://api.replicate.com", self.url)
        assert address.startswith(self.url)
        return self.session.request(method, address, **options)

    get = partialmethod(request, "GET")
    post = partialmethod(request, "POST")


@pytest.fixture
def model(api: StandIn, demo_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The `from` clause of a query."""
    begin = LMTPReplicateClient.__init__

    def begin_redirected(
        client: Any, model: str, session: aiohttp.ClientSession, endpoint: str, **options: Any
    ) -> None:
        begin(client, model, Redirected(session, api.url), endpoint, **options)

    monkeypatch.setattr(LMTPReplicateClient, "__init__", begin_redirected)
    monkeypatch.setenv("REPLICATE_API_TOKEN", TOKEN)
    monkeypatch.setattr(lmql.runtime.caching, "CACHE_DIR", tmp_path)
    return f'lmql.model("ignored", endpoint="replicate:{OWNER}/{MODEL}", tokenizer="{demo_weights}")'


async def run(query: str) -> Any:
    """The result of a query; a list of them where it samples."""
    result = await lmql.run(query)
    return result[0] if isinstance(result, list) and len(result) == 1 else result


async def test_the_sentiment_query_gives_its_distribution(model: str, api: StandIn) -> None:
    before = len(api.predictions)
    result = await run(f'''
argmax
    """Review: We had a great stay. Hiking in the mountains was fabulous and the food is really good.\\n
    Q: What is the underlying sentiment of this review and why?\\n
    A:[ANALYSIS]\\n
    {SUMMARIZING}\\n
    A:[CLASSIFICATION]"""
from
    {model}
where
    STOPS_AT(ANALYSIS, "\\n") and len(TOKENS(ANALYSIS)) < 200
distribution
    CLASSIFICATION in [" positive", " negative", " neutral"]
''')
    probabilities = dict(result.variables["P(CLASSIFICATION)"])
    assert set(probabilities) == {" positive", " negative", " neutral"}
    assert math.isclose(sum(probabilities.values()), 1, rel_tol=1e-6)
    assert max(probabilities, key=lambda option: probabilities[option]) == " positive"
    assert len(result.variables["ANALYSIS"]) > 20
    operations = [prediction.input["ops_batch_json"] for prediction in list(api.predictions.values())[before:]]
    assert sum('"SCORE"' in operation for operation in operations) == 3


async def test_a_choice_is_one_of_the_options(model: str) -> None:
    result = await run(f"""
argmax
    "Between red and blue, the colour of the sky is[COLOUR] and that of blood is[OTHER]."
from
    {model}
where
    COLOUR in [" blue", " red", " extremely green"] and OTHER in [" extremely green", " purple"]
""")
    assert result.variables["COLOUR"] in (" blue", " red", " extremely green")
    assert result.variables["OTHER"] in (" extremely green", " purple")


async def test_stops_at_ends_with_the_phrase(model: str) -> None:
    result = await run(f"""
argmax
    "The first three letters of the alphabet are A, B and C. The last three are[LETTERS]"
from
    {model}
where
    STOPS_AT(LETTERS, ".") and len(TOKENS(LETTERS)) < 60
""")
    assert result.variables["LETTERS"].endswith(".")
    assert result.variables["LETTERS"].count(".") == 1


@pytest.mark.parametrize("most", [2, 9, 30])
async def test_a_variable_is_no_longer_than_it_may_be(model: str, most: int) -> None:
    result = await run(f"""
argmax
    "Once upon a time[STORY]"
from
    {model}
where
    len(TOKENS(STORY)) < {most}
""")
    tokenizer = lmql.tokenizer(model.split('"')[-2])
    assert 0 < len(tokenizer.tokenize(result.variables["STORY"])) < most


async def test_an_integer_is_one(model: str) -> None:
    result = await run(f"""
argmax
    "Q: How many days does a week have?\\nA: [DAYS]"
from
    {model}
where
    INT(DAYS) and len(TOKENS(DAYS)) < 4
""")
    assert isinstance(result.variables["DAYS"], int)


async def test_a_sample_varies_and_keeps_to_its_constraints(model: str) -> None:
    results = await run(f"""
sample(n=3, temperature=1.5)
    "My favourite animal is[ANIMAL], and I would call it[NAME]"
from
    {model}
where
    ANIMAL in [" a cat", " a dog", " an eel"] and len(TOKENS(NAME)) < 8
""")
    assert len(results) == 3
    assert {result.variables["ANIMAL"] for result in results} <= {" a cat", " a dog", " an eel"}
    assert len({result.prompt for result in results}) > 1


async def test_a_beam_search_gives_its_beams(model: str) -> None:
    results = await run(f"""
beam(n=2)
    "The opposite of hot is[WORD]"
from
    {model}
where
    len(TOKENS(WORD)) < 5
""")
    assert len(results) == 2
    assert results[0].prompt != results[1].prompt


async def test_an_argmax_query_says_the_same_twice(model: str) -> None:
    query = f"""
argmax
    "A list of things to do today:[LIST]"
from
    {model}
where
    len(TOKENS(LIST)) < 24
"""
    assert (await run(query)).prompt == (await run(query)).prompt


async def test_the_model_can_be_scored_without_a_query(model: str) -> None:
    described = eval(model, {"lmql": lmql})
    result = await described.score("The capital of France is", [" Paris", " London", " a"])
    assert result.argmax() in (" Paris", " a")
    assert all(score < 0 for score in result.scores())
