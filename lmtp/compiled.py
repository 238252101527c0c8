"""The decode step compiled ahead of time, for CPUs.

Most of a small batch's step is not arithmetic: it is Python, the launch of some 1,500 operations, and matrix kernels
that read weights in an unsuitable layout. PyTorch's ahead-of-time compiler (torch.export, then AOTInductor with frozen
weights) turns the model's own code for one token a row into one native library, whatever the number of rows and
columns. Compiling takes minutes, so it is done by script/build or in the background; loading takes less than a second.

A compiled step fits one model, one dtype, one kind of processor and one set of versions; its file name says which, and
the self-check of runner.py tries it before it serves.
"""

import atexit
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from lmtp.slots import Memory
from lmtp.weights import Manifest

FORMAT = 2
"""Part of a compiled step's name: to be raised when runner.DecodeStep changes what it takes or returns."""

EXAMPLE_ROWS, EXAMPLE_SLOTS, EXAMPLE_COLUMNS, EXAMPLE_CAPACITY = 3, 5, 48, 96
MOST_SLOTS = 4096


class CompiledStep:
    """A compiled decode step, loaded."""

    def __init__(self, path: Path) -> None:
        # The loader behind torch._inductor.aoti_load_package: importing that would take longer than loading.
        self._run = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).boxed_run

    def __call__(
        self, ids: Tensor, positions: Tensor, writes: Tensor, masks: Sequence[Tensor], memory: Memory
    ) -> Tensor:
        """Logits ``[rows, vocabulary]`` for the next token after ``ids`` ``[rows, 1]`` at ``positions`` ``[rows, 1]``.
        Row i is slot i; its keys and values go to its column ``writes[i]``. ``masks`` are ``[rows, 1, 1, columns]``."""
        logits: list[Tensor] = self._run([ids, positions, writes, *masks, *memory.keys, *memory.values])
        return logits[0]


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
    return directory / f"decode-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.pt2"


def build(
    step: nn.Module,
    model: PreTrainedModel,
    masks: int,
    memory: Memory,
    path: Path,
    check: Callable[[CompiledStep], None],
) -> None:
    """Compile a decode step (see runner.DecodeStep) into ``path``; it appears there once ``check`` has passed it.

    ``memory`` is resized. Raises what torch.export raises where the model's code cannot be traced.
    """
    import torch._inductor

    memory.resize(EXAMPLE_SLOTS, EXAMPLE_CAPACITY)
    rows = Dim("rows", min=1, max=MOST_SLOTS)
    columns = Dim("columns", min=8, max=2**24)
    slots = Dim("slots", min=1, max=MOST_SLOTS)
    capacity = Dim("capacity", min=9, max=2**24 + 1)
    count = len(memory.keys)
    mask = torch.zeros(EXAMPLE_ROWS, 1, 1, EXAMPLE_COLUMNS, dtype=model.dtype)
    example = (
        torch.ones(EXAMPLE_ROWS, 1, dtype=torch.long),
        torch.arange(4, 4 + EXAMPLE_ROWS)[:, None],
        torch.arange(4, 4 + EXAMPLE_ROWS)[:, None],
        [mask.clone() for _ in range(masks)],
        list(memory.keys),
        list(memory.values),
    )
    shapes = (
        {0: rows},
        {0: rows},
        {0: rows},
        [{0: rows, 3: columns}] * masks,
        *[[{0: slots, 2: capacity}] * count] * 2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial.pt2")
    try:
        with torch.no_grad(), _attention_as_in_eager_mode():
            program = torch.export.export(step, example, dynamic_shapes=shapes, strict=False)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(partial), inductor_configs={"freezing": True}
            )
        check(CompiledStep(partial))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _attention_as_in_eager_mode() -> Iterator[None]:
    """Let Transformers' attention keep grouped queries together while it is traced.

    Under a compiler it repeats keys and values for every query head instead, which at 32 rows costs more than all the
    rest of attention.
    """
    target: Any = "transformers.integrations.sdpa_attention.is_torchdynamo_compiling"
    with unittest.mock.patch(target, return_value=False):
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
            print("compiled decode step: ready, in use", flush=True)
        else:
            print(f"compiled decode step: {output.strip().splitlines()[-1:] or 'failed'}", flush=True)

    threading.Thread(target=wait, name="build", daemon=True).start()
