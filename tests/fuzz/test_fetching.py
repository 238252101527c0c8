"""A download that is killed at any point, perhaps twice: the next run leaves the old weights or the new ones, whole."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from lmtp.weights.load import load
from lmtp.weights.manifest import MANIFEST, WeightsError, read_manifest
from lmtp.weights.staging import sha256
from tests.fuzz.budget import fuzz
from tests.fuzz.crash import EXIT_CODE
from tests.hub import Hub
from tests.server import ROOT
from tests.weights.helpers import SCRIPT, names_in

SECONDS = 60


def whole(directory: Path) -> str | None:
    """Where the weights are from, if every file is what the manifest says; None if there is no manifest."""
    if not (directory / MANIFEST).exists():
        return None
    manifest = read_manifest(directory)
    for name, file in manifest.files.items():
        assert sha256(directory / name) == file.sha256, f"{name} is not what the manifest of {manifest.source} says"
    return manifest.source


def test_weights_are_whole_after_a_crash_at_any_point(
    hub: Hub, environment: dict[str, str], weights: Path, tiny: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"

    def command(task: str) -> list[str]:
        source = {"fetch": ["org/tiny"], "copy": [str(tiny)], "repair": ["--verify"]}[task]
        return [str(SCRIPT), *source, "--to", str(target)]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
        )

    def killed_after(seconds: float, arguments: list[str]) -> None:
        quiet = subprocess.DEVNULL
        with subprocess.Popen([sys.executable, *arguments], env=environment, stdout=quiet, stderr=quiet) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()

    def check(example: tuple[str, list[int | float]]) -> None:
        task, points = example
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(weights, target)
        old, new = "org/old", "org/tiny" if task == "fetch" else str(tiny)
        if task == "repair":
            assert run(*command("copy")).returncode == 0
            old = new
            (target / "model.safetensors").write_bytes(b"damaged")
            (target / "tokenizer.json").unlink()
        for point in points:
            if isinstance(point, float):
                killed_after(point, command(task))
            else:
                crashed = run("-m", "tests.fuzz.crash", str(point), str(target), *command(task))
                assert crashed.returncode in (0, EXIT_CODE), crashed.stderr
            if task != "repair" and whole(target) not in (old, new):
                with pytest.raises(WeightsError, match=r"half exchanged .* run script/download_weights again"):
                    load(target)

        # A run that gets nothing from the hub: what is there has to be enough, for the old weights or for the new.
        hub.down = True
        idle = run(str(SCRIPT), "org/tiny", "--to", str(target))
        hub.down = False
        assert idle.returncode in (0, 1), idle.stderr
        if task != "repair":
            assert whole(target) in (old, new)

        again = run(*command(task))
        assert again.returncode == 0, again.stderr
        assert whole(target) == new
        assert names_in(target) == {*read_manifest(target).files, MANIFEST, ".gitignore"}

    seconds = st.floats(0.2, 2.5)
    fetching, copying, repairing = (st.integers(1, changes) | seconds for changes in (200, 35, 30))
    examples = st.one_of(
        st.tuples(st.just("fetch"), st.lists(fetching, min_size=1, max_size=2)),
        st.tuples(st.just("copy"), st.lists(copying, min_size=1, max_size=2)),
        st.tuples(st.just("repair"), st.lists(repairing, min_size=1, max_size=2)),
    )
    fuzz(check, examples, shrink=False)
