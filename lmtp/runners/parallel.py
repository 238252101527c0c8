"""One model over several processes, one for each GPU: Transformers' own plan for tensor parallelism.

Each process has some heads of every attention layer and a slice of every matrix. The first process is the server's. Its
runner schedules, keeps prefixes and samples as over one model. What it does to its keys and values, and each step's
inputs, it tells the others, which do the same to theirs; the plan adds up what the layers compute. Only the first
process uses the logits.

`python -m lmtp.runners.parallel` is one of the other processes.
"""

import enum
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel
from typing_extensions import override

from lmtp.runners.group import HANG_SECONDS, LOAD_SECONDS, Group, Leader, follow
from lmtp.runners.links import Links, shard_size
from lmtp.runners.model import UnsupportedModel, in_words, limits_of
from lmtp.runners.runner import MAX_SLOTS, default_budget
from lmtp.runners.selfcheck import Reference, check_slots
from lmtp.runners.slot_runner import SlotRunner, SlotStep, layers_of
from lmtp.runners.slots import Layer, Memory
from lmtp.runners.step import StepInputs
from lmtp.settings import SettingsError
from lmtp.weights import load as weights
from lmtp.weights.kinds import Kind
from lmtp.weights.load import Loaded
from lmtp.weights.manifest import WeightsError, read_manifest

HEADS = re.compile(r"num_(attention|(\w+_)?key_value)_heads$")
"""How configurations name the heads that processes share."""

LOADED_WRONGLY = ("hrm_text", "youtu")
"""Types of models that Transformers loads otherwise in several processes than in one: hrm_text's fused matrices are
split after they are shared, and youtu's padding token keeps its vector. A list, since the self-check sees nothing of
this: it compares with the group's own pass, and no process has the whole model. Nightly tests find such types."""

UNRUNNABLE = ("doge",)
"""Types of models whose code does not run in the parts that Transformers' plan makes: doge's mask has all heads."""

ALIGNED = 8
"""A process's part of an expert's width is a multiple of this: torch multiplies by the matrices of several experts at
once only where their rows begin at multiples of 16 bytes, 8 numbers of 16 bits."""


class Told(enum.IntEnum):
    """What the first process tells the others to do."""

    LOAD = 0
    """Load a part of the model; the numbers are the bytes of its directory and dtype."""
    OPEN = 1
    """Prepare for steps."""
    MEMORY = 2
    """Begin with new memory for keys and values."""
    RESIZE = 3
    COPY = 4
    CLEAR = 5
    SWAP = 6
    STEP = 7
    """Run a step. The numbers are its rows, tokens a row, wanted positions, columns of masks and first slot; then its
    ids, positions, writes and wanted positions themselves."""


