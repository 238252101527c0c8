"""What goes wrong between a client, the gateway and its target, in the words of each protocol."""

import asyncio
import base64
import json
from typing import Any

import aiohttp
import pytest

from gateway import target as target_module
from gateway.errors import UNEXPECTED
from gateway.server import MAX_BODY
from gateway.target import Container, open_target
from tests.gateway.containers import Client, Fake, served, token

COMPLETION = {"model": "tiny", "prompt": "x"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}


async def post(client: Client, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
    """Status and body of an answer."""
    async with client.post(path, json=body, headers=headers) as response:
        return response.status, await response.json()


@pytest.mark.parametrize(
    ("path", "changes", "param", "words"),
    [
        ("completions", {"suffix": "s"}, "suffix", "'suffix' is not supported."),
        ("completions", {"max_token": 4}, "max_token", "Did you mean 'max_tokens'?"),
        ("completions", {"best_of": 3}, "best_of", "not supported"),
        ("completions", {"temperature": -1}, "temperature", ">= 0"),
        ("completions", {"prompt": {"a": 1}}, "prompt", "expected"),
        ("completions", {"prompt": ["a", [1]]}, None, ""),
        ("completions", {"prompt": [1, "a"]}, "prompt", "prompt must be"),
        ("completions", {"max_tokens": 0}, "max_tokens", "needs echo"),
        ("completions", {"n": 120, "prompt": ["a", "b", "c"]}, None, "more than 256"),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools", "not supported"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ("chat/completions", {"n": 17}, "n", "at most 16"),
        ("chat/completions", {"messages": []}, "messages", "length >= 1"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "this model reads text",
        ),
        ("chat/completions", {"response_format": {"type": "grammar"}}, "response_format", "must be of type"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ],
)
async def test_what_is_not_supported_is_a_bad_request_that_names_it(
    path: str, changes: dict[str, Any], param: str | None, words: str
) -> None:
    fake = Fake([token(0, finish="length", stream=i) for i in range(2)])
    async with served(fake) as client:
        body = {**(COMPLETION if path == "completions" else CHAT), **changes}
        status, answer = await post(client, body, f"/v1/{path}")
    if changes == {"prompt": ["a", [1]]}:  # texts and ids may be mixed
        assert status == 200
        return
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param
    assert words in answer["error"]["message"]
    assert fake.inputs == []


async def test_fields_that_ask_for_nothing_are_accepted() -> None:
    harmless = {"tools": [], "tool_choice": "auto", "user": "me", "store": False, "stop": None, "metadata": {"a": "b"}}
    async with served(Fake([token(0, finish="stop")])) as client:
        status, _ = await post(client, {**CHAT, **harmless}, "/v1/chat/completions")
    assert status == 200


async def test_a_chat_becomes_the_predictors_inputs() -> None:
    fake = Fake([token(0, finish="stop")])
    asked = {
        "max_completion_tokens": 5,
        "stop": ["x", "y"],
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "presence_penalty": 0.5,
        "response_format": {"type": "json_object"},
        "logit_bias": {"4": -100},
    }
    async with served(fake) as client:
        status, answer = await post(client, {**CHAT, **asked}, "/v1/chat/completions")
    assert status == 200, answer
    given = {name: json.loads(value) if name in PARSED else value for name, value in fake.inputs[0].items()}
    assert given == {
        "messages": CHAT["messages"],
        "output": "lmtp",
        "max_tokens": 5,
        "n": 1,
        "temperature": 1.0,
        "presence_penalty": 0.5,
        "seed": 3,
        "stop_sequences": ["x", "y"],
        "logit_bias": {"4": -100.0},
        "top_logprobs": 2,
        "json_schema": {"type": "object"},
    }


PARSED = ("messages", "stop_sequences", "logit_bias", "json_schema")


async def test_a_character_in_two_tokens_keeps_its_bytes() -> None:
    fake = Fake([token(3, ""), token(4, "é", finish="stop")])
    async with served(fake) as client:
        _, answer = await post(client, {**CHAT, "logprobs": True}, "/v1/chat/completions")
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "é"
    assert [(t["token"], t["bytes"]) for t in choice["logprobs"]["content"]] == [
        ("bytes:\\xc3", [195]),
        ("bytes:\\xa9", [169]),
    ]


async def test_an_adapter_is_a_model() -> None:
    fake = Fake([token(0, finish="stop")])
    async with served(fake) as client:
        async with client.get("/v1/models") as response:
            names = [model["id"] for model in (await response.json())["data"]]
        await post(client, {**COMPLETION, "model": "polite"})
    assert names == ["tiny", "polite"]
    assert json.loads(fake.inputs[0]["ops_batch_json"])[0][1]["adapter"] == "polite"


async def test_an_unknown_address_is_an_error_object() -> None:
    async with served(Fake()) as client:
        status, answer = await post(client, {}, "/v1/embeddings")
    assert status == 404
    assert answer["error"]["message"] == "There is no POST /v1/embeddings here."


async def test_idle_websockets_leave_requests_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.server.MAX_REQUESTS", 1)
    async with served(Fake([])) as client, client.ws_connect("/"):
        async with client.get("/v1/models") as response:
            assert response.status == 200
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await client.ws_connect("/")
        assert refused.value.status == 503


async def test_an_oversized_body_is_refused() -> None:
    async with served(Fake()) as client, client.post("/v1/completions", data=b" " * (MAX_BODY + 1)) as response:
        assert response.status == 413
        assert (await response.json())["error"]["message"] == f"The body has more than {MAX_BODY} bytes."


class Broken(Container):
    """A target with a mistake of its own."""

    def _predict(self, inputs: Any, running: Any) -> Any:
        raise RuntimeError("r8_secret")


class TestUnforeseen:
    """An exception that nobody expected: the client gets the protocol's error without it, the log gets all of it."""

    async def test_is_an_error_object(self, caplog: pytest.LogCaptureFixture) -> None:
        async with served(Fake(), make=Broken) as client:
            status, answer = await post(client, COMPLETION)
        assert status == 500
        assert answer["error"] == {"message": UNEXPECTED, "type": "server_error", "param": None, "code": None}
        assert "RuntimeError: r8_secret" in caplog.text

    @pytest.mark.parametrize(("name", "word"), [("GENERATE", "TOKEN"), ("SCORE", "TOKEN"), ("MODEL_INFO", "MSG")])
    async def test_is_an_error_of_its_operation(self, name: str, word: str, caplog: pytest.LogCaptureFixture) -> None:
        async with served(Fake(), make=Broken) as client, client.ws_connect("/") as socket:
            await socket.send_str(f'{name} {{"stream_id": 1}}')
            assert await socket.receive_str(timeout=5) == f'{word} [{{"stream_id":1,"error":"{UNEXPECTED}"}}]'
            await socket.send_str(f'{name} {{"stream_id": 1}}')  # the connection goes on
            assert UNEXPECTED in await socket.receive_str(timeout=5)
        assert "RuntimeError: r8_secret" in caplog.text

    async def test_ends_a_stream_that_has_begun(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(usage: Any, running: Any, n: int = 1) -> None:
            raise RuntimeError("r8_secret")

        monkeypatch.setattr("gateway.openai_answers.Usage.count", broken)
        async with (
            served(Fake([token(0)])) as client,
            client.post("/v1/completions", json={**COMPLETION, "stream": True}) as response,
        ):
            first, last = (await response.text()).strip().split("\n\n")
        assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "a"
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == UNEXPECTED
        assert "RuntimeError: r8_secret" in caplog.text

    async def test_of_the_page_is_its_error(self, caplog: pytest.LogCaptureFixture) -> None:
        async with served(Fake(), make=Broken) as client:
            status, answer = await post(client, {"input": {"prompt": "x"}}, "/inspect")
        assert (status, answer["error"]["message"]) == (500, UNEXPECTED)
        assert "RuntimeError: r8_secret" in caplog.text


class TestTarget:
    async def test_a_busy_target_is_asked_again(self) -> None:
        fake = Fake([token(0, finish="stop")], refusals=[409, 409, 409])
        async with served(fake) as client:
            status, _ = await post(client, COMPLETION)
        assert status == 200

    async def test_but_not_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(target_module, "BUSY_SECONDS", 0.01)
        async with served(Fake(refusals=[409] * 100)) as client:
            status, answer = await post(client, COMPLETION)
        assert status == 503
        assert answer["error"] == {
            "message": "The target is busy; ask again later.",
            "type": "server_error",
            "param": None,
            "code": None,
        }

    async def test_a_target_that_is_down_is_a_bad_gateway(self) -> None:
        down = "http://127.0.0.1:1"
        async with served(Fake(), make=lambda _: open_target(down)) as client:
            status, answer = await post(client, COMPLETION)
            async with client.ws_connect("/") as socket:
                await socket.send_str('GENERATE {"stream_id": 1, "prompt": []}')
                frame = await socket.receive_str(timeout=5)
        assert status == 502
        assert answer["error"]["message"] == f"The target {down} cannot be reached."
        assert frame == f'TOKEN [{{"stream_id":1,"error":"The target {down} cannot be reached."}}]'

    async def test_a_target_that_is_something_else_is_a_bad_gateway(self) -> None:
        async with served(Fake(["<html>\n"])) as client:
            status, answer = await post(client, COMPLETION)
        assert status == 502
        assert "not LMTP" in answer["error"]["message"]

    async def test_a_prediction_that_fails_is_a_bad_request_in_the_predictors_words(self) -> None:
        fake = Fake(failure="Prediction failed: Async prediction failed: prompt is empty")
        async with served(fake) as client:
            status, answer = await post(client, COMPLETION)
        assert (status, answer["error"]["message"]) == (400, "prompt is empty")

    async def test_an_error_in_a_stream_is_its_last_event(self) -> None:
        broken = f"TOKEN {json.dumps({'stream_id': 0, 'error': 'grammar: too costly'})}\n"
        async with (
            served(Fake([token(0), broken])) as client,
            client.post("/v1/completions", json={**COMPLETION, "stream": True}) as response,
        ):
            assert response.status == 200
            *_, last = (await response.text()).strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "grammar: too costly"

    async def test_an_error_on_the_page_comes_after_the_tokens_before_it(self) -> None:
        broken = f"TOKEN {json.dumps({'stream_id': 0, 'error': 'grammar: too costly'})}\n"
        async with (
            served(Fake([token(0) + broken])) as client,
            client.post("/inspect", json={"input": {"prompt": "x"}}) as response,
        ):
            first, last = map(json.loads, (await response.text()).splitlines())
        assert first["text"] == "a"
        assert last == {"error": "grammar: too costly"}

    @pytest.mark.parametrize("stream", [True, False])
    async def test_a_client_that_leaves_cancels_its_prediction(self, stream: bool) -> None:
        fake = Fake(endless=True)
        async with served(fake) as client:
            asked = asyncio.create_task(post(client, {**COMPLETION, "stream": stream}))
            while not fake.inputs:
                await asyncio.sleep(0.01)
            asked.cancel()
            await asyncio.wait_for(fake.cancelled.wait(), 5)


class TestAccess:
    async def test_a_key_is_asked_for(self) -> None:
        async with served(Fake([token(0, finish="stop")]), api_key="secret") as client:
            status, answer = await post(client, COMPLETION, Authorization="Bearer wrong")
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert (await post(client, COMPLETION, Authorization="Bearer secret"))[0] == 200
            async with client.get("/") as response:
                assert response.headers["WWW-Authenticate"].startswith("Basic")

    async def test_a_websocket_gives_the_key_in_its_url(self) -> None:
        async with served(Fake([token(0, finish="stop")]), api_key="secret") as client:
            with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
                await client.ws_connect("/")
            basic = base64.b64encode(b":secret").decode()  # what aiohttp makes of http://:secret@host
            async with client.ws_connect("/", headers={"Authorization": f"Basic {basic}"}) as socket:
                await socket.send_str('GENERATE {"stream_id": 0, "prompt": []}')
                assert (await socket.receive_str(timeout=5)).startswith("TOKEN")

    async def test_pages_of_other_sites_are_refused(self) -> None:
        async with served(Fake()) as client:
            assert (await post(client, COMPLETION, Origin="https://example.com"))[0] == 403
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                await client.ws_connect("/", headers={"Origin": "https://example.com"})
            own = f"http://127.0.0.1:{client.port}"
            async with client.ws_connect("/", headers={"Origin": own}):
                pass

    async def test_on_loopback_a_request_for_another_hosts_name_is_refused(self) -> None:
        async with served(Fake()) as client:
            assert (await post(client, COMPLETION, Host="rebound.example"))[0] == 403
        async with served(Fake([token(0, finish="stop")]), local=False) as client:
            assert (await post(client, COMPLETION, Host="gateway.example"))[0] == 200
