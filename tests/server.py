"""A running Cog server, started as a person would: by script/serve, as a process of its own."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 90.0
STOP_SECONDS = 15.0


class Piped(subprocess.Popen[str]):
    """A process whose output is read."""

    stdout: IO[str]
    stderr: IO[str]


@dataclass(frozen=True)
class Server:
    """A server that accepts predictions, and the process of script/serve around it."""

    url: str
    """Without a path."""
    process: Piped
    log: list[str]
    """What it has written to standard error so far."""


@contextmanager
def serving(project: Path = ROOT, **environment: str) -> Iterator[Server]:
    """Run `script/serve --port 0` of a project with these environment variables added."""
    process = Piped(
        [sys.executable, str(project / "script/serve"), "--port", "0"],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    announced: queue.SimpleQueue[str] = queue.SimpleQueue()
    # Both pipes are read all the time: a server that cannot write its log stands still.
    readers = [
        threading.Thread(target=lambda: log.extend(iter(process.stderr.readline, ""))),
        threading.Thread(target=lambda: announced.put(process.stdout.readline())),
    ]
    for reader in readers:
        reader.start()
    try:
        try:
            line = announced.get(timeout=START_SECONDS)
        except queue.Empty:
            line = ""
        assert line.startswith("Ready: "), "script/serve did not become ready:\n" + "".join(log[-30:])
        yield Server(line.removeprefix("Ready: ").strip().removesuffix("/predictions"), process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        finally:
            process.kill()
            for reader in readers:
                reader.join()
            process.communicate()