class SharedMemory(Memory):
    """Keys and values of this process's heads; what happens to the first process's, happens to all."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, group: Group) -> None:
        super().__init__(layers, dtype)
        self._group = group
        self.first = 0
        """The slot that the next step begins with."""
        group.tell(Told.MEMORY)

    @override
    def resize(self, slots: int, capacity: int, held: Sequence[int] = ()) -> None:
        self._group.tell(Told.RESIZE, [slots, capacity, *held])
        super().resize(slots, capacity, held)

    @override
    def _made(self, slots: int, capacity: int, held: Sequence[int]) -> Any:
        try:
            made, refusal = super()._made(slots, capacity, held), ""
        except torch.OutOfMemoryError as error:
            made, refusal = None, str(error)
        if not self._group.least(int(made is not None)):
            raise torch.OutOfMemoryError(refusal or "another process has no memory for keys and values")
        return made

    @override
    def from_slot(self, first: int) -> tuple[list[Tensor], list[Tensor]]:
        self.first = first
        return super().from_slot(first)

    @override
    def copy(self, source: int, target: int, length: int) -> None:
        self._group.tell(Told.COPY, [source, target, length])
        super().copy(source, target, length)

    @override
    def clear(self, slot: int) -> None:
        self._group.tell(Told.CLEAR, [slot])
        super().clear(slot)

    @override
    def swap(self, one: int, other: int, short: int, long: int) -> None:
        self._group.tell(Told.SWAP, [one, other, short, long])
        super().swap(one, other, short, long)


class ParallelStep(SlotStep):
    """A step of all processes: a ModelStep. It uses the memory that was made last."""

    def __init__(self, model: PreTrainedModel, group: Group) -> None:
        super().__init__(model)
        self.group = group

    @override
    def new_memory(self, layers: Sequence[Layer]) -> SharedMemory:
        self.memory = SharedMemory(layers, self.model.dtype, self.group)
        return self.memory

    @override
    def forward(self, inputs: StepInputs) -> Tensor:
        columns = inputs.masks[0].shape[3] if inputs.masks else 0
        sizes = torch.tensor([*inputs.ids.shape, len(inputs.wanted), columns, self.memory.first])
        with self.group.computing():
            self.group.tell(Told.STEP, torch.cat([sizes, *(tensor.flatten().cpu() for tensor in inputs[:4])]))
            return super().forward(inputs)

    def follow(self, numbers: Tensor, device: torch.device) -> None:
        """Run the step that the first process runs."""
        rows, q, wanted, columns, first = numbers[:5].tolist()
        ids, positions, writes, indices = numbers[5:].to(device).split([rows * q] * 3 + [wanted])
        at = positions.view(rows, q)
        masks = self.masks(at, columns) if columns else []
        super().forward(
            StepInputs(ids.view(rows, q), at, writes.view(rows, q), indices, masks, *self.memory.from_slot(first))
        )


def load(group: Leader, directory: Path, dtype: str) -> Loaded:
    """Load the first process's part of the model while the others load theirs.

    Raises WeightsError as weights.load does, and UnsupportedModel where its code cannot run in parts. If another
    process fails, `open_parallel` says so.
    """
    group.tell(Told.LOAD, list(f"{dtype} {directory.resolve()}".encode()))
    try:
        return _load(group, directory, dtype)
    except WeightsError:
        raise
    except Exception as error:  # whatever the model's code raises: part of it already runs here
        raise _not_served("this model", error) from error


def open_parallel(group: Leader, model: PreTrainedModel, kv_budget: int | None = None) -> SlotRunner:
    """The runner of a model that was loaded by `load`: slots, if the self-check passes.

    ``kv_budget``: bytes of each process for keys and values; by default what the one with the least memory has.
    Raises UnsupportedModel where slots do not serve it.
    """
    group.tell(Told.OPEN)
    try:
        step, layers, reference, budget = _open(group, model)
        check_slots(step, layers, reference)
    except Exception as error:  # whatever the model's code raises
        raise _not_served(type(model).__name__, error) from error
    budget = budget if kv_budget is None else kv_budget
    runner = SlotRunner(step, step.new_memory(layers), budget, MAX_SLOTS, limits_of(model).context)
    runner.description = f"slots over {group.count} processes"
    runner.reason = "compiled steps and CUDA graphs run in one process only"
    return runner


def _not_served(what: str, error: Exception) -> UnsupportedModel:
    return UnsupportedModel(f"Several processes do not serve {what}: {in_words(error)}. Set PARALLEL=off.")


def processes_for(choice: int | None, directory: Path, dtype: str) -> int:
    """How many processes compute the model of a directory. None, for PARALLEL=auto, is all GPUs that can share it if
    one has no room for it, else 1.

    Raises WeightsError for a model that cannot be shared by so many, SettingsError where there are too few GPUs.
    """
    gpus = torch.cuda.device_count()
    if choice == 1 or (choice is None and (gpus < 2 or weights.fits(directory, dtype))):
        return 1
    if choice is None:
        return next((n for n in range(gpus, 1, -1) if not refusal_of(directory, n)), 1)
    if gpus and choice > gpus:
        there = "is 1 GPU" if gpus == 1 else f"are {gpus} GPUs"
        raise SettingsError(f"PARALLEL is {choice}, and there {there} on this machine.")
    if refusal := refusal_of(directory, choice):
        raise WeightsError(refusal)
    return choice


def refusal_of(directory: Path, processes: int) -> str:
    """Why so many processes cannot share the model; empty if they can."""
    manifest = read_manifest(directory)
    plan = weights.read_plan(directory, manifest)
    config, instead = plan.config.get_text_config(decoder=True), "set PARALLEL=off"
    if plan.kind not in (Kind.CAUSAL, Kind.MULTIMODAL):
        return f"{manifest.source} is no decoder, and only decoders run in several processes: {instead}."
    if manifest.adapter is not None or manifest.adapters:
        return f"{manifest.source} has an adapter, which several processes do not compute: {instead}."
    if plan.quantization or plan.load_in:
        return f"{manifest.source} is quantized, which several processes do not compute: {instead}."
    if config.model_type in LOADED_WRONGLY:
        return f"Transformers loads {config.model_type} otherwise in several processes than in one: {instead}."
    if not getattr(config, "base_model_tp_plan", None):
        return f"Transformers has no plan to share {config.model_type} among processes: {instead}."
    if config.model_type in UNRUNNABLE:
        return f"Transformers' plan to share {config.model_type} among processes does not run: {instead}."
    try:
        model = weights.without_weights(plan, manifest)
        SlotStep(model)
    except Exception as error:  # whatever the model's code raises
        return str(_not_served(manifest.source, error))
    for one, other in model.all_tied_weights_keys.items():
        if _shares_rows(model, one) != _shares_rows(model, other):
            return (
                f"Transformers' plan for {config.model_type} shares one of {one} and {other}, which are one: {instead}."
            )
    parts = _heads(config, model.tp_plan) | _experts(model)
    common = math.gcd(*parts.values())
    if not common % processes:
        return ""
    uneven = " and ".join(name for name, count in parts.items() if count % processes)
    counts = [str(n) for n in range(2, common + 1) if common % n == 0]
    instead = f"set PARALLEL to {' or '.join([*counts, 'off'])}"
    return f"{manifest.source} has {uneven}, which {processes} processes cannot share equally: {instead}."


def _heads(config: PreTrainedConfig, plan: Mapping[str, str]) -> dict[str, int]:
    """The numbers of heads that have to be divided, by their names."""
    if not any("att" in name and style == "colwise" for name, style in plan.items()):
        return {}
    found: dict[str, int] = {}
    for layer in getattr(config, "per_layer_config", None) or [config]:
        for name in filter(HEADS.search, dir(layer)):
            value = getattr(layer, name)
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int) and count:
                    found[f"{count} {name.removeprefix('num_').replace('_', ' ')}"] = count
    return found


def _experts(model: PreTrainedModel) -> dict[str, int]:
    """How many parts of ALIGNED rows or columns the experts of a model have, by their width."""
    found = {}
    for name, weight in model.named_parameters():
        style = _style_of(model, name)
        if weight.dim() == 3 and style.endswith(("colwise", "rowwise")):
            width = weight.shape[1 if style.endswith("colwise") else 2] // (2 if style.startswith("packed") else 1)
            parts = 1 if width % ALIGNED else width // ALIGNED
            found[f"experts of width {width} (shared in multiples of {ALIGNED})"] = parts
    return found


def _style_of(model: PreTrainedModel, name: str) -> str:
    """The style by which the model's plan shares a parameter; empty if every process has the whole of it."""
    name = re.sub(r"\.\d+(?=\.)", ".*", name)
    plan: dict[str, str] = model.tp_plan
    return plan.get(name) or plan.get(name.rpartition(".")[0], "")


