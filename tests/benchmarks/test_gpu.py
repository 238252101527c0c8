"""`script/benchmark --gpu`: where there is no GPU it measures nothing; its code is run on the CPU, with a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_part_is_said_to_be_not_measured_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu.WHOLE) + len(gpu.SIZES) * len(gpu.PARTS)
    assert all(line.endswith(": not measured: there is no GPU") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_every_part_runs_and_is_written_as_soon_as_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def count(*words: object) -> None:
        written.extend(len(json.loads(path.read_text())) for path in tmp_path.glob("*.json"))

    monkeypatch.setattr("benchmarks.gpu.say", count)
    assert gpu.main(tmp_path, quick=True, device="cpu") == 0
    path, page = tmp_path / "cpu.json", tmp_path / "cpu.md"
    assert sorted(tmp_path.iterdir()) == [path, page]
    found = json.loads(path.read_text())
    assert page.read_text() == gpu_report.page(found)
    parts = [name.split(" tiny")[0] for name in found][2:]
    assert set(parts) == set(gpu.PARTS)
    assert written == list(range(3, 3 + len(written)))
    assert found["vLLM tiny"] == "not measured: there is no GPU"
    assert found["syncs tiny"] == found["continuous batching tiny"] == "not measured: there is no GPU"
    assert found["setup tiny"]["runner"] == "slots"
    assert all(value > 0 for name, part in found.items() if name.startswith("decode") for value in part.values())


def test_the_page_of_a_gpu_leaves_out_what_was_not_measured() -> None:
    found = {
        "machine": "cuda:0 (a card)",
        "torch": "2.13.0",
        "tests": "3 passed",
        "decode 8B 1x128": {"ms": 8.0, "floor ms": 6.0, "of the floor": 0.75},
        "decode 8B 64x4000": "failed: RuntimeError: there is no memory",
        "engine 8B 64": 6000.0,
        "generate 8B 64": 2000.0,
        "continuous batching 8B": 4000.0,
        "vLLM 8B": gpu.NO_VLLM,
        "syncs 8B": {"streams.py:108": 128},
    }
    assert gpu_report.page(found) == (
        "# cuda:0 (a card)\n\ntorch 2.13.0. Random models of Llama's code, bfloat16, unless a line says otherwise. The"
        " floor is the time to read the weights, keys and values once, at the rate of a copy.\n\n"
        "## A decode step of the model\n\n"
        "| model | rows x columns | ms | floor ms | of the floor |\n| --- | --- | --- | --- | --- |\n"
        "| 8B | 1x128 | 8 | 6 | 0.75 |\n\n"
        "## Tokens a second, greedy, prompts of 128 tokens, 128 new ones\n\n"
        "| model | rows | ours | generate | ours / generate | continuous batching | vLLM |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| 8B | 64 | 6,000 | 2,000 | 3 | 4,000 | not measured: vLLM is not installed |\n\n"
        "## Other parts\n\n| part | result |\n| --- | --- |\n| tests | 3 passed |\n"
        "| syncs 8B | streams.py:108: 128 |\n"
    )
