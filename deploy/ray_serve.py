"""Several replicas of the container behind one address, on Ray Serve.

Each replica runs Cog's own runtime, as `script/serve` does, so that every path and every client of a container works
here too. A call goes to the replica that holds the longest beginning of its text (deploy/routing.py). Ray adds and
removes replicas by the number of running calls, and replaces those that die.
"""

import argparse
import asyncio
import json
import logging
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from deploy.routing import PrefixRouter

ROOT = Path(__file__).resolve().parent.parent
FORWARDED = {"accept", "content-type", "prefer"}
"""Request headers that the runtime reads."""
MAX_BODY = 16 << 20
"""Bytes of a request."""
MAX_CALLS = 64
"""Calls of a replica at once; the others wait for a place."""
BUSY_SECONDS = 10.0
"""How long a replica is asked again that answers 409 although it has a place: of two simultaneous requests, Cog 0.23
refuses one."""
PROBE_SECONDS = 5.0
"""How long a replica may take to say how many calls it has. Ray's own 0.1 s pass on a busy machine, and the call would
go where nothing of its text is held."""
MAX_IDS = 10_000
"""Predictions whose replica is remembered, for cancels."""

_PREDICTION = re.compile(r"^/predictions/([^/]+)(?:/cancel)?$")

log = logging.getLogger("ray.serve")


@dataclass
class Call:
    """A call that runs on a replica, or is being sent to it."""

    replica: str
    """Empty while it waits for one."""
    sending: PendingRequest | None
    """None once the replica has it."""
    chosen: float = field(default_factory=time.monotonic)

    @property
    def lost(self) -> bool:
        """Whether its client left before it was sent. Ray then never says that it has ended."""
        if self.sending is None or not self.sending.future.done():
            return False
        return self.sending.future.cancelled() or time.monotonic() - self.chosen > PROBE_SECONDS