def _shares_rows(model: PreTrainedModel, name: str) -> bool:
    style = _style_of(model, name)
    return style.startswith("colwise") or style == "embedding_rowwise"


class Colwise(ColwiseParallel):
    """Transformers' style of that name, without a hook: once `_keep_shards` has run, a linear layer needs none."""

    @override
    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return module if isinstance(module, nn.Linear) else super().install_forward(module, mesh)


class Rowwise(RowwiseParallel):
    """Transformers' style of that name, with a hook that only adds up."""

    def __init__(self, links: Links) -> None:
        super().__init__()
        self._links = links

    @override
    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, nn.Linear):
            return super().install_forward(module, mesh)

        def forward(states: Tensor) -> Tensor:
            part = _sum(functional.linear(states, module.weight), self._links)
            return part if module.bias is None else part + module.bias

        module.__dict__["forward"] = forward  # as Transformers' own hooks, of this module alone
        return module


def _sum(part: Tensor, links: Links) -> Tensor:
    if links.takes(part):
        return links.sum(part)
    dist.all_reduce(part)
    return part


def _load(group: Group, directory: Path, dtype: str) -> Loaded:
    group.wait_at_most(LOAD_SECONDS)
    styles: Any = ALL_PARALLEL_STYLES  # typed as holding functions
    styles.register("colwise", Colwise())
    styles.register("rowwise", Rowwise(group.links))
    loaded = weights.load(directory, dtype, processes=group.count)
    _keep_shards(loaded.model)
    if loaded.device.type == "cpu":
        _share_vocabulary(loaded.model, group.links)
    group.wait_at_most(LOAD_SECONDS)  # the plan has made groups of its own
    return loaded


