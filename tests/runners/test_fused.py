"""What is exchanged of a model's code for fewer kernels, and what it computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmtp.runners.fused import ROTARY, Fused
from tests.tiny import build


def exchanged(model: Any) -> tuple[int, int]:
    """How many norms and how many rotary functions are exchanged."""
    names = [name for _, name, _ in Fused(model)._exchanged]
    return names.count("forward"), names.count(ROTARY)


@pytest.mark.parametrize(
    ("name", "norms", "rotary"),
    [
        ("llama", 5, 1),
        ("mistral", 5, 1),
        ("qwen3_moe", 9, 1),
        ("gpt_oss", 5, 0),
        ("gpt2", 0, 0),
        ("gpt_neox", 0, 1),
        ("gemma2", 0, 1),
    ],
)
def test_every_rms_norm_and_rotary_function_is_exchanged_and_nothing_else(name: str, norms: int, rotary: int) -> None:
    """GPT-OSS has a rotary function of its own kind."""
    assert exchanged(build(name)) == (norms, rotary)


def test_the_models_own_code_does_not_run_and_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("llama")
    code = __import__(type(model).__module__, fromlist=[ROTARY])
    fused, ids = Fused(model), torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        expected = model(ids).logits
        with monkeypatch.context() as patch:
            patch.setattr(type(model.model.norm), "forward", lambda *_: pytest.fail("the norm's own code ran"))
            patch.setattr(code, ROTARY, lambda *_: pytest.fail("the function's own code ran"))
            with fused.in_use():
                torch.testing.assert_close(model(ids).logits, expected)
            with pytest.raises(pytest.fail.Exception, match="own code"):
                model(ids)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


def test_an_error_leaves_the_models_own_code_in_place() -> None:
    model: Any = build("llama")
    expected = model(torch.tensor([[5, 6, 7]])).logits
    with pytest.raises(ZeroDivisionError), Fused(model).in_use():
        raise ZeroDivisionError
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, expected)


def plain(self: Any, x: torch.Tensor, root: Callable[[torch.Tensor, float], torch.Tensor]) -> torch.Tensor:
    return x * root(x.pow(2).mean(-1, keepdim=True), self.variance_epsilon) * self.weight


@pytest.mark.parametrize(
    "other",
    [
        lambda self, x: plain(self, x, lambda square, epsilon: torch.rsqrt(square)),
        lambda self, x: plain(self, x, lambda square, epsilon: 1 / (square.sqrt() + epsilon)),
        lambda self, x: plain(self, x, lambda square, epsilon: torch.rsqrt(square + 10 * epsilon)),
        lambda self, x: plain(self, x, lambda square, epsilon: torch.rsqrt(square + epsilon)) + x,
        lambda self, x: plain(self, x, lambda square, epsilon: torch.rsqrt(square + epsilon)) / self.weight,
        lambda self, x, gate=None: plain(self, x, lambda square, epsilon: torch.rsqrt(square + epsilon)),
        lambda self: 0,
    ],
)
def test_a_norm_that_computes_something_else_keeps_its_code(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("llama")
    monkeypatch.setattr(type(model.model.norm), "forward", other)
    assert exchanged(model) == (0, 1)


def test_a_norm_in_another_dtype_or_whose_code_was_exchanged_by_others_keeps_it() -> None:
    model: Any = build("llama")
    model.model.norm.forward = model.model.norm.forward
    model.model.layers[0].input_layernorm.to(torch.float64)
    assert exchanged(model) == (3, 1)


@pytest.mark.parametrize(
    "other",
    [
        lambda q, k, cos, sin: (q, k),
        lambda q, k=None, cos=None, sin=None, unsqueeze_dim=1: (q, k),
        lambda q, k, cos, sin, unsqueeze_dim=1: (q * cos, k * sin),
        lambda q, k, cos, sin, unsqueeze_dim=1: (q / q.norm(), k),
    ],
)
def test_a_rotary_function_that_computes_something_else_stays(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("llama")
    monkeypatch.setattr(__import__(type(model).__module__, fromlist=[ROTARY]), ROTARY, other)
    assert exchanged(model) == (5, 0)


def test_a_rotary_function_that_is_asked_for_another_dimension_is_the_models_own() -> None:
    model: Any = build("llama")
    code: Any = __import__(type(model).__module__, fromlist=[ROTARY])
    q, k, cos, sin = (torch.randn(1, 3, heads, 8) for heads in (4, 2, 1, 1))
    arguments = (q, k, cos[:, :, 0], sin[:, :, 0])
    expected = code.apply_rotary_pos_emb(*arguments, unsqueeze_dim=2)
    with Fused(model).in_use():
        for got in (
            code.apply_rotary_pos_emb(*arguments, unsqueeze_dim=2),
            code.apply_rotary_pos_emb(*arguments, 2),
        ):
            assert all(torch.equal(ours, own) for ours, own in zip(got, expected, strict=True))
