"""Repeats the cancels that Cog's runtime loses.

The server tells its worker once, over a control channel, to cancel what runs in a slot. The worker ignores that until
it has taken the GIL for the slot's prediction (coglet 0.23.1, `PythonPredictHandler.cancel`), so a caller who leaves
within milliseconds would leave a prediction that nobody can end. Just after, the worker raises an exception in the
thread that starts the prediction. Between two calls into Python it is lost; inside one it fails the prediction.

So a relay stands in the control channel. It holds a cancel back until the prediction has most likely started, and
repeats it for ten seconds, or until the worker says that the slot is idle.
"""

import array
import fcntl
import json
import os
import select
import stat
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import coglet

WORKER_INPUT, WORKER_OUTPUT = 99, 100
"""The worker's ends of the control channel: `fd_redirect.rs` of coglet."""

HOLD_SECONDS = 0.02
"""How long a cancel is held back. An abandoned prediction slows the next one down for as long."""

STALE_SECONDS = 0.02
"""How long the worker may take over the last cancel of a prediction that has ended, once it has read it."""

CROSSING_SECONDS = 0.01
"""How long after the server has read the idle message of a slot a cancel may still be meant for the prediction that
ended. It is passed on once and not repeated: a repetition could cancel the slot's next prediction, which may be another
caller's."""

MAX_REPEAT_SECONDS = 10.0
"""How long a cancel is repeated. A prediction takes it once it has started, however busy the worker is. A cancel that
comes too late for its prediction could otherwise wait for the next one in its slot."""

MAX_INTERVAL_SECONDS = 0.64
"""The intervals between repetitions double from HOLD_SECONDS up to this."""

TICK_SECONDS = 0.01
"""How often to look whether something is due."""


def install() -> None:
    """Put a relay into the control channel of this worker. Call it in setup, while the worker does not read."""
    if coglet.server.active and all(map(_is_pipe, (WORKER_INPUT, WORKER_OUTPUT))):
        from_server, to_worker = _insert(WORKER_INPUT, 0)
        to_server, from_worker = _insert(WORKER_OUTPUT, 1)
        relay = Relay(from_server, to_worker, from_worker, to_server)
        threading.Thread(target=relay.run, name="cancel-relay", daemon=True).start()


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _insert(descriptor: int, end: int) -> tuple[int, int]:
    """Make a descriptor one end of a new pipe; return what it was and the other end."""
    before, pipe = os.dup(descriptor), os.pipe()
    os.set_blocking(before, True)
    os.dup2(pipe[end], descriptor)
    os.close(pipe[end])
    return before, pipe[1 - end]


@dataclass
class Cancel:
    """A cancel of a prediction that still runs."""

    frame: bytes
    due: float
    until: float
    wait: float = HOLD_SECONDS


class Relay:
    """Passes messages on between server and worker. A message is a JSON object after its length in four bytes."""

    def __init__(self, from_server: int, to_worker: int, from_worker: int, to_server: int) -> None:
        """All are file descriptors of pipes."""
        self._from_server, self._to_worker = from_server, to_worker
        self._from_worker, self._to_server = from_worker, to_server
        self._cancels: dict[str, Cancel] = {}
        """By slot."""
        self._ended: dict[str, tuple[float, bytes]] = {}
        """When to send the idle messages of cancelled slots, and what: once the worker has read the last cancel, which
        must not reach the slot's next prediction."""
        self._just_idle: dict[str, float] = {}
        """Until when a cancel of a slot that has become idle may be meant for the prediction that ended."""
        self._unsent = bytearray()
        """What the worker has yet to take. A write that blocks could leave worker and relay waiting for each other."""

    def run(self) -> None:
        """Relay until the server closes its end."""
        try:
            self._relay()
        except BrokenPipeError:  # the server has ended
            pass
        finally:
            os.close(self._to_worker)

    def _relay(self) -> None:
        # The server first: a cancel that crosses the idle message of its prediction ends with that message.
        sources = {self._from_server: (bytearray(), self._down), self._from_worker: (bytearray(), self._up)}
        while True:
            pending = self._cancels or self._ended or self._unsent or self._just_idle
            readable = select.select(sources, [], [], TICK_SECONDS if pending else None)[0]
            for source, (buffer, pass_on) in list(sources.items()):
                if source in readable:
                    received = os.read(source, 1 << 16)
                    buffer += received
                    for frame in _frames(buffer):
                        pass_on(frame)
                    if not received:
                        del sources[source]
            self._tick(time.monotonic())
            if self._from_server not in sources:
                return

    def _down(self, frame: bytes) -> None:
        kind, slot = _describe(frame)
        if kind != "cancel" or slot in self._just_idle:
            self._unsent += frame
        elif slot not in self._ended:
            now = time.monotonic()
            self._cancels.setdefault(slot, Cancel(frame, now + HOLD_SECONDS, now + MAX_REPEAT_SECONDS))

    def _up(self, frame: bytes) -> None:
        kind, slot = _describe(frame)
        now = time.monotonic()
        if kind in ("idle", "failed"):
            if self._cancels.pop(slot, None):
                self._ended[slot] = (now + STALE_SECONDS, frame)
                return
            self._just_idle[slot] = now + CROSSING_SECONDS
        _write(self._to_server, frame)

    def _tick(self, now: float) -> None:
        if self._unsent or _unread(self._to_worker):
            self._ended = {slot: (now + STALE_SECONDS, frame) for slot, (_, frame) in self._ended.items()}
        for slot in [slot for slot, (due, _) in self._ended.items() if due <= now]:
            self._just_idle[slot] = now + CROSSING_SECONDS
            _write(self._to_server, self._ended.pop(slot)[1])
        if _unread(self._to_server):
            self._just_idle = dict.fromkeys(self._just_idle, now + CROSSING_SECONDS)
        self._just_idle = {slot: until for slot, until in self._just_idle.items() if now < until}
        self._cancels = {slot: cancel for slot, cancel in self._cancels.items() if now < cancel.until}
        for cancel in self._cancels.values():
            if cancel.due <= now:
                self._unsent += cancel.frame
                cancel.wait = min(2 * cancel.wait, MAX_INTERVAL_SECONDS)
                cancel.due = now + cancel.wait
        while self._unsent and select.select([], [self._to_worker], [], 0)[1]:
            del self._unsent[: os.write(self._to_worker, self._unsent[: select.PIPE_BUF])]


def _frames(buffer: bytearray) -> Iterator[bytes]:
    """Take the complete messages out of a buffer, with their lengths."""
    while len(buffer) >= 4 and len(buffer) >= (end := 4 + int.from_bytes(buffer[:4])):
        yield bytes(buffer[:end])
        del buffer[:end]


def _describe(frame: bytes) -> tuple[Any, Any]:
    """Return type and slot of a message, as far as it has them."""
    try:
        message = json.loads(frame[4:])
        return message.get("type"), message.get("slot")
    except (ValueError, AttributeError):
        return None, None


def _unread(pipe: int) -> int:
    """How many bytes of a pipe its reader has not read."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def _write(descriptor: int, frame: bytes) -> None:
    view = memoryview(frame)
    while view:
        view = view[os.write(descriptor, view) :]
