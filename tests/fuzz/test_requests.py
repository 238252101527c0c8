"""Hostile requests over HTTP: each is answered within two seconds, and the next answer is right."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import strategies as st

from tests.fuzz.budget import fuzz
from tests.fuzz.inputs import batches, encode, hostile, prompts, text
from tests.fuzz.test_operations import CONTEXT, PROMPT, check_error
from tests.server import serving
from tests.soak.model import install, tiny_model
from tests.tiny import own_greedy

SECONDS = 2.0


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    weights = install(tiny_model(CONTEXT), tmp_path_factory.mktemp("fuzz"))
    with (
        serving(
            WEIGHTS_DIR=str(weights), DTYPE="float32", COMPILE="off", KV_CACHE_GB="0.1", OMP_NUM_THREADS="1"
        ) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        yield client


def post(client: httpx.Client, body: bytes, **headers: str) -> httpx.Response:
    """Post a body, and again while the runtime says that it is busy: it may refuse a request that follows another's end
    at once."""
    while True:
        response = client.post("/predictions", content=body, headers={"Content-Type": "application/json", **headers})
        if response.status_code != 409:
            return response
        time.sleep(0.02)


given_inputs = prompts().map(lambda inputs: {name: value for name, value in inputs.items() if value is not None})


@st.composite
def hostile_inputs(draw: st.DrawFn) -> dict[str, Any]:
    """Inputs of which one is of a wrong type or unknown."""
    inputs = draw(given_inputs)
    inputs[draw(st.sampled_from(sorted(inputs)) | text)] = draw(hostile)
    return inputs


bodies = st.one_of(
    batches.map(lambda batch: encode({"input": {"ops_batch_json": batch}}).encode()),
    given_inputs.map(lambda inputs: encode({"input": inputs}).encode()),
    hostile_inputs().map(lambda inputs: encode({"input": inputs}).encode()),
    hostile.map(lambda value: encode({"input": value}).encode()),
    hostile.map(lambda value: encode(value).encode()),
    given_inputs.map(lambda inputs: encode({"input": inputs}).encode()[:-1]),
    st.binary(max_size=40),
)


def test_hostile_requests_are_answered_in_time_and_harm_no_other(client: httpx.Client) -> None:
    expected = own_greedy(tiny_model(CONTEXT), PROMPT, 4)
    operation = ["GENERATE", {"stream_id": 0, "prompt": PROMPT, "max_tokens": 4}]
    plain = json.dumps({"input": {"ops_batch_json": json.dumps([operation])}}).encode()

    def check(body: bytes) -> None:
        asked = time.monotonic()
        response = post(client, body)
        seconds = time.monotonic() - asked
        assert response.status_code in (200, 400, 413, 422), f"{response.status_code}: {response.text[:500]}"
        if response.status_code == 200:
            prediction = response.json()
            assert prediction["status"] in ("succeeded", "failed"), prediction["status"]
            if prediction["status"] == "failed":
                check_error(prediction["error"])
        assert seconds < SECONDS, f"answered after {seconds:.1f} s"
        answer = post(client, plain).json()
        assert answer["status"] == "succeeded", answer
        lines = "".join(answer["output"]).splitlines()
        assert [json.loads(line.removeprefix("TOKEN "))["token"] for line in lines] == expected

    fuzz(check, bodies, shrink=False)
