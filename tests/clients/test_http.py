"""The predictor behind Cog's HTTP runtime, as a client of the container sees it."""

import json
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from random import Random
from shutil import copy, copytree, ignore_patterns, rmtree
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from transformers import AutoTokenizer

from lmtp.places import DIRECTORIES
from tests.server import ROOT, Server, serving

QUESTION = "What is the capital of France?"
ENDLESS = {
    "prompt": "Tell me a story.",
    "max_tokens": 4000,
    "logit_bias": '{"0": -100, "1": -100, "2": -100}',  # nothing that ends the text
}
"""Takes minutes; no test waits for its end."""

REFUSED = {"input": {"prompt": ""}}
"""A request whose prediction ends at once."""


class Patient(httpx.HTTPTransport):
    """Retries when the runtime says it is busy. Of two requests at the same instant coglet 0.23.1 may refuse one with
    409 "At capacity", even if it could take many more predictions."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        while (response := super().handle_request(request)).status_code == 409:
            response.close()
            time.sleep(0.02)
        return response


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """Talks to the server with the demo model."""
    with httpx.Client(base_url=server.url, timeout=120, transport=Patient()) as client:
        yield client


def predict(client: httpx.Client, **inputs: Any) -> dict[str, Any]:
    """The response to a synchronous prediction."""
    response = client.post("/predictions", json={"input": inputs})
    assert response.status_code == 200, response.text
    return dict(response.json())


def operate(client: httpx.Client, *operations: Any) -> list[tuple[str, dict[str, Any]]]:
    """The replies to a batch of operations: the first word of each line, and its object."""
    prediction = predict(client, ops_batch_json=json.dumps(operations))
    assert prediction["status"] == "succeeded", prediction
    replies = []
    for chunk in prediction["output"]:
        assert chunk.endswith("\n")
        for line in chunk.removesuffix("\n").split("\n"):
            word, _, reply = line.partition(" ")
            replies.append((word, json.loads(reply)))
    return replies


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and data of a prediction's server-sent events as they arrive."""
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def stream(client: httpx.Client, **inputs: Any) -> Any:
    """A context with the response to a streamed prediction."""
    return client.stream("POST", "/predictions", json={"input": inputs}, headers={"Accept": "text/event-stream"})


def cancelled(client: httpx.Client, id: str, answer: Future[httpx.Response]) -> dict[str, Any]:
    """Cancel a prediction that another thread waits for, again until it has begun; return the response that thread
    got."""
    deadline = time.monotonic() + 30
    while not answer.done():
        assert time.monotonic() < deadline, f"{id} was not cancelled"
        client.post(f"/predictions/{id}/cancel")
        wait([answer], timeout=0.5)
    return dict(answer.result().json())


def serves(client: httpx.Client) -> bool:
    """Whether the server answers a prediction."""
    ((word, reply),) = operate(client, ["MODEL_INFO", {"stream_id": 1}])
    return word == "MSG" and "model_info" in reply


