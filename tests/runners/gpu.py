"""Packed runners for tests on a CPU, which computes by the reference of FlashAttention."""

from typing import Any

import torch
from transformers import PreTrainedModel

from lmtp.engine.engine import Engine, LoadedModel
from lmtp.runners.extents import Pool
from lmtp.runners.model import limits_of
from lmtp.runners.packed import PackedRunner, PackedStep
from lmtp.runners.slot_runner import SlotStep, layers_of


def packed(model: PreTrainedModel, tokens: int = 2000) -> PackedRunner:
    """A runner over a pool of so many tokens, in which no step is recorded."""
    layers = layers_of(model)
    step = PackedStep(SlotStep(model), layers)
    return PackedRunner(step, Pool(layers, model.dtype, tokens), limits_of(model).context)


def start(runner: PackedRunner) -> Engine:
    """An engine over a runner on the CPU. It knows no texts."""

    def open_model() -> LoadedModel:
        torch.set_num_threads(1)  # small operations are faster without helping threads
        tokenizer: Any = None
        return LoadedModel(runner.step.model, tokenizer, runner)

    return Engine(open_model)
