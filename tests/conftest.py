"""What several test files share: the demo model's files, and one server that has it loaded."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import ROOT, Server, serving, started

sys.path.insert(0, str(ROOT / "script"))  # where the scripts' own modules are, as it is for a script that runs


@pytest.fixture(scope="session")
def demo_weights() -> Path:
    """A directory with the demo model: DEMO_WEIGHTS, or weights/ if it is in there, or one of the tests' own."""
    if given := os.environ.get("DEMO_WEIGHTS"):
        return Path(given)
    manifest = ROOT / "weights" / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text())["source"] == "demo":
        return manifest.parent
    own = ROOT / ".cache" / "demo-weights"
    if not (own / "manifest.json").exists():
        subprocess.run([sys.executable, ROOT / "script/download_weights", "demo", "--to", own], check=True)
    return own


@pytest.fixture(scope="session")
def server(demo_weights: Path) -> Iterator[Server]:
    """A Cog server with the demo model in float32, started once; tests leave it as they found it."""
    with serving(WEIGHTS_DIR=str(demo_weights), DTYPE="float32", COMPILE="off") as running:
        yield running


@pytest.fixture(scope="session")
def gateway(server: Server) -> Iterator[Server]:
    """The gateway, in front of the server with the demo model."""
    with started([sys.executable, str(ROOT / "script/gateway"), "--target", server.url, "--port", "0"]) as running:
        yield running
