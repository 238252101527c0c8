"""Loading: the model and tokenizer that a weights directory holds, without network."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lmtp.weights.load import _auto_dtype, describe, load
from lmtp.weights.manifest import WeightsError, read_manifest
from tests.weights.helpers import seal


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
    assert loaded.rate * loaded.seconds * 1e9 == pytest.approx((weights / "model.safetensors").stat().st_size)


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
        (20_000_000, None, torch.bfloat16, {"": torch.device("cuda")}),
        (20_000_000, None, torch.float32, "auto"),
        (15_000_000, None, torch.bfloat16, "auto"),
        (15_000_000, "cuda:1", torch.bfloat16, {"": torch.device("cuda:1")}),
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


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, and a PyTorch that was built for one but cannot use this."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr("lmtp.weights.load.GPUS", f"{tmp_path}/nvidia[0-9]*")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update it.")

    monkeypatch.setattr(torch.cuda, "init", too_old)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_cannot_be_used_is_an_error_and_no_reason_to_serve_from_the_cpu(weights: Path) -> None:
    with pytest.raises(WeightsError) as refused:
        load(weights)
    assert str(refused.value) == (
        "This machine has an NVIDIA GPU, and PyTorch with CUDA 13.0 cannot use it: The NVIDIA driver on your system is too"
        " old (found version 12020). Update its driver, or set CUDA_VISIBLE_DEVICES=-1 to serve from the CPU."
    )


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_is_hidden_or_not_asked_for_is_none(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(weights, device="cpu").device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert load(weights).device.type == "cpu"


@pytest.mark.usefixtures("gpu")
def test_a_pytorch_for_cpus_serves_from_the_cpu(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert load(weights).device.type == "cpu"


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_computes_in_float16(
    monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert _auto_dtype(torch.device("cuda")) is dtype


def test_a_gpu_is_described_by_its_name_memory_capability_and_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="NVIDIA L4", total_memory=22 * 2**30, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr("lmtp.weights.load.DRIVER_VERSION", str(tmp_path / "version"))
    assert describe(torch.device("cpu")) == "cpu"
    assert describe(torch.device("cuda:0")).endswith("driver unknown)")
    (tmp_path / "version").write_text("580.65.06\n")
    assert describe(torch.device("cuda:0")) == ("cuda:0 (NVIDIA L4, 22 GB, compute capability 8.9, driver 580.65.06)")


PEAK = """
import sys, threading, time
from pathlib import Path
import torch, transformers
from lmtp.weights.load import load

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
loaded = load(Path(sys.argv[1]), sys.argv[2], "cpu")
done.set()
watcher.join()
converted = 0 if loaded.dtype is torch.bfloat16 else sum(p.nbytes for p in loaded.model.parameters())
print(peak - before - converted)
"""


@pytest.mark.skipif("NIGHTLY" not in os.environ, reason="takes half a minute: NIGHTLY=1")
def test_loading_takes_no_second_copy_of_the_weights_in_memory(weights: Path) -> None:
    """Weights stay in the mapped file; where another dtype is asked for, they are converted one by one."""
    config = LlamaConfig(
        vocab_size=50_000,
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=11,
        num_attention_heads=16,
        eos_token_id=0,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) > 500e6
    model.save_pretrained(weights)
    del model
    seal(weights)
    for dtype in ("bfloat16", "float32"):
        run = subprocess.run([sys.executable, "-c", PEAK, weights, dtype], capture_output=True, text=True, check=True)
        assert int(run.stdout.split()[-1]) < 500e6
