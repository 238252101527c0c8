"""The C++ compiler that script/build uses, and what to say where it fails."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

PROGRAM = "#include <omp.h>\n#include <vector>\nstd::vector<int> threads() { return {omp_get_max_threads()}; }\n"

ADVICE = {"Killed": "free some memory for it", "No space left": "make room on the disk"}
OTHER_ADVICE = "install what is missing (apt-get install g++), or set CXX to another compiler"


class CompilerError(Exception):
    """The C++ compiler does not work; says why and what to do, in one sentence."""


def require() -> None:
    """Try the compiler on a few lines: what it lacks is found now, not after minutes. Raises CompilerError."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "try.cpp")
        source.write_text(PROGRAM)
        command = [_name(), "-shared", "-fPIC", "-fopenmp", "-o", str(source.with_suffix(".so")), str(source)]
        try:
            subprocess.run(
                command,
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=os.environ | {"LC_ALL": "C"},  # `failed` looks for English words
            )
        except FileNotFoundError:
            raise CompilerError(
                f"there is no C++ compiler {_name()}: install it (apt-get install g++), or set CXX."
            ) from None
        except subprocess.CalledProcessError as error:
            raise failed(error.stdout) from None


def failed(output: str) -> CompilerError:
    """The error for what a failing compiler has printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it says nothing"]
    line = next((line for line in lines if re.search(r"\berror\b|cannot find|undefined reference", line)), lines[0])
    advice = next((advice for sign, advice in ADVICE.items() if sign in line), OTHER_ADVICE)
    return CompilerError(f"the C++ compiler {_name()} fails ({line}): {advice}.")


def _name() -> str:
    return os.environ.get("CXX", "g++")