class TestSynchronous:
    def test_a_prompt_is_answered_with_the_models_text(self, client: httpx.Client) -> None:
        prediction = predict(client, prompt=QUESTION, max_tokens=20)
        assert prediction["status"] == "succeeded"
        assert "".join(prediction["output"]) == "The capital of France is Paris."

    def test_the_metrics_say_what_the_prediction_took(self, client: httpx.Client) -> None:
        metrics = predict(client, prompt=QUESTION, max_tokens=4)["metrics"]
        assert metrics["output_token_count"] == 4
        assert 4 < metrics["input_token_count"] < 100
        assert metrics["reused_token_count"] < metrics["input_token_count"]
        assert 0 < metrics["time_to_first_token"] < metrics["predict_time"] + 1
        assert metrics["tokens_per_second"] > 0

    def test_a_batch_gets_one_terminal_reply_for_every_stream(self, client: httpx.Client) -> None:
        replies = operate(
            client,
            ["GENERATE", {"stream_id": "a", "prompt": [504, 3575, 282, 4649, 314], "max_tokens": 3}],
            ["SCORE", {"stream_id": 2, "prompt": [504, 3575, 282, 4649, 314], "scored": [7042, 30]}],
            ["MODEL_INFO", {"stream_id": 3}],
        )
        generated = [reply for word, reply in replies if word == "TOKEN" and reply["stream_id"] == "a"]
        scored = [reply for word, reply in replies if word == "TOKEN" and reply["stream_id"] == 2]
        asked = [reply for word, reply in replies if word == "MSG"]
        assert [reply["finish_reason"] for reply in generated] == [None, None, "length"]
        assert [(reply["token"], reply["finish_reason"]) for reply in scored] == [(7042, None), (30, "stop")]
        assert [reply["stream_id"] for reply in asked] == [3]
        assert len(replies) == 6

    def test_the_vocabulary_is_spelt_on_request(self, client: httpx.Client, demo_weights: Path) -> None:
        (_, reply), (_, other) = operate(
            client, ["MODEL_INFO", {"stream_id": 1, "tokens": True}], ["MODEL_INFO", {"stream_id": 2}]
        )
        assert "tokens" not in other["model_info"]
        tokens = reply["model_info"]["tokens"]
        tokenizer = AutoTokenizer.from_pretrained(demo_weights)
        assert len(tokens) == reply["model_info"]["vocabulary"] == len(tokenizer)
        assert all(isinstance(spelt, str) or spelt for spelt in tokens)
        for i in range(0, len(tokens), 97):
            if isinstance(tokens[i], str):
                assert tokens[i] == tokenizer.decode([i])
        spelt = [tokens[i] for i in tokenizer.encode("naïve 日本語 🧑🏽‍🚀")]
        assert b"".join(t.encode() if isinstance(t, str) else bytes(t) for t in spelt).decode() == "naïve 日本語 🧑🏽‍🚀"
        assert tokens[tokenizer.eos_token_id] == tokenizer.eos_token

    def test_a_constraint_is_kept_and_one_cut_short_is_said_in_metrics_and_logs(self, client: httpx.Client) -> None:
        prediction = predict(client, prompt=QUESTION, regex=r"The capital is (Rome|Paris)\.")
        assert "".join(prediction["output"]) == "The capital is Paris."
        assert prediction["metrics"]["constraint_finished"] is True
        assert prediction["metrics"]["constraint_valid"] is True
        cut = predict(client, prompt=QUESTION, choices='["The capital is Paris."]', max_tokens=2)
        assert "".join(cut["output"]) == "The capital"
        assert cut["metrics"]["constraint_finished"] is False
        assert cut["metrics"]["constraint_valid"] is False
        assert "not valid" in cut["logs"]

    def test_a_conversation_is_answered_as_its_only_message_would_be(self, client: httpx.Client) -> None:
        messages = json.dumps([{"role": "user", "content": [{"type": "text", "text": QUESTION}]}])
        asked = predict(client, messages=messages, max_tokens=8)
        assert asked["output"] == predict(client, prompt=QUESTION, max_tokens=8)["output"]

    def test_inputs_of_other_models_names_mean_the_same(self, client: httpx.Client) -> None:
        """LiteLLM sends max_new_tokens; published models take stop sequences separated by commas."""
        asked = predict(client, prompt=QUESTION, max_new_tokens=4)
        assert asked["metrics"]["output_token_count"] == 4
        assert asked["output"] == predict(client, prompt=QUESTION, max_tokens=4)["output"]
        stopped = predict(client, prompt=QUESTION, stop_sequences="<never>, of France")
        assert "".join(stopped["output"]) == "The capital"

    def test_penalties_and_filters_reach_the_answer(self, client: httpx.Client) -> None:
        inputs = {"prompt": "la la la la la la", "prompt_template": "{prompt}", "max_tokens": 12}
        plain = predict(client, **inputs)
        for changed in ({"repetition_penalty": 1.9}, {"frequency_penalty": 4.0}, {"presence_penalty": 5.0}):
            assert predict(client, **inputs, **changed)["output"] != plain["output"], changed
        same = predict(client, **inputs, temperature=2.0, min_p=1.0, seed=1)
        assert same["output"] == plain["output"], "only the likeliest token is left"
        longer = predict(client, prompt=QUESTION, min_tokens=12, max_tokens=12)
        assert longer["metrics"]["output_token_count"] == 12

    def test_a_prompt_with_output_json_gives_one_document(self, client: httpx.Client) -> None:
        prediction = predict(client, prompt=QUESTION, max_tokens=3, output="json", n=2, temperature=1, seed=1)
        document = json.loads("".join(prediction["output"]))
        assert [choice["index"] for choice in document["choices"]] == [0, 1]

    def test_a_prompt_with_output_lmtp_gives_lines_with_text(self, client: httpx.Client) -> None:
        prediction = predict(client, prompt=QUESTION, max_tokens=3, output="lmtp", top_logprobs=2)
        lines = "".join(prediction["output"]).splitlines()
        tokens = [json.loads(line.removeprefix("TOKEN ")) for line in lines]
        assert "".join(token["text"] for token in tokens) == "The capital of"
        assert all(len(token["top_logprobs"]) == 2 for token in tokens)

    def test_an_id_runs_once_however_often_it_is_put(self, client: httpx.Client) -> None:
        with ThreadPoolExecutor() as pool:
            first = pool.submit(client.put, "/predictions/put-twice", json={"input": ENDLESS})
            time.sleep(0.5)
            again = client.put("/predictions/put-twice", json={"input": ENDLESS})
            assert again.status_code == 202
            assert again.json()["status"] == "processing"
            assert cancelled(client, "put-twice", first)["status"] == "canceled"


