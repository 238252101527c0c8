"""Linear layers of a compiled step as an operation of our own, for which linear.cpp is the code.

It computes in float32. Decoding takes as long as reading the weights, and most checkpoints keep them in 16 bits: so the
operation reads them in those 16 bits, which loses nothing. Weights that torchao quantized are read as its 8 bits; their
scales are multiplied afterwards.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

CODE = Path(__file__).with_suffix(".cpp")
PANEL = 16  # outputs that linear.cpp computes together

torch.library.define("lmtp::linear", "(Tensor input, Tensor panels, SymInt outputs) -> Tensor")


@torch.library.register_fake("lmtp::linear")
def _linear(input: Tensor, panels: Tensor, outputs: int) -> Tensor:
    """What linear.cpp computes: ``[..., outputs]`` from ``[..., inputs]`` and the panels that `panels_of` makes."""
    return input.new_empty(*input.shape[:-1], outputs)


@contextlib.contextmanager
def own_linear(step: nn.Module) -> Iterator[None]:
    """Trace the module's plain linear layers in float32 as this operation, where the processor has AVX2 or AVX-512.

    Others stay as they are: subclasses, experts in one tensor, layers whose ``forward`` somebody replaced.
    """
    with contextlib.ExitStack() as replaced:
        for layer in step.modules() if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else ():
            if type(layer) in (nn.Linear, Conv1D) and "forward" not in vars(layer) and _is_served(layer.weight):
                replaced.callback(_restore, layer)
                _replace(layer)
        yield


def _is_served(weight: Any) -> bool:
    return (type(weight) is nn.Parameter or is_int8(weight)) and weight.dtype == torch.float32


def _replace(layer: Any) -> None:
    weight: Any = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    layer.register_buffer("panels", panels_of(weight))
    layer.register_buffer("scale", weight.scale.flatten() if is_int8(weight) else None)
    layer.forward = partial(_forward, layer, len(weight))


def _restore(layer: nn.Module) -> None:
    for buffer in ("panels", "scale"):
        layer._buffers.pop(buffer, None)
    vars(layer).pop("forward", None)


def _forward(layer: Any, outputs: int, input: Tensor) -> Tensor:
    output: Tensor = torch.ops.lmtp.linear(input, layer.panels, outputs)
    if layer.scale is not None:
        output = output * layer.scale
    return output if layer.bias is None else output + layer.bias


def is_int8(weight: Any) -> bool:
    """Whether torchao quantized the weight to 8 bits with one scale for each output and nothing else."""
    if type(weight).__name__ != "Int8Tensor":  # importing torchao takes seconds, and it may be absent
        return False
    shifted = weight.zero_point is not None and bool(weight.zero_point.any())
    quantizes_inputs = weight.act_quant_kwargs is not None or weight.act_pre_scale is not None
    return list(weight.block_size) == [1, weight.shape[1]] and not (shifted or quantizes_inputs)


def panels_of(weight: Tensor) -> Tensor:
    """A weight ``[outputs, inputs]`` as ``[panels, inputs, PANEL]``, in the narrowest dtype that keeps every number."""
    if is_int8(weight):
        weight = weight.qdata  # type: ignore[attr-defined]
    else:
        for dtype in (torch.bfloat16, torch.float16):
            if (narrow := weight.to(dtype)).to(weight.dtype).equal(weight):
                weight = narrow
                break
    filled = functional.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return filled.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
