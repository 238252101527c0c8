"""Clients and targets that do not speak HTTP as they should, on plain sockets: nobody waits, nothing piles up."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from gateway import server, server_sent_events
from gateway.server import Gateway
from gateway.target import PLACES, Container
from tests.gateway.containers import Client, Fake, served, token

COMPLETION = {"model": "tiny", "prompt": "x"}
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def answering(answer: bytes, repeated: bytes = b"") -> AsyncIterator[tuple[str, list[bytes]]]:
    """The URL of a target that answers each request with these bytes, ``repeated`` without end; the requests it got."""
    requests: list[bytes] = []

    async def target(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        try:
            while repeated:
                writer.write(repeated)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    async with await asyncio.start_server(target, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()
        yield f"http://{host}:{port}", requests


@asynccontextmanager
async def in_front_of(answer: bytes, repeated: bytes = b"") -> AsyncIterator[Client]:
    """A client of a gateway in front of such a target."""
    async with answering(answer, repeated) as (url, _):
        application = Gateway(Container(url)).application()
        async with TestClient(TestServer(application, handler_cancellation=True)) as client:
            yield client


def output(line: str) -> bytes:
    """An event of a prediction's output."""
    return b"event: output\ndata: " + json.dumps({"chunk": line}).encode() + b"\n\n"


async def refused(client: Client) -> str:
    """The message of the bad gateway that a completion gets."""
    async with client.post("/v1/completions", json=COMPLETION) as response:
        assert response.status == 502
        error = (await response.json())["error"]
    assert error["type"] == "server_error"
    return str(error["message"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\x00\xff\x00 no HTTP", "sent what is no answer"),
        (b"", "cannot be reached"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "sent what is no answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<p/>", "sends text/html"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 10\r\n\r\n<b>\xff\r\nX: 1", "answered 500: <b>\ufffd X: 1"),
        (EVENTS.replace(b"Connection: close", b"Content-Length: 99") + output("a"), "broke off its answer"),
        (EVENTS + output("a"), "closed the connection before the prediction was done"),
        (EVENTS + b'event: output\ndata: {"chunk": 1}\n\n', "sent what is no answer"),
        (EVENTS + b'event: output\ndata: {"chunk": "\xff"}\n\n', "sent what is no answer"),
        (EVENTS + output('MSG {"stream_id":0,"model_info":{"model":1}}\n'), "describes its model wrongly"),
        (EVENTS + output("TOKEN 1\n"), "not LMTP"),
        (EVENTS + b'event: error\ndata: {"error": "Prediction failed: no more"}\n\n', "no more"),
    ],
)
async def test_a_target_that_answers_nonsense_is_a_bad_gateway(answer: bytes, words: str) -> None:
    async with in_front_of(answer) as client:
        assert words in await refused(client)


PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
}


async def messages(client: Client, path: str, asked: dict[str, Any]) -> list[str]:
    """The message of the error that a request gets, and that its stream ends with."""
    async with client.post(path, json=asked) as response:
        whole = await response.json()
        assert response.status == 502
    async with client.post(path, json={**asked, "stream": True}) as response:
        *_, last = (await response.text()).strip().split("\n\n")
    return [error["error"]["message"] for error in (whole, json.loads(last.removeprefix("data: ")))]