class TestStreaming:
    def test_the_events_add_up_to_the_synchronous_response(self, client: httpx.Client) -> None:
        expected = predict(client, prompt=QUESTION, max_tokens=20)["output"]
        with stream(client, prompt=QUESTION, max_tokens=20) as response:
            received = list(events(response))
        names = [name for name, _ in received]
        assert (names[0], names[-1]) == ("start", "completed")
        chunks = [data["chunk"] for name, data in received if name == "output"]
        assert "".join(chunks) == "".join(expected)
        assert received[-1][1]["output"] == chunks
        assert received[-1][1]["status"] == "succeeded"

    def test_the_output_is_sent_as_it_grows(self, client: httpx.Client) -> None:
        arrivals = []
        with stream(client, **ENDLESS | {"max_tokens": 40}) as response:
            for name, _ in events(response):
                if name == "output":
                    arrivals.append(time.monotonic())
        assert len(arrivals) > 10
        longest = max(later - earlier for earlier, later in pairwise(arrivals))
        assert longest < (arrivals[-1] - arrivals[0]) / 2

    def test_a_failure_is_the_last_event(self, client: httpx.Client) -> None:
        with stream(client, prompt="") as response:
            name, data = list(events(response))[-1]
        assert (name, data["status"]) == ("completed", "failed")
        assert "prompt is empty" in data["error"]


class TestCancelling:
    def test_a_cancelled_prediction_ends_at_once(self, client: httpx.Client) -> None:
        body = {"id": "to-cancel", "input": ENDLESS}
        headers = {"Accept": "text/event-stream"}
        with client.stream("POST", "/predictions", json=body, headers=headers) as response:
            received = events(response)
            while next(received)[0] != "output":
                pass
            asked = time.monotonic()
            assert client.post("/predictions/to-cancel/cancel").status_code == 200
            name, data = list(received)[-1]
        assert (name, data["status"]) == ("completed", "canceled")
        assert time.monotonic() - asked < 5
        while client.post("/predictions/to-cancel/cancel").status_code != 404:  # the runtime forgets it a moment later
            assert time.monotonic() - asked < 10
        assert serves(client)

    def test_a_synchronous_prediction_can_be_cancelled(self, client: httpx.Client) -> None:
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(client.put, "/predictions/to-cancel-too", json={"input": ENDLESS})
            assert cancelled(client, "to-cancel-too", waiting)["status"] == "canceled"

    @pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
    def test_a_client_that_leaves_cancels_its_prediction(
        self, server: Server, client: httpx.Client, accept: str
    ) -> None:
        body = {"id": f"abandoned-{accept[:4]}", "input": ENDLESS}
        with httpx.Client(base_url=server.url, timeout=3.0) as impatient:
            try:
                with impatient.stream("POST", "/predictions", json=body, headers={"Accept": accept}) as response:
                    received = events(response)
                    while next(received)[0] != "output":  # by then the whole runtime knows that it has started
                        pass
            except httpx.ReadTimeout:
                pass
        # While it runs, a PUT with its id returns its state. Once it has ended, the id is free for another prediction.
        deadline = time.monotonic() + 5
        while client.put(f"/predictions/{body['id']}", json={"input": {"prompt": ""}}).status_code == 202:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def test_cancelled_predictions_leave_room_for_others(self, client: httpx.Client) -> None:
        """More of them in turn than the runtime runs at once."""
        with ThreadPoolExecutor(32) as pool:
            for start in range(0, 96, 32):
                ids = [f"many-{start + index}" for index in range(32)]
                waiting = [pool.submit(client.put, f"/predictions/{id}", json={"input": ENDLESS}) for id in ids]
                for id, answer in zip(ids, waiting, strict=True):
                    assert cancelled(client, id, answer)["status"] == "canceled"
        assert serves(client)


