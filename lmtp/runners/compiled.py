"""The model's step compiled ahead of time, for CPUs.

Most of a small step is not arithmetic: it is Python, the launch of some 1,500 operations, and matrix kernels that read
weights in an unsuitable layout. PyTorch's ahead-of-time compiler (torch.export, then AOTInductor with frozen weights)
turns the model's own code into one native library for any number of rows, tokens a row and columns. Compiling takes
minutes, so it is done by script/build or in the background; loading takes less than a second.

A compiled step fits one model, one dtype, one kind of processor and one set of versions; its file name says which, and
the self-check of runner.py tries it before it serves.
"""

import atexit
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import unittest.mock
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional
from transformers import PreTrainedModel

from lmtp.runners.slots import Memory
from lmtp.weights.manifest import Manifest

FORMAT = 3
"""Part of a compiled step's name: to be raised when runner.ModelStep changes what it takes or returns."""

EXAMPLE_ROWS, EXAMPLE_TOKENS, EXAMPLE_WANTED = 8, 4, 30  # 32 tokens: what matrix kernels are chosen for
EXAMPLE_SLOTS, EXAMPLE_COLUMNS, EXAMPLE_CAPACITY = 11, 48, 96
MOST_SLOTS = 4096
MOST_TOKENS = 2**16

INDUCTOR = {
    "freezing": True,
    "cpp.enable_concat_linear": True,  # one matrix product for queries, keys and values, one for gate and up
    # The compiler's own matrix kernels, where they are faster than oneDNN's on this processor: for few rows a call of
    # oneDNN's takes longer to prepare than to run.
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
}

PROXY = b"aoti_torch_proxy_executor_call_function"
"""What compiled code calls for an operation that has no C interface; only PyTorch's own loader provides it."""

_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype, _capsule_of.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class CompiledStep:
    """A compiled step, loaded.

    It is called through the C interface that the compiler gives it (torch/csrc/inductor/aoti_runtime/interface.h), and
    not by PyTorch's own loader, which keeps Python's lock for as long as a step takes: tokens could not be sent and
    requests not be read meanwhile.
    """

    longest_beginning = 511
    """A longer chunk at the beginning of texts takes less time in the model's own code, which needs no mask there: its
    causal attention skips what no position sees."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file is no compiled step, RuntimeError where it does not load."""
        torch.cpu._init_amx()  # asks the system for the matrix unit, without which code made for it is killed
        self._library = ctypes.CDLL(str(path))
        self._container = ctypes.c_void_p()
        self._call("CreateWithDevice", ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None)

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        writes: Tensor,
        wanted: Tensor,
        masks: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        """As runner.ModelStep.forward, with at least one mask."""
        # Compiled code divides by the number of wanted positions, so one is asked for where none is wanted.
        index = wanted if len(wanted) else wanted.new_zeros(1)
        tensors = [ids, positions, writes, index, *masks, *keys, *values]
        # Handles are the callee's once it is called: it frees those it is given, and the caller those it gets.
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
        inputs = (ctypes.c_void_p * len(tensors))(*(_pointer_in(handle, None) for handle in handles))
        outputs = (ctypes.c_void_p * 1)()
        count, one = ctypes.c_size_t(len(tensors)), ctypes.c_size_t(1)
        self._call("Run", self._container, inputs, count, outputs, one, None, None)
        # The function for a single one does not take the handle over, in spite of its name.
        (logits,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule_of(outputs[0], None, None)])
        return logits[: len(wanted)]

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
    ]
    return directory / f"step-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.so"


