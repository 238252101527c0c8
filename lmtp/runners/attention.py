"""Attention of a compiled step as an operation of our own, for which attention.cpp is the code."""

import contextlib
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

CODE = Path(__file__).with_suffix(".cpp")

torch.library.define("lmtp::attend", "(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor")


@torch.library.register_fake("lmtp::attend")
def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """What attention.cpp computes: ``[rows, q, heads, dim]``, as the output projection reads it."""
    rows, heads, q, _ = query.shape
    return query.new_empty(rows, q, heads, value.shape[3])


@contextlib.contextmanager
def own_attention() -> Iterator[None]:
    """Trace attention as this operation."""
    attend = functional.scaled_dot_product_attention

    def own(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is None or attn_mask.dtype != query.dtype:
            return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        output: Tensor = torch.ops.lmtp.attend(query, key, value, attn_mask, scale)
        return output.transpose(1, 2)

    with (
        unittest.mock.patch("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", return_value=True),
        unittest.mock.patch("torch.nn.functional.scaled_dot_product_attention", own),
    ):
        yield