def send(server: Server, id: str, accept: str) -> socket.socket:
    """Begin a prediction that runs for minutes, on a connection of its own."""
    body = json.dumps({"id": id, "input": ENDLESS}).encode()
    address = urlsplit(server.url)
    head = f"POST /predictions HTTP/1.1\r\nHost: test\r\nAccept: {accept}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((address.hostname, address.port))
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def still_running(client: httpx.Client, ids: Sequence[str], seconds: float) -> list[str]:
    """Which of these predictions run even after a while."""
    deadline = time.monotonic() + seconds
    running = list(ids)
    while running and time.monotonic() < deadline:
        time.sleep(0.1)
        # While it runs, a PUT with its id returns its state. Once it has ended, the id is free for another prediction.
        running = [id for id in running if client.put(f"/predictions/{id}", json=REFUSED).status_code == 202]
    return running


class TestLeaving:
    """A caller who leaves while the runtime starts the prediction leaves nothing that runs on."""

    @pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
    @pytest.mark.parametrize(("burst", "bursts"), [(1, 15), (8, 5), (16, 5), (60, 2)])
    def test_a_connection_dropped_within_milliseconds_ends_its_prediction(
        self, server: Server, client: httpx.Client, accept: str, burst: int, bursts: int
    ) -> None:
        random = Random(burst)
        ids = [f"dropped-{accept[:4]}-{burst}-{index}" for index in range(burst * bursts)]

        def drop(id: str) -> None:
            connection = send(server, id, accept)
            time.sleep(random.uniform(0, 0.012))
            connection.close()

        with ThreadPoolExecutor(burst) as pool:
            for start in range(0, len(ids), burst):
                list(pool.map(drop, ids[start : start + burst]))
                time.sleep(0.2)
        assert still_running(client, ids, seconds=20) == []
        assert serves(client)

    def test_one_cancel_is_enough_however_soon_it_comes(self, server: Server, client: httpx.Client) -> None:
        random = Random(0)
        ends = []
        with ThreadPoolExecutor(8) as pool:
            for start in range(0, 80, 8):
                ids = [f"cancelled-{start + index}" for index in range(8)]
                waiting = [pool.submit(client.put, f"/predictions/{id}", json={"input": ENDLESS}) for id in ids]
                time.sleep(random.uniform(0, 0.012))
                for id in ids:
                    while client.post(f"/predictions/{id}/cancel").status_code == 404:  # it has not arrived yet
                        pass
                ends += [answer.result(timeout=20).json()["status"] for answer in waiting]
        assert Counter(ends) == {"canceled": 80}

    def test_more_requests_than_places_leave_all_places_free(self, server: Server, client: httpx.Client) -> None:
        ids = [f"flood-{index}" for index in range(120)]
        with ThreadPoolExecutor(120) as pool:
            for connection in pool.map(lambda id: send(server, id, "application/json"), ids):
                connection.close()
        assert still_running(client, ids, seconds=20) == []
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda _: predict(client, prompt=QUESTION, max_tokens=2), range(60)))
        assert {answer["status"] for answer in answers} == {"succeeded"}


