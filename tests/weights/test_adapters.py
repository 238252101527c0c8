"""An adapter is fetched with its base, kept under the rules of a model's files, and merged when the model is loaded."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lmtp.protocol import Generate
from lmtp.weights.adapters import apply
from lmtp.weights.install import verify
from lmtp.weights.load import load
from lmtp.weights.manifest import Adapter, fetch_command, read_manifest
from tests.hub import Hub, Repository
from tests.tiny import BASE, answers, own_greedy, random_prompts, start
from tests.weights.conftest import Download
from tests.weights.helpers import NEEDED, contents, refusal, saved, seeded, served

PROMPTS = random_prompts(4, 11)
FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA of the tiny model, org/tiny."""
    torch.manual_seed(1)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tiny), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    directory = tmp_path_factory.mktemp("lora")
    model.save_pretrained(str(directory))
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/tiny"
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "README.md").unlink(missing_ok=True)
    return directory


@pytest.fixture
def adapted(hub: Hub, lora: Path) -> Hub:
    """The hub, which also has org/lora."""
    hub.repositories["org/lora"] = Repository({path.name: path.read_bytes() for path in lora.iterdir()})
    return hub


def test_an_adapter_is_merged_and_answers_as_transformers_and_peft_do(
    adapted: Hub, download: Download, tiny: Path, lora: Path, tmp_path: Path
) -> None:
    download("org/tiny", tmp_path, adapter="org/lora")
    manifest = read_manifest(tmp_path)
    assert manifest.source == "org/tiny"
    assert manifest.adapter == Adapter("org/lora", adapted.repositories["org/lora"].commit)
    assert {*manifest.files} >= {*NEEDED, *FILES}
    loaded = load(tmp_path, "float32", "cpu")
    assert type(loaded.model) is LlamaForCausalLM
    assert not any("lora" in name for name in loaded.model.state_dict())
    base = LlamaForCausalLM.from_pretrained(tiny)
    plain = [own_greedy(base, prompt, 12) for prompt in PROMPTS]
    own: Any = PeftModel.from_pretrained(base, lora).merge_and_unload()
    expected = [own_greedy(own, prompt, 12) for prompt in PROMPTS]
    assert served(loaded, *PROMPTS) == expected != plain


def test_over_a_quantized_model_the_adapter_stays_exact(
    download: Download, tiny: Path, lora: Path, tmp_path: Path
) -> None:
    download(tiny, tmp_path / "weights", adapter=lora, load_in="4bit")
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    base = LlamaForCausalLM.from_pretrained(
        tiny, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **nf4)
    )
    own: Any = PeftModel.from_pretrained(base, lora).get_base_model().eval()
    loaded = load(tmp_path / "weights", "float32", "cpu")
    assert served(loaded, *PROMPTS) == [own_greedy(own, prompt, 12) for prompt in PROMPTS]


def test_named_adapters_over_a_quantized_model_answer_as_each_alone(
    download: Download, tiny: Path, lora: Path, tmp_path: Path
) -> None:
    download(tiny, tmp_path / "base", load_in="4bit")
    plain = load(tmp_path / "base", "float32", "cpu").model
    expected = [own_greedy(plain, PROMPTS[0], 12)]
    own: Any = PeftModel.from_pretrained(plain, lora).get_base_model().eval()
    expected.append(own_greedy(own, PROMPTS[1], 12))
    download(tiny, tmp_path / "weights", named={"a": lora}, load_in="4bit")
    engine = start(load(tmp_path / "weights", "float32", "cpu").model, names=["a"])
    operations = [
        Generate(stream_id=i, prompt=PROMPTS[i], max_tokens=12, adapter=name) for i, name in enumerate(("", "a"))
    ]
    got = answers(engine, *operations)
    engine.stop()
    assert [got.ids(i) for i in range(2)] == expected


def test_an_adapter_alone_gets_the_model_that_it_names(
    adapted: Hub, download: Download, lora: Path, tmp_path: Path
) -> None:
    assert "org/lora is an adapter of org/tiny." in download("org/lora", tmp_path / "a")
    download(lora, tmp_path / "b")
    for name, adapter in (("a", "org/lora"), ("b", str(lora))):
        manifest = read_manifest(tmp_path / name)
        assert manifest.source == "org/tiny"
        assert manifest.adapter is not None
        assert manifest.adapter.source == adapter
        assert {*manifest.files} >= {*NEEDED, *FILES}
    assert "already" in download("org/lora", tmp_path / "a")


