"""The self-check: it passes what computes the model's logits, and refuses what does not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmtp.runners.model import UnsupportedModel
from lmtp.runners.runner import open_runner
from lmtp.runners.selfcheck import Reference, check_slots
from lmtp.runners.slot_runner import SlotRunner, SlotStep, layers_of
from lmtp.runners.step import StepInputs
from tests.tiny import VOCABULARY, build


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


class Faster:
    """A step that calls the model's own code and changes what it returns."""

    description = "a test's step"
    max_first_chunk = 511

    def __init__(self, step: SlotStep, change: Callable[[Tensor], Tensor]) -> None:
        self._step = step
        self._change = change

    def __call__(self, inputs: StepInputs) -> Tensor:
        return self._change(self._step(inputs))


def check(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> None:
    step = SlotStep(model)
    check_slots(step, layers_of(model), Reference.of(model), Faster(step, change))


def test_a_step_that_returns_the_same_tensor_every_time_passes(model: PreTrainedModel) -> None:
    output = torch.zeros(64, VOCABULARY)

    def reuse(logits: Tensor) -> Tensor:
        output[: len(logits)] = logits
        return output[: len(logits)]

    check(model, reuse)


@pytest.mark.parametrize(
    "change",
    [lambda logits: logits.flip(0), lambda logits: logits * 1.01, lambda logits: torch.full_like(logits, torch.nan)],
    ids=["other rows", "another scale", "no numbers"],
)
def test_a_step_that_returns_other_logits_is_refused(
    model: PreTrainedModel, change: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(UnsupportedModel, match="positions differ from the model's own forward pass"):
        check(model, change)


def test_a_step_that_remembers_its_first_result_is_refused(model: PreTrainedModel) -> None:
    """As a CUDA graph does whose inputs are not updated before a replay."""
    seen: dict[int, Tensor] = {}
    with pytest.raises(UnsupportedModel, match="positions differ"):
        check(model, lambda logits: seen.setdefault(len(logits), logits.clone()))


def test_a_model_that_slots_serve_gets_them_and_the_limits_of_its_steps(model: PreTrainedModel) -> None:
    runner = open_runner(model)
    assert isinstance(runner, SlotRunner)
    assert (runner.description, runner.reason) == ("slots", "")
    assert runner.step_limits.drafts
    assert not open_runner(build("qwen3_moe")).step_limits.drafts


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "its cache is not one of keys and values"),
        ("phi3_longrope", "its rotary embedding changes with the longest row of the batch"),
        ("bloom", "ValueError: too many values to unpack"),
    ],
)
def test_another_model_gets_its_own_caches_and_a_reason(name: str, reason: str) -> None:
    runner = open_runner(build(name))
    assert runner.description == "the model's own caches, one stream at a time"
    assert runner.reason.startswith("slots do not serve it: ")
    assert reason in runner.reason
