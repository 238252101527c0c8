"""Packages of npm for tests, installed once into the project's cache."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.server import ROOT


def installed(*packages: str) -> Path:
    """A directory with ``node_modules`` that holds packages of these versions. Skips the test where npm cannot."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    directory = ROOT / ".cache" / "node" / "-".join(package.replace("/", "_") for package in packages)
    if not (directory / "complete").exists():
        directory.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--prefix", str(directory), *packages]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if ended.returncode:
            pytest.skip(f"npm cannot install {' '.join(packages)}: {ended.stderr.strip().splitlines()[-1:]}")
        (directory / "complete").touch()
    return directory


def run(directory: Path, *arguments: str) -> Any:
    """Run node with the installed packages; what the program prints, which is JSON."""
    environment = os.environ | {"NODE_PATH": str(directory / "node_modules")}
    ended = subprocess.run(["node", *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)
