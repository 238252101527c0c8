"""Adapters served side by side: each row of a batch gets its own LoRA, or none, beside the same weights.

peft's LoRA layers take one adapter name for each row of their input (https://huggingface.co/docs/peft: mixed batches).
Here a hook on each layer hands them over, so that the model's own code runs unchanged.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lmtp.weights.adapters import key_of

BASE = "__base__"
"""peft's name for a row without an adapter."""


class Adapters:
    """The adapters that were attached to a model under these names. The name of no adapter is empty."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._rows: list[str] = []
        self._mixed = True
        self._layers: list[Any] = []
        if names:
            from peft.tuners.lora import LoraLayer  # only images with adapters have peft

            self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for layer in self._layers:
            layer.register_forward_pre_hook(self._choose, with_kwargs=True)

    def run(self, rows: Sequence[str], forward: Callable[[], Tensor]) -> Tensor:
        """Run the model on a batch with one adapter for each row."""
        self._rows = [key_of(name) if name else BASE for name in rows]
        try:
            return forward()
        finally:
            self._rows = []

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Let the model compute as peft does with one adapter for everything. Mixed batches are checked by it."""
        self._mixed = not name
        if name:
            for layer in self._layers:
                layer.set_adapter(key_of(name), inference_mode=True)
        try:
            yield
        finally:
            self._mixed = True

    def _choose(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Outside of `run` no row has an adapter."""
        if self._mixed:
            kwargs = {**kwargs, "adapter_names": self._rows or [BASE] * len(args[0])}
        return args, kwargs
