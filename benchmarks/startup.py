"""Time from process start to accepted predictions, against the least that any start has to do."""

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.engines import our_variables
from benchmarks.plan import ROOT, Plan, say
from benchmarks.report import Row, Skipped, cost
from tests.server import child

MODES = {"startup": "off", "startup-compiled": "auto"}
"""COMPILE by row."""
ROWS = tuple(MODES)
WORK = {"startup": "without compilation", "startup-compiled": "with a compiled step on disk"}
READY_SECONDS = 300.0
POLL_SECONDS = 0.02
TARGETS = {"startup": (1.3, 1.1), "startup-compiled": (2.5, 1.5)}
COMPILED = "compiled step"
"""In the setup log when the compiled step is in use."""

FLOOR = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

buffer = bytearray(2**24)
for path in sys.argv[1:]:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
"""
"""Imports torch and two classes of transformers that every user of it needs, and reads the weights."""


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The rows startup and startup-compiled."""
    files = sorted(str(path) for path in plan.weights.glob("*.safetensors"))

    def floor(_: int) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", FLOOR, *files], check=True, timeout=READY_SECONDS)
        return time.perf_counter() - started

    for name in ROWS:
        if not plan.wants(name):
            continue
        say(f"  starting with COMPILE={MODES[name]}")
        if skipped := unavailable(plan, name):
            yield skipped
            continue
        at_most, goal = TARGETS[name]
        yield cost(
            name,
            f"process start to READY, {WORK[name]}",
            "importing torch and transformers and reading the weights once",
            "s",
            plan.alternate(lambda run, name=name: start(plan, name)[0], floor),  # type: ignore[misc]
            at_most=at_most,
            goal=goal,
        )


def unavailable(plan: Plan, name: str, root: Path = ROOT) -> Skipped | None:
    """Why a row cannot be measured, if it cannot."""
    if MODES[name] == "off" or COMPILED in start(plan, name, root)[1]:
        return None
    return Skipped([name], f"{root} has no compiled step for this model and machine: run its `script/build` first.")


def start(plan: Plan, name: str, root: Path = ROOT) -> tuple[float, str]:
    """Start script/serve and stop it again; seconds until its health check says READY, and its log."""
    port = _free_port()
    command = [sys.executable, str(root / "script/serve"), "--port", str(port)]
    started = time.perf_counter()
    with child(command, root, **our_variables(plan, root), COMPILE=MODES[name]) as server:
        # script/serve polls less often and would round the time up.
        while (status := _status(port)) != "READY":
            late = time.perf_counter() > started + READY_SECONDS
            if server.process.poll() is not None or status == "SETUP_FAILED" or late:
                raise RuntimeError(f"script/serve did not become ready:\n{server.tail()}")
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - started
    return seconds, "".join(server.log)


def _status(port: int) -> str:
    """The status that the health check reports; empty while nothing answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health-check")
        return str(json.loads(connection.getresponse().read()).get("status", ""))
    except (OSError, http.client.HTTPException, ValueError):
        return ""
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
