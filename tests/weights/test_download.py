"""Downloads: a model's files, and nothing else, from the hub or a directory into a weights directory."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lmtp.weights.load import load
from lmtp.weights.manifest import File, read_manifest, verify_sizes
from tests.hub import TOKEN, Hub, Repository
from tests.weights.conftest import Download, Script
from tests.weights.helpers import NEEDED, contents, names_in, refusal, seal, staging_of

# Fetching a repository


def test_a_repository_is_fetched_with_what_the_model_needs_and_nothing_else(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    target = tmp_path / "weights"
    printed = download("org/tiny", target)
    assert (
        printed.splitlines()[-1]
        == f"{target} now holds org/tiny at {hub.repositories['org/tiny'].commit}: 7 files, 26 MB."
    )
    repository = hub.repositories["org/tiny"]
    manifest = read_manifest(target)
    assert (manifest.source, manifest.revision) == ("org/tiny", repository.commit)
    assert manifest.model_args == {"trust_remote_code": False}
    assert set(manifest.files) == hub.fetched() == NEEDED | {"LICENSE", "chat_template.jinja"}
    assert names_in(target) == {*manifest.files, "manifest.json"}
    for name, file in manifest.files.items():
        content = repository.files[name]
        assert (target / name).read_bytes() == content
        assert file == File(len(content), hashlib.sha256(content).hexdigest())
    assert load(target).model.config.vocab_size == 50_000


def test_a_branch_is_recorded_as_its_commit(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.repositories["org/tiny"].names = ("main", "refs/pr/1")
    download("org/tiny", tmp_path, "refs/pr/1")
    assert read_manifest(tmp_path).revision == hub.repositories["org/tiny"].commit


def test_of_a_model_in_several_files_those_in_its_index_are_fetched(
    hub: Hub, download: Download, tiny: Path, tmp_path: Path
) -> None:
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "sharded", max_shard_size="15MB")
    shards = contents(tmp_path / "sharded")
    repository = hub.repositories["org/tiny"]
    del repository.files["model.safetensors"]
    repository.files |= shards | {"model-00001-of-00009.safetensors": b"of another sharding"}
    download("org/tiny", tmp_path / "weights")
    fetched = {name for name in hub.fetched() if "safetensors" in name}
    assert fetched == {name for name in shards if "safetensors" in name}
    assert len(fetched) == 3
    load(tmp_path / "weights")


def test_a_models_own_code_is_fetched_and_recorded_only_when_asked_for(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    download("org/tiny", tmp_path)
    download("org/tiny", tmp_path, trust_remote_code=True)
    assert (tmp_path / "modeling_tiny.py").exists()
    assert read_manifest(tmp_path).model_args == {"trust_remote_code": True}


def test_what_is_in_place_already_is_not_fetched_again(hub: Hub, download: Download, tmp_path: Path) -> None:
    download("org/tiny", tmp_path)
    hub.requests.clear()
    commit = hub.repositories["org/tiny"].commit
    assert download("org/tiny", tmp_path) == f"{tmp_path} holds org/tiny at {commit} already.\n"
    assert hub.fetched() == set()


def test_a_commit_in_place_already_needs_no_network(
    hub: Hub, download: Download, script: Script, tmp_path: Path
) -> None:
    download("org/tiny", tmp_path)
    result = script("org/tiny", "--revision", hub.repositories["org/tiny"].commit, "--to", tmp_path, HF_HUB_OFFLINE="1")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_file_of_the_wrong_size_is_fetched_again(hub: Hub, download: Download, tmp_path: Path) -> None:
    download("org/tiny", tmp_path)
    os.truncate(tmp_path / "model.safetensors", 10)
    download("org/tiny", tmp_path)
    verify_sizes(tmp_path, read_manifest(tmp_path))


def test_other_weights_leave_nothing_behind_but_gitignore(hub: Hub, download: Download, weights: Path) -> None:
    (weights / "added_tokens.json").write_text("{}")
    (weights / "model-00001-of-00002.safetensors").touch()
    (weights / ".download-abandoned").mkdir()
    download("org/tiny", weights)
    assert names_in(weights) == {*read_manifest(weights).files, "manifest.json", ".gitignore"}
    assert (weights / ".gitignore").read_text() == "*\n"


def test_a_directory_that_holds_something_else_is_left_alone(hub: Hub, download: Download, weights: Path) -> None:
    (weights / "thesis.txt").write_text("three years of work")
    before = contents(weights)
    with refusal("holds thesis.txt", "--to"):
        download("org/tiny", weights)
    assert contents(weights) == before
    assert hub.requests == []


# What a repository can refuse


def test_a_gated_repository_without_a_token_says_where_to_get_access(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    hub.repositories["org/tiny"].gated = True
    with refusal(f"org/tiny is gated: ask for access at {hub.address}/org/tiny", "set HF_TOKEN"):
        download("org/tiny", tmp_path)


def test_a_gated_repository_tells_a_token_without_access(
    hub: Hub, download: Download, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    hub.repositories["org/tiny"].gated = True
    with refusal("org/tiny is gated", "the account of HF_TOKEN has none yet"):
        download("org/tiny", tmp_path)


def test_a_gated_repository_is_fetched_with_a_token_that_has_access(
    hub: Hub, download: Download, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["org/tiny"].gated = True
    download("org/tiny", tmp_path)
    assert set(read_manifest(tmp_path).files) == NEEDED | {"LICENSE", "chat_template.jinja"}


def test_a_repository_that_does_not_exist_is_an_error_that_names_it(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    with refusal(f"No repository {hub.address}/org/absent, or it is private"):
        download("org/absent", tmp_path)


def test_a_revision_that_does_not_exist_is_an_error_that_names_it(download: Download, tmp_path: Path) -> None:
    with refusal("org/tiny has no revision v9"):
        download("org/tiny", tmp_path, "v9")


def test_a_repository_without_safetensors_is_an_error_that_says_so(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    for name in ("model.safetensors", "consolidated.safetensors"):
        del hub.repositories["org/tiny"].files[name]
    with refusal("org/tiny has no model.safetensors, only pytorch_model.bin"):
        download("org/tiny", tmp_path)
    assert hub.fetched() == set()


def test_a_repository_that_holds_no_model_is_an_error_that_says_so(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    hub.repositories["org/tiny"].files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
    with refusal("org/tiny is no Transformers model: it has no config.json"):
        download("org/tiny", tmp_path)


def test_weights_whose_header_does_not_describe_them_are_not_installed(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    download("org/tiny", tmp_path)
    before = contents(tmp_path)
    files = hub.repositories["org/tiny"].files
    hub.repositories["org/cut"] = Repository(files | {"model.safetensors": files["model.safetensors"][:-4]})
    with refusal("org/cut at", "has a malformed model.safetensors"):
        download("org/cut", tmp_path)
    assert contents(tmp_path) == before


def test_without_room_nothing_is_fetched(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.repositories["org/tiny"].announced = {"model.safetensors": {"size": 10**18}}
    with refusal("MB free, 1,000,000,000,000 MB are needed", "--to"):
        download("org/tiny", tmp_path)
    assert hub.fetched() == set()


def test_without_a_hub_the_error_says_so(download: Download, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with refusal("No connection to http://127.0.0.1:9", "check the network"):
        download("org/tiny", tmp_path)


def test_offline_mode_is_named_when_it_prevents_a_fetch(
    download: Download, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refusal("HF_HUB_OFFLINE is set"):
        download("org/tiny", tmp_path)


def test_a_name_that_no_repository_can_have_is_an_error(hub: Hub, download: Download, tmp_path: Path) -> None:
    with refusal("org/a..b is neither a directory nor a repository's name"):
        download("org/a..b", tmp_path)
    assert hub.requests == []


# Directories


def test_a_directory_is_copied_without_what_the_model_does_not_need(
    download: Download, tiny: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    (source / "optimizer.pt").write_bytes(b"pickle")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tiny / "tokenizer.json")  # As in the hub's cache.
    download(source, tmp_path / "weights")
    manifest = read_manifest(tmp_path / "weights")
    assert (manifest.source, manifest.revision) == (str(source), None)
    assert contents(tmp_path / "weights").keys() - {"manifest.json"} == NEEDED
    assert not (tmp_path / "weights" / "tokenizer.json").is_symlink()
    load(tmp_path / "weights")


def test_a_directory_is_copied_again_for_it_may_have_changed(download: Download, weights: Path, tmp_path: Path) -> None:
    download(weights, tmp_path / "copy")
    tensors = load_file(weights / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights / "model.safetensors", {"format": "pt"})
    download(weights, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (weights / "model.safetensors").read_bytes()


def test_weights_placed_by_hand_get_a_manifest_where_they_are(download: Download, weights: Path) -> None:
    (weights / "manifest.json").unlink()
    (weights / "notes.txt").write_text("mine")
    before = contents(weights)
    download(weights, weights)
    assert set(read_manifest(weights).files) == NEEDED
    (manifest,) = contents(weights).keys() - before.keys()
    assert manifest == "manifest.json"
    load(weights)


def test_a_directory_that_holds_no_model_is_an_error_that_says_so(download: Download, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refusal(f"{tmp_path / 'empty'} is no Transformers model: it has no config.json"):
        download(tmp_path / "empty", tmp_path / "weights")


def test_a_path_that_does_not_exist_is_not_taken_for_a_repository(hub: Hub, download: Download, tmp_path: Path) -> None:
    with refusal("./absent/model is neither a directory nor a repository's name"):
        download("./absent/model", tmp_path)
    assert hub.requests == []


def test_a_target_that_cannot_be_written_is_an_error_that_names_it(
    download: Download, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights").touch()
    with refusal(f"{tmp_path / 'weights'}: File exists"):
        download(tiny, tmp_path / "weights")


def test_a_link_to_another_directory_in_the_target_is_not_followed(
    hub: Hub, download: Download, weights: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (weights / "additional_chat_templates").symlink_to(outside)
    hub.repositories["org/tiny"].files["additional_chat_templates/tools.jinja"] = b"{{ tools }}"
    before = contents(weights)
    with refusal(f"{weights / 'additional_chat_templates'} is a symbolic link to another directory: remove it."):
        download("org/tiny", weights)
    assert contents(weights) == before
    assert names_in(outside) == set()


def test_links_to_files_in_the_target_are_replaced_and_what_they_name_stays(
    hub: Hub, download: Download, weights: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "config.json"
    outside.write_text("mine")
    for name in ("config.json", "manifest.json", ".manifest.json"):
        (weights / name).unlink(missing_ok=True)
        (weights / name).symlink_to(outside)
    download("org/tiny", weights)
    assert outside.read_text() == "mine"
    assert not any(path.is_symlink() for path in weights.iterdir())
    assert names_in(weights) == {*read_manifest(weights).files, "manifest.json", ".gitignore"}


def test_a_link_in_place_of_a_staging_directory_is_removed_not_followed(
    hub: Hub, download: Download, weights: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / "files").mkdir(parents=True)
    (outside / "files" / "config.json").write_text("mine")
    seal(outside / "files", "org/evil", trust_remote_code=True)
    shutil.copy(outside / "files" / "manifest.json", outside / "sealed.json")
    staging_of(hub, weights).symlink_to(outside)
    download("org/tiny", weights)
    assert names_in(outside) == {"files", "sealed.json"}
    assert names_in(outside / "files") == {"config.json", "manifest.json"}
    assert (outside / "files" / "config.json").read_text() == "mine"
    assert read_manifest(weights).source == "org/tiny"


# The command


def test_the_command_ends_with_0_and_says_what_is_in_place(script: Script, tiny: Path, tmp_path: Path) -> None:
    result = script(tiny, "--to", tmp_path / "weights")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{tmp_path / 'weights'} now holds {tiny}: 5 files, 26 MB.\n"


def test_the_command_ends_with_1_and_one_line_on_standard_error(hub: Hub, script: Script, tmp_path: Path) -> None:
    result = script("org/absent", "--to", tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert (
        result.stderr
        == f"No repository {hub.address}/org/absent, or it is private: then set HF_TOKEN to a token with access.\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [("demo", "--revision", "v1"), (".", "--revision", "v1"), ("--trust-remote-code",), ("org/tiny", "--verify")],
)
def test_options_that_make_no_sense_together_are_a_usage_error(script: Script, arguments: tuple[str, ...]) -> None:
    assert script(*arguments).returncode == 2
