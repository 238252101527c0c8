"""`--model-arg`: keywords of Transformers' from_pretrained, checked before the download and kept in the manifest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, LlamaConfig, LlamaForCausalLM

from lmtp.weights.arguments import configuration, parse
from lmtp.weights.load import load
from lmtp.weights.manifest import WeightsError, fetch_command, read_manifest
from tests.hub import Hub
from tests.tiny import BASE
from tests.weights.conftest import Download, Script
from tests.weights.helpers import refusal, saved, seeded

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_arguments_are_read_as_json() -> None:
    assert parse(['attn_implementation="eager"', 'torch_dtype="float32"', 'rope_scaling={"factor": 2.0}']) == {
        "attn_implementation": "eager",
        "dtype": "float32",
        "rope_scaling": {"factor": 2.0},
    }


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("attn_implementation", "give NAME=JSON"),
        ("attn_implementation=eager", "eager is no JSON; a text is written 'attn_implementation=\"text\"'"),
        ("revision=1", "use --revision instead"),
        ("trust_remote_code=true", "use --trust-remote-code instead"),
        ("load_in=4", "use --load-in instead"),
    ],
)
def test_an_argument_of_another_form_is_an_error_that_says_how_to_write_it(pair: str, said: str) -> None:
    with refusal(said):
        parse([pair])


def test_arguments_reach_the_model(tiny: Path, tmp_path: Path) -> None:
    model = seeded(LlamaForCausalLM(LlamaConfig(**BASE, rope_parameters={"rope_type": "default", "rope_theta": 500.0})))
    arguments: dict[str, Any] = {"attn_implementation": "eager", "rope_scaling": YARN, "dtype": "float16"}
    loaded = load(saved(model, tmp_path / "weights", tiny, **arguments), device="cpu")
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.dtype == loaded.model.dtype == torch.float16
    directory = tmp_path / "weights"
    rope = {**YARN, "rope_theta": 500.0}
    own = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, rope_parameters=rope)
    ids = torch.arange(100)[None]
    expected = own(ids).logits
    assert torch.allclose(load(directory, "float32", "cpu").model(ids).logits, expected, atol=1e-5)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2)


def test_an_argument_of_the_text_part_of_a_multimodal_model_is_put_there(tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path)
    config = configuration(tmp_path, {"sliding_window": 77, "tie_word_embeddings": False}, "org/name", "")
    assert config.text_config.sliding_window == 77
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is False


def test_an_unknown_argument_is_refused_with_a_suggestion_before_the_weights_are_fetched(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    with refusal("org/tiny takes no argument 'atn_implementation': did you mean attn_implementation?"):
        download("org/tiny", tmp_path, atn_implementation="eager")
    with refusal("org/tiny takes no argument 'max_positions_embeddings': did you mean max_position_embeddings?"):
        download("org/tiny", tmp_path, max_positions_embeddings=5)
    with pytest.raises(WeightsError, match=r"'_name_or_path': (?!did you mean _)"):
        download("org/tiny", tmp_path, _name_or_path="x")
    for name in ("cache_dir", "state_dict", "__class__", "to_dict", "config"):
        with refusal("org/tiny takes no argument"):
            download("org/tiny", tmp_path, **{name: "x"})
    with refusal("The argument dtype is 'int4': choose one of auto, float32"):
        download("org/tiny", tmp_path, dtype="int4")
    with refusal("--load-in and --model-arg quantization_config exclude each other"):
        download("org/tiny", tmp_path, load_in="4bit", quantization_config={})
    assert hub.fetched() == {"config.json"}


def test_the_command_records_arguments_and_the_command_that_fetches_again_repeats_them(
    script: Script, tiny: Path, tmp_path: Path
) -> None:
    target = tmp_path / "weights"
    options = ("--load-in", "4bit", "--model-arg", 'attn_implementation="eager"')
    assert script(tiny, "--to", target, *options).returncode == 0
    manifest = read_manifest(target)
    assert manifest.model_args == {"trust_remote_code": False, "attn_implementation": "eager", "load_in": "4bit"}
    command = fetch_command(target, manifest)
    assert command == f"script/download_weights {tiny} --model-arg 'attn_implementation=\"eager\"' --load-in 4bit"


def test_a_manifest_whose_trust_is_no_boolean_is_damaged(weights: Path) -> None:
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["model_args"]["trust_remote_code"] = "no"
    (weights / "manifest.json").write_text(json.dumps(manifest))
    with refusal("manifest.json is damaged (trust_remote_code is neither true nor false"):
        read_manifest(weights)


def test_kernels_of_a_repository_are_refused_and_the_named_argument_takes_their_place(tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["_attn_implementation"] = "org/kernels"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with refusal(
        "org/name names attn_implementation 'org/kernels'", "give --model-arg 'attn_implementation=\"eager\"'"
    ):
        configuration(tmp_path, {}, "org/name", "")
    configuration(tmp_path, {"attn_implementation": "eager"}, "org/name", "")
    with refusal("org/name names attn_implementation 'org/other'"):
        configuration(tmp_path, {"attn_implementation": "org/other"}, "org/name", "")
