"""The self-check: it passes what computes the model's logits, and refuses what does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmtp.runners.cache_runner import CacheRunner, Mode
from lmtp.runners.model import UnsupportedModel
from lmtp.runners.runner import open_runner
from lmtp.runners.selfcheck import Reference, check_caches, check_slots
from lmtp.runners.slot_runner import SlotRunner, SlotStep, layers_of
from lmtp.runners.step import Step, StepInputs, Stream
from tests import models
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


@pytest.fixture(scope="module")
def mamba() -> PreTrainedModel:
    return build("mamba")


def test_the_models_own_caches_pass(mamba: PreTrainedModel) -> None:
    for mode in Mode:
        check_caches(CacheRunner(mamba, 512, "", mode), mamba)


class OneCache(CacheRunner):
    """Streams that run together write into one cache, as if the state were in the model's modules."""

    def admit(self, stream: Stream) -> bool:
        admitted = super().admit(stream)
        self._caches = [self._caches[0]] * len(self._caches)
        return admitted


class Forgetful(CacheRunner):
    """A finished stream's cache is taken over without what is in it."""

    def release(self, stream: Stream, keep: bool = True) -> None:
        super().release(stream, keep)
        for cache in self._idle:
            cache.arguments = self._new_cache(torch.tensor([stream.tokens]))


class Louder(CacheRunner):
    """The logits have another scale."""

    def prepare(self, step: Step[Stream]) -> Callable[[], Tensor]:
        run = super().prepare(step)
        return lambda: run() * 1.01


@pytest.mark.parametrize("kind", [OneCache, Forgetful, Louder])
def test_caches_that_give_other_logits_are_refused(mamba: PreTrainedModel, kind: type[CacheRunner]) -> None:
    with pytest.raises(UnsupportedModel, match="of 17 positions differ from the model's own forward pass"):
        check_caches(kind(mamba, 512, ""), mamba)


def test_a_model_that_no_runner_serves_is_refused_with_what_was_found_and_what_to_do(
    mamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmtp.runners.runner.CacheRunner", Louder)
    with pytest.raises(UnsupportedModel) as refused:
        open_runner(mamba)
    assert str(refused.value) == (
        "No runner serves MambaForCausalLM as Transformers' own forward pass computes it: 17 of 17 positions differ from "
        "the model's own forward pass. Choose an architecture that docs/models.md lists as exact."
    )


def test_a_stream_waits_for_the_one_before_where_the_model_keeps_state_in_its_modules() -> None:
    runner = open_runner(models.build("recurrent_gemma"))
    assert runner.description == "the model's own state, one stream alone"
    first, second = (Stream([5, 6, 7], 8) for _ in range(2))
    assert runner.admit(first)
    assert not runner.admit(second)
    first.computed = 3
    runner.release(first)
    assert runner.admit(second)
    assert second.reused == 0


def test_the_reason_names_another_tolerance_than_the_models_own() -> None:
    model: Any = build("llama")
    assert open_runner(model).reason == ""
    model.is_loaded_in_8bit = True
    said = "its 8-bit kernels depend on the batch, so the self-check has the tolerance of bfloat16"
    assert open_runner(model).reason == said