class TestDirectories:
    """The runtime makes three directories for each prediction and removes none."""

    @pytest.fixture
    def impatient_project(self, tmp_path: Path) -> Path:
        """A copy of the project that looks at its places and at its health every 0.2 s."""
        for name in ("lmtp", "script"):
            copytree(ROOT / name, tmp_path / name, ignore=ignore_patterns("__pycache__"))
        for name in ("predict.py", "cog.yaml"):
            copy(ROOT / name, tmp_path)
        for path in (tmp_path / "lmtp/places.py", tmp_path / "script/runtime.py"):
            text, count = re.subn(r"(?m)^WATCH_SECONDS = .*", "WATCH_SECONDS = 0.2", path.read_text())
            assert count == 1
            path.write_text(text)
        return tmp_path

    def test_none_is_left_once_a_prediction_has_ended(self, client: httpx.Client) -> None:
        for inputs in ({"prompt": QUESTION, "max_tokens": 2}, {"prompt": ""}):
            assert client.put("/predictions/leaves-nothing", json={"input": inputs}).status_code == 200
            assert not (DIRECTORIES / "leaves-nothing").exists()

    @pytest.mark.parametrize("id", ["../escaped", "nested/id"])
    def test_an_id_that_is_a_path_is_refused(self, client: httpx.Client, id: str) -> None:
        answer = client.post("/predictions", json={"id": id, "input": {"prompt": QUESTION}}).json()
        rmtree((DIRECTORIES / id).resolve())
        assert answer["status"] == "failed"
        assert "id cannot be a path" in answer["error"]

    def test_a_server_that_has_lost_its_places_says_so(self, demo_weights: Path, impatient_project: Path) -> None:
        with serving(
            impatient_project, WEIGHTS_DIR=str(demo_weights), COMPILE="off", COG_MAX_CONCURRENCY="2"
        ) as server:
            for id in ("x" * 300, "with\0NUL"):
                httpx.post(f"{server.url}/predictions", json={"id": id, "input": {"prompt": QUESTION}}, timeout=20)
            health = httpx.get(f"{server.url}/health-check").json()
            assert health["status"] == "BUSY"
            while health["status"] == "BUSY":
                time.sleep(0.05)
                health = httpx.get(f"{server.url}/health-check").json()
            assert health["status"] == "UNHEALTHY"
            assert "lost 2 or more of its 2 places" in health["user_healthcheck_error"]
            assert server.process.wait(timeout=30) == 1
            assert "The predictor is not healthy: Cog's runtime has lost" in server.log[-1]


def test_predictions_at_the_same_time_get_what_each_gets_alone(client: httpx.Client) -> None:
    prompts = [QUESTION, "Name three colours.", "Write a haiku about the sea.", "What is two plus two?"]
    alone = [predict(client, prompt=prompt, max_tokens=10)["output"] for prompt in prompts]
    with ThreadPoolExecutor(32) as pool:
        answers = [pool.submit(predict, client, prompt=prompt, max_tokens=10) for prompt in prompts * 8]
    assert ["".join(answer.result()["output"]) for answer in answers] == ["".join(output) for output in alone] * 8


VOCABULARY = 49152
CONTEXT = 8192


def generate(**fields: Any) -> list[Any]:
    return ["GENERATE", {"stream_id": 1, "prompt": [504, 3575], "max_tokens": 2, **fields}]


