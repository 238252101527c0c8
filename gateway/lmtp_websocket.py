"""LMTP over WebSocket, as `lmql serve-model` speaks it.

A client sends frames ``NAME {object}``, one operation each. It gets frames ``TOKEN [{…}, …]`` and ``MSG [{…}]``. Each
operation is a prediction of its own; a connection that closes cancels what it started.
"""

import asyncio
import re
from contextlib import suppress

import msgspec
from aiohttp import WSMsgType, web
from msgspec import Struct

from gateway import replies
from gateway.errors import told
from gateway.target import Target

MAX_FRAME = 2**22
"""Characters of a frame. A mask of half a vocabulary of 128,000 tokens fits."""

MAX_CLOSING_FRAME = 2**24
"""Bytes of a frame that closes the connection, before it is held in memory."""

MAX_OPERATIONS = 1024
"""Operations that one connection may have waiting or running."""

HEARTBEAT_SECONDS = 120.0
"""How often to ask whether a silent client still exists."""

_STREAM_ID = re.compile(r'"stream_id"\s*:\s*(-?(?:0|[1-9]\d{0,17})|"[^"\\\x00-\x1f]{0,256}")\s*[,}]', re.ASCII)
_TOKENS = ("GENERATE", "SCORE")
"""Operations whose errors are TOKEN. A client waits forever for those of others."""

StreamId = int | str | None


class _Identity(Struct):
    stream_id: int | str


class Connection:
    """One client."""

    def __init__(self, target: Target, socket: web.WebSocketResponse) -> None:
        self._target = target
        self._socket = socket
        self._running: dict[StreamId, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Answer frames until the client leaves."""
        try:
            async for message in self._socket:
                if message.type is WSMsgType.TEXT:
                    await self._receive(message.data)
                elif message.type is WSMsgType.BINARY:
                    await self._refuse("", None, "A frame is text: NAME {object}.")
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _receive(self, frame: str) -> None:
        name, _, payload = frame.partition(" ")
        if len(frame) > MAX_FRAME:
            reason = f"The frame has {len(frame)} characters; {MAX_FRAME} is the limit. Send a mask, not a logit_bias."
            return await self._refuse(name, _guessed(payload), reason)
        try:
            stream_id = msgspec.json.decode(payload, type=_Identity).stream_id
        except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
            reason = f"A frame is NAME {{object}} with a stream_id: {str(error).replace('`', '')}."
            return await self._refuse(name, _guessed(payload[:4096]), reason)
        if stream_id in self._running:
            return await self._refuse(name, stream_id, f"stream_id {stream_id!r} is in use on this connection.")
        if len(self._running) >= MAX_OPERATIONS:
            return await self._refuse(name, stream_id, f"{MAX_OPERATIONS} operations run on this connection; wait.")
        task = asyncio.create_task(self._run(name, stream_id, payload))
        self._running[stream_id] = task
        return None

    async def _run(self, name: str, stream_id: StreamId, payload: str) -> None:
        batch = f"[[{msgspec.json.encode(name).decode()},{payload}]]"
        try:
            async with self._target.predict({"ops_batch_json": batch}) as running:
                async for lines in replies.lines(running.chunks):
                    await self._send(lines)
        except ConnectionError:
            pass  # the client has left; serve() ends, too
        except Exception as error:
            await self._refuse(name, stream_id, str(told(error)))
        finally:
            self._running.pop(stream_id, None)

    async def _send(self, lines: list[str]) -> None:
        """Send lines in frames, neighbours of one kind together."""
        kind, objects = "", list[str]()
        for line in [*lines, ""]:
            word, _, reply = line.partition(" ")
            if word != kind and objects:
                await self._socket.send_str(f"{kind} [{','.join(objects)}]")
                objects = []
            kind = word
            if reply:
                objects.append(reply)

    async def _refuse(self, name: str, stream_id: StreamId, reason: str) -> None:
        kind = "TOKEN" if name in _TOKENS else "MSG"
        error = msgspec.json.encode({"stream_id": stream_id, "error": reason}).decode()
        with suppress(ConnectionError):
            await self._socket.send_str(f"{kind} [{error}]")


def _guessed(payload: str) -> StreamId:
    """The stream_id of a text that is no operation, if it seems to have one."""
    found = _STREAM_ID.search(payload)
    return msgspec.json.decode(found[1]) if found else None


async def serve(request: web.Request, target: Target) -> web.WebSocketResponse:
    """Serve LMTP on a request that asks for a WebSocket."""
    # Compressing every token would take longer than sending it.
    socket = web.WebSocketResponse(max_msg_size=MAX_CLOSING_FRAME, heartbeat=HEARTBEAT_SECONDS, compress=False)
    await socket.prepare(request)
    await Connection(target, socket).serve()
    return socket
