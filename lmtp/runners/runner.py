"""The runner: the one object that keeps the streams' state and runs steps. `open_runner` picks one for a model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmtp.runners.adapters import Adapters
from lmtp.runners.cache_runner import CacheRunner, modes_of
from lmtp.runners.compiled import CompiledStep
from lmtp.runners.encoder import open_encoder
from lmtp.runners.encoder_decoder import open_encoder_decoder
from lmtp.runners.extents import Pool
from lmtp.runners.graphs import Graphs
from lmtp.runners.model import UnsupportedModel, in_words, limits_of
from lmtp.runners.packed import PackedRunner, PackedStep
from lmtp.runners.selfcheck import CONTEXT, TOKENS, Reference, check_caches, check_packed, check_slots, with_tolerance
from lmtp.runners.slot_runner import SlotRunner, SlotStep, layers_of
from lmtp.runners.slots import MIN_TOKENS, Memory, check_budget
from lmtp.runners.step import Step, StepLimits, Stream

MAX_SLOTS = 256
GPU_RESERVE = 0.1
"""The share of GPU memory left for activations when the KV budget is chosen."""


class Runner(Protocol):
    """Keeps the state of streams and runs steps."""

    description: str
    """What serves the model, for setup's log and MODEL_INFO."""
    reason: str
    """Why a faster runner or step was rejected; empty if none was."""
    step_limits: StepLimits

    refusal: str
    """Why the system gave no memory when a stream was last not admitted; empty while it did."""

    @property
    def active(self) -> Sequence[Stream]:
        """The admitted streams, in slot order."""

    @property
    def longest(self) -> int:
        """The most tokens one stream can hold."""

    longest_source: int
    """The most tokens its source can have; 0 where the model has no encoder."""

    def shared_prefix(self, stream: Stream) -> tuple[int, int]:
        """How many of the stream's first tokens are computed now, and how many once running streams are done."""

    def admit(self, stream: Stream) -> bool:
        """Let the stream run, from the longest computed prefix; False where there is no room now."""

    def release(self, stream: Stream, keep: bool = True) -> None:
        """Take back what the stream held. Its tokens stay reusable unless ``keep`` is false."""

    def prepare(self, step: Step[Stream]) -> Callable[[], Tensor]:
        """Do what can be done ahead, and return what runs the model.

        That returns the logits ``[wanted, vocabulary]`` at the step's wanted positions, stream by stream in order of
        position.
        """


def open_runner(
    model: PreTrainedModel,
    kv_budget: int | None = None,
    compiled: Path | None = None,
    graphs: bool = True,
    names: Sequence[str] = (),
) -> Runner:
    """The fastest runner that proves itself on this model: packed tokens on a GPU, else slots if the self-check passes,
    else the model's own caches; for an encoder, its own. Raises UnsupportedModel for one that nothing serves.

    ``kv_budget``: bytes for keys and values; by default what is free on the GPU less a reserve, half of it for slots,
    or a quarter of the free memory on a CPU. ``compiled``: where the model's compiled step is, if it exists.
    ``graphs``: whether a GPU runs small packed steps as CUDA graphs. ``names``: the adapters attached to the model; the
    model's own code then runs each step.

    Raises UnsupportedModel for a model that no runner serves exactly.
    """
    limits = limits_of(model)
    if names and (limits.head or limits.source):
        raise UnsupportedModel(
            f"Adapters are served side by side with decoders only, not with {type(model).__name__}: fetch one with"
            " --adapter SOURCE, without a name, which merges it."
        )
    if limits.head:
        return open_encoder(model, limits)
    context = limits.context
    on_gpu = model.device.type == "cuda"
    if on_gpu:  # its attention with masks plans anew for each new length
        torch.backends.cuda.enable_cudnn_sdp(False)
    budget = kv_budget if kv_budget is not None else default_budget(model.device)
    if limits.source:
        return open_encoder_decoder(model, limits, budget, MAX_SLOTS, compiled)
    adapters = Adapters(model, names)
    try:
        layers = layers_of(model)
        step = SlotStep(model, adapters)
        reference = Reference.of(model)
        check_slots(step, layers, reference)
        for name, other in zip(names, [*names[1:], *names[:1]], strict=True):
            check_slots(step, layers, Reference.of(model, adapters, ("", name, other)))
    except Exception as error:  # whatever the model's code raises, fall back to its own caches
        return _open_cache_runner(model, context, f"slots do not serve it: {in_words(error)}", adapters)
    memory = Memory(layers, model.dtype)
    fast, reason = None, "no compiled step, no CUDA graphs: adapters take the model's own code" if names else ""
    if on_gpu and not names:
        budget_of_pool = budget if kv_budget is not None else budget * 2  # it never grows
        check_budget(budget_of_pool, min(MIN_TOKENS, context) * memory.bytes_per_token, memory.total)
        try:
            tokens = budget_of_pool // memory.bytes_per_token
            return _open_packed(PackedStep(step, layers), reference, tokens, context, graphs)
        except Exception as error:  # whatever the model's code raises, fall back to slots
            reason = f"no packed tokens: {in_words(error)}"
    try:
        if compiled and compiled.exists() and not (names or on_gpu):
            fast = CompiledStep(compiled)
            check_slots(step, layers, reference, fast)
    except Exception as error:  # fall back to the model's own code
        fast, reason = None, f"no faster step: {type(error).__name__}: {error}"
    return SlotRunner(step, memory, budget, MAX_SLOTS, context, fast, with_tolerance(model, reason))


def _open_cache_runner(model: PreTrainedModel, context: int, reason: str, adapters: Adapters) -> CacheRunner:
    found = []
    for mode in modes_of(model):
        try:
            for name in ("", *adapters.names):
                check_caches(CacheRunner(model, context, reason, mode, adapters), model, name)
        except Exception as error:  # whatever the model's code raises
            found.append(in_words(error))
        else:
            reason = "; nor do its own caches: ".join([reason, *found[:1]])
            return CacheRunner(model, context, with_tolerance(model, reason), mode, adapters)
    what, instead = type(model).__name__, "Choose an architecture that docs/models.md lists as exact."
    if adapters.names:
        what, instead = f"{what} with adapters side by side", "Merge one, with --adapter SOURCE and no name."
    raise UnsupportedModel(
        f"No runner serves {what} as Transformers' own forward pass computes it: {found[0]}. {instead}"
    )


def _open_packed(step: PackedStep, reference: Reference, tokens: int, context: int, graphs: bool) -> PackedRunner:
    dtype = step.model.dtype
    check_packed(PackedRunner(step, Pool(step.layers, dtype, TOKENS), CONTEXT), reference)
    runner, reason = PackedRunner(step, Pool(step.layers, dtype, tokens), context), ""
    if graphs:
        try:
            recorded = PackedRunner(step, runner.pool, context, Graphs(step, runner.pool, runner.longest))
            check_packed(recorded, reference)
            runner = recorded
        except Exception as error:  # run the steps as they are
            reason = f"no CUDA graphs: {in_words(error)}"
    runner.reason = with_tolerance(step.model, reason)
    return runner


def default_budget(device: torch.device) -> int:
    """Bytes for keys and values where KV_CACHE_GB does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading the model left counts as used
        free, total = torch.cuda.mem_get_info(device)
        # While the memory grows, old and new tensors exist together.
        return max(free - int(total * GPU_RESERVE), 0) // 2
    return psutil.virtual_memory().available // 4
