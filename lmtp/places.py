"""The places for predictions that Cog's runtime has: how many run here, and whether the runtime has lost places.

Coglet 0.23.1 loses a place for good when it cannot make a prediction's directories: an id that holds NUL or over 255
bytes, a full disk, no inodes. Without places it answers every request with 409, and its status is BUSY.
"""

import asyncio
import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from contextvars import Context
from pathlib import Path

import coglet

from lmtp.protocol import RequestError

DIRECTORIES = Path("/tmp/coglet/predictions")
"""Where the runtime makes a directory for each prediction, named by its id. It removes none."""

WATCH_SECONDS = 5.0
"""How often to ask whether the server has places."""

MAX_SUSPICIONS = 3
"""After how many answers in a row places count as lost."""


IGNORED_SHARE = 8
"""One place in so many may be missing: of predictions that are just starting or ending."""


class Places:
    """Counts the predictions of this process and compares them with what the server says."""

    def __init__(self, total: int) -> None:
        """``total`` is how many predictions the server runs at once."""
        self.total = total
        self.problem = ""
        """Why the server has to be started again, if it has."""
        self._taken: set[object] = set()
        self._begun = self._begun_before = 0
        self._suspicions = 0

    def begin(self, context: Context) -> None:
        """Count the prediction of this task until the task ends, and remove the prediction's directories.

        Raises:
            RequestError: Its id is a path.
        """
        task = asyncio.current_task()
        assert task
        self._begun += 1
        self._taken.add(task)
        task.add_done_callback(self._taken.discard)
        remove_directories(next((value for key, value in context.items() if key.name == "_coglet_prediction_id"), "-"))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Count a prediction for as long as it sends output."""
        place = object()
        self._taken.add(place)
        try:
            yield
        finally:
            self._taken.remove(place)

    def watch(self) -> None:
        """Compare from now on, on a thread, if this process is a worker of the runtime."""
        if coglet.server.active:
            threading.Thread(target=self._watch, name="places", daemon=True).start()

    def _watch(self) -> None:
        host, port = os.environ.get("SERVER_HOST") or "127.0.0.1", int(os.environ.get("PORT") or 5000)
        while not self.problem:
            time.sleep(WATCH_SECONDS)
            connection = http.client.HTTPConnection(host, port, timeout=WATCH_SECONDS)
            with suppress(OSError, http.client.HTTPException, ValueError), closing(connection):
                connection.request("GET", "/health-check")
                answer = json.load(connection.getresponse())
                self.compare(isinstance(answer, dict) and answer.get("status") == "BUSY")

    def compare(self, busy: bool) -> None:
        """Take in whether all of the server's places are taken.

        Those of predictions that run here are, and those of predictions that began and ended since the last time may
        have been.
        """
        begun = self._begun
        missing = self.total - len(self._taken) - (begun - self._begun_before)
        self._begun_before = begun
        self._suspicions = self._suspicions + 1 if busy and missing > self.total // IGNORED_SHARE else 0
        if self._suspicions == MAX_SUSPICIONS:
            self.problem = (
                f"Cog's runtime has lost {missing} or more of its {self.total} places, because it could not make a"
                f" directory in {DIRECTORIES}: the disk is full, or an id was no file name. Start the server again."
            )


def remove_directories(prediction_id: str) -> None:
    """Remove the directories of a prediction that has begun. Only outputs of over 6 MiB would need them.

    Raises:
        RequestError: Its id is a path, so that the runtime has made directories wherever it leads.
    """
    if not prediction_id.strip(".") or "/" in prediction_id:
        raise RequestError("A prediction's id cannot be a path: use letters, digits, _ and -.")
    with suppress(OSError):
        for directory in ("inputs", "outputs", "."):
            os.rmdir(os.path.normpath(DIRECTORIES / prediction_id / directory))
