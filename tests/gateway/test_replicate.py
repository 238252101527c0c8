"""A target on Replicate, by the stand-in for its API, and the same model as a container."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from gateway.server import Gateway
from gateway.target import Container, Replicate, Target, TargetError, open_target
from tests.replicate_stand_in import MODEL, OWNER, TOKEN, VERSION, StandIn, stand_in
from tests.server import ENDLESS, Server

NAME = f"{OWNER}/{MODEL}"
QUESTION = {"prompt": "What is the capital of France?", "max_tokens": 20}


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[StandIn]:
    with stand_in(server.url) as api:
        yield api


@pytest.fixture
async def target(api: StandIn) -> AsyncIterator[Target]:
    target = Replicate(NAME, TOKEN, api.url)
    yield target
    await target.close()


async def output(target: Target, **inputs: Any) -> tuple[str, dict[str, Any]]:
    """Text and metrics of a prediction."""
    async with target.predict(inputs) as running:
        return "".join([chunk async for chunk in running.chunks]), running.metrics


async def test_both_targets_give_the_same_output_and_metrics(target: Target, server: Server) -> None:
    container = Container(server.url)
    operations = json.dumps([["GENERATE", {"stream_id": 1, "prompt": "One\n\ntwo", "max_tokens": 5, "text": True}]])
    for inputs in (QUESTION, {"ops_batch_json": operations}):
        here, there = [await output(each, **inputs) for each in (container, target)]
        assert re.sub(r"-?\d+\.\d+", "", here[0]) == re.sub(r"-?\d+\.\d+", "", there[0]) != ""
        assert here[1]["output_token_count"] == there[1]["output_token_count"] > 0
    await container.close()


@pytest.mark.parametrize("model", [f"{NAME}:{VERSION}", f"deployment/{NAME}"])
async def test_versions_and_deployments_are_targets(api: StandIn, model: str) -> None:
    target = Replicate(model, TOKEN, api.url)
    text, _ = await output(target, **QUESTION)
    assert text == "The capital of France is Paris."
    await target.close()


async def test_leaving_a_prediction_cancels_it(target: Target, api: StandIn) -> None:
    async with target.predict(ENDLESS) as running, aclosing(running.chunks):
        assert await anext(running.chunks)
    prediction = list(api.predictions.values())[-1]
    async with asyncio.timeout(10):
        while prediction.status != "canceled":
            await asyncio.sleep(0.01)


async def test_leaving_while_a_prediction_is_made_cancels_it(target: Target, api: StandIn) -> None:
    before = len(api.predictions)
    leaving = asyncio.create_task(output(target, **ENDLESS))
    for _ in range(3):  # it has begun, and cannot have had an answer
        await asyncio.sleep(0)
    leaving.cancel()
    async with asyncio.timeout(20):
        while [each.status for each in list(api.predictions.values())[before:]] != ["canceled"]:
            await asyncio.sleep(0.01)


async def test_a_failure_has_the_predictors_words(target: Target) -> None:
    with pytest.raises(TargetError, match=r"^prompt is empty; give at least one character\.$") as raised:
        await output(target, prompt="")
    assert raised.value.status == 400
    with pytest.raises(TargetError, match="max_tokens: 0 is less than the minimum") as raised:
        await output(target, prompt="x", max_tokens=0)
    assert raised.value.status == 400


@pytest.mark.parametrize(
    ("model", "token", "words"),
    [
        (NAME, "r8_wrong", "Replicate does not accept the gateway's REPLICATE_API_TOKEN."),
        ("test/other", TOKEN, "There is no replicate:test/other that the gateway's token may use."),
    ],
)
async def test_a_wrong_token_or_model_is_a_bad_gateway(api: StandIn, model: str, token: str, words: str) -> None:
    gateway = Gateway(Replicate(model, token, api.url), model)
    async with TestClient(TestServer(gateway.application())) as client:
        async with client.post("/v1/completions", json={"model": model, "prompt": "x"}) as response:
            answer = await response.text()
            assert response.status == 502
        async with client.ws_connect("/") as socket:
            await socket.send_str('GENERATE {"stream_id": 1, "prompt": []}')
            frame = await socket.receive_str(timeout=5)
    assert json.loads(answer)["error"]["message"] == words
    assert json.loads(frame.removeprefix("TOKEN ")) == [{"stream_id": 1, "error": words}]
    assert token not in answer + frame


async def test_openai_requests_are_answered_from_replicate(api: StandIn) -> None:
    gateway = Gateway(Replicate(NAME, TOKEN, api.url), NAME)
    body = {"model": NAME, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0, "logprobs": 1}
    async with TestClient(TestServer(gateway.application())) as client:
        async with client.post("/v1/completions", json=body) as response:
            (choice,) = (await response.json())["choices"]
        assert choice["logprobs"]["tokens"] == [" Paris"]


def test_a_target_is_named_by_url_or_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPLICATE_API_TOKEN", raising=False)
    with pytest.raises(ValueError, match="Set REPLICATE_API_TOKEN"):
        open_target("replicate:user/model")
    with pytest.raises(ValueError, match="user/model"):
        open_target("replicate:model")
    with pytest.raises(ValueError, match="give a URL"):
        open_target("localhost:5000")
