"""Servers that are measured from outside: this project's and LMQL's, each behind a stand-in for Replicate's API."""

import asyncio
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from benchmarks.plan import ROOT, Plan
from tests.replicate_stand_in import MODEL, OWNER, TOKEN, StandIn, stand_in

T = TypeVar("T")

START_SECONDS = 300.0
STOP_SECONDS = 15.0
IDLE_INTERVAL, IDLE_CHECKS = 0.2, 100
WORK_SECONDS = 600.0
REPLICATE = "https://api.replicate.com"


class ServerError(Exception):
    """A server did not start; says how, with the end of its log."""


@dataclass(frozen=True)
class Server:
    """A server that accepts predictions."""

    url: str
    """Without a path."""
    log: Path
    """What it has written to standard error."""
    process: psutil.Process

    def wait_until_idle(self) -> None:
        """LMQL's server goes on for a while with what its client no longer waits for."""
        for _ in range(IDLE_CHECKS):
            before = self._processor_seconds()
            time.sleep(IDLE_INTERVAL)
            if self._processor_seconds() - before < IDLE_INTERVAL / 10:
                return

    def _processor_seconds(self) -> float:
        family = [self.process, *self.process.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in family)


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[Server]:
    """Run a command that says `Ready: URL` once it serves."""
    with tempfile.NamedTemporaryFile(prefix="benchmark-", suffix=".log") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()

        def read() -> None:
            # LMQL prints what it does; the line that says when it serves is the one that counts.
            for line in process.stdout or ():
                lines.put(line)
            lines.put("")

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            try:
                while not (line := lines.get(timeout=START_SECONDS)).startswith("Ready: ") and line:
                    pass
            except queue.Empty:
                line = ""
            if not line:
                tail = "".join(Path(log.name).read_text(errors="replace").splitlines(keepends=True)[-20:])
                raise ServerError(f"{' '.join(command)} did not become ready:\n{tail}")
            url = line.removeprefix("Ready: ").strip().removesuffix("/predictions")
            yield Server(url, Path(log.name), psutil.Process(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            reader.join()


def our_server(plan: Plan, **environment: str) -> Any:
    """This project's server, as script/serve starts it."""
    command = [sys.executable, str(ROOT / "script/serve"), "--port", "0"]
    return started(command, {"WEIGHTS_DIR": str(plan.weights), "DTYPE": plan.dtype, **environment})


def lmql_server(plan: Plan) -> Any:
    """LMQL's server."""
    command = [sys.executable, "-m", "benchmarks.lmql_server", "--weights", str(plan.weights), "--dtype", plan.dtype]
    return started(command, {"HF_HUB_OFFLINE": "1"})


class Clients:
    """LMQL's own clients on one event loop, sent to whichever stand-in is their turn."""

    def __init__(self, ours: StandIn, lmqls: StandIn, servers: Sequence[Server]) -> None:
        self._servers = servers
        self.ours = ours
        self.lmqls = lmqls
        self._base = ours.url
        self._loop = asyncio.new_event_loop()

    def run(self, api: StandIn, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the work returns, with LMQL's requests to Replicate going to this stand-in.

        Raises TimeoutError where it takes longer than WORK_SECONDS.
        """
        self._base = api.url
        return self._loop.run_until_complete(asyncio.wait_for(work(), WORK_SECONDS))

    def wait_until_idle(self) -> None:
        """Wait until neither side computes any more, so that the next to be timed has the machine to itself."""
        for server in self._servers:
            server.wait_until_idle()

    def close(self) -> None:
        """Close the event loop."""
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def redirect(self, address: str) -> str:
        """Where a request really goes. Raises ValueError where that would be another machine."""
        redirected = address.replace(REPLICATE, self._base)
        if not redirected.startswith(self._base):
            raise ValueError(f"a request to {address} has no business here")
        return redirected


@contextmanager
def both(plan: Plan) -> Iterator[Clients]:
    """This project's server and LMQL's, each behind its stand-in, and LMQL's client in front."""
    import aiohttp
    import lmql.runtime.caching

    with ExitStack() as stack:
        ours = stack.enter_context(our_server(plan))
        lmqls = stack.enter_context(lmql_server(plan))
        ours_behind, lmqls_behind = (stack.enter_context(stand_in(server.url)) for server in (ours, lmqls))
        clients = Clients(ours_behind, lmqls_behind, (ours, lmqls))
        stack.callback(clients.close)
        request = aiohttp.ClientSession._request

        async def redirected(session: aiohttp.ClientSession, method: str, url: Any, **options: Any) -> Any:
            # The stand-ins' own requests go to their servers, by path only.
            address = str(url)
            return await request(session, method, clients.redirect(address) if "://" in address else url, **options)

        cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        token = os.environ.get("REPLICATE_API_TOKEN")
        stack.callback(_restore, "REPLICATE_API_TOKEN", token)
        stack.callback(setattr, lmql.runtime.caching, "CACHE_DIR", lmql.runtime.caching.CACHE_DIR)
        stack.callback(setattr, aiohttp.ClientSession, "_request", request)
        os.environ["REPLICATE_API_TOKEN"] = TOKEN
        lmql.runtime.caching.CACHE_DIR = cache
        aiohttp.ClientSession._request = redirected  # type: ignore[method-assign, assignment]
        yield clients


def model_clause(plan: Plan) -> str:
    """The `from` clause of a query."""
    return f'lmql.model("ignored", endpoint="replicate:{OWNER}/{MODEL}", tokenizer="{plan.weights}")'


@asynccontextmanager
async def lmtp_client() -> AsyncIterator[Any]:
    """LMQL's client for Replicate, below its query language."""
    import aiohttp
    from lmql.models.lmtp.lmtp_replicate_client import LMTPReplicateClient

    async with aiohttp.ClientSession() as session:
        yield LMTPReplicateClient(f"{OWNER}/{MODEL}", session, f"replicate:{OWNER}/{MODEL}")


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
