"""Pushing: what the generated script asks of the installed Cog, and what it refuses; cog is a stand-in."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lmtp.deploy import DeployError, commands
from lmtp.deploy.commands import Workshop
from lmtp.deploy.pages import push
from tests.containers.conftest import Build

COG = """\
#!/bin/sh
case "$1 ${{2-}}" in
    "--version ") echo "cog version {version} (built 2026-01-01T00:00:00Z)" ;;
    "push --help") echo "Flags: {flags}" ;;
    *) echo "$PWD: $*" >> "{calls}"; exit {code} ;;
esac
"""

Machine = Callable[..., None]


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """What cog was called with: its directory and arguments, a call a line."""
    return tmp_path / "calls"


@pytest.fixture
def machine(tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Puts a stand-in for Cog, and Docker's configuration, on this machine."""

    def prepare(
        version: str = "0.23.1",
        flags: str = "--separate-weights --use-cuda-base-image string",
        docker: object = {"auths": {"r8.im": {"auth": "eDp5"}}},
        code: int = 0,
        helper: str = "",
    ) -> None:
        directory = tmp_path / "bin"
        directory.mkdir()
        programs = {"cog": COG.format(version=version, flags=flags, calls=calls, code=code)} if version else {}
        if helper:
            programs["docker-credential-keys"] = f"#!/bin/sh\n[ $1 = list ] && echo '{helper}'\n"
        for name, text in programs.items():
            (directory / name).write_text(text)
            (directory / name).chmod(0o755)
        for name in ("sh", "sed", "sort", "head", "grep", "cat", "dirname"):
            (directory / name).symlink_to(str(shutil.which(name)))
        monkeypatch.setenv("PATH", str(directory))
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
        if docker is not None:
            (tmp_path / "docker").mkdir()
            (tmp_path / "docker" / "config.json").write_text(json.dumps(docker, indent=2))

    return prepare


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the push script of an image, from another directory."""

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "push").write_text(push("r8.im/acct/x"))
        command = ["sh", str(tmp_path / "x" / "push"), *options]
        return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60, check=False)

    return run


Run = Callable[..., subprocess.CompletedProcess[str]]


class TestTheScript:
    def test_pushes_the_image_with_its_weights_apart(
        self, machine: Machine, run: Run, calls: Path, tmp_path: Path
    ) -> None:
        machine()
        assert run("--no-cache").returncode == 0
        options = "--use-cuda-base-image=false --separate-weights --no-cache"
        assert calls.read_text() == f"{tmp_path}/x: push r8.im/acct/x {options}\n"

    def test_gives_no_option_that_the_installed_cog_does_not_know(
        self, machine: Machine, run: Run, calls: Path
    ) -> None:
        machine(flags="--no-cache")
        assert run().returncode == 0
        assert calls.read_text().endswith(": push r8.im/acct/x\n")

    @pytest.mark.parametrize(
        "docker",
        [
            {"auths": {"r8.im": {}}, "credsStore": "keys"},
            {"credHelpers": {"r8.im": "keys"}},
        ],
    )
    def test_takes_a_login_that_docker_keeps_elsewhere(self, machine: Machine, run: Run, docker: object) -> None:
        machine(docker=docker)
        assert run().returncode == 0

    def test_asks_the_program_that_keeps_the_logins(self, machine: Machine, run: Run) -> None:
        machine(docker={"credsStore": "keys"}, helper='{"r8.im":"acct"}')
        assert run().returncode == 0

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"version": ""}, "push: there is no cog: install it"),
            ({"version": "0.9.8"}, "push: cog 0.9.8 is too old: install 0.21 or newer."),
            ({"docker": None}, "push: not logged in to r8.im: run cog login."),
            ({"docker": {"auths": {"ghcr.io": {}}}}, "push: not logged in to r8.im: run cog login."),
            ({"docker": {"credsStore": "keys"}, "helper": '{"ghcr.io":"acct"}'}, "push: not logged in to r8.im"),
            ({"docker": {"credsStore": "gone"}}, "push: not logged in to r8.im"),
        ],
    )
    def test_refuses_where_the_push_would_fail_after_the_build(
        self, machine: Machine, run: Run, calls: Path, settings: dict[str, object], message: str
    ) -> None:
        machine(**settings)
        ended = run()
        assert ended.returncode == 1
        assert ended.stderr.startswith(message)
        assert len(ended.stderr.splitlines()) == 1
        assert not calls.exists()


class TestThePushOfSeveral:
    def test_runs_each_script_in_turn_once_all_are_built(
        self, build: Build, shop: Workshop, machine: Machine, calls: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        build("tiny--4bit")
        machine()
        with pytest.raises(
            DeployError, match="work/tiny--lora is not built: run `script/models build tiny--lora` first"
        ):
            commands.push(shop, [])
        assert not calls.exists()
        build()
        commands.push(shop, [], dry_run=True)
        assert "work/tiny--4bit would be pushed to r8.im/acct/tiny--4bit." in capsys.readouterr().out
        assert not calls.exists()
        commands.push(shop, [])
        images = [line.split()[2] for line in calls.read_text().splitlines()]
        assert images == ["r8.im/acct/tiny--4bit", "r8.im/acct/tiny--lora"]

    def test_ends_with_the_first_that_fails(self, build: Build, shop: Workshop, machine: Machine, calls: Path) -> None:
        build()
        machine(code=3)
        with pytest.raises(DeployError, match=r"r8.im/acct/tiny--4bit is not pushed: .*/push ended with exit code 3"):
            commands.push(shop, [])
        assert len(calls.read_text().splitlines()) == 1
