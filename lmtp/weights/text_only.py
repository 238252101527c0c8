"""Free what a multimodal model needs for images, video and sound: only text is served."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lmtp.weights.manifest import WeightsError, first_line


@torch.inference_mode()
def keep_text_only(model: PreTrainedModel) -> list[str]:
    """Remove the parts of the model that plain text never runs through; returns their names.

    The parts are looked for at the top of the model and of its base model. The logits afterwards are compared with
    those before; if they differ or the model then fails, it is left whole.
    Raises WeightsError if the whole model fails.
    """
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    try:
        with _called(model) as called:
            before = model(input_ids=ids).logits
    except Exception as error:  # whatever the model's code raises without an image
        raise WeightsError(
            f"A {type(model).__name__} does not take plain text ({first_line(error)[:200]}): choose another model."
        ) from error
    unused = [
        (parent, name, child)
        for parent in dict.fromkeys((model, model.base_model))
        for name, child in parent.named_children()
        if not called.intersection(child.modules()) and any(True for _ in child.parameters())
    ]
    for parent, name, _ in unused:
        setattr(parent, name, None)
    with contextlib.suppress(Exception):  # whatever the model's code raises where a part is missing
        if torch.equal(model(input_ids=ids).logits, before):
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            return [name for _, name, _ in unused]
    for parent, name, child in unused:
        setattr(parent, name, child)
    return []


@contextlib.contextmanager
def _called(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The modules that run inside the block."""
    called: set[nn.Module] = set()

    def note(module: nn.Module, *_: Any) -> None:
        called.add(module)

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
