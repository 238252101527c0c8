"""RMS norms by the fused kernel: which ones, and what they compute."""

import pytest
import torch

from lmtp.runners.norms import FusedNorms
from tests.tiny import build


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama", 5), ("mistral", 5), ("qwen3_moe", 9), ("gpt_oss", 5), ("gpt2", 0), ("gpt_neox", 0), ("gemma2", 0)],
)
def test_every_rms_norm_is_fused_and_nothing_else(name: str, count: int) -> None:
    assert len(FusedNorms(build(name))._fused) == count


def test_the_kernel_is_used_in_place_of_the_norms_code_and_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    norms, ids = FusedNorms(model), torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        expected = model(ids).logits
        own = type(model.model.norm)
        monkeypatch.setattr(own, "forward", lambda *_: pytest.fail("the norm's own code ran"))
        with norms.in_place():
            torch.testing.assert_close(model(ids).logits, expected)
        with pytest.raises(pytest.fail.Exception, match="own code"):
            model(ids)


def test_a_norm_that_computes_something_else_keeps_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    own = type(model.model.norm)
    forward = own.forward
    for other in (lambda self, x: forward(self, x) + x, lambda self, x: forward(self, x) / self.weight, lambda self: 0):
        monkeypatch.setattr(own, "forward", other)
        assert FusedNorms(model)._fused == []


def test_a_norm_whose_code_was_exchanged_by_others_keeps_theirs() -> None:
    model = build("llama")
    model.model.norm.forward = model.model.norm.forward
    assert len(FusedNorms(model)._fused) == 4
