"""Parts of a model's code as fewer kernels. On a GPU a small step takes about as long as it takes to start its kernels.

RMS norms (Zhang and Sennrich 2019), eight operations in Transformers' code, become PyTorch's fused kernel. Rotary
embeddings (Su et al. 2021) rotate queries and keys together. Each exchange first proves that it computes in float32
what the model's own code does. In 16 bits a norm rounds once less.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

EMPTY = inspect.Parameter.empty

SCALES = (1.0, 1e-2, 1e-3, 1e-5)
"""Sizes of the random vectors that prove a norm: small ones show what it adds to the variance, and where."""

ROTARY = "apply_rotary_pos_emb"
ROTARY_ARGUMENTS = {"q": EMPTY, "k": EMPTY, "cos": EMPTY, "sin": EMPTY, "unsqueeze_dim": 1}
"""The rotary function's name in Transformers' code, and its arguments with their defaults."""

Rotary = Callable[..., tuple[Tensor, Tensor]]


class Fused:
    """What is exchanged of a model's code while a step runs. The code of all models of its type is exchanged, so no two
    of them run at once in a process."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Find the norms and the rotary functions that can be exchanged."""
        self._exchanged: list[tuple[dict[str, Any], str, Any]] = [
            (module.__dict__, "forward", functools.partial(_norm, module))  # since setattr looks for parameters first
            for module in model.modules()
            if _may_be_norm(module, model.dtype) and _is_norm(module)
        ]
        for source in {type(module).__module__ for module in model.modules()} & sys.modules.keys():
            code = vars(sys.modules[source])
            if (rotate := code.get(ROTARY)) and _is_rotary(rotate):
                self._exchanged.append((code, ROTARY, functools.partial(_rotate_together, rotate)))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Exchange them."""
        before = [names.get(name) for names, name, _ in self._exchanged]
        for names, name, fused in self._exchanged:
            names[name] = fused
        try:
            yield
        finally:
            for (names, name, _), own in zip(self._exchanged, before, strict=True):
                if own is None:
                    del names[name]  # a module has its class's forward
                else:
                    names[name] = own


def _norm(module: Any, vectors: Tensor) -> Tensor:
    return functional.rms_norm(vectors, module.weight.shape, module.weight, module.variance_epsilon)


def _may_be_norm(module: Any, dtype: torch.dtype) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 1
        and weight.dtype == dtype  # else the kernel takes plain operations
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and "forward" not in module.__dict__  # exchanged by someone else
        and len(inspect.signature(module.forward).parameters) == 1
    )


@torch.inference_mode()
def _is_norm(module: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    size, device = module.weight.shape[0], module.weight.device
    weight, vectors = (torch.randn(*rows, size, generator=generator).to(device) for rows in ((), (len(SCALES),)))
    vectors = vectors * torch.tensor(SCALES).to(device)[:, None]
    try:
        own = functional_call(module, {"weight": weight}, (vectors,))
        kernel = functional.rms_norm(vectors, weight.shape, weight, module.variance_epsilon)
        return torch.allclose(own, kernel, rtol=1e-4, atol=0)
    except Exception:  # whatever the module's code raises, it is no such norm
        return False


def _rotate_together(
    rotate: Rotary, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    if unsqueeze_dim != 1:
        return rotate(q, k, cos, sin, unsqueeze_dim)
    heads = q.shape[1]
    # As they lie in memory: by token, then by head.
    both = torch.cat([q.transpose(1, 2), k.transpose(1, 2)], 2).transpose(1, 2)
    rotated, _ = rotate(both, k[:, :0], cos, sin)
    return rotated[:, :heads], rotated[:, heads:]


@torch.inference_mode()
def _is_rotary(rotate: Rotary) -> bool:
    if {name: each.default for name, each in inspect.signature(rotate).parameters.items()} != ROTARY_ARGUMENTS:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 16, generator=generator) for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 3, 16, generator=generator)
    try:
        both = zip(rotate(q, k, cos, sin), _rotate_together(rotate, q, k, cos, sin), strict=True)
        return all(torch.equal(own, together) for own, together in both)
    except Exception:  # whatever the function raises, it is no such one
        return False
