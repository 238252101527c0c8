"""Several adapters are served side by side: each stream is answered by its own, as peft answers with that one alone."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from lmtp.completions import Completions
from lmtp.engine.engine import Engine
from lmtp.protocol import Generate, Score
from lmtp.runners.cache_runner import CacheRunner
from lmtp.runners.model import UnsupportedModel
from lmtp.runners.runner import open_runner
from lmtp.weights.install import chosen_adapters, download
from lmtp.weights.load import load
from lmtp.weights.manifest import Adapter, fetch_command, read_manifest
from tests import models
from tests.tiny import answers, build, own_greedy, random_prompts, start
from tests.weights.helpers import refusal, saved

NAMES = ("legal", "Poems-2", "type")
"""The last would be an attribute of a module."""

PROMPTS = random_prompts(4, 11, 7, 20, 9, 5, 13, 6)


def lora(model: PreTrainedModel, directory: Path, seed: int, embeddings: Any = "auto", **settings: Any) -> Path:
    """Save a random LoRA of the model, which stays as it is. ``embeddings``: whether it brings the model's own."""
    torch.manual_seed(seed)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(str(directory), save_embedding_layers=embeddings)
    adapted.unload()
    return directory


@dataclass
class Served:
    """A weights directory with adapters, its engine, and what peft loads from the same files."""

    weights: Path
    base: Path
    sources: dict[str, Path]
    engine: Engine
    models: dict[str, PreTrainedModel] = field(default_factory=dict)

    def own(self, adapter: str, prompt: list[int], count: int) -> list[int]:
        """What Transformers' generate adds with peft's adapter alone."""
        return own_greedy(self.alone(adapter), prompt, count)

    def alone(self, adapter: str) -> PreTrainedModel:
        """The model with this adapter only."""
        if adapter not in self.models:
            model: Any = load(self.base, "float32", "cpu").model
            if adapter:
                model = PeftModel.from_pretrained(model, str(self.sources[adapter])).eval()
            self.models[adapter] = model
        return self.models[adapter]


