"""The manifest of a weights directory: written, read, and compared with the files' sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmtp.weights.manifest import File, Manifest, WeightsError, read_manifest, write_manifest
from tests.weights.helpers import ROOT, names_in


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = Manifest("org/name", "c" * 40, {"config.json": File(7, "00")}, {"trust_remote_code": True})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert names_in(tmp_path) == {"manifest.json"}


def test_a_damaged_manifest_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"source": "org/name"}')
    with pytest.raises(WeightsError, match=r"manifest\.json is damaged .*revision"):
        read_manifest(tmp_path)


def test_a_manifest_that_names_files_outside_its_directory_is_damaged(tmp_path: Path) -> None:
    for name in ("../config.json", "/etc/passwd", "a/../../b"):
        manifest = {"source": "a", "revision": None, "files": {name: {"size": 1, "sha256": ""}}, "model_args": {}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(WeightsError, match=rf"manifest\.json is damaged .*'{name}' is outside"):
            read_manifest(tmp_path)


def test_writing_a_manifest_does_not_follow_a_symbolic_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in (".manifest.json", "manifest.json"):
        (weights / name).symlink_to(outside)
    write_manifest(weights, Manifest("org/name", None, {}, {}))
    assert outside.read_text() == "mine"
    assert names_in(weights) == {"manifest.json"}
    assert read_manifest(weights).source == "org/name"


def test_reading_manifests_and_fetching_import_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, lmtp.weights.manifest, lmtp.weights.install\n"
        "print({'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