def test_an_adapter_beside_its_model_is_not_ignored(
    adapted: Hub, download: Download, tiny: Path, lora: Path, tmp_path: Path
) -> None:
    adapted.repositories["org/tiny"].files |= adapted.repositories["org/lora"].files
    download("org/tiny", tmp_path / "a")
    both = tmp_path / "both"
    shutil.copytree(tiny, both)
    for path in lora.iterdir():
        shutil.copy(path, both / path.name)
    download(both, tmp_path / "b")
    for name in "ab":
        manifest = read_manifest(tmp_path / name)
        assert manifest.adapter is not None
        assert manifest.adapter.source == manifest.source
        assert {*manifest.files} >= {*NEEDED, *FILES}
        assert "--adapter" not in fetch_command(tmp_path / name, manifest)
        load(tmp_path / name, "float32", "cpu")
    with refusal("cannot take an adapter where it is: choose a directory with --to"):
        download(both, both)


def test_without_the_adapter_the_directory_holds_the_base_again(
    adapted: Hub, download: Download, tmp_path: Path
) -> None:
    download("org/tiny", tmp_path, adapter="org/lora")
    command = fetch_command(tmp_path, read_manifest(tmp_path))
    assert f"--adapter org/lora@{adapted.repositories['org/lora'].commit}" in command
    download("org/tiny", tmp_path)
    assert read_manifest(tmp_path).adapter is None
    assert not (tmp_path / "adapter").exists()


def test_a_damaged_adapter_is_found_and_repaired(adapted: Hub, download: Download, tmp_path: Path) -> None:
    download("org/tiny", tmp_path, adapter="org/lora")
    before = contents(tmp_path / "adapter")
    (tmp_path / FILES[1]).write_bytes(b"damaged")
    (tmp_path / "tokenizer.json").unlink()
    verify(tmp_path)
    assert contents(tmp_path / "adapter") == before
    load(tmp_path, "float32", "cpu")


def test_named_adapters_are_fetched_at_their_commits_and_repaired(
    adapted: Hub, download: Download, tmp_path: Path
) -> None:
    named: dict[str, object] = {"a": "org/lora", "b": "org/lora@main"}
    download("org/tiny", tmp_path, named=named)
    commit = adapted.repositories["org/lora"].commit
    assert read_manifest(tmp_path).adapters == dict.fromkeys("ab", Adapter("org/lora", commit))
    assert "already" in download("org/tiny", tmp_path, named=named)
    before = contents(tmp_path / "adapters" / "b")
    (tmp_path / "adapters" / "b" / "adapter_model.safetensors").write_bytes(b"damaged")
    verify(tmp_path)
    assert contents(tmp_path / "adapters" / "b") == before
    load(tmp_path, "float32", "cpu")


def test_an_adapter_beside_its_model_is_named_like_the_others(adapted: Hub, download: Download, tmp_path: Path) -> None:
    adapted.repositories["org/tiny"].files |= adapted.repositories["org/lora"].files
    with refusal("org/tiny would be merged", "name it as well, with --adapter NAME=org/tiny"):
        download("org/tiny", tmp_path, named={"a": "org/lora"})
    download("org/tiny", tmp_path, named={"a": "org/lora", "own": "org/tiny"})
    assert [*read_manifest(tmp_path).adapters] == ["a", "own"]


def change(**values: object) -> Callable[[Repository], None]:
    def prepare(repository: Repository) -> None:
        config = json.loads(repository.files["adapter_config.json"])
        repository.files["adapter_config.json"] = json.dumps({**config, **values}).encode()

    return prepare


