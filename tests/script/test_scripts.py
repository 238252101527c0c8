"""script/serve, script/predict and the modules behind them, with a small predictor that needs no model."""

import ast
import errno
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import schema
import yaml

from tests.server import ROOT, Piped, serving

PREDICTOR = """
import asyncio
import os
import time
from pathlib import Path
from typing import Optional

import cog
from cog import AsyncConcatenateIterator, BasePredictor, Input

HERE = Path(__file__).parent


class Predictor(BasePredictor):
    async def setup(self) -> None:
        (HERE / "worker").write_text(str(os.getpid()))
        behaviour = os.environ.get("SETUP")
        if behaviour == "fail":
            raise RuntimeError("There are no weights.\\nRun `make weights`.")
        if behaviour == "crash":
            os._exit(3)
        if behaviour == "hang":
            time.sleep(60)

    def healthcheck(self) -> bool:
        if (HERE / "ill").exists():
            raise RuntimeError("The predictor has a cold.")
        return True

    @cog.streaming
    @cog.concurrent(max=8)
    async def predict(
        self,
        text: Optional[str] = Input(default=None, description="What to say"),
        times: int = Input(default=3, ge=1, le=1000, description="How often to say it"),
        pause: float = Input(default=0.0, ge=0, description="Seconds between"),
        case: str = Input(default="lower", choices=["lower", "upper"], description="How to say it"),
        loud: bool = Input(default=False, description="With an exclamation mark"),
    ) -> AsyncConcatenateIterator[str]:
        # A coroutine that returns a generator: the runtime sends nothing of an async generator before its end.
        scope = self.scope
        if text is None:
            raise ValueError("text is missing.")
        if text == "hang":
            time.sleep(60)
        if text == "crash":
            os._exit(3)

        def words():
            for _ in range(times):
                yield (text.upper() if case == "upper" else text) + ("! " if loud else " ")
                time.sleep(pause)
            scope.record_metric("words", times)

        return words()
"""


