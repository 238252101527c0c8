"""From the start of the process to predictions being accepted, beside what no start can do without."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.plan import ROOT, Plan, say
from benchmarks.report import Row, Skipped

ROWS = ("startup", "startup-compiled")
READY_SECONDS = 300.0
POLL_SECONDS = 0.02
TARGETS = {"startup": (1.3, 1.1), "startup-compiled": (2.5, 1.5)}
COMPILED = "compiled step"
"""What setup's log says when the compiled step is in use."""

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
"""Importing torch and transformers, with the two classes that every use of it begins with, and reading the weights."""


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The rows startup and startup-compiled."""
    files = sorted(str(path) for path in plan.weights.glob("*.safetensors"))

    def floor(_: int) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", FLOOR, *files], check=True, timeout=READY_SECONDS)
        return time.perf_counter() - started

    for name, compile_ in zip(ROWS, ("off", "auto"), strict=True):
        if not plan.wants(name):
            continue
        say(f"  starting with COMPILE={compile_}")
        if compile_ == "auto" and COMPILED not in start(plan, compile_)[1]:
            yield Skipped([name], "There is no compiled step for this model and machine: run `script/build` first.")
            continue
        ours, theirs = plan.alternate(lambda run, compile_=compile_: start(plan, compile_)[0], floor)  # type: ignore[misc]
        yield Row(
            name=name,
            work="process start to READY, "
            + ("without compilation" if compile_ == "off" else "with a compiled step on disk"),
            against="importing torch and transformers and reading the weights once",
            unit="s",
            ours=ours,
            peer=theirs,
            kind="cost",
            at_least=TARGETS[name][0],
            goal=TARGETS[name][1],
        )


def start(plan: Plan, compile_: str) -> tuple[float, str]:
    """Start script/serve; seconds until its health check says READY, and what it logged. It is stopped again."""
    port = _free_port()
    environment = {"WEIGHTS_DIR": str(plan.weights), "DTYPE": plan.dtype, "COMPILE": compile_}
    with tempfile.NamedTemporaryFile(prefix="benchmark-", suffix=".log") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "script/serve"), "--port", str(port)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            while (status := _status(port)) != "READY":
                if (
                    process.poll() is not None
                    or status == "SETUP_FAILED"
                    or time.perf_counter() > started + READY_SECONDS
                ):
                    raise RuntimeError("script/serve did not become ready:\n" + Path(log.name).read_text()[-2000:])
                time.sleep(POLL_SECONDS)
            seconds = time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return seconds, Path(log.name).read_text(errors="replace")


def _status(port: int) -> str:
    """What the health check says; empty while nobody answers."""
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
