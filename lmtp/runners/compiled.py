"""The model's step compiled ahead of time, for CPUs.

Most of a small step is not arithmetic: it is Python, the launch of some 1,500 operations, and matrix kernels that read
weights in an unsuitable layout. PyTorch's ahead-of-time compiler (torch.export, then AOTInductor with frozen weights)
turns the model's own code into one native library for any number of rows, tokens a row and columns. Compiling takes
minutes, so script/build does it; loading takes less than a second.

A compiled step fits one model, one dtype, one kind of processor and one set of versions. Its file name says which, and
the self-check tries it before it serves.
"""

import contextlib
import ctypes
import hashlib
import json
import mmap
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from lmtp.runners import attention, linear
from lmtp.runners.model import UnsupportedModel
from lmtp.runners.slot_runner import SlotStep
from lmtp.runners.slots import Layer, Memory
from lmtp.runners.step import SourceInputs, StepInputs
from lmtp.weights.manifest import Manifest

FORMAT = 9
"""Part of a compiled step's name. Raise it when SlotStep changes what it takes or returns, and with the C++ code."""

EXAMPLE_ROWS, EXAMPLE_TOKENS, EXAMPLE_WANTED = 8, 4, 30  # matrix kernels are chosen for these 32 tokens
EXAMPLE_SLOTS, EXAMPLE_COLUMNS, EXAMPLE_CAPACITY = 11, 48, 96
MAX_SLOTS = 4096
MAX_TOKENS = 2**16

INDUCTOR = {
    "freezing": True,
    "cpp.enable_concat_linear": True,  # one matrix product for queries, keys and values, one for gate and up
    # In bfloat16, the compiler's own matrix kernels where they beat oneDNN's on this processor: for few rows a call of
    # oneDNN takes longer to prepare than to run. In float32 linear.cpp computes nearly all of them.
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "aot_inductor.compile_wrapper_opt_level": "O2",  # our C++ code is part of the wrapper
    "aot_inductor.precompile_headers": False,  # one build would use them once
    # Do not try AVX2 and AVX-512 by compiling and loading a file: where that fails, a step is made without them.
    "cpp.vec_isa_ok": True,
}

PROXY = b"aoti_torch_proxy_executor_call_function"
"""What compiled code calls for an operation without a C interface. Only PyTorch's own loader provides it."""

_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype, _capsule_of.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class CompiledStep:
    """A compiled step, loaded.

    It is called through the C interface that the compiler gives it (torch/csrc/inductor/aoti_runtime/interface.h).
    PyTorch's own loader holds the GIL for as long as a step takes: meanwhile no token is sent and no request is read.
    Measured with the demo model on two cores: beside it another thread waits for the GIL for a whole step at the 90th
    percentile, and 0.7 ms beside the C interface.
    """

    description = "compiled step"
    max_first_chunk = 511

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file is no compiled step, RuntimeError where it does not load."""
        torch.cpu._init_amx()  # without this request to the kernel, AMX instructions kill the process
        self._library = ctypes.CDLL(str(path))
        self._container = ctypes.c_void_p()
        self._call("CreateWithDevice", ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None)

    def __call__(self, inputs: StepInputs, sources: SourceInputs | None = None) -> Tensor:
        """As slot_runner.SlotStep.forward, with at least one mask; with sources, as EncoderDecoderStep.run."""
        wanted = len(inputs.wanted)
        if not wanted:  # compiled code divides by the number of wanted positions
            inputs = inputs._replace(wanted=inputs.wanted.new_zeros(1))
        tensors = [*inputs[:4], *inputs.masks, *inputs.keys, *inputs.values]
        if sources:
            tensors += [sources.mask, *sources.keys, *sources.values]
        # The callee takes over the handles that it is given and frees them; the caller frees those that it gets.
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
        pointers = (ctypes.c_void_p * len(tensors))(*(_pointer_in(handle, None) for handle in handles))
        outputs = (ctypes.c_void_p * 1)()
        count, one = ctypes.c_size_t(len(tensors)), ctypes.c_size_t(1)
        self._call("Run", self._container, pointers, count, outputs, one, None, None)
        # In spite of its name, the variant of this function for a single tensor does not take the handle over.
        (logits,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule_of(outputs[0], None, None)])
        return logits[:wanted]

    def _call(self, function: str, *arguments: Any) -> None:
        if getattr(self._library, f"AOTInductorModelContainer{function}")(*arguments):
            raise RuntimeError(f"the compiled step fails at {function}; standard error says why")


def path_of(directory: Path, model: PreTrainedModel, manifest: Manifest) -> Path:
    """Where the compiled step of this model, dtype, processor and versions belongs."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        info = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "\n".join(sorted({line for line in info if line.startswith(("model name", "flags", "Features"))}))
    files = {name: file.sha256 for name, file in manifest.files.items()}
    facts = [
        FORMAT,
        torch.__version__,
        transformers.__version__,
        processor,
        str(model.dtype),
        torch.get_num_threads(),
        files,
        manifest.model_args,  # a scaled rotary embedding, say, is another step over the same files
    ]
    return directory / f"step-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.so"


