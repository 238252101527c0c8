"""Run Cog's runtime without Docker, for script/serve and script/predict.

This is the server that the container runs, `python -m cog.server.http`. It starts a worker process for the predictor.
Both are in one process group, so that stopping reaches whatever they started.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import schema
import yaml
from environment import ROOT, memory_limit

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a script to stop: Ctrl-C, a supervisor, a closed terminal."""

GRACE_SECONDS = 5.0
"""How long running predictions get to end before everything is killed."""

POLL_SECONDS = 0.2
"""How often to ask whether setup is done."""

WATCH_SECONDS = 2.0
"""How often to ask whether a server that was ready still works."""

MAX_FAILURES = 3
"""How many answers in a row say that it does not."""

_LAYERS = r"^((worker setup failed( \(slot [\w-]+\))?|[Ss]etup failed|failed to load predictor): )+"


class StartError(Exception):
    """The runtime does not serve; says why in one sentence."""


class Stopped(BaseException):
    """A signal asked this script to stop. Not an Exception, so that only the way out catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Server:
    """A runtime that accepts predictions."""

    process: subprocess.Popen[bytes]
    host: str
    """The numeric address to connect to."""
    port: int

    @property
    def url(self) -> str:
        """Where predictions are posted to."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/predictions"

    def connect(self, timeout: float | None = None) -> http.client.HTTPConnection:
        """A new connection to the server that bypasses any proxy. `timeout` is in seconds; None waits forever."""
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def wait(self) -> str:
        """Block until no more predictions are served; return why.

        A server whose worker has died runs on and fails every prediction; only its health check shows that. It has to
        fail several times in a row: the predictor's own health check may take too long now and then.
        """
        failures = 0
        health: dict[str, Any] = {}
        while failures < MAX_FAILURES:
            time.sleep(WATCH_SECONDS)
            code = self.process.poll()
            if code is not None:
                return f"The server ended by itself, with exit code {code}."
            health = _health(self)
            failures = 0 if health.get("status") in ("READY", "BUSY") else failures + 1
        own, _, reason = health.get("user_healthcheck_error", "").partition("Healthcheck failed: ")
        if reason and not own:
            return f"The predictor is not healthy: {reason.removeprefix('RuntimeError: ')}"
        return "The process that runs the predictor has died; the log above may say why."


def stop_on_signals() -> None:
    """Raise Stopped in the main thread at the first signal of STOPPING. Later ones do not interrupt the way out."""

    def stop(number: int, _frame: object) -> NoReturn:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        raise Stopped(number)

    for number in STOPPING:
        # Under nohup SIGHUP is ignored and stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


@contextmanager
def serving(host: str, port: int, signature: schema.Signature, logs: IO[Any] | int) -> Iterator[Server]:
    """Run the runtime while the block runs; enter the block once predictions are accepted.

    Args:
        host: Name or address of the interface to listen on.
        port: 0 picks a free one.
        signature: The predictor's.
        logs: Where the runtime and the predictor log to: a real file, or a constant of subprocess.

    Raises:
        StartError: The port is taken, setup failed, or the server ended before it was ready.
    """
    schema.write(signature, ROOT)
    bound, port = _free_address(host, port)
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound, bound)
    environment = {
        **container_environment(),
        **os.environ,
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "PORT": str(port),
        "SERVER_HOST": reachable,  # the predictor asks the server for its health, too
        # The server starts its worker with the first `python` on PATH.
        "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath))),
    }
    # `cog build` sets this in the image; the runtime itself does not read @cog.concurrent.
    environment.setdefault("COG_MAX_CONCURRENCY", str(signature.concurrency))
    environment.setdefault("LOG_FORMAT", "console")
    # No signal may be handled between the start of the server and the `try` that stops it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "cog.server.http", "--host", f"[{bound}]" if ":" in bound else bound],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=logs,
            stderr=logs,
            start_new_session=True,
            preexec_fn=partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask),
        )
        try:
            with _guarded(process):
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                server = Server(process, reachable, port)
                _wait_until_ready(server)
                yield server
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
            _stop(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def container_environment(root: Path = ROOT) -> dict[str, str]:
    """The variables that cog.yaml sets in the container, less those that would override the operator's own choice."""
    lines = yaml.safe_load((root / "cog.yaml").read_text(encoding="utf-8")).get("environment") or []
    variables = dict(line.split("=", 1) for line in lines)
    if "OMP_WAIT_POLICY" in os.environ:  # libgomp prefers GOMP_SPINCOUNT
        variables.pop("GOMP_SPINCOUNT", None)
    return variables


@contextmanager
def _guarded(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill the server and its worker as soon as this script is killed, even by SIGKILL.

    Its end closes the pipe that the guard reads from. The runtime would only notice once its worker is idle.
    """
    command = ["sh", "-c", f"read -r _; kill -s KILL -- -{process.pid}"]
    quiet = subprocess.DEVNULL
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        yield
    finally:
        guard.kill()
        guard.communicate()


def _free_address(host: str, port: int) -> tuple[str, int]:
    """Resolve a host and check that the port is free; return (numeric host, port)."""
    if not 0 <= port <= 65535:
        raise StartError(f"There is no port {port}; ports are 0 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            name = probe.getsockname()
            return str(name[0]), int(name[1])
    except OSError as error:
        raise StartError(f"Cannot listen on {host} port {port}: {error.strerror}.") from error


def _wait_until_ready(server: Server) -> None:
    while True:
        code = server.process.poll()
        if code is not None:
            raise StartError(f"The server ended before it was ready, with exit code {code}.{memory_limit()}")
        health = _health(server)
        status = health.get("status", "STARTING")
        if status in ("SETUP_FAILED", "DEFUNCT"):
            raise StartError(f"Setup failed: {_setup_error(health)}{memory_limit()}")
        if status != "STARTING":
            return
        time.sleep(POLL_SECONDS)


def _health(server: Server) -> dict[str, Any]:
    """The server's answer to a health check; empty while it does not answer."""
    connection = server.connect(timeout=10)
    try:
        connection.request("GET", "/health-check")
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()


def _setup_error(health: dict[str, Any]) -> str:
    """The predictor's own message on one line, without the runtime's prefixes."""
    logs: str = health.get("setup", {}).get("logs", "")
    return " ".join(re.sub(_LAYERS, "", logs).split()) or "the runtime does not say why."


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server and all it started to end; kill what has not ended in time."""
    process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while _group_lives(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
