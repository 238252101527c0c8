"""LMTP over WebSocket: frames in, frames out."""

import asyncio
import json
from typing import Any

from tests.gateway.containers import Client, Fake, served, token


async def exchange(client: Client, *frames: str, count: int = 1) -> list[tuple[str, Any]]:
    """Send frames; the word and the object of the first replies that come back."""
    replies: list[tuple[str, Any]] = []
    async with client.ws_connect("/any/path") as socket:
        for frame in frames:
            await socket.send_str(frame)
        while len(replies) < count:
            word, _, objects = (await socket.receive_str(timeout=5)).partition(" ")
            replies += [(word, reply) for reply in json.loads(objects)]
    return replies


async def test_an_operation_is_a_prediction_and_its_lines_are_replies() -> None:
    fake = Fake([token(7, stream=3), token(8, stream=3, finish="stop")])
    async with served(fake) as client:
        replies = await exchange(client, 'GENERATE {"stream_id": 3, "prompt": [1]}', count=2)
    assert [(word, reply["token"], reply["stream_id"]) for word, reply in replies] == [("TOKEN", 7, 3), ("TOKEN", 8, 3)]
    assert json.loads(fake.inputs[0]["ops_batch_json"]) == [["GENERATE", {"stream_id": 3, "prompt": [1]}]]


async def test_tokens_that_come_together_share_a_frame() -> None:
    async with served(Fake([token(7) + token(8, finish="stop")])) as client, client.ws_connect("/") as socket:
        await socket.send_str('GENERATE {"stream_id": 0, "prompt": [1]}')
        frame = await socket.receive_str(timeout=5)
    assert [reply["token"] for reply in json.loads(frame.removeprefix("TOKEN "))] == [7, 8]


async def test_a_line_that_is_split_over_chunks_is_one_frame() -> None:
    line = token(7, finish="stop")
    async with served(Fake([line[:9], line[9:]])) as client:
        ((_, reply),) = await exchange(client, 'SCORE {"stream_id": 0, "prompt": [1], "scored": [2]}')
    assert reply["token"] == 7


async def test_frames_that_are_no_operations_are_answered_and_not_fatal() -> None:
    frames = [
        "GENERATE",
        "GENERATE {",
        'GENERATE {"stream_id": 5, "prompt": NaN}',
        "SCORE [1]",
        'MODEL_INFO {"prompt": []}',
        'GENERATE {"stream_id": 6} {"stream_id": 7}',
        'GENERATE {"stream_id": 007}',
        'GENERATE {"stream_id": 1.5}',
        'GENERATE {"stream_id": "a\nb"}',
        'GENERATE {"stream_id": 8, "a": ' + "[" * 100_000,
    ]
    async with served(Fake([token(1, stream=9, finish="stop")])) as client:
        *answers, last = await exchange(client, *frames, 'GENERATE {"stream_id": 9, "prompt": []}', count=11)
    assert [word for word, _ in answers] == ["TOKEN", "TOKEN", "TOKEN", "TOKEN", "MSG", *["TOKEN"] * 5]
    assert [reply["stream_id"] for _, reply in answers] == [None, None, 5, None, None, 6, None, None, None, 8]
    assert all(reply["error"] for _, reply in answers)
    assert last[1]["token"] == 1


async def test_a_binary_frame_is_answered() -> None:
    async with served(Fake()) as client, client.ws_connect("/") as socket:
        await socket.send_bytes(b"GENERATE {}")
        assert (await socket.receive_str(timeout=5)).startswith('MSG [{"stream_id":null,"error":')


async def test_an_oversized_frame_ends_its_stream_and_no_other() -> None:
    large = 'GENERATE {"stream_id": 1, "prompt": [' + "1," * 2_200_000 + "1]}"
    async with served(Fake([token(1, stream=2, finish="stop")])) as client:
        frames = await exchange(client, large, 'GENERATE {"stream_id": 2, "prompt": []}', count=2)
    assert frames[0][1]["stream_id"] == 1
    assert "4194304 is the limit" in frames[0][1]["error"]
    assert frames[1][1]["token"] == 1


async def test_an_id_in_use_is_refused() -> None:
    async with served(Fake(endless=True)) as client, client.ws_connect("/") as socket:
        await socket.send_str('GENERATE {"stream_id": 1, "prompt": []}')
        await socket.receive_str(timeout=5)
        await socket.send_str('MODEL_INFO {"stream_id": 1}')
        while "error" not in (frame := await socket.receive_str(timeout=5)):
            pass
    assert frame.startswith("MSG ")
    assert "in use" in frame


async def test_a_failed_prediction_is_an_error_of_its_stream() -> None:
    reason = "Prediction failed: Async prediction failed: the engine has stopped"
    async with served(Fake(failure=reason)) as client:
        frames = await exchange(
            client, 'SCORE {"stream_id": 1, "prompt": []}', 'GENERATE {"stream_id": "b", "prompt": []}', count=2
        )
    assert [word for word, _ in frames] == ["TOKEN", "TOKEN"]
    assert {reply["stream_id"] for _, reply in frames} == {1, "b"}
    assert {reply["error"] for _, reply in frames} == {"the engine has stopped"}


async def test_a_closed_connection_cancels_what_it_started() -> None:
    fake = Fake(endless=True)
    async with served(fake) as client:
        await exchange(client, 'GENERATE {"stream_id": 1, "prompt": []}')
        await asyncio.wait_for(fake.cancelled.wait(), 5)