Start = Callable[..., Piped]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with this repository's scripts and the small predictor."""
    (tmp_path / "script").mkdir()
    for name in ("environment.py", "schema.py", "runtime.py", "serve", "predict"):
        shutil.copy(ROOT / "script" / name, tmp_path / "script" / name)
    shutil.copy(ROOT / "cog.yaml", tmp_path)
    (tmp_path / "predict.py").write_text(PREDICTOR)
    return tmp_path


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def limit_memory(script: Path, limit: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end with a limit on its address space."""
    command = ["sh", "-c", f'ulimit -v {limit // 1024} && exec "$@"', "sh", sys.executable, str(script), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a script and leave it running; what is left at the end is killed."""
    started: list[Piped] = []

    def start(script: Path, *arguments: str, **environment: str) -> Piped:
        command = [sys.executable, str(script), *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # Where the tests run under nohup, SIGHUP is ignored, and would be by what they start.
        pipes["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
        started.append(Piped(command, env=os.environ | environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def worker(project: Path) -> int:
    """The process in which the predictor of a project runs, or ran last."""
    assert eventually(lambda: (project / "worker").exists() and (project / "worker").read_text() != "")
    return int((project / "worker").read_text())


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # A process that has ended and that nobody has waited for can still be signalled.
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def members(group: int) -> list[int]:
    """The processes of a process group."""
    found = subprocess.run(["ps", "-e", "-o", "pgid=,pid="], capture_output=True, text=True, check=True)
    return [int(pid) for pgid, pid in map(str.split, found.stdout.splitlines()) if int(pgid) == group]


def environment_of(process: int) -> dict[str, str]:
    """The environment that a process was started with."""
    lines = Path(f"/proc/{process}/environ").read_bytes().decode().rstrip("\0").split("\0")
    return dict(line.split("=", 1) for line in lines)


class TestServe:
    def test_says_in_one_line_where_predictions_are_accepted(self, project: Path, start: Start) -> None:
        server = start(project / "script/serve", "--port", "0")
        line = server.stdout.readline()
        address, path = line.removeprefix("Ready: http://").split("/")
        connection = http.client.HTTPConnection(address, timeout=20)
        connection.request(
            "POST", f"/{path.strip()}", '{"input": {"text": "hi"}}', {"Content-Type": "application/json"}
        )
        assert json.load(connection.getresponse())["output"] == ["hi ", "hi ", "hi "]
        server.terminate()
        assert server.communicate(timeout=20)[0] == ""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_ends_with_success_and_leaves_nothing_running_when_it_is_stopped(
        self, project: Path, start: Start, number: int
    ) -> None:
        server = start(project / "script/serve", "--port", "0")
        assert server.stdout.readline()
        server.send_signal(number)
        assert server.wait(timeout=20) == 0
        assert not alive(worker(project))

    def test_stops_a_predictor_that_does_not_listen(self, project: Path, start: Start) -> None:
        server = start(project / "script/serve", "--port", "0")
        address = server.stdout.readline().removeprefix("Ready: http://").split("/")[0]
        connection = http.client.HTTPConnection(address, timeout=20)
        connection.request("POST", "/predictions", '{"input": {"text": "hang"}}', {"Content-Type": "application/json"})
        time.sleep(0.5)
        server.terminate()
        assert server.wait(timeout=20) == 0
        assert not alive(worker(project))

    def test_can_be_stopped_during_setup(self, project: Path, start: Start) -> None:
        server = start(project / "script/serve", "--port", "0", SETUP="hang")
        process = worker(project)
        server.terminate()
        assert server.communicate(timeout=20)[0] == ""
        assert server.returncode == 0
        assert not alive(process)

    def test_fails_with_the_message_of_setup(self, project: Path) -> None:
        served = run(project / "script/serve", "--port", "0", SETUP="fail")
        assert (served.returncode, served.stdout) == (1, "")
        last = served.stderr.splitlines()[-1]
        assert last == "script/serve: Setup failed: RuntimeError: There are no weights. Run `make weights`."
        assert not alive(worker(project))

    def test_fails_when_setup_crashes(self, project: Path) -> None:
        served = run(project / "script/serve", "--port", "0", SETUP="crash")
        assert (served.returncode, served.stdout) == (1, "")
        assert served.stderr.splitlines()[-1] == "script/serve: Setup failed: worker crashed"

    def test_fails_when_the_predictor_cannot_be_imported(self, project: Path) -> None:
        (project / "predict.py").write_text("import nothing_of_that_name\n" + PREDICTOR)
        served = run(project / "script/serve", "--port", "0")
        assert served.returncode == 1
        assert "No module named 'nothing_of_that_name'" in served.stderr.splitlines()[-1]

    def test_fails_when_the_port_is_taken(self, project: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            served = run(project / "script/serve", "--port", str(port))
        assert served.returncode == 1
        assert served.stderr == f"script/serve: Cannot listen on 127.0.0.1 port {port}: Address already in use.\n"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--port", "70000"), "There is no port 70000; ports are 0 to 65535."),
            (("--host", "no.such.host.invalid"), "Cannot listen on no.such.host.invalid port 5000: "),
        ],
    )
    def test_fails_where_it_cannot_listen(self, project: Path, options: tuple[str, ...], message: str) -> None:
        served = run(project / "script/serve", *options)
        assert served.returncode == 1
        assert served.stderr.startswith(f"script/serve: {message}")

    def test_fails_when_the_predictor_dies_later(self, project: Path) -> None:
        with serving(project) as server:
            os.kill(worker(project), signal.SIGKILL)
            assert server.process.wait(timeout=30) == 1
            assert eventually(lambda: "has died" in server.log[-1])

    def test_fails_with_the_message_of_a_health_check(self, project: Path) -> None:
        with serving(project) as server:
            (project / "ill").touch()
            assert server.process.wait(timeout=30) == 1
            assert server.log[-1] == "script/serve: The predictor is not healthy: The predictor has a cold.\n"
            assert not alive(worker(project))

    @pytest.mark.parametrize("script", ["serve", "predict"])
    def test_fails_where_an_input_is_not_one_that_cog_serves(self, project: Path, script: str) -> None:
        (project / "predict.py").write_text(PREDICTOR.replace("default=3", "default=0"))
        served = run(project / "script" / script)
        assert (served.returncode, served.stdout) == (1, "")
        assert served.stderr == f"script/{script}: predict.py: invalid default for times: int: must be at minimum 1\n"

    @pytest.mark.parametrize("script", ["serve", "predict"])
    def test_fails_where_the_project_cannot_be_written(self, project: Path, script: str) -> None:
        (project / ".cog").touch()  # where its directory should be
        served = run(project / "script" / script)
        assert (served.returncode, served.stdout) == (1, "")
        path = project / ".cog/openapi_schema.json"
        assert served.stderr.splitlines()[-1] == (
            f"script/{script}: The runtime needs {path}, which cannot be written: File exists."
        )

    def test_names_a_limit_on_memory_where_setup_fails(self, project: Path) -> None:
        limited = limit_memory(project / "script/serve", 8 * 2**30, "--port", "0", SETUP="fail")
        assert limited.returncode == 1
        assert limited.stderr.splitlines()[-1] == (
            "script/serve: Setup failed: RuntimeError: There are no weights. Run `make weights`."
            " (`ulimit -v` allows 8192 MB of memory, which may be too little.)"
        )

    @pytest.mark.parametrize("behaviour", ["", "hang"])
    @pytest.mark.parametrize(
        "command", ["serve --port 0", "predict -i text=hi -i times=1000 -i pause=0.1", "predict -i text=hang"]
    )
    def test_leaves_nothing_running_when_it_is_killed(
        self, project: Path, start: Start, command: str, behaviour: str
    ) -> None:
        script, *arguments = command.split()
        serving = start(project / "script" / script, *arguments, SETUP=behaviour)
        if not behaviour and "hang" not in command:
            assert serving.stdout.read(1)
        group = os.getpgid(worker(project))
        if "hang" in command:
            time.sleep(1)
        assert group not in (os.getpgid(0), os.getpgid(serving.pid))
        serving.kill()
        try:
            assert eventually(lambda: not any(alive(process) for process in members(group)), seconds=5)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def test_sets_the_environment_of_the_container(self, project: Path) -> None:
        with serving(project, MALLOC_ARENA_MAX="4"):
            found = environment_of(worker(project))
        set_by_cog = dict(line.split("=", 1) for line in yaml.safe_load((ROOT / "cog.yaml").read_text())["environment"])
        assert set(set_by_cog) == {
            "GOMP_SPINCOUNT",
            "MALLOC_ARENA_MAX",
            "MALLOC_MMAP_THRESHOLD_",
            "MALLOC_TRIM_THRESHOLD_",
        }
        assert {name: found[name] for name in set_by_cog} == set_by_cog | {"MALLOC_ARENA_MAX": "4"}

    def test_leaves_the_spinning_of_openmp_to_whoever_sets_its_policy(self, project: Path) -> None:
        with serving(project, OMP_WAIT_POLICY="passive"):
            assert "GOMP_SPINCOUNT" not in environment_of(worker(project))

    def test_writes_the_schema_that_the_runtime_checks_inputs_by(self, project: Path) -> None:
        with serving(project) as server:
            connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
            body = '{"input": {"text": 1, "times": 0, "case": "title"}}'
            connection.request("POST", "/predictions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 422
            problems = {problem["loc"][-1]: problem["msg"] for problem in json.load(response)["detail"]}
        assert problems == {
            "text": '1 is not of type "string"',
            "times": "0 is less than the minimum of 1",
            "case": '"title" is not one of ["lower","upper"]',
        }

    def test_runs_as_many_predictions_at_once_as_the_decorator_says(self, project: Path) -> None:
        with serving(project) as server:
            connections = []
            for _ in range(9):
                connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
                body = '{"input": {"text": "hi", "times": 4, "pause": 0.5}}'
                connection.request("POST", "/predictions", body, {"Content-Type": "application/json"})
                connections.append(connection)
            assert sorted(connection.getresponse().status for connection in connections) == [200] * 8 + [409]


class TestPredict:
    def test_prints_the_output_and_nothing_else(self, project: Path) -> None:
        predicted = run(project / "script/predict", "-i", "text=hi")
        assert (predicted.returncode, predicted.stdout) == (0, "hi hi hi \n")
        loading, ready = predicted.stderr.splitlines()
        assert loading == "Loading the model …"
        assert ready.startswith("Ready after ")
        assert not alive(worker(project))

    def test_prints_the_output_as_it_grows(self, project: Path, start: Start) -> None:
        predicting = start(project / "script/predict", "-i", "text=hi", "-i", "times=8", "-i", "pause=0.25")
        assert predicting.stdout.read(3) == "hi "
        first = time.monotonic()
        assert predicting.stdout.read() == "hi " * 7 + "\n"
        assert time.monotonic() - first > 1

    def test_gives_inputs_the_types_of_the_signature(self, project: Path) -> None:
        inputs = ("text=2", "times=2", "pause=0.1", "case=upper", "loud=true")
        predicted = run(project / "script/predict", *(part for given in inputs for part in ("-i", given)))
        assert predicted.stdout == "2! 2! \n"

    def test_reads_a_value_from_a_file(self, project: Path) -> None:
        (project / "text").write_text("grüße=\n")
        predicted = run(project / "script/predict", "-i", f"text=@{project / 'text'}", "-i", "times=1")
        assert predicted.stdout == "grüße=\n \n"

    def test_prints_the_whole_response_as_json(self, project: Path) -> None:
        predicted = run(project / "script/predict", "-i", "text=hi", "--json")
        response = json.loads(predicted.stdout)
        assert response["status"] == "succeeded"
        assert response["output"] == ["hi ", "hi ", "hi "]
        assert response["metrics"]["words"] == 3

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("text", "-i text: an input is given as NAME=VALUE."),
            ("txt=hi", "There is no input 'txt'. Did you mean 'text'? Inputs: text, times, pause, case, loud."),
            ("xyz=hi", "There is no input 'xyz'. Inputs: text, times, pause, case, loud."),
            ("times=many", "-i times=many: this input is of type integer, as JSON writes it."),
            ("times=1.5", "-i times=1.5: this input is of type integer, as JSON writes it."),
            ("loud=yes", "-i loud=yes: this input is of type boolean, as JSON writes it."),
            (
                "text=@missing",
                "-i text: missing cannot be read as text: [Errno 2] No such file or directory: 'missing'",
            ),
        ],
    )
    def test_refuses_a_wrong_input_before_it_loads_the_model(self, project: Path, given: str, message: str) -> None:
        predicted = run(project / "script/predict", "-i", given)
        assert (predicted.returncode, predicted.stdout) == (1, "")
        assert predicted.stderr == f"script/predict: {message}\n"

    def test_explains_every_input(self, project: Path) -> None:
        helped = run(project / "script/predict", "--help").stdout.splitlines()
        for line in ("text What to say", "times How often to say it", "loud With an exclamation mark"):
            assert line.split() in [found.split() for found in helped]

    @pytest.mark.parametrize("options", [(), ("--json",)])
    def test_fails_with_what_the_server_has_against_the_inputs(self, project: Path, options: tuple[str, ...]) -> None:
        predicted = run(project / "script/predict", "-i", "times=0", "-i", "case=title", *options)
        assert (predicted.returncode, predicted.stdout) == (1, "")
        problems = 'case: "title" is not one of ["lower","upper"]', "times: 0 is less than the minimum of 1"
        assert all(problem in predicted.stderr for problem in problems)

    @pytest.mark.parametrize("options", [(), ("--json",)])
    def test_fails_with_the_message_of_the_predictor(self, project: Path, options: tuple[str, ...]) -> None:
        predicted = run(project / "script/predict", *options)
        assert predicted.returncode == 1
        assert predicted.stderr.splitlines()[-1] == "script/predict: ValueError: text is missing."

    def test_fails_when_the_predictor_crashes(self, project: Path) -> None:
        predicted = run(project / "script/predict", "-i", "text=crash")
        assert predicted.returncode == 1
        assert predicted.stderr.splitlines()[-1] == "script/predict: Worker crashed"

    def test_fails_with_the_message_of_setup(self, project: Path) -> None:
        predicted = run(project / "script/predict", "-i", "text=hi", SETUP="fail")
        assert predicted.returncode == 1
        assert "Setup failed: RuntimeError: There are no weights. Run `make weights`." in predicted.stderr

    def test_shows_the_logs_when_asked_to(self, project: Path) -> None:
        predicted = run(project / "script/predict", "-i", "text=hi", "--verbose")
        assert predicted.stdout == "hi hi hi \n"
        assert "Running setup" in predicted.stderr

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_stops_everything_when_it_is_interrupted(self, project: Path, start: Start, number: int, code: int) -> None:
        predicting = start(project / "script/predict", "-i", "text=hi", "-i", "times=1000", "-i", "pause=0.1")
        assert predicting.stdout.read(3) == "hi "
        predicting.send_signal(number)
        assert predicting.wait(timeout=20) == code
        assert not alive(worker(project))

    def test_ends_quietly_when_nobody_reads_on(self, project: Path, start: Start) -> None:
        predicting = start(project / "script/predict", "-i", "text=hi", "-i", "times=1000", "-i", "pause=0.1")
        assert predicting.stdout.read(3) == "hi "
        predicting.stdout.close()
        assert predicting.wait(timeout=20) == 1
        assert "Traceback" not in predicting.stderr.read()
        assert not alive(worker(project))


class TestEnvironment:
    PROBE = "import environment\nenvironment.enter()\nimport sys\nprint(sys.prefix, sys.path[0], *sys.argv[1:])\n"

    @pytest.fixture
    def probe(self, project: Path) -> Path:
        (project / "script" / "probe").write_text(self.PROBE)
        return project / "script" / "probe"

    def test_runs_with_the_interpreter_at_hand_where_there_is_no_venv(self, project: Path, probe: Path) -> None:
        assert run(probe, "a", "b").stdout == f"{sys.prefix} {project} a b\n"

    def test_runs_with_the_projects_venv(self, project: Path, probe: Path) -> None:
        venv.create(project / ".venv", symlinks=True)
        packages = next((project / ".venv").glob("lib/python*/site-packages"))
        (packages / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        assert run(probe, "a", "b").stdout == f"{project / '.venv'} {project} a b\n"

    def test_finds_the_project_through_a_symbolic_link_and_from_another_directory(
        self, project: Path, probe: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        (elsewhere / "link").symlink_to(probe)
        found = subprocess.run([sys.executable, "link"], cwd=elsewhere, capture_output=True, text=True, timeout=20)
        assert found.stdout == f"{sys.prefix} {project}\n"

    def test_says_what_to_do_where_there_are_neither_venv_nor_packages(self, project: Path, probe: Path) -> None:
        bare = [sys.executable, "-S", str(probe)]  # -S: an interpreter that finds nothing that is installed
        asked = subprocess.run(bare, capture_output=True, text=True, timeout=20)
        assert asked.returncode == 1
        assert asked.stderr == (
            f"The project's environment {project / '.venv'} does not exist, and this Python has no cog, torch,"
            f" transformers.\n`make -C {project} weights` builds it and fetches a small model.\n"
        )

    def test_says_what_to_do_where_the_venv_is_not_complete(self, project: Path, probe: Path) -> None:
        venv.create(project / ".venv", symlinks=True)
        asked = run(probe)
        assert asked.returncode == 1
        assert asked.stderr.startswith(
            f"The project's environment {project / '.venv'} has no cog, torch, transformers."
        )

    @pytest.mark.parametrize(
        "script", [path for path in (ROOT / "script").iterdir() if path.is_file() and not path.suffix]
    )
    def test_scripts_enter_it_before_they_import_what_only_it_has(self, script: Path) -> None:
        before, found, _ = script.read_text().partition("\nenvironment.enter(")
        assert found
        imports = [node for node in ast.walk(ast.parse(before)) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name.name for node in imports if isinstance(node, ast.Import) for name in node.names}
        names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
        assert {name.partition(".")[0] for name in names} <= {"environment", *sys.stdlib_module_names}

    @pytest.mark.parametrize("script", ["serve", "predict", "build", "download_weights"])
    def test_scripts_refuse_less_memory_than_pytorch_needs(self, script: str) -> None:
        path = ROOT / "script" / script
        limited = limit_memory(path, 2**29)
        assert (limited.returncode, limited.stdout) == (1, "")
        assert limited.stderr == (
            f"{path}: `ulimit -v` allows 512 MB of memory, and PyTorch needs more than 1024: raise the limit.\n"
        )

    @pytest.mark.parametrize("script", ["serve", "predict"])
    def test_scripts_can_be_executed_and_explain_themselves(self, script: str) -> None:
        # The first `python3` on the path has to be one with the packages, as inside the image.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        helped = subprocess.run(
            [ROOT / "script" / script, "--help"],
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert helped.returncode == 0
        assert helped.stdout.startswith(f"usage: {script} ")


Describe = Callable[[str], schema.Signature]


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Describe:
    """Describes the predictor in this source."""

    def describe(source: str) -> schema.Signature:
        (tmp_path / "predict.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(sys.modules, "predict", None)  # brings back at the end what is there now
        del sys.modules["predict"]
        return schema.read_signature()

    return describe


def predictor(arguments: str) -> str:
    """The source of a predictor whose predict has these arguments."""
    return (
        "from typing import List, Optional\nimport typing\nfrom cog import Input\n"
        f"class Predictor:\n    async def predict(self, {arguments}) -> str: ...\n"
    )


class TestSchema:
    def test_is_the_one_that_cog_build_writes(self, describe: Describe) -> None:
        document = schema.openapi(describe(PREDICTOR))
        schemas = document["components"]["schemas"]
        assert schemas["Input"] == {
            "title": "Input",
            "type": "object",
            "properties": {
                "text": {
                    "title": "Text",
                    "type": "string",
                    "nullable": True,
                    "default": None,
                    "description": "What to say",
                    "x-order": 0,
                },
                "times": {
                    "title": "Times",
                    "type": "integer",
                    "default": 3,
                    "minimum": 1,
                    "maximum": 1000,
                    "description": "How often to say it",
                    "x-order": 1,
                },
                "pause": {
                    "title": "Pause",
                    "type": "number",
                    "default": 0.0,
                    "minimum": 0,
                    "description": "Seconds between",
                    "x-order": 2,
                },
                "case": {
                    "allOf": [{"$ref": "#/components/schemas/case"}],
                    "default": "lower",
                    "description": "How to say it",
                    "x-order": 3,
                },
                "loud": {
                    "title": "Loud",
                    "type": "boolean",
                    "default": False,
                    "description": "With an exclamation mark",
                    "x-order": 4,
                },
            },
        }
        assert schemas["case"] == {
            "title": "case",
            "description": "An enumeration.",
            "type": "string",
            "enum": ["lower", "upper"],
        }
        assert schemas["Output"] == {
            "title": "Output",
            "type": "array",
            "items": {"type": "string"},
            "x-cog-array-type": "iterator",
            "x-cog-array-display": "concatenate",
        }
        assert document["paths"]["/predictions"]["post"]["x-cog-streaming"] is True

    def test_knows_how_many_predictions_run_at_once(self, describe: Describe) -> None:
        assert describe(PREDICTOR).concurrency == 8
        assert describe(predictor("given: str")).concurrency == 1

    def test_says_that_output_is_streamed_only_where_the_decorator_is(self, describe: Describe) -> None:
        assert describe(PREDICTOR).streaming
        document = schema.openapi(describe(PREDICTOR.replace("@cog.streaming", "")))
        assert "x-cog-streaming" not in document["paths"]["/predictions"]["post"]

    @pytest.mark.parametrize(
        ("annotation", "expected"),
        [
            ("str", {"type": "string"}),
            ("Optional[int]", {"type": "integer", "nullable": True}),
            ("typing.Optional[int]", {"type": "integer", "nullable": True}),
            ("int | None", {"type": "integer", "nullable": True}),
            ("None | int", {"type": "integer", "nullable": True}),
            ("list[str]", {"type": "array", "items": {"type": "string"}}),
            ("Optional[List[float]]", {"type": "array", "items": {"type": "number"}, "nullable": True}),
        ],
    )
    def test_reads_plain_types(self, describe: Describe, annotation: str, expected: dict[str, Any]) -> None:
        if "nullable" in expected:
            expected = expected | {"default": None}
        assert describe(predictor(f"given: {annotation}")).inputs == {"given": expected}

    def test_an_input_is_required_where_it_has_no_default_and_is_not_optional(self, describe: Describe) -> None:
        signature = describe(
            predictor(
                "plain: str, optional: Optional[str], literal: str = 'x', none: str = None, described: int ="
                " Input(ge=1), cleared: int = Input(default=None), defaulted: int = Input(default=1)"
            )
        )
        assert signature.required == ["plain", "none", "described", "cleared"]

    @pytest.mark.parametrize(
        ("source", "problem"),
        [
            ("class Runner: ...", "predictor Predictor not found in predict"),
            ("class Predictor: ...", "run or predict method not found"),
            ("class Predictor(:", "invalid syntax (predict.py, line 1)"),
            ("class Predictor:\n def predict(self, x: int): ...", "must have a return type annotation"),
            (predictor("given"), "missing type annotation for input: given"),
            (predictor("given: complex"), "complex"),
            (predictor("*given"), "must not have *args"),
            (predictor("given: int = Input(default=0, ge=1)"), "must be at minimum 1"),
        ],
    )
    def test_says_what_is_wrong_with_the_file(self, describe: Describe, source: str, problem: str) -> None:
        with pytest.raises(schema.SchemaError, match=r"^predict\.py: ") as raised:
            describe(source)
        assert problem in str(raised.value)

    def test_is_written_whole_or_not_at_all(
        self, describe: Describe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        signature = describe(predictor(""))
        schema.write(signature, tmp_path)
        written = (tmp_path / ".cog/openapi_schema.json").read_text()

        def write_a_part(path: Path, text: str, encoding: str) -> None:
            path.write_bytes(text.encode(encoding)[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", write_a_part)
        schema.write(signature, tmp_path)  # nothing has changed, so nothing has to be written
        (tmp_path / ".cog/openapi_schema.json").write_bytes(b"\xff")  # as a crash can leave it
        with pytest.raises(schema.SchemaError, match="No space left"):
            schema.write(signature, tmp_path)
        (tmp_path / ".cog/openapi_schema.json").write_bytes(b"older")
        with pytest.raises(schema.SchemaError, match=r"openapi_schema.json, which cannot be written: No space left"):
            schema.write(signature, tmp_path)
        assert [path.name for path in (tmp_path / ".cog").iterdir()] == ["openapi_schema.json"]
        assert (tmp_path / ".cog/openapi_schema.json").read_text() == "older"
        assert json.loads(written)["openapi"]

    def test_can_read_this_projects_predictor(self) -> None:
        signature = schema.read_signature()
        assert {"prompt", "max_tokens", "ops_batch_json"} <= set(signature.inputs)
        assert signature.streaming
        assert signature.concurrency == 64
        assert signature.required == []
        assert all(described["description"] for described in signature.inputs.values())


class TestInputsTable:
    """The table of predict.py's inputs in README.md."""

    def test_is_the_one_that_make_docs_writes(self, tmp_path: Path) -> None:
        readme = (ROOT / "README.md").read_text()
        (tmp_path / "README.md").write_text(re.sub("(?s)(<!-- inputs -->\n).*(\n<!-- /inputs -->)", r"\1\2", readme))
        assert "| `prompt` |" not in (tmp_path / "README.md").read_text()
        assert run(ROOT / "script/inputs_table", str(tmp_path / "README.md")).returncode == 0
        assert (tmp_path / "README.md").read_text() == readme, "predict.py's inputs have changed: run `make docs`"

    def test_is_not_written_where_nothing_marks_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("# Without markers\n")
        written = run(ROOT / "script/inputs_table", str(tmp_path / "README.md"))
        assert written.returncode == 1
        assert written.stderr.endswith("README.md needs one <!-- inputs --> … <!-- /inputs -->.\n")
        assert (tmp_path / "README.md").read_text() == "# Without markers\n"


def test_scripts_are_written_for_any_python_3_that_starts_them() -> None:
    """They are parsed before the project's own Python takes over."""
    for name in ("serve", "predict", "inputs_table", "environment.py"):
        ast.parse((ROOT / "script" / name).read_text(), feature_version=(3, 9))
