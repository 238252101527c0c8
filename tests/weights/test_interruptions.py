"""Interrupted downloads: the old weights stay, finished files are kept, and nothing is left behind for good."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from transformers import LlamaForCausalLM

from lmtp.weights.load import load
from lmtp.weights.manifest import WeightsError, read_manifest
from tests.hub import Hub
from tests.weights.conftest import Download, Script
from tests.weights.helpers import NEEDED, SCRIPT, contents, manifest_of, names_in, refusal, seal, staging_of

# huggingface_hub writes 10 MB at a time: a file must be larger for a part of it to be kept.
MEGABYTE = 1_000_000


def test_a_cut_connection_is_taken_up_again_within_the_run(hub: Hub, script: Script, tmp_path: Path) -> None:
    hub.cuts["model.safetensors"] = 15 * MEGABYTE
    assert script("org/tiny", "--to", tmp_path).returncode == 0
    content = hub.repositories["org/tiny"].files["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == content
    assert hub.sent["model.safetensors"] < len(content) + 6 * MEGABYTE


def test_a_failed_fetch_leaves_the_old_weights_and_the_next_run_completes_it(
    hub: Hub, script: Script, weights: Path
) -> None:
    before = contents(weights)
    hub.cuts["model.safetensors"] = 15 * MEGABYTE
    hub.down_after_cut = True
    result = script("org/tiny", "--to", weights)
    assert result.returncode == 1
    assert "answered 503: run the command again later, it resumes." in result.stderr.splitlines()[-1]
    assert contents(weights) == before
    load(weights)

    hub.down = False
    assert script("org/tiny", "--to", weights).returncode == 0
    content = hub.repositories["org/tiny"].files["model.safetensors"]
    assert (weights / "model.safetensors").read_bytes() == content
    assert read_manifest(weights).source == "org/tiny"


def test_ctrl_c_leaves_the_old_weights_and_the_next_run_fetches_only_unfinished_files(
    hub: Hub, script: Script, environment: dict[str, str], weights: Path, tiny: Path, tmp_path: Path
) -> None:
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "sharded", max_shard_size="15MB")
    files = hub.repositories["org/tiny"].files
    del files["model.safetensors"]
    files |= contents(tmp_path / "sharded")
    first, second = sorted(name for name in files if name.startswith("model-"))
    before = contents(weights)
    hub.stalls[second] = len(files[second]) - 1
    command = [sys.executable, str(SCRIPT), "org/tiny", "--to", str(weights)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    staged = staging_of(hub, weights) / "files"
    finished = NEEDED - {"model.safetensors"} | {first, "LICENSE", "chat_template.jinja"}
    metadata = staged / ".cache" / "huggingface" / "download"
    while not (hub.stalled.is_set() and all((metadata / f"{name}.metadata").exists() for name in finished)):
        assert process.poll() is None
        time.sleep(0.01)
    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=10)
    assert time.monotonic() - interrupted < 2
    assert process.returncode == 130
    assert error == "Interrupted. The weights are as they were; the same command resumes the download.\n"
    assert contents(weights) == before

    assert script("org/tiny", "--to", weights).returncode == 0
    assert all((weights / name).read_bytes() == files[name] for name in read_manifest(weights).files)
    # huggingface_hub resumes a file within a run only: in the next run an unfinished file begins anew.
    assert hub.sent[second] == 2 * len(files[second]) - 1
    assert {name: hub.sent[name] for name in finished} == {name: len(files[name]) for name in finished}
    assert names_in(weights) == {*read_manifest(weights).files, "manifest.json", ".gitignore"}


def test_what_killed_downloads_left_is_removed_by_the_next_download(
    hub: Hub, download: Download, weights: Path
) -> None:
    unfinished = staging_of(hub, weights) / "files" / ".cache" / "huggingface" / "download" / "a.b.incomplete"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_text("half")
    other = weights / ".download-of-another-origin" / "files"
    other.mkdir(parents=True)
    hub.repositories["org/tiny"].served["model.safetensors"] = b"damaged"
    with refusal("model.safetensors"):
        download("org/tiny", weights)
    assert not unfinished.exists()
    assert not other.exists()
    hub.repositories["org/tiny"].served.clear()
    download("org/tiny", weights)

    other.mkdir(parents=True)
    assert "already" in download("org/tiny", weights)
    assert not other.parent.exists()


def test_a_file_that_arrives_damaged_is_refused_and_fetched_again(hub: Hub, download: Download, weights: Path) -> None:
    before = contents(weights)
    repository = hub.repositories["org/tiny"]
    damaged = ("model.safetensors", "tokenizer.json")  # One stored with LFS, one with git.
    repository.served = {name: b"!" + repository.files[name][1:] for name in damaged}
    for name in damaged:
        with refusal(f"{name} arrived damaged: run the command again"):
            download("org/tiny", weights)
        assert contents(weights) == before
        del repository.served[name]
    hub.sent.clear()
    download("org/tiny", weights)
    assert set(hub.sent) == {"tokenizer.json"}
    assert (weights / "model.safetensors").read_bytes() == repository.files["model.safetensors"]


def test_an_exchange_stopped_half_way_is_not_loaded_and_is_finished_by_the_next_run(
    hub: Hub, download: Download, weights: Path, tiny: Path
) -> None:
    staging = weights / ".download-sealed"
    shutil.copytree(tiny, staging / "files")
    (staging / "files" / "LICENSE").write_text("MIT")
    seal(staging / "files", "org/new")
    (staging / "files" / "manifest.json").replace(staging / "sealed.json")
    (weights / "manifest.json").unlink()
    (staging / "files" / "config.json").replace(weights / "config.json")
    with pytest.raises(WeightsError, match="half exchanged for other weights: run script/download_weights again"):
        load(weights)

    hub.down = True
    with refusal("503"):
        download("org/tiny", weights)
    assert load(weights).manifest.source == "org/new"
    assert names_in(weights) == NEEDED | {"LICENSE", "manifest.json", ".gitignore"}


def test_of_two_downloads_at_once_the_second_waits_and_finds_the_work_done(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.stalls["model.safetensors"] = 15 * MEGABYTE
    command = [sys.executable, str(SCRIPT), "org/tiny", "--to", str(tmp_path / "weights")]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    assert hub.stalled.wait(30)
    second = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert second.stdout is not None
    assert second.stdout.readline().startswith("Waiting for another download into")
    hub.closing.set()
    assert first.wait(30) == 0
    assert "already" in second.communicate(timeout=30)[0]
    assert second.returncode == 0


def test_a_staged_manifest_that_a_repository_brought_is_never_exchanged_in(
    hub: Hub, download: Download, weights: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    manifest = manifest_of(weights, "org/evil", trust_remote_code=True)
    for name in ("manifest.json", "files/manifest.json", "files/sealed.json"):
        staged = staging_of(hub, weights) / name
        staged.parent.mkdir(parents=True, exist_ok=True)
        (staged.parent / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
        staged.write_bytes(msgspec.json.encode(manifest))
    hub.down = True
    with refusal("503"):
        download("org/tiny", weights)
    assert load(weights).manifest.source == "org/old"
    hub.down = False
    download("org/tiny", weights)
    assert read_manifest(weights).trust_remote_code is False
    assert names_in(weights) == {*read_manifest(weights).files, "manifest.json", ".gitignore"}
    assert not marker.exists()
