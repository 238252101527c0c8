"""llama.cpp as a peer: its own benchmark programs, on a GGUF of the demo model.

`llama-bench` measures one stream, `llama-batched-bench` beside it several. Both decode random tokens, without choosing
any of them from the logits and without text. The weights have the checkpoint's dtype, whatever the other sides compute
in: with few rows llama.cpp is fastest where it reads 16 bits a weight. Or they have 8 bits, in Q8_0.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

GGUF_TYPES = {
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.float32: gguf.GGMLQuantizationType.F32,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""A GGUF's names of a layer's weights."""
RUN_SECONDS = 600.0


class LlamaCpp:
    """The demo model in llama.cpp."""

    def __init__(self, bench: str, weights: str, quantized: bool, directory: str) -> None:
        """``bench``: the program llama-bench; ``quantized``: to Q8_0; ``directory``: where the GGUF goes."""
        self._bench = Path(bench).resolve()
        self._batched_bench = self._bench.with_name("llama-batched-bench")
        for program in (self._bench, self._batched_bench):
            if not os.access(program, os.X_OK) or program.is_dir():
                raise FileNotFoundError(f"there is no program {program}; LLAMA_BENCH names llama-bench of a build")
        self._model = Path(directory) / "model.gguf"
        write_gguf(Path(weights), self._model, quantized)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Decode as many streams of as many tokens, all prompts of one length. Returns seconds and new tokens."""
        streams, length = len(prompts), len(prompts[0])
        seconds = self._one(length, max_tokens) if streams == 1 else self._several(streams, length, max_tokens)
        return {"seconds": seconds, "tokens": streams * max_tokens}

    def _one(self, length: int, max_tokens: int) -> float:
        nothing_else = ["-p", "0", "-n", "0", "-r", "1", "-o", "json"]
        output = self._run(self._bench, "-pg", f"{length},{max_tokens}", *nothing_else)
        (test,) = json.loads(output)
        return float(test["samples_ns"][0]) / 1e9

    def _several(self, streams: int, length: int, max_tokens: int) -> float:
        sizes = ["-npp", str(length), "-ntg", str(max_tokens), "-npl", str(streams)]
        context = streams * (length + max_tokens)
        output = self._run(self._batched_bench, *sizes, "-c", str(context), "--output-format", "jsonl")
        (test,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        return float(test["t"])

    def _run(self, program: Path, *arguments: str) -> str:
        """Its standard output. Raises RuntimeError with its log if it fails."""
        threads = ["-t", str(torch.get_num_threads())]
        # A wheel's libraries lie beside its programs.
        libraries = f"{program.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        run = subprocess.run(
            [str(program), "-m", str(self._model), *threads, *arguments],
            env=os.environ | {"LD_LIBRARY_PATH": libraries},
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
        )
        if run.returncode:
            raise RuntimeError(f"{program.name} failed:\n{run.stderr[-2000:]}")
        return run.stdout


def write_gguf(weights: Path, path: Path, quantized: bool = False) -> None:
    """Write a Llama model's safetensors as a GGUF, its matrices in their own dtype or all in Q8_0.

    It has no tokenizer: llama.cpp's benchmarks need only token ids.
    """
    config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in load_file(weights / "model.safetensors").items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        for projection, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if projection in name:
                tensor = _interleaved(tensor, count)
        _add(writer, _gguf_name(name), tensor, quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, quantized: bool) -> None:
    """Add a tensor. llama.cpp wants vectors in float32; numpy has no bfloat16, so bytes are given."""
    if tensor.dim() == 1:
        tensor = tensor.float()
    elif quantized:
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), q8_0), raw_dtype=q8_0)
        return
    writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=GGUF_TYPES[tensor.dtype])


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order of llama.cpp's rotary embedding for this architecture: both halves of a head in turns."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _gguf_name(name: str) -> str:
    """A tensor's name in a GGUF, by its name in Transformers. Raises ValueError if it has none."""
    outside = {
        "model.embed_tokens.weight": "token_embd",
        "model.norm.weight": "output_norm",
        "lm_head.weight": "output",
    }
    if name in outside:
        return f"{outside[name]}.weight"
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    if part not in NAMES:
        raise ValueError(f"the tensor {name} is not one of a plain Llama model")
    return f"blk.{layer}.{NAMES[part]}.weight"