def content(name: str, value: bytes | None) -> Callable[[Repository], None]:
    def prepare(repository: Repository) -> None:
        del repository.files[name]
        if value is not None:
            repository.files[name] = value

    return prepare


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (change(peft_type="PROMPT_TUNING"), "an adapter of type 'PROMPT_TUNING', which cannot be merged"),
        (change(peft_type="\x1b[2J"), "which cannot be merged"),
        (change(megatron_config={"a": 1}, megatron_core="antigravity"), "is an adapter for Megatron"),
        (change(alora_invocation_tokens=[5, 6]), "is an activated LoRA, which begins within a text"),
        (change(layer_replication=[[0, 2], [1, 2]]), "sets layer_replication, so it cannot be merged"),
        (change(revision="\x1b[2J"), r"'\x1b[2J' is no revision of org/tiny: give a branch, a tag or a commit"),
        (change(revision="main\nAll is well."), r"'main\nAll is well.' is no revision of org/tiny"),
        (change(revision="a" * 300), "is no revision of org/tiny"),
        (change(base_model_name_or_path="https://evil.example/model"), "which is no repository"),
        (change(base_model_name_or_path="org/n\u0430me"), "which is no repository"),
        (change(base_model_name_or_path="a" * 300), "which is no repository"),
        (change(base_model_name_or_path="/etc"), "is an adapter of '/etc', which is no repository"),
        (change(base_model_name_or_path="../../x"), "which is no repository"),
        (change(base_model_name_or_path="demo"), "which is no repository"),
        (change(base_model_name_or_path="a\nb"), "which is no repository"),
        (change(base_model_name_or_path=None), "names no base model"),
        (content("adapter_config.json", b"[1]"), "has a malformed adapter_config.json"),
        (content("adapter_config.json", b'{"a":' * 100_000), "has a malformed adapter_config.json"),
        (content("adapter_model.safetensors", None), "is no adapter stored as safetensors"),
    ],
)
def test_a_hostile_or_unusable_adapter_is_refused_before_any_weights_are_fetched(
    prepare: Callable[[Repository], None], said: str, adapted: Hub, download: Download, weights: Path
) -> None:
    prepare(adapted.repositories["org/lora"])
    adapted.repositories["org/lora"].files["adapter_model.bin"] = b"pickle"
    before = contents(weights)
    with refusal(said):
        download("org/lora", weights)
    assert contents(weights) == before
    assert adapted.fetched() <= {"adapter_config.json"}


def test_adapter_weights_other_than_announced_are_refused(adapted: Hub, download: Download, weights: Path) -> None:
    adapted.repositories["org/lora"].served["adapter_model.safetensors"] = b"!"
    with refusal("adapter_model.safetensors arrived damaged"):
        download("org/tiny", weights, adapter="org/lora")


@pytest.mark.parametrize("change", [{"peft_type": "IA3"}, {"target_parameters": ["mlp.experts.down_proj"]}])
def test_what_cannot_be_served_beside_others_is_refused_before_the_base_is_fetched(
    change: dict[str, object], adapted: Hub, download: Download, tmp_path: Path
) -> None:
    config = json.loads(adapted.repositories["org/lora"].files["adapter_config.json"])
    adapted.repositories["org/lora"].files["adapter_config.json"] = json.dumps({**config, **change}).encode()
    with refusal("org/lora", "is not served beside other adapters: give --adapter org/lora without a name"):
        download("org/tiny", tmp_path, named={"a": "org/lora"})
    assert adapted.fetched() == {"adapter_config.json"}


@pytest.mark.parametrize(
    ("change", "said"), [({"peft_type": "HRA"}, "is an adapter of type 'HRA'"), ({"use_dora": True}, "uses DoRA")]
)
def test_what_is_not_added_to_quantized_weights_is_refused_before_the_base_is_fetched(
    change: dict[str, object], said: str, adapted: Hub, download: Download, tmp_path: Path
) -> None:
    config = json.loads(adapted.repositories["org/lora"].files["adapter_config.json"])
    adapted.repositories["org/lora"].files["adapter_config.json"] = json.dumps({**config, **change}).encode()
    with refusal(f"org/lora {said}, which is not added to quantized weights: choose a LoRA"):
        download("org/tiny", tmp_path, adapter="org/lora", load_in="4bit")
    assert "model.safetensors" not in adapted.fetched()


