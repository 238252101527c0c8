"""Repeats the cancels that Cog's runtime loses.

The server tells its worker once, over a control channel, to cancel what runs in a slot. The worker ignores that until
it holds the future of the slot's prediction (coglet 0.23.1, `PythonPredictHandler.cancel`), so a caller who leaves
within milliseconds would leave a prediction that nobody can end. So a relay stands in the control channel. It repeats a
cancel for ten seconds, or until the worker says that the slot is idle.

A cancel names a slot, not a prediction, and must not reach the slot's next one, which may be another caller's. What the
relay goes by is order, not time, as far as the channel has an order:

- The server gives a slot to another prediction only when it has read the slot's idle message. So the relay withholds
  the idle message of a cancelled slot. It sends the worker a health check of its own and waits for the result: the
  worker handles messages one after another, so every cancel before the check is done with.
- A cancel that the server sends before it reads the idle message is for the prediction that ended. So the relay passes
  an idle message on when it has read all that the server sent, and drops the cancels that come before the server has
  read it.
- The server may still cancel the old prediction between reading the idle message and the prediction's last message,
  which comes over another channel, usually first. No order tells that cancel from one for the next prediction. For
  CROSSING_SECONDS it is dropped: a prediction that nobody cancelled must not end, and a lost cancel costs its time.
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
"""How long a cancel is held back, as the worker ignores one that comes while it starts the prediction."""

CROSSING_SECONDS = 0.005
"""How long after the server has read the idle message of a slot a cancel may still be meant for the prediction that
ended: as long as the server may take to read that prediction's last message."""

MAX_REPEAT_SECONDS = 10.0
"""How long a cancel is repeated. A prediction takes it once it has started, however busy the worker is. A cancel that
comes too late for its prediction could otherwise wait for the next one in its slot."""

MAX_INTERVAL_SECONDS = 0.64
"""The intervals between repetitions double from HOLD_SECONDS up to this."""

CHECK = "cancel-relay"
"""The id of the relay's own health checks."""

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
    sent: bool = False


@dataclass
class Idle:
    """A slot that the server may take for busy."""

    end: int
    """Where the idle message ends in what was written to the server, in bytes."""
    until: float
    """How long its cancels are dropped, if the server has read the message."""


class Relay:
    """Passes messages on between server and worker. A message is a JSON object after its length in four bytes."""

    def __init__(self, from_server: int, to_worker: int, from_worker: int, to_server: int) -> None:
        """All are file descriptors of pipes."""
        self._from_server, self._to_worker = from_server, to_worker
        self._from_worker, self._to_server = from_worker, to_server
        self._cancels: dict[str, Cancel] = {}
        """By slot."""
        self._ended: dict[str, bytes] = {}
        """The idle messages of cancelled slots whose last cancel the worker may have yet to handle."""
        self._checked: dict[str, bytes] = {}
        """Those of them that the next health check's result releases."""
        self._idle: list[tuple[str, bytes]] = []
        """The idle messages to pass on."""
        self._just_idle: dict[str, Idle] = {}
        """The slots of which a cancel may be meant for the prediction that ended."""
        self._written = 0
        """Bytes written to the server."""
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
            pending = self._cancels or self._idle or self._unsent or self._just_idle
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
        message = _message(frame)
        slot = str(message.get("slot"))
        if message.get("type") != "cancel":
            self._unsent += frame
        elif not self._has_ended(slot, now := time.monotonic()):
            self._cancels.setdefault(slot, Cancel(frame, now + HOLD_SECONDS, now + MAX_REPEAT_SECONDS))

    def _has_ended(self, slot: str, now: float) -> bool:
        """Whether a cancel of the slot that was just read is for a prediction that has ended."""
        if idle := self._just_idle.get(slot):
            return not self._has_read(idle) or now < idle.until
        return slot in self._ended or slot in self._checked or any(slot == idle for idle, _ in self._idle)

    def _has_read(self, idle: Idle) -> bool:
        """Whether the server has read a slot's idle message."""
        return idle.end <= self._written - _unread(self._to_server)

    def _up(self, frame: bytes) -> None:
        message = _message(frame)
        kind, slot = message.get("type"), str(message.get("slot"))
        if kind == "healthcheck_result" and message.get("id") == CHECK:
            self._idle += self._checked.items()
            self._checked = {}
        elif kind not in ("idle", "failed"):
            self._send(frame)
        elif (cancel := self._cancels.pop(slot, None)) and cancel.sent:
            self._ended[slot] = frame
        else:
            self._idle.append((slot, frame))
        if self._ended and not self._checked:
            self._checked, self._ended = self._ended, {}
            self._unsent += _frame({"type": "healthcheck", "id": CHECK})

    def _tick(self, now: float) -> None:
        while self._idle and not _unread(self._from_server):
            slot, frame = self._idle.pop(0)
            self._send(frame)
            self._just_idle[slot] = Idle(self._written, now + CROSSING_SECONDS)
        for idle in self._just_idle.values():
            if not self._has_read(idle):
                idle.until = now + CROSSING_SECONDS
        self._just_idle = {slot: idle for slot, idle in self._just_idle.items() if now < idle.until}
        self._cancels = {slot: cancel for slot, cancel in self._cancels.items() if now < cancel.until}
        for cancel in self._cancels.values():
            if cancel.due <= now:
                self._unsent += cancel.frame
                cancel.sent = True
                cancel.wait = min(2 * cancel.wait, MAX_INTERVAL_SECONDS)
                cancel.due = now + cancel.wait
        while self._unsent and select.select([], [self._to_worker], [], 0)[1]:
            del self._unsent[: os.write(self._to_worker, self._unsent[: select.PIPE_BUF])]

    def _send(self, frame: bytes) -> None:
        self._written += len(frame)
        view = memoryview(frame)
        while view:
            view = view[os.write(self._to_server, view) :]


def _frames(buffer: bytearray) -> Iterator[bytes]:
    """Take the complete messages out of a buffer, with their lengths."""
    while len(buffer) >= 4 and len(buffer) >= (end := 4 + int.from_bytes(buffer[:4])):
        yield bytes(buffer[:end])
        del buffer[:end]


def _frame(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return len(body).to_bytes(4) + body


def _message(frame: bytes) -> dict[str, Any]:
    """Read a message; empty if it is no JSON object."""
    try:
        message = json.loads(frame[4:])
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _unread(pipe: int) -> int:
    """How many bytes of a pipe its reader has not read."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]