@pytest.fixture(scope="module")
def served(demo_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny Llama with three LoRAs that change different layers, fetched and served."""
    directory = tmp_path_factory.mktemp("served")
    base = saved(build("llama"), directory / "base", demo_weights)
    model = build("llama")
    targets = (["q_proj", "v_proj"], ["up_proj", "down_proj"], ["o_proj", "q_proj"])
    sources = {name: lora(model, directory / f"lora-{i}", i, target_modules=targets[i]) for i, name in enumerate(NAMES)}
    weights = directory / "weights"
    download(str(base), None, weights, named={name: str(source) for name, source in sources.items()})
    loaded = load(weights, "float32", "cpu")
    engine = start(loaded.model, names=NAMES)
    yield Served(weights, base, sources, engine)
    engine.stop()


def test_every_stream_of_a_mixed_batch_is_answered_as_by_its_adapter_alone(served: Served) -> None:
    chosen = ["", *NAMES, "none", *NAMES]
    operations = [
        Generate(stream_id=i, prompt=prompt, adapter=chosen[i], max_tokens=12) for i, prompt in enumerate(PROMPTS)
    ]
    got = answers(served.engine, *operations)
    assert served.engine.runner.description == "slots"
    assert got.counters.rows > 2 * got.counters.steps  # they ran together
    own = [served.own(name.replace("none", ""), prompt, 12) for name, prompt in zip(chosen, PROMPTS, strict=True)]
    assert [got.ids(i) for i in range(len(PROMPTS))] == own
    assert len({tuple(served.own(name, PROMPTS[1], 12)) for name in ("", *NAMES)}) == 4  # they differ


def test_many_streams_of_several_adapters_take_the_steps_of_a_few(served: Served) -> None:
    chosen = [*NAMES, ""] * 8
    prompts = random_prompts(*range(4, 36), seed=9)
    operations = [
        Generate(stream_id=i, prompt=prompt, adapter=chosen[i], max_tokens=6, cache_salt=str(i))
        for i, prompt in enumerate(prompts)
    ]
    alone = [answers(served.engine, operation) for operation in operations]
    together = answers(served.engine, *operations)
    assert [together.ids(i) for i in range(32)] == [each.ids(i) for i, each in enumerate(alone)]
    assert together.counters.steps * 3 <= sum(each.counters.steps for each in alone)


def test_scores_are_the_adapters(served: Served) -> None:
    prompt, scored = PROMPTS[3][:10], PROMPTS[3][10:]
    got = answers(
        served.engine,
        *(
            Score(stream_id=name, prompt=prompt, scored=scored, adapter=name, cache_salt="scores")
            for name in ("", *NAMES)
        ),
    )
    for name in ("", *NAMES):
        with torch.inference_mode():
            logits = served.alone(name)(torch.tensor([prompt + scored])).logits[0].log_softmax(-1)
        own = [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(scored)]
        assert [token.logprob for token in got.tokens(name)] == pytest.approx(own, abs=1e-4)


def test_computed_prefixes_are_reused_within_one_adapter_only(served: Served) -> None:
    prompt = random_prompts(30, seed=7)[0]

    def reused(adapter: str) -> int:
        one = Generate(stream_id=0, prompt=prompt, adapter=adapter, max_tokens=2)
        return answers(served.engine, one).counters.reused_tokens

    assert [reused(name) for name in ("legal", "", "type", "legal", "none", "type")] == [0, 0, 0, 29, 29, 29]


def test_an_unknown_adapter_is_refused_with_the_known_ones(served: Served) -> None:
    one = Generate(stream_id=0, prompt=PROMPTS[0], adapter="Legal", max_tokens=1)
    assert answers(served.engine, one).error() == (
        "adapter: 'Legal' is not served; choose one of legal, Poems-2, type, none."
    )
    assert served.engine.model_info()["adapters"] == list(NAMES)


def test_a_model_without_adapters_says_so() -> None:
    engine = start(build("llama"))
    one = Generate(stream_id=0, prompt=PROMPTS[0], adapter="legal", max_tokens=1)
    assert answers(engine, one).error() == "adapter: 'legal' is not served, nor is any other; leave it empty."
    assert engine.model_info()["adapters"] == []
    engine.stop()


def test_completions_choices_and_the_scored_prompt_take_the_prompts_adapter(served: Served) -> None:
    generate = Generate(stream_id=0, prompt=PROMPTS[0], text=True, adapter="legal")
    sampled = Completions(generate, served.engine.tokenizer, "json", n=3, prompt_logprobs=True)
    choices = Generate(stream_id=0, prompt=PROMPTS[0], text=True, adapter="legal", choices=["a", "b"])
    compared = Completions(choices, served.engine.tokenizer, "json")
    operations = [*sampled.operations, *compared.operations]
    assert [each.adapter for each in operations if isinstance(each, Generate | Score)] == ["legal"] * 6


def test_the_manifest_names_the_adapters_and_the_command_that_fetches_them(served: Served, tmp_path: Path) -> None:
    manifest = read_manifest(served.weights)
    assert manifest.adapters == {name: Adapter(str(source), None) for name, source in served.sources.items()}
    assert {f"adapters/{name}/adapter_model.safetensors" for name in NAMES} <= set(manifest.files)
    command = fetch_command(served.weights, manifest)
    assert all(f"--adapter {name}={source}" in command for name, source in served.sources.items())
    again = tmp_path / "weights"
    shutil.copytree(served.weights, again)
    download(str(served.base), None, again)
    assert read_manifest(again).adapters == {}
    assert not (again / "adapters").exists()


def test_the_models_own_caches_serve_adapters_too(tmp_path: Path) -> None:
    source = lora(build("mamba"), tmp_path / "lora", 1, target_modules=["in_proj", "x_proj"])
    own: Any = PeftModel.from_pretrained(build("mamba"), str(source)).eval()
    plain = build("mamba")
    PeftModel.from_pretrained(plain, str(source), adapter_name="-a")
    engine = start(plain, names=["a"])
    assert isinstance(engine.runner, CacheRunner)
    got = answers(
        engine,
        *(
            Generate(stream_id=i, prompt=prompt, adapter="a" if i % 2 else "", max_tokens=8)
            for i, prompt in enumerate(PROMPTS[:4])
        ),
    )
    engine.stop()
    expected = [own_greedy(own if i % 2 else build("mamba"), prompt, 8) for i, prompt in enumerate(PROMPTS[:4])]
    assert [got.ids(i) for i in range(4)] == expected


def test_an_adapter_of_experts_that_would_mix_rows_is_refused(tmp_path: Path) -> None:
    """Experts see the tokens of all rows, so that no name belongs to a row of what they see."""
    model = build("llama")
    experts: Any = model
    for layer in experts.model.layers:
        layer.mlp = Shuffling(layer.mlp)
    source = lora(model, tmp_path / "lora", 1, target_modules=["up_proj"])
    PeftModel.from_pretrained(model, str(source), adapter_name="-a")
    with pytest.raises(UnsupportedModel, match=r"with adapters side by side .* Merge one"):
        open_runner(model, 2**20, names=["a"])


class Shuffling(torch.nn.Module):
    """Routes tokens as a mixture of experts does: one by one, whatever row they are of."""

    def __init__(self, expert: torch.nn.Module) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = self.expert(hidden.flatten(0, 1))
        return flat.view_as(hidden)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "sets use_dora, which is not served beside other adapters"),
        ({"bias": "all", "target_modules": ["q_proj"]}, "trains biases, which is not served beside"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "sets modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "holds base_model.model.model.embed_tokens"),
        (
            {"target_modules": ["lm_head"], "embeddings": False},
            "changes the output layer, which is not served beside other adapters",
        ),
    ],
)
def test_an_adapter_that_cannot_share_a_batch_is_refused(
    settings: dict[str, Any], said: str, served: Served, tmp_path: Path
) -> None:
    source = lora(build("llama"), tmp_path / "lora", 1, **settings)
    with refusal(f"{source} {said}", "without a name"):
        download(str(served.base), None, tmp_path / "weights", named={"a": str(source)})
        load(tmp_path / "weights", "float32", "cpu")


@pytest.mark.parametrize("name", ["", "none", "a/b", "..", "a.b", "a_b", "x" * 65])
def test_a_name_that_is_no_plain_word_is_refused(name: str, served: Served, tmp_path: Path) -> None:
    with refusal("choose a name of at most 64 letters, digits and hyphens"):
        download(str(served.base), None, tmp_path, named={name: str(served.sources["legal"])})


def test_adapter_options_with_a_name_are_the_named_ones() -> None:
    assert chosen_adapters(["org/a@v1", "b=org/b", "c-2=/x=y/z"]) == ("org/a@v1", {"b": "org/b", "c-2": "/x=y/z"})
    assert chosen_adapters(["./x=y/z"]) == ("./x=y/z", {})
    with refusal("only one is merged; give several as --adapter NAME=SOURCE"):
        chosen_adapters(["org/a", "org/b"])
    with refusal("b is given twice"):
        chosen_adapters(["b=org/a", "b=org/b"])


def test_a_merged_adapter_and_named_ones_exclude_each_other(served: Served, tmp_path: Path) -> None:
    source = str(served.sources["legal"])
    with refusal("would be merged, and so change the model that a were trained for"):
        download(str(served.base), None, tmp_path, adapter=source, named={"a": source})


def test_encoder_decoders_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="served side by side with decoders only"):
        open_runner(models.build("t5", AutoModelForSeq2SeqLM, decoder=False), 2**20, names=["a"])