def build(
    step: SlotStep,
    layers: Sequence[Layer],
    path: Path,
    check: Callable[[CompiledStep], None],
    cross: Sequence[Layer] = (),
) -> None:
    """Compile a step into ``path``. The file appears there once ``check`` has passed it. ``cross``: the layers of
    cross-attention, if there are any.

    Raises UnsupportedModel for a model with operations that compiled code cannot call, CppCompileError where the C++
    compiler fails, and what torch.export raises where the model's code cannot be traced.
    """
    from torch._inductor import aot_compile
    from torch._inductor.exc import InductorError
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    memory = Memory(layers, step.model.dtype)
    memory.resize(EXAMPLE_SLOTS, EXAMPLE_CAPACITY)
    tokens = torch.ones(EXAMPLE_ROWS, EXAMPLE_TOKENS, dtype=torch.long)
    mask = torch.zeros(EXAMPLE_ROWS, 1, EXAMPLE_TOKENS, EXAMPLE_COLUMNS, dtype=step.model.dtype)
    example = StepInputs(
        ids=tokens,
        positions=tokens.clone(),
        writes=tokens.clone(),
        wanted=torch.arange(EXAMPLE_WANTED),
        masks=[mask.clone() for _ in step.rules],
        keys=list(memory.keys),
        values=list(memory.values),
    )
    given: tuple[tuple[Any, ...], ...] = (tuple(example),)
    shapes: tuple[Any, ...] = (_shapes(example),)
    if cross:
        rows = Memory(cross, step.model.dtype)
        rows.resize(EXAMPLE_SLOTS + 1, EXAMPLE_CAPACITY + 1)
        unmasked = torch.zeros(EXAMPLE_ROWS, 1, 1, EXAMPLE_COLUMNS - 1, dtype=step.model.dtype)
        given += ((unmasked, list(rows.keys), list(rows.values)),)
        shapes += (_source_shapes(shapes[0], len(cross)),)
    path.parent.mkdir(parents=True, exist_ok=True)
    code = {torch.ops.lmtp.attend.default: attention.CODE, torch.ops.lmtp.linear.default: linear.CODE}
    shims = {operation: [file.read_text(encoding="utf-8")] for operation, file in code.items()}
    with (
        tempfile.TemporaryDirectory(prefix="build-") as work,  # no spaces: PyTorch does not quote the paths of commands
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as beside,
        torch.no_grad(),
    ):
        compiled, library = Path(work, path.name), Path(beside, path.name)
        with attention.own_attention(), linear.own_linear(step):
            program = torch.export.export(_Exported(step), given, dynamic_shapes=(shapes,), strict=False)
        options = INDUCTOR | {"aot_inductor.custom_ops_to_c_shims": shims, "aot_inductor.output_path": str(compiled)}
        try:
            with temporary_cache_dir(work):
                aot_compile(program.module(), given, options=options)
        except InductorError as error:
            raise error.inner_exception from None
        with compiled.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
            if binary.find(PROXY) >= 0:
                raise UnsupportedModel("it uses an operation that compiled code cannot call; its own code serves it")
        shutil.copyfile(compiled, library)
        check(CompiledStep(library))
        library.replace(path)


class _Exported(nn.Module):
    """The step as a function of plain tuples, which is what torch.export can serialize."""

    def __init__(self, step: SlotStep) -> None:
        super().__init__()
        self.step = step

    def forward(self, *inputs: tuple[Any, ...]) -> Tensor:
        if len(inputs) == 1:
            return self.step.forward(StepInputs(*inputs[0]))
        run: Any = self.step.run
        return run(StepInputs(*inputs[0]), SourceInputs(*inputs[1]))


def _shapes(example: StepInputs) -> tuple[Any, ...]:
    """Which dimensions of the example may have other sizes."""
    rows = Dim("rows", min=1, max=MAX_SLOTS)
    q = Dim("q", min=1, max=MAX_TOKENS)
    wanted = Dim("wanted", min=1, max=MAX_TOKENS)
    columns = Dim("columns", min=8, max=2**24)
    slots = Dim("slots", min=1, max=MAX_SLOTS)
    capacity = Dim("capacity", min=9, max=2**24 + 1)
    memory = [{0: slots, 2: capacity}] * len(example.keys)
    masks = [{0: rows, 2: q, 3: columns}] * len(example.masks)
    tokens = {0: rows, 1: q}
    return (tokens, tokens, tokens, {0: wanted}, masks, memory, memory)


def _source_shapes(of_targets: tuple[Any, ...], layers: int) -> tuple[Any, ...]:
    """The same for sources, which have the targets' rows."""
    columns = Dim("source_columns", min=8, max=2**24)
    slots = Dim("source_slots", min=1, max=MAX_SLOTS)
    capacity = Dim("source_capacity", min=9, max=2**24 + 1)
    memory = [{0: slots, 2: capacity}] * layers
    return ({0: of_targets[0][0], 3: columns}, memory, memory)
