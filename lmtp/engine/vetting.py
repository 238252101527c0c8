"""Compiles constraints where it may fail: in processes that end with the attempt.

Compiling is native code that nothing can interrupt. A constraint of a thousand characters can take it a minute and
gigabytes, or overflow its stack. So each one is first compiled in a child process with a limit on time and memory. The
engine's own process, where matchers must live, compiles only what passed. Finished texts are checked there too.

`python -m lmtp.engine.vetting` is the children's parent. It holds the tokenizer, which they share, and forks one for
every request. It may not import torch: a fork would copy threads' locks.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

import msgspec
from llguidance import LLTokenizer

from lmtp.engine.schema import is_valid
from lmtp.engine.source import Source, compile_source
from lmtp.protocol import RequestError
from lmtp.settings import ROOT

COMPILE_MEMORY = 2**28
"""Bytes for compiling one constraint, or for checking a text."""

STACK = 2**28
"""Bytes of address space for a child's stack: the compiler descends through a grammar's rules."""

QUICK_SECONDS = 0.05
"""From then on a child yields the processor to the engine."""

NICE = 5

POLL_SECONDS = 0.02

START_SECONDS = 60
"""For the parent to read the tokenizer."""

PATIENCE = 1.25
"""Seconds for a child to get a second of the processor, which others need too."""

MARGIN = 1.0
"""Seconds in which a child in native code is ended after its time is up."""


class Vetter:
    """Asks the parent process, and starts it when it is needed."""

    def __init__(self, tokenizer: str, vocabulary: int, end_of_sequence: Sequence[int]) -> None:
        """``tokenizer`` is the JSON of a fast tokenizer, as LLTokenizer takes it."""
        self._setup = msgspec.json.encode([tokenizer, vocabulary, list(end_of_sequence)])
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def vet(self, source: Source, seconds: float) -> tuple[float, int]:
        """Compile a constraint in a child. Returns the seconds that it took and the bytes of the result.

        Raises RequestError for one that cannot be used, and TimeoutError for one that takes more than ``seconds`` of
        processor time.
        """
        answer = self._ask({"source": source, "seconds": seconds})
        if answer is None:
            raise RequestError(
                f"{source.field}: too large or complex to compile; {COMPILE_MEMORY >> 20} MB of memory is the most."
            )
        if error := answer.get("error"):
            raise RequestError(error)
        return answer["seconds"], answer["bytes"]

    def check(self, schema: str, texts: Sequence[str], seconds: float) -> list[bool | None]:
        """Whether each text is JSON that the schema allows; None where that cannot be told."""
        try:
            answer = self._ask({"schema": schema, "texts": texts, "seconds": seconds})
        except OSError:
            answer = None
        return answer["valid"] if answer else [None] * len(texts)

    def start(self) -> None:
        """Start the parent, or do nothing if it runs."""
        with self._lock:
            self._parent()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """A child's answer; None if it died. Raises TimeoutError."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs, self._lock:
                socket.send_fds(self._parent(), [b"\0"], [theirs.fileno()])
            ours.settimeout(request["seconds"] * PATIENCE + 2 * MARGIN)
            ours.sendall(json.dumps(request).encode())
            ours.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError), ours.makefile("rb") as answers:
                if answer := answers.read():
                    result: dict[str, Any] = json.loads(answer)
                    if result.get("late"):
                        raise TimeoutError
                    return result
        return None

    def _parent(self) -> socket.socket:
        if self._process is None or self._process.poll() is not None:
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno())],
                    cwd=ROOT,
                    env=os.environ | {"MALLOC_ARENA_MAX": "1", "RUST_BACKTRACE": "0"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError), self._process.stdin as setup:
                setup.write(self._setup)
            self._control.settimeout(START_SECONDS)
            if self._control.recv(1) != b"\0":
                raise OSError("the process for it does not start")
        return self._control


def _main(control: socket.socket, setup: IO[bytes]) -> None:
    """The parent: read the tokenizer, then fork a child for each socket that arrives."""
    for ignored in (signal.SIGINT, signal.SIGCHLD):  # no child is waited for
        signal.signal(ignored, signal.SIG_IGN)
    os.closerange(control.fileno() + 1, control.fileno() + 256)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(0)
    tokenizer, vocabulary, end_of_sequence = msgspec.json.decode(setup.read())
    matching = LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=end_of_sequence or None)
    control.sendall(b"\0")
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        with socket.socket(fileno=descriptors[0]) as connection:
            if os.fork() == 0:
                control.close()
                _serve(connection, matching)
                os._exit(0)


def _serve(connection: socket.socket, tokenizer: LLTokenizer) -> None:
    """A child: answer one request within its limits."""
    with connection.makefile("rb") as requests:
        request = json.loads(requests.read())
    seconds, started = request["seconds"], time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds * PATIENCE + MARGIN)  # its default action needs no Python
    most = _pages() * resource.getpagesize() + STACK + COMPILE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    threading.stack_size(STACK)
    answer: dict[str, Any] = {"late": True}

    def work() -> None:
        nonlocal answer
        answer = _answer(request, tokenizer)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(min(QUICK_SECONDS, seconds))
    if worker.is_alive() and seconds > QUICK_SECONDS:
        os.setpriority(os.PRIO_PROCESS, worker.native_id or 0, NICE)
    while worker.is_alive() and time.process_time() < seconds and time.monotonic() - started < seconds * PATIENCE:
        worker.join(POLL_SECONDS)
    connection.sendall(json.dumps(answer).encode())


def _answer(request: dict[str, Any], tokenizer: LLTokenizer) -> dict[str, Any]:
    if "texts" in request:
        return {"valid": [is_valid(request["schema"], text) for text in request["texts"]]}
    started, before = time.monotonic(), _heap()
    try:
        matcher = compile_source(Source(*request["source"]), tokenizer)
    except RequestError as error:
        return {"error": str(error)}
    seconds = time.monotonic() - started
    after = _heap()
    del matcher
    return {"seconds": seconds, "bytes": max(after - before, 0)}


def _pages() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0])


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "ford", "keep")
    ]


def _heap() -> int:
    """The bytes that malloc has given out. MALLOC_ARENA_MAX is 1, so this is all of them."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Heap
    heap = mallinfo()
    return int(heap.uordblks + heap.hblkhd)


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])), sys.stdin.buffer)
