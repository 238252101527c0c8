"""Quantized models: their tokens are Transformers' own, and what cannot be loaded is refused before the download."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from lmtp.weights import quantization
from lmtp.weights.load import load
from lmtp.weights.manifest import WeightsError, read_manifest
from tests.hub import Hub
from tests.tiny import BASE, own_greedy, random_prompts
from tests.weights.conftest import Download, Script
from tests.weights.helpers import ROOT, contents, refusal, saved, seal, seeded, served

PROMPTS = random_prompts(4, 11, 7)


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that is not quantized, whose matrices are large enough for every format."""
    model = seeded(LlamaForCausalLM(LlamaConfig(**{**BASE, "hidden_size": 64, "intermediate_size": 128})))
    return saved(model, tmp_path_factory.mktemp("plain"), tiny)


def copy_of(directory: Path, tiny: Path, target: Path, **model_args: object) -> Path:
    return saved(LlamaForCausalLM.from_pretrained(directory), target, tiny, **model_args)


def own_quantization(load_in: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    return {
        "4bit": lambda: BitsAndBytesConfig(load_in_4bit=True, **nf4),
        "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    }[load_in]()


@pytest.mark.parametrize("load_in", ["4bit", "8bit", "int8"])
def test_a_model_quantized_while_it_is_loaded_answers_as_transformers_own(
    load_in: str, plain: Path, tiny: Path, tmp_path: Path
) -> None:
    own = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, quantization_config=own_quantization(load_in)
    )
    loaded = load(copy_of(plain, tiny, tmp_path / "weights", load_in=load_in), "float32", "cpu")
    assert loaded.dtype == torch.float32
    assert loaded.model.get_memory_footprint() == own.get_memory_footprint()
    kinds = {type(parameter).__name__ for parameter in loaded.model.parameters()}
    assert kinds == {"Parameter", {"4bit": "Params4bit", "8bit": "Int8Params", "int8": "Int8Tensor"}[load_in]}
    # The kernels of 8 bits treat a batch's outliers together, so each text is asked for alone.
    got = [served(loaded, prompt)[0] for prompt in PROMPTS] if load_in == "8bit" else served(loaded, *PROMPTS)
    assert got == [own_greedy(own, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_checkpoint_quantized_by_bitsandbytes_answers_as_transformers_own(
    load_in: str, plain: Path, tiny: Path, tmp_path: Path
) -> None:
    own = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, quantization_config=own_quantization(load_in)
    )
    loaded = load(saved(own, tmp_path / "weights", tiny), "float32", "cpu")
    assert loaded.model.get_memory_footprint() == own.get_memory_footprint()
    assert served(loaded, PROMPTS[0]) == [own_greedy(own, PROMPTS[0], 12)]


def test_a_checkpoint_quantized_by_compressed_tensors_answers_as_transformers_own(
    plain: Path, tiny: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(plain)
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    }
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module, "weight_scale"):
            weight: torch.Tensor = module.weight
            module.weight_scale.data = weight.abs().amax(dim=1, keepdim=True) / 127
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    directory = tmp_path / "weights"
    model.save_pretrained(directory)
    compressor.update_config(directory)
    saved_config = json.loads((directory / "config.json").read_text())
    assert saved_config["quantization_config"]["quant_method"] == "compressed-tensors"
    own = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tiny / name).read_bytes())
    seal(directory)
    loaded = load(directory, "float32", "cpu")
    assert served(loaded, *PROMPTS) == [own_greedy(own, prompt, 12) for prompt in PROMPTS]


def test_a_quantized_model_needs_the_memory_of_its_bits(plain: Path) -> None:
    shards = [plain / "model.safetensors"]
    whole = quantization.bytes_loaded(shards, 4, None, None)
    assert whole == LlamaForCausalLM.from_pretrained(plain).get_memory_footprint(return_buffers=False)
    assert quantization.bytes_loaded(shards, 2, None, None) == whole // 2
    for load_in in ("4bit", "8bit"):  # Transformers does not count what torchao packs.
        own = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.bfloat16, quantization_config=own_quantization(load_in)
        )
        needed = quantization.bytes_loaded(shards, 2, None, load_in)
        assert own.get_memory_footprint() * 0.9 < needed < own.get_memory_footprint() * 1.2
        assert needed < whole // 2


