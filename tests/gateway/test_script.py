"""script/gateway, as a user starts it."""

import os
import signal
import socket
import subprocess
import sys

from tests.server import ROOT, started

COMMAND = [sys.executable, str(ROOT / "script/gateway"), "--port", "0"]


def refused(*arguments: str) -> str:
    """The error of a gateway that must not start."""
    environment = {name: value for name, value in os.environ.items() if name != "REPLICATE_API_TOKEN"}
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=30, env=environment)
    assert ended.returncode == 1
    return ended.stderr


def test_it_starts_without_its_target_and_a_signal_stops_it() -> None:
    with started([*COMMAND, "--target", "http://127.0.0.1:1"]) as gateway:
        assert gateway.url.startswith("http://127.0.0.1:")
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(10) == 0


def test_a_target_without_its_token_is_refused_with_what_to_do() -> None:
    assert refused("--target", "replicate:user/model").startswith("script/gateway: Set REPLICATE_API_TOKEN to a token")


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in refused("--port", port)