def _keep_shards(model: PreTrainedModel) -> None:
    """Replace the linear layers' distributed weights by this process's part of them, which Transformers' hooks take out
    at each call."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            for name, weight in list(module.named_parameters(recurse=False)):
                if isinstance(weight, DTensor):
                    setattr(module, name, nn.Parameter(weight.to_local(), requires_grad=False))


def _share_vocabulary(model: PreTrainedModel, links: Links) -> None:
    """Embed tokens and compute logits without Transformers' hooks, which make distributed tensors of all that goes in
    and out. Only the first process gets the logits."""
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if type(embeddings) is nn.Embedding and _rows(embeddings.weight) is not None:
        table = _rows(embeddings.weight)
        first = links.rank * shard_size(embeddings.num_embeddings, links.count)

        def embed(ids: Tensor) -> Tensor:
            own = (ids >= first) & (ids < first + len(table))
            part = functional.embedding((ids - first).where(own, 0), table)
            return _sum(part.masked_fill_(~own[..., None], 0), links)

        embeddings.__dict__["forward"] = embed
    if type(head) is nn.Linear and getattr(head, "bias", None) is None and _rows(head.weight) is not None:
        weight = _rows(head.weight)

        def logits(states: Tensor) -> Tensor:
            return links.gather(functional.linear(states, weight), head.out_features)

        head.__dict__["forward"] = logits


def _rows(weight: Any) -> Any:
    """This process's rows of a matrix whose rows the processes share; None for any other."""
    shared = isinstance(weight, DTensor) and weight.placements == (Shard(0),)
    return weight.to_local() if shared else None


def _open(group: Group, model: PreTrainedModel) -> tuple[ParallelStep, list[Layer], Reference, int]:
    """What all processes do alike before the first step. The budget in bytes is what the least of them has."""
    if model.device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # as in open_runner
    step = ParallelStep(model, group)
    with group.computing(UnsupportedModel):  # here the first process waits until the others have loaded their parts
        layers, reference = layers_of(model), Reference.of(model)
    group.wait_at_most(HANG_SECONDS)
    share = default_budget(model.device) // (1 if model.device.type == "cuda" else group.count)
    return step, layers, reference, group.least(share)


def _main() -> None:
    """Do what the first process tells, until it ends this one."""
    group = follow()
    opened: tuple[ParallelStep, list[Layer], Reference, int] | None = None
    loaded: Loaded | None = None
    while True:
        code, numbers = group.receive()
        if code == Told.LOAD:
            dtype, _, directory = bytes(numbers.tolist()).decode().partition(" ")
            opened, loaded = None, _load(group, Path(directory), dtype)
            continue
        assert loaded is not None
        if code == Told.OPEN:
            try:
                opened = _open(group, loaded.model)
            except UnsupportedModel:  # the first process has found the same
                opened = None
            continue
        assert opened is not None
        with torch.inference_mode():
            _obey(opened[0], opened[1], Told(code), numbers, loaded.device)


def _obey(step: ParallelStep, layers: Sequence[Layer], code: Told, numbers: Tensor, device: torch.device) -> None:
    if code == Told.MEMORY:
        step.new_memory(layers)
    elif code == Told.STEP:
        step.follow(numbers, device)
    elif code == Told.RESIZE:
        slots, capacity, *held = numbers.tolist()
        try:
            step.memory.resize(slots, capacity, held)
        except torch.OutOfMemoryError:  # the first process knows; nothing has changed
            torch.cuda.empty_cache()
    elif code == Told.COPY:
        step.memory.copy(*numbers.tolist())
    elif code == Told.CLEAR:
        step.memory.clear(*numbers.tolist())
    else:
        step.memory.swap(*numbers.tolist())


if __name__ == "__main__":
    _main()
