"""Repeats the cancels that Cog's runtime loses.

The server tells its worker once, over a control channel, to cancel what runs in a slot. The worker ignores that until
it holds the future of the slot's prediction (coglet 0.23.1, `PythonPredictHandler.cancel`), so a caller who leaves
within milliseconds would leave a prediction that nobody can end. So a relay stands in the control channel. It repeats a
cancel until the worker says that the slot is idle.

A cancel names a slot, not a prediction, and must not reach the slot's next one, which may be another caller's. The
server gives a slot to another prediction only when it has read the slot's idle message, so the relay withholds that
message until no cancel of the prediction that ended is on its way:

- The server cancels a prediction until it handles the prediction's last message (coglet, `run_event_loop`). That
  message comes over the slot's socket and can be handled after an idle message that was sent later. So the relay sends
  a message of its own after it, and waits for the receipt. By then every cancel is in the control channel.
- The relay reads the control channel until it is empty and drops the slot's cancels.
- If it has sent cancels, it sends the worker a health check and waits for the result. The worker handles messages one
  after another, so every cancel before the check is done with.
"""

import array
import fcntl
import json
import os
import re
import select
import socket
import stat
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import coglet

WORKER_INPUT, WORKER_OUTPUT = 99, 100
"""The worker's ends of the control channel: `fd_redirect.rs` of coglet."""

SLOT_SOCKET = re.compile(rb"\0coglet-\d+-(\d+)")
"""The names of the slots' sockets: `transport.rs` of coglet."""

HOLD_SECONDS = 0.02
"""How long a cancel is held back, as the worker ignores one that comes while it starts the prediction."""

MAX_REPEAT_SECONDS = 60.0
"""How long a cancel is repeated. A prediction takes it once it has started, however busy the worker is. It never starts
if the runtime has lost its place."""

MAX_INTERVAL_SECONDS = 0.64
"""The intervals between repetitions double from HOLD_SECONDS up to this."""

MAX_RECEIPT_SECONDS = 5.0
"""How long to wait for a receipt. A server that has given none by then is asked for no more."""

SETTLE_SECONDS = 0.1
"""How long to wait instead of a receipt where there is none."""

CHECK = "cancel-relay"
"""The id of the relay's own health checks."""

TICK_SECONDS = 0.01
"""How often to look whether something is due."""

RECEIPT_TICK_SECONDS = 0.001
"""How often to look whether a receipt has come. The server gives it within microseconds if it is not busy."""


def install() -> None:
    """Put a relay into the control channel of this worker. Call it in setup, while the worker does not read."""
    if coglet.server.active and all(map(_is_pipe, (WORKER_INPUT, WORKER_OUTPUT))):
        from_server, to_worker = _insert(WORKER_INPUT, 0)
        to_server, from_worker = _insert(WORKER_OUTPUT, 1)
        relay = Relay(from_server, to_worker, from_worker, to_server, _slot_sockets())
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


def _slot_sockets() -> dict[int, int]:
    """This process's ends of the slots' sockets, by the index of the slot."""
    found: dict[int, int] = {}
    descriptors: list[str] = []
    with suppress(OSError):  # there is no /proc
        descriptors = os.listdir("/proc/self/fd")
    for descriptor in map(int, descriptors):
        with suppress(OSError):  # it is closed again, or has no peer
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as duplicate:
                    peer = duplicate.getpeername()
                if isinstance(peer, bytes) and (name := SLOT_SOCKET.fullmatch(peer)):
                    found[int(name[1])] = descriptor
    return found


