"""Servers that are measured from outside, each behind a stand-in for Replicate's API."""

import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engines import our_variables
from benchmarks.plan import ROOT, Plan
from tests.replicate_stand_in import Prediction, StandIn, stand_in
from tests.server import Server, serving, started

IDLE_INTERVAL, IDLE_CHECKS = 0.2, 100
WORK_SECONDS = 600.0
STAND_IN_THREAD = "replicate stand-in"
"""Its thread's name in tests/replicate_stand_in.py."""


def our_server(plan: Plan, root: Path = ROOT) -> AbstractContextManager[Server]:
    """This project's server, of this checkout or of another one."""
    return serving(root, **our_variables(plan, root))


def lmql_server(plan: Plan) -> AbstractContextManager[Server]:
    """LMQL's server."""
    command = [sys.executable, "-m", "benchmarks.lmql_server", "--weights", str(plan.weights), "--dtype", plan.dtype]
    return started(command, HF_HUB_OFFLINE="1")


@dataclass(frozen=True)
class Turn:
    """One side's turn. Processor times are in seconds, of all threads and child processes."""

    seconds: float
    predictions: list[Prediction]
    client: float
    """Processor time of LMQL's client."""
    stand_in: float
    """Processor time of the stand-in for Replicate, in a thread of the client's process."""
    server: float
    """Processor time of the server, the model included."""


class Clients:
    """LMQL's own clients on one event loop, sent to one of two stand-ins at a time."""

    def __init__(self, servers: Sequence[Server], apis: Sequence[StandIn]) -> None:
        self._servers = {id(api): server for api, server in zip(apis, servers, strict=True)}
        self.ours, self.theirs = apis
        self.api = self.ours
        """Where requests to Replicate go."""
        self._loop = asyncio.new_event_loop()

    def timed(self, api: StandIn, work: Callable[[], Coroutine[Any, Any, Any]]) -> Turn:
        """Run the work against a stand-in. Raises TimeoutError if it takes longer than WORK_SECONDS."""
        before = len(api.predictions)
        self.wait_until_idle()
        self.api = api

        def clocks() -> list[float]:
            stand_ins = sum(map(_thread_seconds, threading.enumerate()))
            return [
                time.perf_counter(),
                time.process_time() - stand_ins,
                stand_ins,
                processor_seconds(self._servers[id(api)]),
            ]

        started = clocks()
        self._loop.run_until_complete(asyncio.wait_for(work(), WORK_SECONDS))
        seconds, client, stand_in, server = (now - then for now, then in zip(clocks(), started, strict=True))
        return Turn(seconds, list(api.predictions.values())[before:], client, stand_in, server)

    def wait_until_idle(self) -> None:
        """Wait until no server computes any more: LMQL's goes on for a while after its client has left."""
        for server in self._servers.values():
            wait_until_idle(server)

    def close(self) -> None:
        """Close the event loop."""
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


@contextmanager
def both(plan: Plan, theirs: AbstractContextManager[Server]) -> Iterator[Clients]:
    """Start this project's server and another one, each behind a stand-in, with LMQL's client in front."""
    from benchmarks.lmql_client import redirected

    with ExitStack() as stack:
        servers = [stack.enter_context(server) for server in (our_server(plan), theirs)]
        clients = Clients(servers, [stack.enter_context(stand_in(server.url)) for server in servers])
        stack.callback(clients.close)
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(redirected(lambda: clients.api.url, cache))
        yield clients


def processor_seconds(server: Server) -> float:
    """Processor time of a server's processes so far."""
    script = psutil.Process(server.process.pid)
    total = 0.0
    for process in [script, *script.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # such as a process that compiled a grammar
            total += sum(process.cpu_times()[:2])
    return total


def _thread_seconds(thread: threading.Thread) -> float:
    """Processor time of a stand-in's thread so far; 0 for any other thread."""
    if thread.name != STAND_IN_THREAD or thread.ident is None:
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def wait_until_idle(server: Server) -> None:
    """Wait until a server's processes use almost no processor time."""
    for _ in range(IDLE_CHECKS):
        before = processor_seconds(server)
        time.sleep(IDLE_INTERVAL)
        if processor_seconds(server) - before < IDLE_INTERVAL / 10:
            return
