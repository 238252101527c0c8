"""One side of a comparison, in a process of its own.

A process per side keeps threads, settings and memory apart, and lets a peer live in another virtual environment or
another checkout. This module imports only the standard library. Calls and results are JSON lines over pipes.
"""

import importlib
import json
import os
import queue
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tests.server import ROOT, child

START_SECONDS = 600.0
CALL_SECONDS = 900.0


class Caller(Protocol):
    """What rows need of a side: its calls."""

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method and return its result."""


class SideError(Exception):
    """A call failed; the message holds the error and the end of the log."""


class Side:
    """The class `module:Class`, created and called in another process. Use as a context manager.

    Modules are imported from `root` and run by `python`.
    """

    def __init__(
        self, target: str, environment: Mapping[str, str], *, python: str = sys.executable, root: Path = ROOT
    ) -> None:
        self._target = target
        self._running = child([python, "-m", "benchmarks.side", target], root, **environment)

    def __enter__(self) -> "Side":
        self._child = self._running.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._running.__exit__(*error)

    def make(self, **arguments: Any) -> None:
        """Create the object whose methods `call` calls."""
        self._exchange("__init__", arguments, START_SECONDS)

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method and return its result. Raises SideError if it fails or times out."""
        return self._exchange(method, arguments, CALL_SECONDS)

    def _exchange(self, method: str, arguments: dict[str, Any], seconds: float) -> Any:
        try:
            print(json.dumps([method, arguments]), file=self._child.process.stdin, flush=True)
            line = self._child.lines.get(timeout=seconds)
        except OSError:
            line = ""
        except queue.Empty:
            raise SideError(f"{self._target}.{method} took more than {seconds:.0f} s.") from None
        if not line:
            raise SideError(f"The process of {self._target} ended during {method}:\n{self._child.tail()}")
        outcome, result = json.loads(line)
        if outcome != "returned":
            raise SideError(f"{self._target}.{method} failed:\n{result}\n{self._child.tail()}")
        return result


def main(target: str) -> None:
    """Create the object and answer calls until standard input ends."""
    # Libraries may print: that goes to the log. Only results go to the pipe.
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
        print(json.dumps(reply), file=results, flush=True)
    # Do not wait for a peer's threads and child processes.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