class Receipt:
    """Tells when the server has handled all that the worker has sent it over a slot's socket.

    The server handles messages one after another, and reads the file that a `file_output` message names. Here that is
    a pipe, empty once the server has read it. No prediction runs in the slot, so the server drops what it has read.
    """

    def __init__(self, connection: int | None) -> None:
        """``connection`` is the socket's file descriptor. Without one the receipt counts as come after a while."""
        self._connection = connection
        self._begun = time.monotonic()
        self._pipe: int | None = None

    def has_come(self) -> bool:
        """Look for the receipt; send the message if the socket has not taken it before."""
        if self._connection is None:
            return time.monotonic() >= self._begun + SETTLE_SECONDS
        if self._pipe is None:
            self._pipe = self._request(self._connection)
        return self._pipe is not None and not _unread(self._pipe)

    def is_overdue(self) -> bool:
        """Whether the server will not give it."""
        return time.monotonic() >= self._begun + MAX_RECEIPT_SECONDS

    def _request(self, connection: int) -> int | None:
        """Send the message and return the pipe, if the socket takes it now: whole or not at all, as it is short."""
        try:
            pipe, end = os.pipe()
        except OSError:  # too many files are open
            return None
        os.write(end, b"null")
        os.close(end)
        path = f"/proc/{os.getpid()}/fd/{pipe}"
        try:
            os.write(connection, _frame({"type": "file_output", "filename": path, "kind": {"type": "oversized"}}))
        except OSError:
            os.close(pipe)
            return None
        return pipe

    def close(self) -> None:
        """Close the pipe, which the server has read."""
        if self._pipe is not None:
            os.close(self._pipe)

    def withdraw(self) -> None:
        """Empty the pipe. A server that reads it after all would take its content for output of the next prediction.

        It stays open, so that its name never leads to another file.
        """
        if self._pipe is not None:
            os.read(self._pipe, select.PIPE_BUF)


@dataclass
class Cancel:
    """A cancel of a prediction that still runs."""

    frame: bytes
    due: float
    until: float
    wait: float = HOLD_SECONDS
    sent: bool = False


@dataclass
class Ended:
    """A slot that is idle, which the server does not know yet."""

    idle: bytes
    """The message that says so."""
    unchecked: bool
    """Whether the worker may have a cancel of the slot to handle."""
    receipt: Receipt


class Relay:
    """Passes messages on between server and worker. A message is a JSON object after its length in four bytes."""

    def __init__(
        self, from_server: int, to_worker: int, from_worker: int, to_server: int, slot_sockets: Mapping[int, int]
    ) -> None:
        """All are file descriptors: of pipes, and of the worker's ends of the slots' sockets, by the slots' indices."""
        self._from_server, self._to_worker = from_server, to_worker
        self._from_worker, self._to_server = from_worker, to_server
        self._slot_sockets = slot_sockets
        self._sockets: dict[str, int] = {}
        """By slot."""
        self._cancels: dict[str, Cancel] = {}
        """By slot."""
        self._ended: dict[str, Ended] = {}
        """By slot."""
        self._checked: list[Ended] = []
        """Those that the next health check's result is about."""
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
        sources = {self._from_server: (bytearray(), self._down), self._from_worker: (bytearray(), self._up)}
        while True:
            pending = TICK_SECONDS if self._cancels or self._unsent else None
            readable = select.select(sources, [], [], RECEIPT_TICK_SECONDS if self._ended else pending)[0]
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
        elif slot not in self._ended:
            now = time.monotonic()
            self._cancels.setdefault(slot, Cancel(frame, now + HOLD_SECONDS, now + MAX_REPEAT_SECONDS))

    def _up(self, frame: bytes) -> None:
        message = _message(frame)
        kind, slot = message.get("type"), str(message.get("slot"))
        if kind == "healthcheck_result" and message.get("id") == CHECK:
            for ended in self._checked:
                ended.unchecked = False
            self._checked = []
        elif kind == "idle":
            cancel = self._cancels.pop(slot, None)
            receipt = Receipt(self._sockets.get(slot))
            self._ended[slot] = Ended(frame, unchecked=bool(cancel and cancel.sent), receipt=receipt)
        else:
            if kind == "ready":
                slots = enumerate(map(str, message.get("slots", [])))
                self._sockets = {slot: self._slot_sockets[i] for i, slot in slots if i in self._slot_sockets}
            elif kind == "failed":  # the server gives this slot to nobody
                self._cancels.pop(slot, None)
            self._send(frame)

    def _tick(self, now: float) -> None:
        if not self._checked and (unchecked := [ended for ended in self._ended.values() if ended.unchecked]):
            self._checked = unchecked
            self._unsent += _frame({"type": "healthcheck", "id": CHECK})
        for slot, ended in list(self._ended.items()):
            come = ended.receipt.has_come()
            if ended.unchecked or not (come or ended.receipt.is_overdue()):
                continue
            if _unread(self._from_server):  # maybe a cancel from before the receipt: drop it first
                continue
            if come:
                ended.receipt.close()
            else:
                ended.receipt.withdraw()
                self._sockets = {}
            del self._ended[slot]
            self._send(ended.idle)
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
