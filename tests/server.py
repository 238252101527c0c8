"""Child processes of tests and benchmarks: above all a Cog server, started by script/serve as a user starts it."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180.0
STOP_SECONDS = 15.0

ENDLESS = {
    "prompt": "Tell me a story.",
    "max_tokens": 4000,
    "logit_bias": '{"0": -100, "1": -100, "2": -100}',  # forbids every token that ends the text
}
"""Inputs of a prediction that runs for minutes. Tests that use it do not wait for its end."""


class Piped(subprocess.Popen[str]):
    """A process with pipes for its input and output."""

    stdin: IO[str]
    stdout: IO[str]
    stderr: IO[str]


@dataclass(frozen=True)
class Child:
    """A running process. Threads read its output all the time: a process whose pipe is full would block."""

    process: Piped
    lines: queue.SimpleQueue[str]
    """Standard output, line by line; an empty string at its end."""
    log: list[str]
    """Lines of standard error so far."""

    def tail(self) -> str:
        """The end of the log, for an error message."""
        return "".join(self.log[-30:])


@dataclass(frozen=True)
class Server:
    """A server that accepts predictions."""

    url: str
    """Without a path."""
    process: Piped
    log: list[str]


@contextmanager
def child(command: Sequence[str], cwd: Path = ROOT, **environment: str) -> Iterator[Child]:
    """Run a command with these environment variables added; stop it when the block ends."""
    pipe = subprocess.PIPE
    # An inherited PYTHONPATH could import another checkout's modules.
    variables = {**os.environ, "PYTHONPATH": "", **environment}
    process = Piped(command, cwd=cwd, env=variables, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    running = Child(process, queue.SimpleQueue(), [])

    def read_output() -> None:
        for line in process.stdout:
            running.lines.put(line)
        running.lines.put("")

    def read_log() -> None:
        for line in process.stderr:
            running.log.append(line)

    readers = [threading.Thread(target=read, daemon=True) for read in (read_output, read_log)]
    for reader in readers:
        reader.start()
    try:
        yield running
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        finally:
            process.kill()
            process.wait()
            for reader in readers:
                reader.join(STOP_SECONDS)


@contextmanager
def started(command: Sequence[str], cwd: Path = ROOT, **environment: str) -> Iterator[Server]:
    """Run a command that prints `Ready: URL` once it serves. Raises RuntimeError if it does not start."""
    with child(command, cwd, **environment) as running:
        try:
            while (line := running.lines.get(timeout=START_SECONDS)) and not line.startswith("Ready: "):
                pass
        except queue.Empty:
            line = ""
        if not line:
            raise RuntimeError(f"{' '.join(command)} did not become ready:\n{running.tail()}")
        url = line.removeprefix("Ready: ").strip().removesuffix("/predictions")
        yield Server(url, running.process, running.log)


@contextmanager
def serving(project: Path = ROOT, **environment: str) -> Iterator[Server]:
    """Run `script/serve --port 0` of a project with these environment variables added."""
    with started([sys.executable, str(project / "script/serve"), "--port", "0"], project, **environment) as server:
        yield server
