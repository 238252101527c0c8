"""`script/download_weights --verify`: hash what is in place, and repair what is damaged or missing."""

import os
import shutil
from pathlib import Path

import pytest

from lmtp.weights import demo
from lmtp.weights.install import verify
from lmtp.weights.manifest import read_manifest
from tests.hub import Hub
from tests.weights.conftest import Download, Script
from tests.weights.helpers import contents, names_in, refusal


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def fetched(hub: Hub, download: Download, tmp_path: Path) -> Path:
    """A weights directory with org/tiny as fetched from the hub."""
    download("org/tiny", tmp_path / "weights")
    hub.requests.clear()
    hub.sent.clear()
    return tmp_path / "weights"


def test_intact_weights_are_said_to_be_intact_without_network(
    hub: Hub, fetched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(fetched)
    assert capsys.readouterr().out == f"{fetched} is intact: all 7 files are as its manifest.json says.\n"
    assert hub.requests == []


def test_a_flipped_byte_is_invisible_to_a_download_and_found_and_repaired_by_verify(
    hub: Hub, download: Download, fetched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(fetched)
    flip_a_byte(fetched / "model.safetensors")
    assert "already" in download("org/tiny", fetched)
    verify(fetched)
    printed = capsys.readouterr().out
    assert printed == f"model.safetensors is damaged.\n{fetched} is repaired: 1 of 7 files replaced.\n"
    assert contents(fetched) == before
    assert names_in(fetched) == before.keys()
    assert set(hub.sent) == {"model.safetensors"}


def test_missing_and_truncated_files_are_fetched_again_at_the_recorded_commit_and_no_others(
    hub: Hub, fetched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(fetched)
    hub.repositories["org/tiny"].names = ()
    (fetched / "tokenizer.json").unlink()
    os.truncate(fetched / "config.json", 3)
    verify(fetched)
    printed = capsys.readouterr().out
    assert "tokenizer.json is missing.\n" in printed
    assert "config.json is damaged.\n" in printed
    assert contents(fetched) == before
    assert set(hub.sent) == {"config.json", "tokenizer.json"}


def test_what_cannot_be_fetched_stays_broken_and_the_command_ends_with_1(
    hub: Hub, script: Script, fetched: Path
) -> None:
    flip_a_byte(fetched / "config.json")
    before = contents(fetched)
    result = script("--verify", "--to", fetched, HF_HUB_OFFLINE="1")
    assert (result.returncode, result.stdout) == (1, "config.json is damaged.\n")
    assert result.stderr == "HF_HUB_OFFLINE is set, so org/tiny cannot be fetched: unset it.\n"
    assert contents(fetched) == before


def test_a_file_that_the_hub_now_has_otherwise_is_not_taken_for_the_recorded_one(hub: Hub, fetched: Path) -> None:
    flip_a_byte(fetched / "config.json")
    before = contents(fetched)
    hub.repositories["org/tiny"].served["config.json"] = b"{}"
    with refusal("config.json"):
        verify(fetched)
    assert contents(fetched) == before


def test_the_command_ends_with_0_when_everything_is_repaired(script: Script, fetched: Path) -> None:
    (fetched / "config.json").unlink()
    result = script("--verify", "--to", fetched)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_copied_model_is_repaired_from_its_directory(download: Download, tiny: Path, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    shutil.copytree(tiny, source)
    download(source, copy)
    before = contents(copy)
    flip_a_byte(copy / "model.safetensors")
    verify(copy)
    assert contents(copy) == before

    flip_a_byte(copy / "model.safetensors")
    flip_a_byte(source / "model.safetensors")
    before = contents(copy)
    with refusal("is no longer what was copied", f"script/download_weights {source} --to {copy}"):
        verify(copy)
    assert contents(copy) == before


def test_adopted_weights_say_what_to_do(download: Download, weights: Path) -> None:
    (weights / "manifest.json").unlink()
    download(weights, weights)
    flip_a_byte(weights / "model.safetensors")
    with refusal(
        f"{weights} was filled by hand: put model.safetensors back and verify again, or run",
        f"`script/download_weights {weights}`",
    ):
        verify(weights)


def test_the_demo_is_made_again_as_a_whole(demo_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = read_manifest(demo_weights).files

    def collect(directory: Path) -> dict[str, None]:
        for name in names:
            shutil.copy(demo_weights / name, directory / name)
        return dict.fromkeys(names)

    monkeypatch.setattr(demo, "collect", collect)
    shutil.copytree(demo_weights, tmp_path / "demo")
    flip_a_byte(tmp_path / "demo" / "tokenizer.json")
    verify(tmp_path / "demo")
    assert (tmp_path / "demo" / "tokenizer.json").read_bytes() == (demo_weights / "tokenizer.json").read_bytes()
    assert not list((tmp_path / "demo").glob(".download-*"))


def test_without_weights_the_error_names_the_command(tmp_path: Path) -> None:
    with refusal("No weights in", "script/download_weights demo"):
        verify(tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_a_link_to_another_directory_is_not_followed_by_a_repair(hub: Hub, download: Download, tmp_path: Path) -> None:
    weights, outside = tmp_path / "weights", tmp_path / "outside"
    hub.repositories["org/tiny"].files["additional_chat_templates/tools.jinja"] = b"{{ tools }}"
    download("org/tiny", weights)
    outside.mkdir()
    shutil.rmtree(weights / "additional_chat_templates")
    (weights / "additional_chat_templates").symlink_to(outside)
    with refusal("is a symbolic link to another directory"):
        verify(weights)
    assert names_in(outside) == set()
