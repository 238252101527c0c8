"""`script/benchmark --gpu`: where there is no GPU it measures nothing; its code is run on the CPU, with a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_part_is_said_to_be_not_measured_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(gpu.SIZES) * len(gpu.PARTS)
    assert all(line.endswith(": not measured: there is no GPU") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_every_part_runs_and_is_written_as_soon_as_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def count(*words: object) -> None:
        written.extend(len(json.loads(path.read_text())) for path in tmp_path.iterdir())

    monkeypatch.setattr("benchmarks.gpu.say", count)
    assert gpu.main(tmp_path, quick=True, device="cpu") == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    parts = [name.split(" tiny")[0] for name in found][2:]
    assert set(parts) == set(gpu.PARTS)
    assert written == list(range(3, 3 + len(written)))
    assert found["syncs tiny"] == found["continuous batching tiny"] == "not measured: there is no GPU"
    assert found["setup tiny"]["runner"] == "slots"
    assert all(value > 0 for name, part in found.items() if name.startswith("decode") for value in part.values())
