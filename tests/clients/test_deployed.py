"""What a deployed model's users run: the snippets of its README, and the workflow's questions to the pushed version."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from benchmarks.lmql_client import redirected
from lmtp.deploy.models import Model, Source
from lmtp.deploy.pages import DEMO_TOKENIZER, readme
from lmtp.weights.manifest import Manifest, read_manifest
from tests.clients.test_replicate_client import ANSWER, node_modules
from tests.replicate_stand_in import MODEL, OWNER, TOKEN, StandIn
from tests.server import ROOT

__all__ = ["node_modules"]

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/push.yml").read_text())
STEPS = WORKFLOW["jobs"]["push"]["steps"]


@pytest.fixture
def snippet(demo_weights: Path) -> Callable[[str], str]:
    """The snippet below a heading of the README of the stand-in's model."""
    model = Model(MODEL, f"r8.im/{OWNER}/{MODEL}", Source("demo", "0.1.2"), {}, None, {}, {}, "", "private")
    text = readme(model, read_manifest(demo_weights))

    def find(heading: str) -> str:
        section = text.partition(f"### {heading}\n")[2].partition("\n### ")[0]
        fenced = re.search(r"```\w+\n(.*?)```", section, re.DOTALL)
        return fenced[1] if fenced else section

    return find


def run(command: list[str], api: StandIn, **environment: str) -> str:
    address = {"REPLICATE_API_TOKEN": TOKEN, "REPLICATE_BASE_URL": api.url}
    alone = {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}  # no request leaves this machine
    variables = os.environ | address | alone | environment
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_readmes_python_streams_the_answer(snippet: Callable[[str], str], api: StandIn) -> None:
    assert run([sys.executable, "-c", snippet("Python")], api) == ANSWER


def test_the_readmes_curl_prints_the_answer(snippet: Callable[[str], str], api: StandIn) -> None:
    commands = snippet("curl").replace("https://api.replicate.com", api.url)
    assert run(["bash", "-euo", "pipefail", "-c", commands], api) == ANSWER


def test_the_readmes_javascript_streams_the_answer(
    snippet: Callable[[str], str], api: StandIn, node_modules: Path, tmp_path: Path
) -> None:
    (tmp_path / "node_modules").symlink_to(node_modules / "node_modules")
    program = snippet("JavaScript").replace("new Replicate()", f'new Replicate({{ baseUrl: "{api.url}/v1" }})')
    (tmp_path / "ask.mjs").write_text(program)
    assert run(["node", str(tmp_path / "ask.mjs")], api) == ANSWER


def test_the_readmes_query_prints_its_distribution_in_lmql(
    snippet: Callable[[str], str], api: StandIn, demo_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "query.py"  # LMQL reads a query's source from its file
    program.write_text(snippet("LMQL").replace(DEMO_TOKENIZER, str(demo_weights)))
    with redirected(lambda: api.url, tmp_path):
        exec(compile(program.read_text(), str(program), "exec"), {})
    pairs = re.findall(r"\('(.+?)', (?:np\.float64\()?([\d.e-]+)", capsys.readouterr().out)
    assert {option for option, _ in pairs} == {" positive", " negative", " neutral"}
    assert sum(float(probability) for _, probability in pairs) == pytest.approx(1)


def test_the_readme_names_the_first_adapter_and_the_hardware() -> None:
    source = Source("org/name", "main")
    adapters = {"legal": Source("org/legal", "main"), "poems": Source("org/poems", "v2")}
    model = Model("x", "r8.im/acct/x", source, {"load_in": "4bit"}, None, adapters, {}, "gpu-t4", "public")
    text = readme(model, Manifest("org/name", "f" * 40, {}, {}))
    assert text.count('"adapter": "legal"') == 3
    assert '"visibility": "public", "hardware": "gpu-t4"' in text
    assert "| adapters | `legal` (`org/legal@main`), `poems` (`org/poems@v2`) |" in text
    assert "| quantization | 4bit |" in text
    assert 'tokenizer="org/name"' in text


class TestTheWorkflow:
    def test_asks_the_pushed_version(self, api: StandIn) -> None:
        (step,) = (step for step in STEPS if step.get("name") == "Ask the pushed version")
        program = re.search(r"<<'END'\n(.*)END\n", step["run"], re.DOTALL)
        assert program
        printed = run([sys.executable, "-c", program[1]], api, IMAGE=f"r8.im/{OWNER}/{MODEL}").splitlines()
        assert [line.split()[0] for line in printed] == ["MSG", "TOKEN"]

    def test_names_the_models_of_models_toml_or_those_it_is_given(self, tmp_path: Path) -> None:
        (tmp_path / "models.toml").write_text((ROOT / "models.toml.example").read_text())
        (step,) = (step for step in WORKFLOW["jobs"]["models"]["steps"] if step.get("id") == "names")

        def names(chosen: str) -> list[str]:
            variables = os.environ | {"CHOSEN": chosen, "GITHUB_OUTPUT": str(tmp_path / "output")}
            (tmp_path / "output").unlink(missing_ok=True)
            subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=variables, check=True, timeout=60)
            found: list[str] = json.loads((tmp_path / "output").read_text().removeprefix("names="))
            return found

        assert names("")[0] == "smollm2-135m"
        assert len(names("")) == 5
        assert names("a b") == ["a", "b"]

    def test_installs_the_cog_whose_sdk_the_image_has(self) -> None:
        (setup,) = (step["with"] for step in STEPS if step.get("uses", "").startswith("replicate/setup-cog@"))
        assert setup["cog-version"] == "v" + yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["sdk_version"]

    def test_takes_actions_at_commits_and_secrets_that_the_documentation_names(self) -> None:
        text = (ROOT / ".github/workflows/push.yml").read_text()
        used = re.findall(r"uses: (\S+)", text)
        assert used
        assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used)
        documented = (ROOT / "docs/deploy.md").read_text()
        assert {name for name in re.findall(r"secrets\.(\w+)", text) if f"`{name}`" not in documented} == set()