def test_packed_checkpoints_need_what_they_store_unless_they_are_dequantized(plain: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a.weight": torch.zeros(64, 64, dtype=torch.float8_e4m3fn), "a.weight_scale": torch.ones(64)}
    save_file(tensors, tmp_path / "model.safetensors")
    shards = [tmp_path / "model.safetensors"]
    assert quantization.bytes_loaded(shards, 2, {"quant_method": "compressed-tensors"}, None) == 64 * 64 + 2 * 64
    assert quantization.bytes_loaded(shards, 2, {"quant_method": "fp8"}, None) == 2 * 64 * 64 + 2 * 64


def test_a_checkpoint_of_several_dtypes_is_loaded_in_one(plain: Path, tiny: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(plain)
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    directory = saved(model, tmp_path / "weights", tiny)
    for dtype in ("float32", "bfloat16"):
        loaded = load(directory, dtype, "cpu")
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}


def test_fp8_without_a_gpu_that_computes_it_is_refused_with_the_reason(plain: Path, tiny: Path, tmp_path: Path) -> None:
    directory = copy_of(plain, tiny, tmp_path / "weights", load_in="fp8")
    with pytest.raises(WeightsError, match=r"fp8 needs a GPU of compute capability 8\.9 or higher.*--load-in int8"):
        load(directory, "float32", "cpu")


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        PackageNotFoundError = metadata.PackageNotFoundError

        @staticmethod
        def version(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(quantization, "metadata", Nothing)


@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize(
    ("stored", "package", "command"),
    [
        ({"load_in_4bit": True}, "bitsandbytes==0.50.2", "-r requirements/bitsandbytes.txt"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes==0.50.2", "-r requirements/bitsandbytes.txt"),
        ({"quant_method": "torchao"}, "torchao==0.18.0", "-r requirements/torchao.txt"),
        (
            {"quant_method": "compressed-tensors"},
            "compressed-tensors==0.20.0",
            "-r requirements/compressed-tensors.txt",
        ),
        ({"quant_method": "gptq"}, "gptqmodel>=1.4.3 and optimum>=1.24.0", "'gptqmodel>=1.4.3' 'optimum>=1.24.0'"),
        ({"quant_method": "awq"}, "gptqmodel>=1.4.3", "'gptqmodel>=1.4.3'"),
        ({"quant_method": "quanto"}, "optimum-quanto", "'optimum-quanto'"),
    ],
)
def test_a_format_without_its_package_is_refused_before_the_weights_are_fetched(
    hub: Hub, download: Download, tmp_path: Path, stored: dict[str, Any], package: str, command: str
) -> None:
    config = json.loads(hub.repositories["org/tiny"].files["config.json"])
    hub.repositories["org/tiny"].files["config.json"] = json.dumps({**config, "quantization_config": stored}).encode()
    with refusal(f"org/tiny needs {package} (", f"run `python -m pip install {command}`"):
        download("org/tiny", tmp_path)
    assert hub.fetched() == {"config.json"}


@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize("source", ["org/tiny", "demo"])
def test_quantizing_without_its_package_is_refused_before_the_weights_are_fetched(
    hub: Hub, download: Download, tmp_path: Path, source: str
) -> None:
    with refusal(f"{source} needs torchao==0.18.0 (torchao), which is not installed"):
        download(source, tmp_path, load_in="int8")
    assert hub.fetched() <= {"config.json"}


def test_an_unknown_format_and_quantizing_twice_are_refused_before_the_weights_are_fetched(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    repository = hub.repositories["org/tiny"]
    config = json.loads(repository.files["config.json"])
    for number, stored in enumerate(({"quant_method": "gguf"}, {"quant_method": "bitnet"})):
        repository.files["config.json"] = json.dumps({**config, "quantization_config": stored}).encode()
        said = ("org/tiny is quantized by 'gguf', which is not loaded", "org/tiny is quantized already (bitnet)")[
            number
        ]
        with refusal(said):
            download("org/tiny", tmp_path / str(number), load_in=(None, "4bit")[number])
    assert hub.fetched() == {"config.json"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "The argument quantization_config is None: give an object whose quant_method is one of bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "give an object whose quant_method is one of bitsandbytes, torchao"),
        ({"quant_method": "fp8"}, "the formats that quantize while they load"),
        ({"load_in_4bit": "yes"}, "Transformers refuses the argument quantization_config"),
    ],
)
def test_an_argument_that_does_not_quantize_is_refused_before_the_weights_are_fetched(
    given: object, said: str, hub: Hub, download: Download, tmp_path: Path
) -> None:
    with refusal(said):
        download("org/tiny", tmp_path, quantization_config=given)
    assert hub.fetched() == {"config.json"}


@pytest.mark.usefixtures("without_packages")
def test_the_argument_needs_the_package_of_its_format(hub: Hub, download: Download, tmp_path: Path) -> None:
    with refusal("org/tiny needs bitsandbytes==0.50.2 (bitsandbytes), which is not installed"):
        download("org/tiny", tmp_path, quantization_config={"load_in_4bit": True})
    assert hub.fetched() == {"config.json"}


def test_the_argument_does_not_quantize_a_quantized_checkpoint_again(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    repository = hub.repositories["org/tiny"]
    config = json.loads(repository.files["config.json"])
    for method in ("fp8", "bitsandbytes"):
        stored = {"quant_method": method, "load_in_4bit": method != "fp8"}
        repository.files["config.json"] = json.dumps({**config, "quantization_config": stored}).encode()
        with refusal(f"org/tiny is quantized already ({method}): leave out --model-arg quantization_config"):
            download("org/tiny", tmp_path / method, quantization_config={"load_in_8bit": True})
    assert hub.fetched() == {"config.json"}


def test_the_argument_quantizes_as_transformers_does(plain: Path, tiny: Path, tmp_path: Path) -> None:
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    own = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**given)
    )
    loaded = load(copy_of(plain, tiny, tmp_path / "weights", quantization_config=given), "float32", "cpu")
    assert served(loaded, *PROMPTS) == [own_greedy(own, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize(("version", "refused"), [("0.49.0", True), ("0.50.2", False), ("0.51.0", True)])
def test_a_package_of_another_version_than_the_tested_one_is_refused(
    version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    if refused:
        with refusal("org/a needs bitsandbytes==0.50.2"):
            quantization.check(None, {"load_in": "4bit"}, "org/a")
    else:
        quantization.check(None, {"load_in": "4bit"}, "org/a")


def test_how_to_load_is_recorded_and_can_be_changed_without_fetching_again(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    download("org/tiny", tmp_path, load_in="4bit")
    assert read_manifest(tmp_path).model_args == {"trust_remote_code": False, "load_in": "4bit"}
    before = contents(tmp_path)
    hub.requests.clear()
    assert "its manifest.json now says how to load it" in download("org/tiny", tmp_path, load_in="8bit")
    assert hub.fetched() == set()
    assert read_manifest(tmp_path).model_args["load_in"] == "8bit"
    assert {name for name, content in contents(tmp_path).items() if content != before[name]} == {"manifest.json"}


def test_the_command_takes_only_the_known_formats(script: Script, tmp_path: Path) -> None:
    result = script("org/tiny", "--load-in", "3bit", "--to", tmp_path)
    assert result.returncode == 2
    assert "choose from" in result.stderr


def test_the_packages_of_each_tested_format_are_in_its_requirements_and_in_those_of_the_tests() -> None:
    tested = {name: packages for name, packages in quantization.REQUIREMENTS.items() if "==" in packages}
    own = {path.stem: path.read_text().splitlines()[-1] for path in (ROOT / "requirements").iterdir()}
    assert {name: own[name] for name in tested} == tested
    assert {f"-r requirements/{name}.txt" for name in own} <= {
        *(ROOT / "requirements-dev.txt").read_text().splitlines()
    }
    assert not {own[name] for name in tested} & {*(ROOT / "requirements.txt").read_text().splitlines()}