class TestBadInput:
    """One sentence says what is wrong and where, and the next prediction is served."""

    @pytest.fixture(autouse=True)
    def _serves_the_next_prediction(self, client: httpx.Client) -> Iterator[None]:
        yield
        assert serves(client)

    @pytest.mark.parametrize(
        ("inputs", "field", "message"),
        [
            ({"prompt": 1}, "prompt", '1 is not of type "string"'),
            ({"prompt": "x", "max_tokens": "many"}, "max_tokens", '"many" is not of type "integer"'),
            ({"prompt": "x", "max_tokens": 0}, "max_tokens", "0 is less than the minimum of 1"),
            ({"prompt": "x", "temperature": -1}, "temperature", "-1 is less than the minimum of 0"),
            ({"prompt": "x", "output": "xml"}, "output", '"xml" is not one of ["text","lmtp","json"]'),
            ({"ops_batch_json": [["MODEL_INFO", {"stream_id": 1}]]}, "ops_batch_json", 'is not of type "string"'),
        ],
    )
    def test_the_runtime_refuses_what_the_schema_excludes(
        self, client: httpx.Client, inputs: dict[str, Any], field: str, message: str
    ) -> None:
        response = client.post("/predictions", json={"input": inputs})
        assert response.status_code == 422
        (problem,) = response.json()["detail"]
        assert problem["loc"] == ["body", "input", field]
        assert message in problem["msg"]

    def test_the_runtime_refuses_a_body_that_is_not_json(self, client: httpx.Client) -> None:
        response = client.post("/predictions", content='{"input": {', headers={"Content-Type": "application/json"})
        assert response.status_code == 400

    @pytest.mark.parametrize(
        ("inputs", "words"),
        [
            ({}, "Give prompt, messages or ops_batch_json"),
            ({"prompt": "x", "ops_batch_json": "[]"}, "prompt and ops_batch_json: give one of them"),
            ({"prompt": "x", "messages": "[]"}, "prompt and messages: give one of them"),
            ({"messages": "[]"}, "messages must be a JSON list"),
            ({"prompt": "x", "max_tokens": 3, "max_new_tokens": 4}, "give max_tokens alone"),
            ({"prompt": ""}, "prompt is empty"),
            ({"prompt": "word " * CONTEXT}, "prompt is"),
            ({"prompt": "x", "prompt_template": "Q:"}, "prompt_template"),
            ({"prompt": "x", "logit_bias": "{"}, "logit_bias"),
            ({"prompt": "x", "logit_bias": '{"seven": 1}'}, "logit_bias"),
            ({"prompt": "x", "logit_bias": f'{{"{VOCABULARY}": 1}}'}, "logit_bias"),
            ({"prompt": "x", "stop_sequences": "[1]"}, "stop_sequences"),
            ({"prompt": "x", "adapter": "legal"}, "adapter: 'legal' is not served"),
            ({"ops_batch_json": "["}, "ops_batch_json is not JSON"),
            ({"ops_batch_json": "{}"}, "ops_batch_json must be"),
            ({"ops_batch_json": "[]"}, "ops_batch_json holds no operations"),
            ({"ops_batch_json": json.dumps([["MODEL_INFO", {"stream_id": n}] for n in range(300)])}, "300 operations"),
        ],
    )
    def test_the_prediction_fails_where_there_is_no_stream_to_answer(
        self, client: httpx.Client, inputs: dict[str, Any], words: str
    ) -> None:
        prediction = predict(client, **inputs)
        assert prediction["status"] == "failed"
        assert words in prediction["error"]
        assert "\n" not in prediction["error"]
        assert prediction["error"].endswith(".")

    @pytest.mark.parametrize(
        ("operation", "words"),
        [
            ("GENERATE", ("operation 0",)),
            (["GENERAT", {"stream_id": 1, "prompt": [1]}], ("unknown operation 'GENERAT'", "GENERATE")),
            (generate(max_token=2), ("max_token", "did you mean 'max_tokens'")),
            (["GENERATE", {"prompt": [504]}], ("stream_id",)),
            (["GENERATE", {"stream_id": 1}], ("prompt",)),
            (["SCORE", {"stream_id": 1, "prompt": [504]}], ("scored",)),
            (["SCORE", {"stream_id": 1, "prompt": [504], "scored": []}], ("scored",)),
            (generate(max_tokens="2"), ("max_tokens",)),
            (generate(max_tokens=0), ("max_tokens",)),
            (generate(prompt=[504, "3575"]), ("prompt[1]",)),
            (generate(prompt=[504, -1]), ("prompt[1]",)),
            (generate(prompt=[504, VOCABULARY]), ("prompt[1]", str(VOCABULARY))),
            (["SCORE", {"stream_id": 1, "prompt": [504], "scored": [VOCABULARY]}], ("scored[0]", str(VOCABULARY))),
            (generate(prompt=[]), ("prompt", "empty")),
            (generate(adapter="legal"), ("adapter", "'legal'")),
            (generate(prompt=[504] * CONTEXT), ("prompt", str(CONTEXT))),
            (generate(logit_bias={str(VOCABULARY): 100}), ("logit_bias", str(VOCABULARY))),
            (generate(logit_bias={str(token): -100 for token in range(VOCABULARY)}), ("logit_bias",)),
        ],
        ids=lambda value: value[0] if isinstance(value, tuple) else "",
    )
    def test_an_operation_that_cannot_run_ends_its_stream_and_no_other(
        self, client: httpx.Client, operation: Any, words: tuple[str, ...]
    ) -> None:
        replies = operate(client, operation, ["GENERATE", {"stream_id": 2, "prompt": [504], "max_tokens": 1}])
        (error,) = [reply["error"] for _, reply in replies if "error" in reply]
        assert all(word in error for word in words), error
        assert "\n" not in error
        (token,) = [reply for word, reply in replies if word == "TOKEN" and reply["stream_id"] == 2]
        assert token["finish_reason"] == "length"
