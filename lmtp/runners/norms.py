"""RMS norms (Zhang and Sennrich 2019) by PyTorch's fused kernel.

In Transformers' code a norm is eight operations. On a GPU each of them is a kernel, and the time of a small step is
mostly that of starting its kernels.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

ROWS = 4
"""How many random vectors prove that a module computes what the kernel does."""


class FusedNorms:
    """A model's RMS norms, whose code is exchanged for the fused kernel while a step runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Find the modules that are such norms: in float32, each of their classes gives what the kernel gives."""
        kinds: dict[type[nn.Module], bool] = {}
        self._fused: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        for module in model.modules():
            if not _may_be_norm(module):
                continue
            kind = type(module)
            if kind not in kinds:
                kinds[kind] = _is_norm(module)
            if kinds[kind]:
                self._fused.append((module, _kernel(module)))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the kernel compute the norms."""
        for module, kernel in self._fused:
            module.__dict__["forward"] = kernel  # not by setattr, which looks for parameters first
        try:
            yield
        finally:
            for module, _ in self._fused:
                del module.__dict__["forward"]


def _kernel(module: Any) -> Callable[[Tensor], Tensor]:
    return functools.partial(_norm, weight=module.weight, epsilon=module.variance_epsilon)


def _norm(vectors: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return functional.rms_norm(vectors, weight.shape, weight, epsilon)


def _may_be_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 1
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and "forward" not in module.__dict__  # exchanged by someone else
    )


@torch.inference_mode()
def _is_norm(module: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    size, device = module.weight.shape[0], module.weight.device
    weight, vectors = (torch.randn(*rows, size, generator=generator).to(device) for rows in ((), (ROWS,)))
    try:
        own = functional_call(module, {"weight": weight}, (vectors,))
        return torch.allclose(own, _norm(vectors, weight, module.variance_epsilon), rtol=1e-5, atol=1e-6)
    except Exception:  # whatever the module's code raises, it is no such norm
        return False
