"""One side of a comparison in a process of its own, driven a call at a time.

Threads, settings and memory of one side cannot touch the other's, and a peer may live in another virtual environment:
this module needs nothing but the standard library. Calls and results travel as JSON lines over pipes.
"""

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from typing import IO, Any

from benchmarks.plan import ROOT

START_SECONDS = 600.0
CALL_SECONDS = 900.0


class SideError(Exception):
    """The side failed; says how, with the end of what it logged."""


class Side:
    """The class `module:Class`, made and called in another process. Use as a context manager."""

    def __init__(self, target: str, *, python: str = sys.executable, environment: dict[str, str] | None = None) -> None:
        self._target = target
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.side", target],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def make(self, **arguments: Any) -> None:
        """Make the object; every call after it is one of its methods."""
        self._exchange("__init__", arguments, START_SECONDS)

    def call(self, method: str, **arguments: Any) -> Any:
        """What the method returns. Raises SideError where it fails or takes too long."""
        return self._exchange(method, arguments, CALL_SECONDS)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._log.close()

    def _read(self) -> None:
        if self._process.stdout:
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put("")

    def _exchange(self, method: str, arguments: dict[str, Any], seconds: float) -> Any:
        try:
            if self._process.stdin:
                self._process.stdin.write(json.dumps([method, arguments]) + "\n")
                self._process.stdin.flush()
            line = self._lines.get(timeout=seconds)
        except OSError:
            line = ""
        except queue.Empty:
            raise SideError(f"{self._target}.{method} took more than {seconds:.0f} s.") from None
        if not line:
            raise SideError(f"{self._target} ended by itself:\n{self._logged()}")
        outcome, result = json.loads(line)
        if outcome != "returned":
            raise SideError(f"{self._target}.{method} failed:\n{result}\n{self._logged()}")
        return result

    def _logged(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-20:])


def main(target: str) -> None:
    """Make the object and answer calls until there are no more."""
    # Whatever the libraries print goes to the log; the pipe is for results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = target.partition(":")
    made: Any = None
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            if method == "__init__":
                made = getattr(importlib.import_module(module), name)(**arguments)
                reply = ["returned", None]
            else:
                reply = ["returned", getattr(made, method)(**arguments)]
        except Exception:
            reply = ["failed", traceback.format_exc()]
        results.write(json.dumps(reply) + "\n")
        results.flush()
    results.close()
    # A peer's threads and child processes must not hold up the end.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
