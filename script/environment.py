"""Every script's first step: run with the project's own Python, wherever and however it was started."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The project's directory; symbolic links to a script or to `script/` lead here too."""

REQUIRED = ("cog", "torch", "transformers")
"""Without these no script can do its work."""


def enter() -> None:
    """Carry on with the project's environment, and with the project importable.

    Where `.venv` exists, as `make` leaves it, and another interpreter is running, the process replaces itself by the
    same command under `.venv`'s Python. Where it does not, as in the container image, nothing is replaced.
    Call it before importing anything but the standard library. Exits with what to do when packages are missing.
    """
    python = ROOT / ".venv" / "bin" / "python"
    # The second comparison keeps a damaged .venv, whose Python reports another prefix, from replacing itself for ever.
    running = Path(sys.prefix).resolve() == python.parent.parent.resolve() or Path(sys.executable) == python
    if python.exists() and not running:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(python, [str(python), *sys.argv])
    # In front, so that a `script` or `tests` directory of somebody else's is not found first.
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        state = "has no" if python.exists() else "does not exist, and this Python has no"
        sys.exit(
            f"The project's environment {ROOT / '.venv'} {state} {', '.join(missing)}.\n"
            f"`make -C {ROOT} weights` builds it and fetches a small model."
        )
