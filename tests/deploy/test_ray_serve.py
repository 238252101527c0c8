"""Two replicas on Ray Serve answer as one container does; the real LMQL client's calls find their prefixes."""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import lmql
import psutil
import pytest

from benchmarks import lmql_client, lmql_queries
from tests.replicate_stand_in import TERMINAL, StandIn, stand_in
from tests.server import ENDLESS, Server, child, serving, started

pytest.importorskip("ray", reason="requirements/ray.txt is not installed")

CLIENTS = 8
slow = pytest.mark.skipif(not os.environ.get("NIGHTLY"), reason="takes minutes; NIGHTLY=1 runs it")


@pytest.fixture(scope="module")
def replicas(demo_weights: Path) -> Iterator[Server]:
    """Two replicas with the demo model behind one address."""
    command = [sys.executable, "-m", "deploy.ray_serve", "--replicas", "2", "--port", "0"]
    with started(command, WEIGHTS_DIR=str(demo_weights), DTYPE="float32", COMPILE="off") as running:
        yield running


@pytest.fixture
def client(replicas: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=replicas.url, timeout=120) as client:
        yield client


def runtimes(server: Server) -> dict[int, psutil.Process]:
    """Cog's server of each replica, by the id of the replica's process."""
    parts = psutil.Process(server.process.pid).children(recursive=True)
    return {part.ppid(): part for part in parts if "cog.server.http" in " ".join(part.cmdline())}


def predict(client: httpx.Client, **inputs: Any) -> dict[str, Any]:
    response = client.post("/predictions", json={"input": inputs})
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def stream(client: httpx.Client, path: str, **inputs: Any) -> Any:
    method = "PUT" if path.count("/") > 1 else "POST"
    return client.stream(method, path, json={"input": inputs}, headers={"Accept": "text/event-stream"})


def test_a_prompt_is_answered_and_continued_where_it_was_computed(client: httpx.Client) -> None:
    beginning = "The capital of France is a city on the river Seine. " * 4
    first = predict(client, prompt=beginning, prompt_template="{prompt}", max_tokens=3)
    other = predict(client, prompt="Another text. " * 20, prompt_template="{prompt}", max_tokens=3)
    again = predict(client, prompt=beginning + "Its name is", prompt_template="{prompt}", max_tokens=3)
    assert first["status"] == other["status"] == again["status"] == "succeeded"
    assert again["metrics"]["reused_token_count"] >= first["metrics"]["input_token_count"] - 1


def test_text_arrives_as_events(client: httpx.Client) -> None:
    with stream(client, "/predictions", prompt="Hello", max_tokens=5) as response:
        lines = list(response.iter_lines())
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines.count("event: output") >= 4
    assert json.loads([line for line in lines if line.startswith("data: ")][-1][6:])["status"] == "succeeded"


def test_a_client_that_leaves_ends_its_prediction(client: httpx.Client) -> None:
    with stream(client, "/predictions/left", **ENDLESS) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 20
    while client.post("/predictions/left/cancel").status_code != 404:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_cancel_reaches_the_replica_of_its_prediction(client: httpx.Client) -> None:
    with stream(client, "/predictions/ended", **ENDLESS) as response:
        lines = response.iter_lines()
        next(lines)
        assert client.post("/predictions/ended/cancel").status_code == 200
        assert '"status":"canceled"' in list(lines)[-2]


def test_what_is_no_prediction_is_answered_by_a_container(client: httpx.Client) -> None:
    assert client.get("/health-check").json()["status"] == "READY"
    assert client.get("/nowhere").status_code == 404
    assert client.post("/predictions", content=b"[", headers={"Content-Type": "application/json"}).status_code == 400
    assert client.post("/predictions", json={"input": {"prompt": "x" * (17 << 20)}}).status_code == 413


def computed(api: StandIn) -> int:
    return sum(prediction.metrics["computed_token_count"] for prediction in api.predictions.values())


async def queries(api: StandIn, weights: Path, cache: Path) -> None:
    """LMQL's set of queries, by eight clients at once."""
    with lmql_client.redirected(lambda: api.url, cache):
        model = lmql_client.model_clause(weights)

        async def ask(number: int) -> None:
            for name in lmql_queries.QUERIES:
                await lmql.run(lmql_queries.text(name, model, number))

        await asyncio.gather(*(ask(number) for number in range(CLIENTS)))
    # LMQL's client leaves as soon as it has the last line, before the prediction's metrics.
    async with asyncio.timeout(60):
        while any(prediction.status not in TERMINAL for prediction in api.predictions.values()):
            await asyncio.sleep(0.02)


@slow
def test_eight_clients_of_lmql_compute_hardly_more_than_on_one_replica(
    replicas: Server, demo_weights: Path, tmp_path: Path
) -> None:
    with stand_in(replicas.url) as two:
        asyncio.run(queries(two, demo_weights, tmp_path / "two"))
    with (
        serving(WEIGHTS_DIR=str(demo_weights), DTYPE="float32", COMPILE="off") as server,
        stand_in(server.url) as one,
    ):
        asyncio.run(queries(one, demo_weights, tmp_path / "one"))
    print(f"computed: {computed(two)} tokens by two replicas, {computed(one)} by one")
    assert computed(two) <= 1.1 * computed(one)


@slow
def test_a_replica_that_is_killed_loses_its_own_calls_only_and_is_replaced(
    replicas: Server, client: httpx.Client
) -> None:
    ends: dict[str, str] = {}
    running = threading.Barrier(5)

    def ask(number: int) -> None:
        text = f"Story {number}. " * 10
        with httpx.Client(base_url=replicas.url, timeout=120) as own:
            inputs = {**ENDLESS, "prompt": text, "max_tokens": 100}
            with stream(own, f"/predictions/kill-{number}", **inputs) as response:
                lines = response.iter_lines()
                next(lines)
                running.wait(60)
                ends[text] = [line for line in lines if line.startswith("data: ")][-1]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    running.wait(60)
    before = runtimes(replicas)
    os.kill(min(before), signal.SIGKILL)
    for thread in threads:
        thread.join()
    statuses = [json.loads(end[6:])["status"] for end in ends.values()]
    assert sorted(statuses) == ["failed", "failed", "succeeded", "succeeded"]
    assert all("was lost" in end for end in ends.values() if "failed" in end)
    assert predict(client, prompt="Hello", max_tokens=2)["status"] == "succeeded"
    deadline = time.monotonic() + 90
    while len(runtimes(replicas).keys() | before.keys()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not before[min(before)].is_running()


@slow
def test_nothing_is_left_running_after_a_signal(demo_weights: Path) -> None:
    command = [sys.executable, "-m", "deploy.ray_serve", "--port", "0"]
    with child(command, WEIGHTS_DIR=str(demo_weights), DTYPE="float32", COMPILE="off") as running:
        while not running.lines.get(timeout=120).startswith("Ready: "):
            pass
        parts = psutil.Process(running.process.pid).children(recursive=True)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
    _, alive = psutil.wait_procs(parts, timeout=20)
    assert parts
    assert not [part for part in alive if part.status() != psutil.STATUS_ZOMBIE]