class ByPrefix(RequestRouter):
    """Ray's request router, by prefix. Cancels go where their prediction runs.

    It counts the calls of each replica itself: Ray forgets its own counts after 10 s without a new call.
    """

    queue_len_response_deadline_s = max_queue_len_response_deadline_s = PROBE_SECONDS

    def initialize_state(self, **_: Any) -> None:
        """Ray's constructor calls this."""
        self._router = PrefixRouter()
        self._ids: dict[str, ReplicaID] = {}
        self._calls: dict[str, Call] = {}
        """By Ray's id of the call."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas to try, the best first."""
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not replicas or not pending_request:
            return [list(replicas.values())]
        wanted, call = pending_request.kwargs, pending_request.metadata.internal_request_id
        self._calls.pop(call, None)  # it is asked again for a call that its first choice did not take
        home = self._ids.get(wanted.get("prediction", ""))
        if home is not None and home.unique_id in replicas:
            first, order = home.unique_id, [home.unique_id]
        else:
            loads, first = self._loads(replicas), ""
            order = sorted(replicas, key=lambda name: loads[name])
            # A full replica does not take the call, so it must not be remembered to hold its text.
            if room := {name: load for name, load in loads.items() if load < replicas[name].max_ongoing_requests}:
                first = self._router.choose(wanted.get("text", ""), room)
                order.sort(key=lambda name: name != first)
        self._calls[call] = Call(first, pending_request)
        return [[replicas[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember which replica took the call, and where a named prediction runs."""
        call, name = self._calls.get(pending_request.metadata.internal_request_id), replica_id.unique_id
        if call is None or call.replica != name:
            self._router.remember(pending_request.kwargs.get("text", ""), name)
        if call is not None:  # else it has ended already
            call.replica, call.sending = name, None
        if prediction := pending_request.kwargs.get("prediction"):
            self._ids[prediction] = replica_id
            while len(self._ids) > MAX_IDS:
                del self._ids[next(iter(self._ids))]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count the call no more. Ray can say so before it says that the replica has the call."""
        self._calls.pop(internal_request_id, None)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget what it held."""
        super().on_replica_actor_died(replica_id)
        self._router.forget(replica_id.unique_id)

    def _loads(self, replicas: Iterable[str]) -> dict[str, int]:
        """How many calls each replica has."""
        self._calls = {name: call for name, call in self._calls.items() if not call.lost}
        counts = Counter(call.replica for call in self._calls.values())
        return {name: counts[name] for name in replicas}


class Container:
    """One replica: Cog's runtime in a process group that ends with this process."""

    def __init__(self) -> None:
        import runtime  # of script/, which is on the path of replicas only
        import schema

        self._stack = ExitStack()
        self._server = self._stack.enter_context(runtime.serving("127.0.0.1", 0, schema.read_signature(), 2))
        self._url = self._server.url.removesuffix("/predictions")
        self._session: aiohttp.ClientSession | None = None

    async def forward(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, *, text: str, prediction: str
    ) -> AsyncIterator[Any]:
        """The status and content type of the answer, then its body in parts. `text` and `prediction` are for the
        router. Leaving drops the connection, which cancels the prediction."""
        if self._session is None:
            self._session = aiohttp.ClientSession(self._url, timeout=aiohttp.ClientTimeout(None))
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            async with self._session.request(method, path, headers=headers, data=body) as answer:
                if answer.status == 409 and path == "/predictions" and time.monotonic() < deadline:
                    await asyncio.sleep(0.05)
                    continue
                yield answer.status, answer.content_type
                async for part in answer.content.iter_any():
                    yield part
                return

    async def check_health(self) -> None:
        """Raises if the runtime has ended or is not healthy. Ray then replaces this replica."""
        if (code := self._server.process.poll()) is not None:
            raise RuntimeError(f"The runtime ended with exit code {code}.")
        async with (
            aiohttp.ClientSession(self._url, timeout=aiohttp.ClientTimeout(20)) as session,
            session.get("/health-check") as answer,
        ):
            status = (await answer.json())["status"]
        if status not in ("READY", "BUSY"):
            raise RuntimeError(f"The runtime's health check says {status}.")

    def __del__(self) -> None:
        self._stack.close()


class Front:
    """Takes HTTP requests, and tells the router what a call's text is."""

    def __init__(self, containers: DeploymentHandle[Any]) -> None:
        self._containers = containers.options(method_name="forward", stream=True)

    async def __call__(self, request: Request) -> Response:
        """Answer as a container does."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                return JSONResponse({"detail": f"The request has more than {MAX_BODY >> 20} MB."}, 413)
        path = request.url.path
        named = _PREDICTION.match(path)
        headers = {name: value for name, value in request.headers.items() if name in FORWARDED}
        answer: Any = self._containers.remote(
            request.method, path, headers, body, text=text_of(body), prediction=named[1] if named else ""
        )
        try:
            status, kind = await anext(answer)
        except RayError as error:
            return JSONResponse({"detail": _lost(error)}, 502)
        return StreamingResponse(_parts(answer, kind), status, media_type=kind)


async def _parts(answer: Any, kind: str) -> AsyncIterator[bytes]:
    try:
        async for part in answer:
            yield part
    except RayError as error:
        if kind != "text/event-stream":
            raise
        data = json.dumps({"status": "failed", "error": _lost(error)})
        yield f"event: completed\ndata: {data}\n\n".encode()


def _lost(error: RayError) -> str:
    log.error("A replica was lost: %s", error)
    return "The replica that ran this prediction was lost. Send it again."


def text_of(body: bytes) -> str:
    """What a call's tokens begin with: its system prompt and prompt, or its first operation's prompt."""
    try:
        given = json.loads(body)["input"]
        if operations := given.get("ops_batch_json"):
            operations = json.loads(operations) if isinstance(operations, str) else operations
            return str(operations[0][1]["prompt"])
        return "".join(str(given.get(name) or "") for name in ("prompt_template", "system_prompt", "prompt"))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return ""


def application(replicas: int, max_replicas: int, streams: int) -> serve.Application:
    """What Ray Serve runs.

    Args:
        replicas: How many there are at least.
        max_replicas: How many there may be.
        streams: Running calls of a replica beyond which Ray adds one.
    """
    containers = serve.deployment(
        max_ongoing_requests=MAX_CALLS,
        health_check_period_s=2,
        request_router_config=RequestRouterConfig.model_validate({"request_router_class": "deploy.ray_serve.ByPrefix"}),
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas, max_replicas=max_replicas, target_ongoing_requests=streams
        ),
        ray_actor_options={"num_gpus": 1 if ray.cluster_resources().get("GPU") else 0},
    )
    # It only passes on what containers say, so it needs no processor of its own.
    front = serve.deployment(max_ongoing_requests=2 * MAX_CALLS * max_replicas, ray_actor_options={"num_cpus": 0})
    return front(Front).bind(containers(Container).bind())


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0 picks a free one (default: %(default)s)"
    )
    parser.add_argument("--replicas", type=int, default=1, help="replicas at least (default: %(default)s)")
    parser.add_argument("--max-replicas", type=int, help="replicas at most (default: as many as at least)")
    parser.add_argument(
        "--streams", type=int, default=16, help="calls of a replica beyond which one is added (default: %(default)s)"
    )
    parser.add_argument("--address", help="of a running Ray cluster (default: one on this machine)")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        options.address,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "script")))}},
    )
    port = options.port or _free_port(options.host)
    serve.start(http_options=HTTPOptions(host=options.host, port=port))
    serve.run(application(options.replicas, max(options.max_replicas or 0, options.replicas), options.streams))
    print(f"Ready: http://{options.host}:{port}/predictions", flush=True)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
