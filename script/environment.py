"""Every script's first step: run under the project's own Python, wherever it was started from."""

import importlib.util
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The project's directory, also when a script is started through a symbolic link."""

REQUIRED = ("cog", "torch", "transformers")
"""Packages that most scripts need."""

MIN_ADDRESS_SPACE = 2**30
"""Bytes without which PyTorch cannot be imported."""


def enter(required: Sequence[str] = REQUIRED) -> None:
    """Switch to the project's environment and make the project importable.

    If `.venv` exists and another interpreter is running, replace this process by the same command under `.venv`'s
    Python. The container image has no `.venv`; nothing is replaced there. Call this before importing anything but the
    standard library. If packages are missing, exit with a message that says what to do.
    """
    python = ROOT / ".venv" / "bin" / "python"
    # The Python of a damaged .venv reports another prefix. The second comparison keeps it from restarting forever.
    running = Path(sys.prefix).resolve() == python.parent.parent.resolve() or Path(sys.executable) == python
    if python.exists() and not running:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(python, [str(python), *sys.argv])
    # First, so that no other `script` or `tests` package is found before.
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    missing = [name for name in required if importlib.util.find_spec(name) is None]
    if missing:
        state = "has no" if python.exists() else "does not exist, and this Python has no"
        sys.exit(
            f"The project's environment {ROOT / '.venv'} {state} {', '.join(missing)}.\n"
            f"`make -C {ROOT} weights` builds it and fetches a small model."
        )
    if "torch" in required and 0 <= (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) < MIN_ADDRESS_SPACE:
        sys.exit(
            f"{sys.argv[0]}: `ulimit -v` allows {limit >> 20} MB of memory, and PyTorch needs more than"
            f" {MIN_ADDRESS_SPACE >> 20}: raise the limit."
        )


def memory_limit() -> str:
    """What to add to an error of a process that has a limit on its address space."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if limit < 0 else f" (`ulimit -v` allows {limit >> 20} MB of memory, which may be too little.)"