def test_over_a_checkpoint_that_comes_quantized_it_is_refused_before_the_weights_are_fetched(
    adapted: Hub, download: Download, tiny: Path, tmp_path: Path
) -> None:
    change(use_dora=True)(adapted.repositories["org/lora"])
    config = json.loads((tiny / "config.json").read_bytes())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    adapted.repositories["org/tiny"].files["config.json"] = json.dumps(config).encode()
    local = tmp_path / "local"
    shutil.copytree(tiny, local)
    (local / "config.json").write_text(json.dumps(config))
    for base in ("org/tiny", local):
        with refusal("org/lora uses DoRA, which is not added to quantized weights: choose a LoRA"):
            download(base, tmp_path / "weights", adapter="org/lora")
    assert adapted.fetched() == {"adapter_config.json", "adapter_model.safetensors", "config.json"}


def test_an_adapter_in_place_is_refused_when_its_model_is_to_be_quantized(
    adapted: Hub, download: Download, tmp_path: Path
) -> None:
    change(use_dora=True)(adapted.repositories["org/lora"])
    download("org/tiny", tmp_path, adapter="org/lora")
    with refusal("org/lora uses DoRA, which is not added to quantized weights"):
        download("org/tiny", tmp_path, adapter="org/lora", load_in="4bit")
    assert "load_in" not in read_manifest(tmp_path).model_args


def test_an_adapter_of_experts_is_merged(tiny: Path, tmp_path: Path) -> None:
    base = seeded(MixtralForCausalLM(MixtralConfig(**BASE, num_local_experts=4)))
    directory = saved(base, tmp_path / "base", tiny)
    config = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    own = trained(base, config, tmp_path / "lora")
    model = apply(load(directory, "float32", "cpu").model, tmp_path / "lora", False, "org/lora")
    ids = torch.tensor([PROMPTS[1]])
    assert torch.allclose(model(input_ids=ids).logits, own(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "layer"), [(LoraConfig, "lm_head"), (LoraConfig, "embed_tokens"), (LoHaConfig, "lm_head")]
)
def test_an_adapter_of_one_of_two_layers_that_share_their_weights_is_refused(
    kind: Any, layer: str, tmp_path: Path
) -> None:
    base = seeded(LlamaForCausalLM(LlamaConfig(**BASE, tie_word_embeddings=True)))
    trained(copy.deepcopy(base), kind(r=4, target_modules=[layer]), tmp_path / "lora")
    with refusal("org/lora changes one of two layers that share their weights", "with tie_word_embeddings off"):
        apply(base, tmp_path / "lora", False, "org/lora")


def trained(base: Any, config: Any, directory: Path) -> Any:
    """The model with a random adapter, which is saved to the directory."""
    torch.manual_seed(1)
    model: Any = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(str(directory))
    return model.eval()


def test_an_adapter_of_another_model_is_not_served_as_the_base(
    download: Download, tiny: Path, lora: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(lora, other)
    tensors = load_file(other / "adapter_model.safetensors")
    renamed = {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}
    save_file(renamed, other / "adapter_model.safetensors", {"format": "pt"})
    download(tiny, tmp_path / "weights", adapter=other)
    with refusal(f"The adapter {other} does not fit the model", "choose the model that it was trained for"):
        load(tmp_path / "weights", "float32", "cpu")


def test_an_adapter_of_experts_that_names_them_as_modules_is_not_mixed_and_its_model_is_not_fetched(
    adapted: Hub, download: Download, tmp_path: Path
) -> None:
    base = MixtralForCausalLM(MixtralConfig(**BASE, num_local_experts=4))
    get_peft_model(base, LoraConfig(r=2, target_modules=["w1", "w3"])).save_pretrained(str(tmp_path / "lora"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    # As older versions of Transformers had it, where each expert was a module.
    config = {**json.loads(files["adapter_config.json"]), "target_parameters": None, "target_modules": ["w1", "w3"]}
    adapted.repositories["org/experts"] = Repository(files | {"adapter_config.json": json.dumps(config).encode()})
    with refusal("org/experts holds", ".experts.", "give --adapter org/experts without a name, which merges it"):
        download("org/tiny", tmp_path / "weights", named={"a": "org/experts"})
    assert adapted.fetched() == {"adapter_config.json", "adapter_model.safetensors"}
