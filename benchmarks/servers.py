"""Servers that are measured from outside, each behind a stand-in for Replicate's API."""

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engines import our_variables
from benchmarks.plan import ROOT, Plan
from tests.replicate_stand_in import Prediction, StandIn, stand_in
from tests.server import Server, serving, started

IDLE_INTERVAL, IDLE_CHECKS = 0.2, 100
WORK_SECONDS = 600.0


def our_server(plan: Plan, root: Path = ROOT) -> AbstractContextManager[Server]:
    """This project's server, of this checkout or of another one."""
    return serving(root, **our_variables(plan, root))


def lmql_server(plan: Plan) -> AbstractContextManager[Server]:
    """LMQL's server."""
    command = [sys.executable, "-m", "benchmarks.lmql_server", "--weights", str(plan.weights), "--dtype", plan.dtype]
    return started(command, HF_HUB_OFFLINE="1")


class Clients:
    """LMQL's own clients on one event loop, sent to one of two stand-ins at a time."""

    def __init__(self, servers: Sequence[Server], apis: Sequence[StandIn]) -> None:
        self.servers = servers
        self.ours, self.theirs = apis
        self.api = self.ours
        """Where requests to Replicate go."""
        self._loop = asyncio.new_event_loop()

    def timed(self, api: StandIn, work: Callable[[], Coroutine[Any, Any, Any]]) -> tuple[float, list[Prediction]]:
        """Run the work against a stand-in; its seconds, and the predictions it created.

        Raises TimeoutError if it takes longer than WORK_SECONDS.
        """
        before = len(api.predictions)
        self.wait_until_idle()
        self.api = api
        started = time.perf_counter()
        self._loop.run_until_complete(asyncio.wait_for(work(), WORK_SECONDS))
        return time.perf_counter() - started, list(api.predictions.values())[before:]

    def wait_until_idle(self) -> None:
        """Wait until no server computes any more: LMQL's goes on for a while after its client has left."""
        for server in self.servers:
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


def wait_until_idle(server: Server) -> None:
    """Wait until a server's processes use almost no processor time."""

    def processor_seconds() -> float:
        script = psutil.Process(server.process.pid)
        return sum(sum(process.cpu_times()[:2]) for process in [script, *script.children(recursive=True)])

    for _ in range(IDLE_CHECKS):
        before = processor_seconds()
        time.sleep(IDLE_INTERVAL)
        if processor_seconds() - before < IDLE_INTERVAL / 10:
            return
