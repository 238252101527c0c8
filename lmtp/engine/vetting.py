"""Compiles constraints where it may fail: in processes that end with the attempt.

Compiling is native code that nothing can interrupt. A constraint of a thousand characters can take it a minute and
gigabytes, or overflow its stack. So each one is first compiled in a child process with a limit on time and memory. The
engine's own process, where matchers must live, compiles only what passed. Finished texts are checked there too.

`python -m lmtp.engine.vetting` is the children's parent. It holds the tokenizer, which they share, forks one for
every request, and tells by which signal it ended. It may not import torch: a fork would copy threads' locks.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import msgspec
from llguidance import LLTokenizer

from lmtp.engine.heap import in_use
from lmtp.engine.schema import is_valid
from lmtp.engine.source import Source, compile_source
from lmtp.protocol import RequestError
from lmtp.settings import ROOT

COMPILE_MEMORY = 2**28
"""Bytes for compiling one constraint, or for checking a text."""

STACK = 2**28
"""Bytes of address space for a child's stack: the compiler descends through a grammar's rules."""

QUICK_SECONDS = 0.05
"""A child that may take longer yields the processor to the engine."""

NICE = 5

START_SECONDS = 20.0
"""For the parent to read the tokenizer."""

PATIENCE = 10
"""Seconds for a child to get a second of the processor, which others need too."""

MARGIN = 2.0
"""Seconds for a child to start."""

ANSWER_SECONDS = 5.0
"""For the answer of a child whose time is up."""

TOO_LARGE = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
"""How native code ends when it gets no more memory, or no more stack."""


class Vetter:
    """Asks the parent process, and starts it when it is needed."""

    def __init__(self, tokenizer: str, vocabulary: int, end_of_sequence: Sequence[int]) -> None:
        """``tokenizer`` is the JSON of a fast tokenizer, as LLTokenizer takes it."""
        self._setup = os.fdopen(os.memfd_create("tokenizer"), "w+b")
        self._setup.write(msgspec.json.encode([tokenizer, vocabulary, list(end_of_sequence)]))
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def vet(self, source: Source, seconds: float) -> int:
        """Compile a constraint in a child. Returns the bytes of the result.

        Raises RequestError for one that cannot be used, TimeoutError for one that takes more than ``seconds`` of
        processor time, and another OSError if it cannot be told now.
        """
        try:
            answer = self._ask({"source": source}, seconds)
        except MemoryError:
            raise RequestError(
                f"{source.field}: too large or complex to compile; {COMPILE_MEMORY >> 20} MB of memory is the most."
            ) from None
        if error := answer.get("error"):
            raise RequestError(error)
        size: int = answer["bytes"]
        return size

    def check(self, schema: str, texts: Sequence[str], seconds: float) -> list[bool | None]:
        """Whether each text is JSON that the schema allows; None where that cannot be told.

        Raises OSError, TimeoutError and MemoryError as `vet` meets them.
        """
        valid: list[bool | None] = self._ask({"schema": schema, "texts": texts}, seconds)["valid"]
        return valid

    def start(self) -> None:
        """Start the parent if it does not run. Does not wait until it has read the tokenizer."""
        with self._lock:
            self._start()

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """A child's answer."""
        wall = seconds * PATIENCE + MARGIN
        ours, theirs = socket.socketpair()
        with ours:
            with theirs, self._lock:
                socket.send_fds(self._parent(), [b"\0"], [theirs.fileno()])
            ours.settimeout(wall + ANSWER_SECONDS)
            try:
                ours.sendall(json.dumps(request | {"seconds": seconds, "wall": wall}).encode())
                ours.shutdown(socket.SHUT_WR)
                with ours.makefile("rb") as answers:
                    line = answers.readline()
            except TimeoutError:
                raise OSError("its process does not answer") from None
            except ConnectionError:
                line = b""
        answer: dict[str, Any] = json.loads(line or "{}")
        ended = answer.get("signal")
        if ended == signal.SIGPROF:
            raise TimeoutError
        if ended == signal.SIGALRM:
            raise OSError("the server is busy")
        if ended in TOO_LARGE or answer.get("memory"):
            raise MemoryError
        if ended or not answer:
            raise OSError("its process was ended")
        if failure := answer.get("failure"):
            raise RuntimeError(failure)
        return answer

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_SECONDS)
        self._ready = False
        self._setup.seek(0)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                cwd=ROOT,
                env=os.environ | {"MALLOC_ARENA_MAX": "1", "RUST_BACKTRACE": "0"},
                stdin=self._setup,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def _parent(self) -> socket.socket:
        """The socket to the parent, once it has read the tokenizer."""
        self._start()
        if not self._ready:
            with contextlib.suppress(OSError):
                self._ready = self._control.recv(1) == b"\0"
            if not self._ready:
                assert self._process is not None
                self._process.kill()
                self._process.wait()
                raise OSError("the process for it does not start")
        return self._control


def _main(control: socket.socket, setup: IO[bytes]) -> None:
    """The parent: read the tokenizer, then fork a child for each socket that arrives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ended, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(0)
    tokenizer, vocabulary, end_of_sequence = msgspec.json.decode(setup.read())
    matching = LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=end_of_sequence or None)
    control.sendall(b"\0")
    children: dict[int, socket.socket] = {}
    while True:
        readable, _, _ = select.select([control, ended], [], [])
        if ended in readable:
            ended.recv(1024)
            _tell_how_they_ended(children)
        if control in readable:
            _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not descriptors:
                return
            connection = socket.socket(fileno=descriptors[0])
            child = os.fork()
            if child == 0:
                _serve(connection, matching)
                os._exit(0)
            children[child] = connection


def _tell_how_they_ended(children: dict[int, socket.socket]) -> None:
    """A line for each, after its answer if there was one. Others hold copies of its socket, so only a line ends it."""
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        with children.pop(child) as connection, contextlib.suppress(OSError):
            ended = {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else {}
            connection.sendall(json.dumps(ended).encode() + b"\n")


def _serve(connection: socket.socket, tokenizer: LLTokenizer) -> None:
    """A child: answer one request within its limits. Exceeding one ends it, by a signal that needs no Python."""
    with connection.makefile("rb") as requests:
        request = json.loads(requests.read())
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    signal.setitimer(signal.ITIMER_REAL, request["wall"])
    if request["seconds"] > QUICK_SECONDS:
        os.nice(NICE)
    most = _pages() * resource.getpagesize() + STACK + COMPILE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    threading.stack_size(STACK)
    with ThreadPoolExecutor(1) as deep:
        answer = deep.submit(_answer, request, tokenizer).result()
    connection.sendall(json.dumps(answer).encode() + b"\n")


def _answer(request: dict[str, Any], tokenizer: LLTokenizer) -> dict[str, Any]:
    try:
        if "texts" in request:
            return {"valid": [is_valid(request["schema"], text) for text in request["texts"]]}
        before = in_use()  # MALLOC_ARENA_MAX is 1, so this is all of it
        matcher = compile_source(Source(*request["source"]), tokenizer)
        size = in_use() - before
        del matcher
        return {"bytes": max(size, 0)}
    except RequestError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"memory": True}
    except BaseException as error:
        return {"failure": f"{type(error).__name__}: {error}"}


def _pages() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0])


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])), sys.stdin.buffer)
