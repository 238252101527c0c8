"""script/build where the C++ compiler fails. What it compiles is tested in tests/runners/test_compiled.py."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType, SimpleNamespace

import compiler
import pytest
import torch
from torch._inductor.exc import CppCompileError, InductorError

from lmtp.weights.manifest import Manifest
from tests.server import ROOT
from tests.tiny import build

LONG_OUTPUT = """In file included from /usr/include/a.h:3,
                 from wrapper.cpp:1:
/usr/include/b.h:10:10: fatal error: omp.h: No such file or directory
   10 | #include <omp.h>
compilation terminated.
"""


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    return tmp_path / "steps"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, steps: Path) -> ModuleType:
    """script/build, for a small model."""
    monkeypatch.setattr("runtime.container_environment", dict)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = spec_from_loader("script_build", SourceFileLoader("script_build", str(ROOT / "script/build")))
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded = SimpleNamespace(model=build("llama"), manifest=Manifest("small", None, {}, {}))
    monkeypatch.setattr(module.weights, "load", lambda *_, **__: loaded)
    monkeypatch.setattr(sys, "argv", ["script/build"])
    monkeypatch.setenv("COMPILED_DIR", str(steps))
    return module


def program(path: Path, *lines: str) -> str:
    """A shell script, as a compiler that does not work."""
    path.write_text("\n".join(("#!/bin/sh", *lines)))
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_does_not_work_is_found_before_the_work_begins(
    script: ModuleType,
    steps: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = program(tmp_path / "c++", f"cat >&2 <<'END'\n{LONG_OUTPUT}END", "exit 1")
    monkeypatch.setenv("CXX", broken)
    assert script.main() == 1
    assert capsys.readouterr().err == (
        f"script/build: the C++ compiler {broken} fails (/usr/include/b.h:10:10: fatal error: omp.h: No such file or"
        " directory): install what is missing (apt-get install g++), or set CXX to another compiler.\n"
    )
    assert not steps.exists()


def test_a_compiler_that_is_not_there_is_missed(
    script: ModuleType, steps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert script.main() == 1
    assert capsys.readouterr().err == (
        "script/build: there is no C++ compiler /nowhere/c++: install it (apt-get install g++), or set CXX.\n"
    )
    assert not steps.exists()


def test_a_compiler_that_fails_in_the_middle_leaves_no_files(
    script: ModuleType, steps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_partly(_: object, __: object, options: dict[str, str]) -> None:
        Path(options["aot_inductor.output_path"]).with_suffix(".o").write_text("half")
        raise InductorError(CppCompileError(["c++"], LONG_OUTPUT), None)

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler, "require", lambda: None)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: SimpleNamespace(module=lambda: None))
    monkeypatch.setattr("torch._inductor.aot_compile", compile_partly)
    assert script.main() == 1
    assert capsys.readouterr().err.startswith(
        "script/build: the C++ compiler g++ fails (/usr/include/b.h:10:10: fatal error: omp.h: No such file"
    )
    assert list(steps.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("g++: fatal error: Killed signal terminated program cc1plus", "free some memory for it."),
        ("fatal error: error writing to /tmp/a.s: No space left on device", "make room on the disk."),
        ("/usr/bin/ld: cannot find -lgomp", "install what is missing (apt-get install g++), or set CXX"),
        ("", "(it says nothing): install"),
    ],
)
def test_what_to_do_follows_from_what_the_compiler_says(output: str, told: str) -> None:
    assert told in str(compiler.failed(output))