class TestAnswers:
    """Answers of a container that are LMTP, but none to what it was asked."""

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("stream", [1, -1, "0", "prompt"])
    async def test_of_streams_that_nobody_asked_for_are_a_bad_gateway(
        self, path: str, stream: int | str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with served(Fake([token(0, stream=stream, finish="stop")])) as client:
            found = await messages(client, path, PATHS[path])
        assert found == [f"The target sent a token of stream {stream!r}: nobody asked for it."] * 2
        assert "not foreseen" not in caplog.text

    async def test_of_prompts_that_nobody_asked_for_are_a_bad_gateway(self) -> None:
        async with served(Fake([token(0, stream=1)])) as client:
            found = await messages(client, "/v1/completions", {**COMPLETION, "prompt": [1], "echo": True})
        assert "sent a token of stream 1" in found[0]

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("count", ["6", None, [6], {}])
    async def test_with_counts_that_are_no_numbers_are_a_bad_gateway(
        self, path: str, count: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        fake = Fake([token(0, finish="stop")], metrics={"input_token_count": count})
        async with served(fake) as client:
            found = await messages(client, path, PATHS[path])
        assert all("metrics are not the predictor's: Expected `float`" in message for message in found)
        assert "not foreseen" not in caplog.text

    async def test_with_counts_written_as_fractions_are_read(self) -> None:
        fake = Fake([token(0, finish="stop")], metrics={"input_token_count": 6.0, "output_token_count": 2})
        async with served(fake) as client, client.post("/v1/completions", json=COMPLETION) as response:
            assert '"prompt_tokens":6,"completion_tokens":2' in await response.text()

    @pytest.mark.parametrize("answer", ['{"choices": []}', '{"choices": ' + '[{"a":' * 3000])
    async def test_to_the_page_that_hold_no_choice_are_its_error(
        self, answer: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        asked = {"input": {"choices": '["a"]'}}
        async with served(Fake([answer])) as client, client.post("/inspect", json=asked) as response:
            assert "not the predictor's" in (await response.json(content_type=None))["error"]
        assert "not foreseen" not in caplog.text

    async def test_nested_without_end_are_no_lmtp(self) -> None:
        async with served(Fake(["MSG " + '{"model_info":' * 3000 + "\n"])) as client:
            assert "not LMTP" in await refused(client)


async def test_a_redirect_is_not_followed() -> None:
    async with answering(EVENTS) as (elsewhere, requests):
        answer = f"HTTP/1.1 307 Go\r\nContent-Length: 0\r\nLocation: {elsewhere}\r\n\r\n".encode()
        async with in_front_of(answer) as client:
            assert "redirects (307)" in await refused(client)
    assert requests == []


async def test_an_event_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_sent_events, "MAX_EVENT", 2**20)
    async with in_front_of(EVENTS + b"data: ", b"x" * 2**16) as client:
        assert "sent what is no answer" in await refused(client)


async def test_a_refusal_without_end_is_given_up() -> None:
    async with in_front_of(b"HTTP/1.1 500 Oh\r\nConnection: close\r\n\r\n", b"x" * 2**16) as client:
        assert "answered 500: xxx" in await refused(client)


async def test_a_target_that_goes_on_after_its_prediction_is_left() -> None:
    ended = b'event: completed\ndata: {"status": "succeeded"}\n\n'
    async with answering(EVENTS + output("a") + ended, b"x" * 2**16) as (url, _):
        target = Container(url)
        async with asyncio.timeout(5), target.predict({}) as running:
            assert [chunk async for chunk in running.chunks] == ["a"]
        await target.close()


async def test_a_body_that_trickles_in_gives_its_place_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_BODY_SECONDS", 0.1)
    monkeypatch.setattr(server, "MAX_REQUESTS", 1)
    async with served(Fake([token(0, finish="stop")])) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        assert b"The body took more than 0.1 seconds" in await reader.readuntil(b"}}")
        async with client.post("/v1/completions", json=COMPLETION) as response:  # though the first is still connected
            assert response.status == 200
        writer.close()


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n"])
async def test_a_connection_without_a_request_is_closed(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_IDLE_SECONDS", 0.05)
    runner = Gateway(Container("http://127.0.0.1:1")).runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    reader, writer = await asyncio.open_connection(*runner.addresses[0])
    writer.write(begun)
    async with asyncio.timeout(20):
        assert await reader.read() == b""
    writer.close()
    await runner.cleanup()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux watches over connections")
async def test_a_client_that_reads_nothing_is_left_and_its_prediction_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UNREAD_SECONDS", 0.1)
    fake = Fake([token(0, "x" * 2**20)] * 16, endless=True)
    body = json.dumps({**COMPLETION, "stream": True})
    async with served(fake) as client:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", client.port))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall((head + body).encode())
            await asyncio.wait_for(fake.cancelled.wait(), 20)


async def test_clients_that_leave_give_their_places_back() -> None:
    fake = Fake(endless=True)
    async with served(fake) as client:
        asked = [asyncio.create_task(client.post("/v1/completions", json=COMPLETION)) for _ in range(PLACES + 2)]
        async with asyncio.timeout(20):
            while len(fake.inputs) < PLACES:
                await asyncio.sleep(0.01)
        for each in asked:
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        fake.endless, fake.lines = False, [token(0, finish="stop")]
        async with asyncio.timeout(20), client.post("/v1/completions", json=COMPLETION) as response:
            assert response.status == 200


class TestRequests:
    @pytest.mark.parametrize(
        ("request_line", "headers", "status"),
        [
            ("OPTIONS *", "", 404),
            ("GET /v1/models/x%0D%0AX-Evil:%201", "", 404),
            ("GET /v1/models", "Origin: http://[::1\r\n", 403),
            ("GET /", "Upgrade: websocket\r\nConnection: Upgrade\r\n", 400),
            ("POST /v1/completions", "Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello", 400),
            ("POST /v1/completions", "Authorization: Basic \xff\r\nContent-Length: 2\r\n\r\n{}", 400),
            ("POST /v1/completions", f"Content-Length: 9999\r\n\r\n{'[' * 9999}", 400),
        ],
    )
    async def test_that_are_malformed_get_an_error_object(
        self, request_line: str, headers: str, status: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with served(Fake()) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            writer.write(f"{request_line} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode("latin-1"))
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.lower().partition("content-length: ")[2].split()[0])
            answer: Any = json.loads(await reader.readexactly(length))
            writer.close()
        assert head.startswith(f"HTTP/1.1 {status} ")
        assert "X-Evil" not in head
        assert answer["error"]["message"]
        assert "not foreseen" not in caplog.text

    @pytest.mark.parametrize("key", [b"Bearer \xff", b"Basic \xff", "Basic \u2603".encode(), b"Basic !", b"Bearer"])
    async def test_with_keys_that_are_no_text_are_refused_like_wrong_ones(
        self, key: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with served(Fake(), api_key="secret") as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: "
            writer.write(head + key + b"\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
            writer.close()
        assert "not foreseen" not in caplog.text

    async def test_nested_too_deeply_are_refused_wherever_that_is_noticed(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with served(Fake([token(0, finish="stop")])) as client:
            for depth in range(900, 1000, 10):
                schema = '{"not":' * depth + "true" + "}" * depth
                form = f'{{"type": "json_schema", "json_schema": {{"schema": {schema}}}}}'
                body = f'{{"model": "tiny", "messages": [{{"role": "user"}}], "response_format": {form}}}'
                async with client.post("/v1/chat/completions", data=body) as response:
                    assert response.status in (200, 400)
            assert response.status == 400
        assert "not foreseen" not in caplog.text
