"""Run a script and end the process, as a crash does, before its Nth change to files below a directory.

python -m tests.fuzz.crash N DIRECTORY SCRIPT ARGUMENTS...
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.symlink", "os.link"}
EXIT_CODE = 99


def crash_before(number: int, directory: str) -> None:
    """End this process before its change of this number, counted from 1."""
    changes = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in CHANGES
        # Names relative to an open directory, as shutil.rmtree uses them, are in no other.
        if writes and isinstance(arguments[0], str | Path):
            path = str(arguments[0])
            if path.startswith(directory) or not path.startswith("/"):
                changes += 1
                if changes == number:
                    os._exit(EXIT_CODE)

    sys.addaudithook(hook)


if __name__ == "__main__":
    _, number, directory, *sys.argv = sys.argv
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    crash_before(int(number), directory)
    runpy.run_path(sys.argv[0], run_name="__main__")