def build(
    step: nn.Module,
    model: PreTrainedModel,
    masks: int,
    memory: Memory,
    path: Path,
    check: Callable[[CompiledStep], None],
) -> None:
    """Compile a step (see runner.ModelStep) into ``path``; it appears there once ``check`` has passed it.

    ``memory`` is resized. Raises what torch.export raises where the model's code cannot be traced.
    """
    import torch._inductor

    memory.resize(EXAMPLE_SLOTS, EXAMPLE_CAPACITY)
    rows = Dim("rows", min=1, max=MOST_SLOTS)
    q = Dim("q", min=1, max=MOST_TOKENS)
    wanted = Dim("wanted", min=1, max=MOST_TOKENS)
    columns = Dim("columns", min=8, max=2**24)
    slots = Dim("slots", min=1, max=MOST_SLOTS)
    capacity = Dim("capacity", min=9, max=2**24 + 1)
    count = len(memory.keys)
    tokens = torch.ones(EXAMPLE_ROWS, EXAMPLE_TOKENS, dtype=torch.long)
    mask = torch.zeros(EXAMPLE_ROWS, 1, EXAMPLE_TOKENS, EXAMPLE_COLUMNS, dtype=model.dtype)
    example = (
        tokens,
        tokens.clone(),
        tokens.clone(),
        torch.arange(EXAMPLE_WANTED),
        [mask.clone() for _ in range(masks)],
        list(memory.keys),
        list(memory.values),
    )
    shapes = (
        {0: rows, 1: q},
        {0: rows, 1: q},
        {0: rows, 1: q},
        {0: wanted},
        [{0: rows, 2: q, 3: columns}] * masks,
        *[[{0: slots, 2: capacity}] * count] * 2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as directory:
        package = Path(directory, "step.pt2")
        with torch.no_grad(), _grouped_attention():
            program = torch.export.export(step, example, dynamic_shapes=shapes, strict=False)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(package), inductor_configs=dict(INDUCTOR)
            )
        library = Path(directory, path.name)
        with zipfile.ZipFile(package) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".so"))
            code = archive.read(name)
        if PROXY in code:
            raise RuntimeError("the model uses an operation that compiled code cannot call")
        library.write_bytes(code)
        check(CompiledStep(library))
        library.replace(path)


@contextlib.contextmanager
def _grouped_attention() -> Iterator[None]:
    """Let attention keep grouped queries together while it is traced: the queries of one key head become one head's.

    Transformers and PyTorch repeat keys and values for every query head instead, which at 32 rows costs more than all
    the rest of attention.
    """
    attend = functional.scaled_dot_product_attention

    def grouped(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        enable_gqa: bool = False,
        **more: Any,
    ) -> Tensor:
        if not enable_gqa or attn_mask is None:
            return attend(query, key, value, attn_mask, enable_gqa=enable_gqa, **more)
        q, key_heads = query.shape[2], key.shape[1]
        group = query.shape[1] // key_heads
        packed = query.unflatten(1, (key_heads, group)).transpose(2, 3).flatten(2, 3)
        if attn_mask.shape[1] == 1:  # shared by all heads
            mask = attn_mask[:, :, :, None].expand(-1, -1, -1, group, -1).flatten(2, 3)
        else:
            mask = attn_mask.unflatten(1, (key_heads, group)).transpose(2, 3).flatten(2, 3)
        output = attend(packed, key, value, mask, **more)
        return output.unflatten(2, (q, group)).transpose(2, 3).flatten(1, 2)

    with (
        unittest.mock.patch("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", return_value=True),
        unittest.mock.patch("torch.nn.functional.scaled_dot_product_attention", grouped),
    ):
        yield


def build_in_background(adopt: Callable[[Path], None], path: Path, script: Path) -> None:
    """Run script/build in a process of its own, at the lowest priority, and adopt its result when it is there.

    The process has the environment of this one, so it compiles for the same weights and dtype, and it ends with it.
    """
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    os.setpriority(os.PRIO_PROCESS, process.pid, 19)
    atexit.register(process.terminate)

    def wait() -> None:
        output, _ = process.communicate()
        atexit.unregister(process.terminate)
        if process.returncode == 0 and path.exists():
            adopt(path)
            print("compiled step: ready, in use", flush=True)
        else:
            print(f"compiled step: {output.strip().splitlines()[-1:] or 'failed'}", flush=True)

    threading.Thread(target=wait, name="build", daemon=True).start()
