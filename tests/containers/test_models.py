"""models.toml is read and checked without network; an error names the file, the line and what to do."""

import os
import re
import tomllib
from pathlib import Path

import pytest

from lmtp.deploy import DeployError, models
from lmtp.deploy.lines import line_of
from lmtp.deploy.models import KEYS, Model, Source
from tests.server import ROOT

EXAMPLE = ROOT / "models.toml.example"
PREFIX = 'dest_prefix = "r8.im/acct/"\n'


def read(path: Path, text: str) -> dict[str, Model]:
    (path / "models.toml").write_text(text)
    return models.read(path / "models.toml")


def test_a_config_of_lmqls_build_script_is_read_as_it_is(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        f"""{PREFIX}
[models]

## base
[models.llama-2-7b-hf--lmql-4bit]
huggingface.repo = "meta-llama/Llama-2-7b-hf" # could also set huggingface.version
config.load_in_4bit = true

[models.llama-2-7b-hf--lmql-8bit]
huggingface.repo = "meta-llama/Llama-2-7b-hf"
huggingface.version = "v1"
config.load_in_8bit = true
config.use_safetensors = true
config.torch_dtype = "float16"

[models.llama-2-7b-hf--lmql]
huggingface.repo = "meta-llama/Llama-2-7b-hf"
config.trust_remote_code = true
config.rope_scaling = {{ rope_type = "linear", factor = 2.0 }}
""",
    )
    four, eight, plain = found.values()
    assert four.image == "r8.im/acct/llama-2-7b-hf--lmql-4bit"
    assert four.source == Source("meta-llama/Llama-2-7b-hf", "main")
    assert eight.source.revision == "v1"
    assert four.model_args == {"trust_remote_code": False, "load_in": "4bit"}
    assert eight.model_args == {"trust_remote_code": False, "dtype": "float16", "load_in": "8bit"}
    assert plain.model_args == {"trust_remote_code": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert (plain.visibility, plain.hardware) == ("private", "")


def test_adapters_are_one_to_merge_or_several_by_name(tmp_path: Path) -> None:
    tables = '[models.{}]\nhuggingface.repo = "org/name"\n'
    one, several = read(
        tmp_path,
        PREFIX
        + tables.format("one")
        + 'adapters = "org/lora@v2"\n'
        + tables.format("several")
        + 'adapters.a = "org/lora"\nadapters.b = "org/lora@v2"\n',
    ).values()
    assert (one.adapter, one.adapters) == (Source("org/lora", "v2"), {})
    assert (several.adapter, several.adapters) == (
        None,
        {"a": Source("org/lora", "main"), "b": Source("org/lora", "v2")},
    )


def test_the_example_is_right_once_the_account_is_set_and_shows_every_key(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    found = read(tmp_path, text.replace("YOURACCOUNT", "acct"))
    assert len(found) == 5
    used = {key for table in tomllib.loads(text)["models"].values() for key in table}
    assert used == set(KEYS)
    with pytest.raises(DeployError, match="line 5: dest_prefix still says YOURACCOUNT: put your account"):
        read(tmp_path, text)


MODEL = PREFIX + '[models.x]\nhuggingface.repo = "org/name"\n'


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[models.x]\nhuggingface.repo = "a/b"\n', 1, "dest_prefix is not set: add"),
        ('dest_prefix = "docker.io/a"\n', 1, "dest_prefix is 'docker.io/a': give Replicate's registry and an account"),
        ("dest_prefix = 3\n", 1, "dest_prefix is 3: give a text of one line"),
        (PREFIX, 1, "there are no models: add a table such as [models.my-model]"),
        ("\n" + PREFIX + "model = 1\n", 3, "model is unknown: did you mean models?"),
        (PREFIX + "[models.x]\n", 2, 'x has no huggingface.repo: add huggingface.repo = "org/name"'),
        (PREFIX + '[models.x.huggingface]\nrep = "org/name"\n', 3, "huggingface.rep is unknown: did you mean repo?"),
        (PREFIX + '[models.x]\nhuggingface.repo = "/etc"\n', 3, "huggingface.repo is '/etc': give a repository"),
        (PREFIX + '[models.x]\nhuggingface = "org/name"\n', 3, "huggingface is 'org/name': make it a table"),
        (PREFIX + '[models.x]\nhuggingface = { repo = "demo", version = "1" }\n', 3, "one version"),
        (PREFIX + '[models.Llama]\nhuggingface.repo = "org/name"\n', 2, "Llama is no name for a model"),
        (PREFIX + '[models."../x"]\nhuggingface.repo = "org/name"\n', 2, "../x is no name for a model"),
        (PREFIX + "models = 1\n", 2, "models is 1: make it a table"),
        (PREFIX + "[models]\nx = 1\n", 3, "models.x is 1: make it a table"),
        (MODEL + 'quantisation = "4bit"\n', 4, "quantisation is unknown: did you mean quantization?"),
        (MODEL + 'quantization = "4"\n', 4, "quantization is '4': choose one of 4bit, 8bit, int8, fp8"),
        (MODEL + "zzz = 1\n", 4, "zzz is unknown: known are huggingface, config, quantization"),
        (MODEL + 'quantization = "8bit"\nconfig.load_in_4bit = true\n', 4, "both 8bit and 4bit: choose one"),
        (MODEL + "config.load_in_4bit = 1\n", 4, "config.load_in_4bit is 1: give true or false"),
        (MODEL + 'config.load_in = "4bit"\n', 4, "config.load_in is not taken: set quantization"),
        (MODEL + 'config.revision = "v1"\n', 4, "config.revision is not taken: set huggingface.version"),
        (MODEL + "config.use_safetensors = false\n", 4, "only safetensors are loaded"),
        (MODEL + 'config.torch_dtype = "half"\n', 4, "config.torch_dtype is 'half': choose one of auto, float32"),
        (MODEL + "config.since = 2024-01-01\n", 4, "config.since is 2024-01-01, which JSON does not have"),
        (MODEL + "adapters = 1\n", 4, "adapters is 1: make it a repository, or a table of repositories by name"),
        (MODEL + 'adapters = "a b"\n', 4, "'a b' is no adapter: give a repository, such as org/name"),
        (MODEL + 'adapters."a/b" = "org/lora"\n', 4, "a/b is no name for an adapter"),
        (MODEL + '[models.x.environment]\nDTYPE = "half"\n', 5, "environment.DTYPE is 'half': choose one of auto"),
        (MODEL + 'environment.KV_CACHE_GB = "lots"\n', 4, "KV_CACHE_GB is 'lots'; use a number of gigabytes"),
        (MODEL + 'environment.HF_TOKEN = "x"\n', 4, "HF_TOKEN looks like a secret"),
        (MODEL + 'environment.CUDA_HOME = "x"\n', 4, "Cog sets CUDA_HOME itself: leave it out"),
        (MODEL + 'environment.WEIGHTS_DIR = "x"\n', 4, "WEIGHTS_DIR is not taken: the build decides"),
        (MODEL + 'environment."A-B" = "x"\n', 4, "A-B is no name of an environment variable"),
        (MODEL + "environment.COMPILE = false\n", 4, "COMPILE is False: give a text of one line, or a number"),
        (MODEL + 'environment.A = "b PATH=/c"\n', 4, "A is 'b PATH=/c': Cog takes no spaces, quotes"),
        (MODEL + "environment.A = '$HOME'\n", 4, "A is '$HOME': Cog takes no spaces, quotes"),
        (MODEL + 'environment.A = "b\\nRUN c"\n', 4, "give a text of one line"),
        (MODEL + 'huggingface.version = "`rm`"\n', 4, "huggingface.version is '`rm`': give a branch, a tag or a commit"),
        (MODEL + 'adapters = "org/lora@a|b"\n', 4, "'org/lora@a|b' is no adapter: give a repository"),
        (MODEL + 'adapters.a = "../lora"\n', 4, "'../lora' is no adapter: give a repository"),
        (PREFIX + '[models."a\\nb"]\nhuggingface.repo = "org/name"\n', 2, "a\\nb is no name for a model"),
        (MODEL + 'hardware = "Nvidia T4"\n', 4, "hardware is 'Nvidia T4': give a name as Replicate's API lists it"),
        (MODEL + 'visibility = "secret"\n', 4, "visibility is 'secret': choose one of private, public"),
        (MODEL + '[models.x]\nhuggingface.repo = "org/name"\n', 4, "the model x is there twice: give one of them another"),
        (MODEL + "a = \n", 4, "is not TOML: Invalid value"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(DeployError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path}/models.toml, line {line}")
    assert message in str(error.value)
    assert str(error.value).isprintable()


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"There is no .*/models.toml: copy models.toml.example to it"):
        models.read(tmp_path / "models.toml")
    (tmp_path / "models.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DeployError, match="cannot be read"):
        models.read(tmp_path / "models.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#" * 2**21, "has 2097152 bytes: 1048576 is the limit"),
        ("a = " + "[" * 5000, "nested too deeply"),
        (MODEL + "config" + ".a" * 1200 + " = 1\n", "nested too deeply"),
        (MODEL + 'quantisation = """' + " " * 100_000 + '"""\n', "line 4: quantisation is unknown"),
    ],
)
def test_a_file_that_would_take_for_ever_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DeployError, match=message):
        read(tmp_path, text)


def test_settings_are_checked_by_themselves_and_the_process_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILE", "nonsense")
    before = dict(os.environ)
    (model,) = read(tmp_path, MODEL + 'environment.TOKENIZER_THREADS = 4\nenvironment.PREFIX_REUSE = "off"\n').values()
    assert model.environment == {"TOKENIZER_THREADS": "4", "PREFIX_REUSE": "off"}
    assert dict(os.environ) == before


def test_an_unknown_name_on_the_command_line_gets_the_nearest(tmp_path: Path) -> None:
    found = read(tmp_path, MODEL.replace("models.x", "models.tiny"))
    with pytest.raises(DeployError, match=re.escape("models.toml has no model tini: did you mean tiny?")):
        models.choose(found, ["tini"], Path("models.toml"))


def test_a_line_is_found_by_tables_dotted_and_quoted_keys() -> None:
    text = '# a\n[a]\nb.c = """\nx = 1\n"""\n"b.d" = 1\n[ a."e.f" ] # g\nh = {i = 1}\n'
    found = {
        path: line_of(text, path) for path in (("a",), ("a", "b", "c"), ("a", "b.d"), ("a", "e.f", "h", "i"), ("z",))
    }
    assert list(found.values()) == [2, 3, 6, 8, 1]
