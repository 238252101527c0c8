"""llama.cpp as a peer: the GGUF is the same model, and its programs are asked for the same work."""

import json
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.llama_cpp_side import LlamaCpp, write_gguf
from tests.tiny import build, own_logits, random_prompts

PROGRAM = """#!{python}
import json, sys
option = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "-pg" in option:
    print(json.dumps([{{"samples_ns": [1500000000], "asked": option["-pg"]}}]))
else:
    print("a line of its log")
    print(json.dumps({{"t": float(option["-npl"]) + float(option["-npp"]) / 100 + float(option["-ntg"]) / 10000}}))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights")
    model = build("llama", tie_word_embeddings=True)
    config = model.config.to_dict() | {"rope_theta": 10000.0}
    (directory / "config.json").write_text(json.dumps(config))
    named = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(named, directory / "model.safetensors")
    return directory


def test_the_gguf_is_the_same_model_to_transformers(weights: Path, tmp_path: Path) -> None:
    write_gguf(weights, tmp_path / "model.gguf")
    # Transformers' own reader of GGUFs, which undoes the order of llama.cpp's rotary embedding.
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    (prompt,) = random_prompts(20)
    assert torch.allclose(
        own_logits(read, prompt), own_logits(build("llama", tie_word_embeddings=True), prompt), atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_have_the_dtype_of_the_checkpoint(weights: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "config.json").write_bytes((weights / "config.json").read_bytes())
    narrow = {name: tensor.to(dtype) for name, tensor in load_file(weights / "model.safetensors").items()}
    save_file(narrow, tmp_path / "model.safetensors")
    write_gguf(tmp_path, tmp_path / "model.gguf")
    tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    assert {(len(tensor.shape), tensor.tensor_type.name) for tensor in tensors} == {
        (1, "F32"),
        (2, "BF16" if dtype == torch.bfloat16 else "F16"),
    }


def test_a_quantized_gguf_is_within_half_a_step_of_every_block(weights: Path, tmp_path: Path) -> None:
    write_gguf(weights, tmp_path / "model.gguf", quantized=True)
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors} == {"Q8_0", "F32"}
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    for name, weight in build("llama", tie_word_embeddings=True).named_parameters():
        distance = (read.get_parameter(name) - weight).abs()
        if weight.dim() == 1:
            assert not distance.any()
            continue
        blocks = weight.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True)
        # The scale is rounded to 16 bits.
        assert (distance.unflatten(1, (-1, 32)) <= blocks * (0.5 / 127 + 2**-11)).all()


def test_one_stream_and_several_are_asked_of_its_two_programs(weights: Path, tmp_path: Path) -> None:
    for name in ("llama-bench", "llama-batched-bench"):
        (tmp_path / name).write_text(PROGRAM.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    peer = LlamaCpp(str(tmp_path / "llama-bench"), str(weights), False, str(tmp_path))
    assert peer.generate([[1] * 5], 64) == {"seconds": 1.5, "tokens": 64}
    assert peer.generate([[1] * 5] * 8, 64) == {"seconds": pytest.approx(8.0564), "tokens": 512}


def test_a_path_without_both_programs_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="LLAMA_BENCH names llama-bench of a build"):
        LlamaCpp(str(tmp_path / "llama-bench"), str(weights), False, str(tmp_path))
