"""Llama 4's attention temperature, which grows with the position, for rows of different lengths.

On layers without a rotary embedding the model's own code scales its queries by their positions, counted from the length
of the cache: the same for all rows. Here a hook on the query projection scales them by the positions that the model is
given. For a single text both are equal. Paper: Nakanishi, Scalable-Softmax (2025), https://arxiv.org/abs/2501.19399.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def scale_by_position(model: PreTrainedModel) -> set[str]:
    """Change the model so that its temperature follows ``position_ids``; a second call changes nothing.

    Returns the names of the configuration's lengths that rows need no longer share.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(_attention(module), "floor_scale")]
    for layer in layers:
        if layer.self_attn.attn_temperature_tuning and not layer.self_attn.use_rope:
            layer.self_attn.attn_temperature_tuning = False
            scale = _Scale(layer.self_attn)
            layer.register_forward_pre_hook(scale.note, with_kwargs=True)
            layer.self_attn.q_proj.register_forward_hook(scale.apply)
    return {"floor_scale"} if layers else set()


def _attention(layer: nn.Module) -> Any:
    return getattr(layer, "self_attn", None)


class _Scale:
    """What one layer's queries are scaled by."""

    def __init__(self, attention: Any) -> None:
        self._strength, self._floor = attention.attn_scale, attention.floor_scale
        self._positions = torch.empty(0)

    def note(self, _: nn.Module, __: object, kwargs: dict[str, Any]) -> None:
        """Take the positions ``[rows, q]`` or ``[1, q]`` of the layer's input."""
        self._positions = kwargs["position_ids"]

    def apply(self, _: nn.Module, __: object, queries: Tensor) -> Tensor:
        """Scale queries ``[rows, q, width]``."""
        steps = torch.floor((self._positions.to(queries.device).float() + 1.0) / self._floor)
        scales = torch.log1p(steps) * self._strength + 1.0
        return (queries * scales[..., None]).to(queries.dtype)
