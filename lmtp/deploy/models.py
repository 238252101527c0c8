"""models.toml: which containers to build. It is read and checked without network.

The keys `dest_prefix`, `huggingface.repo`, `huggingface.version` and `config` are those of LMQL's build script:
https://github.com/eth-sri/lmql/blob/main/scripts/replicate-build/config.toml.example
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from lmtp import settings
from lmtp.deploy import DeployError
from lmtp.deploy.lines import line_of
from lmtp.protocol import NO_ADAPTER
from lmtp.weights import demo
from lmtp.weights.arguments import DTYPES
from lmtp.weights.hub import REVISION
from lmtp.weights.install import REPOSITORY
from lmtp.weights.manifest import ADAPTER_NAME
from lmtp.weights.quantization import LOAD_IN

NAME = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*", re.ASCII)
"""A name that both Replicate and a container registry take."""

PREFIX = re.compile(rf"(r8\.im/{NAME.pattern})/?", re.ASCII)
PLACEHOLDER = "YOURACCOUNT"

VISIBILITIES = ("private", "public")

LOADED_IN = {"load_in_4bit": "4bit", "load_in_8bit": "8bit"}
"""LMQL's spelling of `quantization`, in `config`."""

SET_ELSEWHERE = {"revision": "huggingface.version", "load_in": "quantization"}

RESERVED = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED", "LIBRARY_PATH", "HF_ENDPOINT"),
    *("HF_HUB_ENABLE_HF_TRANSFER", "R8_*", "REPLICATE_*", "CUDA_*", "NVIDIA_*", "NV_*", "PGET_*", "KUBERNETES_*"),
)
"""Variables that `cog build` refuses: https://github.com/replicate/cog/blob/main/pkg/config/env.go"""

SECRET = re.compile(r"(.*_)?(TOKEN|SECRET|PASSWORD|KEY)")

UNSAFE = re.compile(r"""[\s"'\\$]""")
"""Characters that mean something else in the Dockerfile that Cog writes, where values are not quoted."""

MAX_BYTES = 2**20
"""Size of a models.toml."""

TOP = ("dest_prefix", "models")
KEYS = ("huggingface", "config", "quantization", "adapters", "environment", "hardware", "visibility")


@dataclass(frozen=True)
class Source:
    """A repository, or `demo`, and the branch, tag or commit to take."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


@dataclass(frozen=True)
class Model:
    """One container. `model_args` are a manifest's; `adapter` is merged, `adapters` are served side by side."""

    name: str
    image: str
    source: Source
    model_args: Mapping[str, Any]
    adapter: Source | None
    adapters: Mapping[str, Source]
    environment: Mapping[str, str]
    hardware: str
    """A name of Replicate's, such as gpu-l40s; empty if none is given."""
    visibility: str

    @property
    def sources(self) -> list[Source]:
        """The model's repository and those of its adapters."""
        return [self.source, *([self.adapter] if self.adapter else []), *self.adapters.values()]

    @property
    def owner(self) -> str:
        """The account on Replicate."""
        return self.image.split("/")[1]


def read(path: Path) -> dict[str, Model]:
    """The models of a models.toml by name. Raises DeployError with file, line and what to do."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise DeployError(f"{path} has {size} bytes: {MAX_BYTES} is the limit, which is thousands of models.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DeployError(f"There is no {path}: copy models.toml.example to it, and set dest_prefix.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeployError(f"{path} cannot be read: {error}.") from None
    try:
        return _Reader(path, text).models(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise DeployError(_malformed(path, str(error))) from None
    except RecursionError:
        raise DeployError(f"{path} has tables or lists that are nested too deeply: make them flat.") from None


def choose(models: Mapping[str, Model], names: Collection[str], path: Path) -> list[Model]:
    """The models of these names, or all if there are none. Raises DeployError."""
    for name in names:
        if name not in models:
            raise DeployError(f"{path} has no model {ascii(name)[1:-1]}: {_nearest(name, models)}")
    return [model for name, model in models.items() if not names or name in names]


def _malformed(path: Path, error: str) -> str:
    place = re.fullmatch(r"(.*) \(at (line \d+), column \d+\)", error)
    what, where = (place[1], f", {place[2]}") if place else (error, "")
    if twice := re.match(r"Cannot declare \('models', '([^']*)'\) twice", what):
        return f"{path}{where}: the model {twice[1]} is there twice: give one of them another name."
    return f"{path}{where} is not TOML: {what}."


def _nearest(name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name, known, 1)
    return f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}."


class _Reader:
    """Takes the values out of a document; errors name the line."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.source = text

    def refuse(self, where: tuple[str, ...], problem: str) -> NoReturn:
        raise DeployError(f"{self.path}, line {line_of(self.source, where)}: {problem}")

    def models(self, document: dict[str, Any]) -> dict[str, Model]:
        self.table(document, (), TOP)
        prefix = self.prefix(document)
        tables = self.table(document.get("models", {}), ("models",))
        if not tables:
            self.refuse(
                ("models",),
                'there are no models: add a table such as [models.my-model] with huggingface.repo = "org/name".',
            )
        return {name: self.model(name, prefix, table) for name, table in tables.items()}

    def prefix(self, document: dict[str, Any]) -> str:
        example = 'dest_prefix = "r8.im/your-account/"'
        if "dest_prefix" not in document:
            self.refuse(("dest_prefix",), f"dest_prefix is not set: add {example} above the first table.")
        given = self.text(document["dest_prefix"], ("dest_prefix",))
        if PLACEHOLDER in given:
            self.refuse(("dest_prefix",), f"dest_prefix still says {PLACEHOLDER}: put your account on Replicate there.")
        if not (match := PREFIX.fullmatch(given)):
            self.refuse(
                ("dest_prefix",),
                f"dest_prefix is {given!a:.99}: give Replicate's registry and an account, such as {example}.",
            )
        return match[1]

    def model(self, name: str, prefix: str, value: Any) -> Model:
        where = ("models", name)
        if not NAME.fullmatch(name) or len(name) > 100:
            self.refuse(
                where,
                f"{ascii(name)[1:-1]:.99} is no name for a model: use lower-case letters and digits, and . _ - within.",
            )
        table = self.table(value, where, KEYS)
        arguments = self.model_args(table, where)
        adapter, adapters = self.adapters(table.get("adapters", {}), (*where, "adapters"))
        return Model(
            name,
            f"{prefix}/{name}",
            self.repository(table, where),
            arguments,
            adapter,
            adapters,
            self.environment(table.get("environment", {}), (*where, "environment")),
            self.hardware(table, where),
            self.one_of(table.get("visibility", "private"), (*where, "visibility"), VISIBILITIES),
        )

    def repository(self, table: dict[str, Any], where: tuple[str, ...]) -> Source:
        where = (*where, "huggingface")
        given = self.table(table.get("huggingface", {}), where, ("repo", "version"))
        if "repo" not in given:
            self.refuse(where, f'{where[1]} has no huggingface.repo: add huggingface.repo = "org/name".')
        repository = self.text(given["repo"], (*where, "repo"))
        version = self.revision(given.get("version", "main"), (*where, "version"))
        if repository == "demo":
            if "version" in given:
                self.refuse((*where, "version"), "the demo model has one version: leave out huggingface.version.")
            return Source("demo", demo.VERSION)
        if not re.fullmatch(REPOSITORY, repository):
            self.refuse(
                (*where, "repo"),
                f"huggingface.repo is {repository!a:.99}: give a repository, such as org/name, or demo.",
            )
        return Source(repository, version)

    def model_args(self, table: dict[str, Any], where: tuple[str, ...]) -> dict[str, Any]:
        arguments: dict[str, Any] = {"trust_remote_code": False}
        load_in = []
        if "quantization" in table:
            load_in.append(self.one_of(table["quantization"], (*where, "quantization"), LOAD_IN))
        for key, value in self.table(table.get("config", {}), (*where, "config")).items():
            here = (*where, "config", key)
            if key in SET_ELSEWHERE:
                self.refuse(here, f"config.{key} is not taken: set {SET_ELSEWHERE[key]}.")
            if key in (*LOADED_IN, "trust_remote_code", "use_safetensors") and not isinstance(value, bool):
                self.refuse(here, f"config.{key} is {value!r:.99}: give true or false.")
            if key in LOADED_IN:
                load_in += [LOADED_IN[key]] if value else []
            elif key == "use_safetensors":
                if not value:
                    self.refuse(here, "config.use_safetensors is false: leave it out, only safetensors are loaded.")
            else:
                try:
                    json.dumps(value, allow_nan=False)
                except (TypeError, ValueError):
                    self.refuse(
                        here,
                        f"config.{key} is {value!s:.99}, which JSON does not have: give a text, number, list or table.",
                    )
                arguments["dtype" if key == "torch_dtype" else key] = value
        if "dtype" in arguments:
            self.one_of(
                arguments["dtype"],
                (*where, "config", "torch_dtype" if "torch_dtype" in table["config"] else "dtype"),
                DTYPES,
            )
        if len(load_in) > 1:
            self.refuse(
                (*where, "quantization"), f"{where[1]} is quantized to both {load_in[0]} and {load_in[1]}: choose one."
            )
        return arguments | ({"load_in": load_in[0]} if load_in else {})

    def adapters(self, given: Any, where: tuple[str, ...]) -> tuple[Source | None, dict[str, Source]]:
        """The adapter to merge, or those to serve side by side."""
        if isinstance(given, str):
            return self.adapter(given, where), {}
        named = self.table(given, where, what="a repository, or a table of repositories by name")
        for name in named:
            if not ADAPTER_NAME.fullmatch(name) or name == NO_ADAPTER:
                self.refuse(
                    (*where, name),
                    f"{ascii(name)[1:-1]:.99} is no name for an adapter: use up to 64 letters, digits and hyphens.",
                )
        return None, {name: self.adapter(value, (*where, name)) for name, value in named.items()}

    def adapter(self, given: Any, where: tuple[str, ...]) -> Source:
        repository, at, revision = self.text(given, where).partition("@")
        if not re.fullmatch(REPOSITORY, repository) or (at and not REVISION.fullmatch(revision)):
            self.refuse(
                where, f"{given!a:.99} is no adapter: give a repository, such as org/name or org/name@revision."
            )
        return Source(repository, revision or "main")

    def revision(self, given: Any, where: tuple[str, ...]) -> str:
        revision = self.text(given, where)
        if not REVISION.fullmatch(revision):
            self.refuse(where, f"{'.'.join(where[2:])} is {revision!a:.99}: give a branch, a tag or a commit.")
        return revision

    def environment(self, given: Any, where: tuple[str, ...]) -> dict[str, str]:
        variables = {}
        for name, value in self.table(given, where).items():
            here = (*where, name)
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
                self.refuse(
                    here, f"{ascii(name)[1:-1]:.99} is no name of an environment variable: use letters, digits and _."
                )
            if any(fnmatchcase(name, pattern) for pattern in RESERVED):
                self.refuse(here, f"Cog sets {name} itself: leave it out.")
            if name == "WEIGHTS_DIR":
                self.refuse(here, "WEIGHTS_DIR is not taken: the build decides where the weights are.")
            if SECRET.fullmatch(name):
                self.refuse(
                    here,
                    f"{name} looks like a secret, and who can pull an image can read its environment: leave it out.",
                )
            if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).isprintable():
                self.refuse(here, f"{name} is {value!r:.99}: give a text of one line, or a number.")
            if UNSAFE.search(str(value)):
                self.refuse(
                    here, f"{name} is {value!a:.99}: Cog takes no spaces, quotes, \\ and $ in it, leave them out."
                )
            variables[name] = str(value)
        try:
            with _only(variables):
                settings.read()
        except settings.SettingsError as error:
            self.refuse((*where, str(error).split()[0]), str(error))
        if "DTYPE" in variables:
            self.one_of(variables["DTYPE"], (*where, "DTYPE"), DTYPES)
        return variables

    def hardware(self, table: dict[str, Any], where: tuple[str, ...]) -> str:
        given = self.text(table["hardware"], (*where, "hardware")) if "hardware" in table else ""
        if not re.fullmatch(r"[a-z0-9-]*", given):
            self.refuse(
                (*where, "hardware"),
                f"hardware is {given!a:.99}: give a name as Replicate's API lists it, such as cpu or gpu-l40s.",
            )
        return given

    def table(
        self, value: Any, where: tuple[str, ...], keys: Collection[str] = (), what: str = "a table"
    ) -> dict[str, Any]:
        """The value, which must be a table, with no other keys than these if there are any."""
        shown = ".".join(where[2:]) or ".".join(where)
        if not isinstance(value, dict):
            self.refuse(where, f"{shown} is {value!r:.99}: make it {what}.")
        for key in value:
            if keys and key not in keys:
                dotted = ".".join((*where[2:], key))
                self.refuse((*where, key), f"{ascii(dotted)[1:-1]:.99} is unknown: {_nearest(key, keys)}")
        return value

    def text(self, value: Any, where: tuple[str, ...]) -> str:
        if not isinstance(value, str) or not value or not value.isprintable():
            self.refuse(where, f"{'.'.join(where[2:]) or where[0]} is {value!r:.99}: give a text of one line.")
        return value

    def one_of(self, value: Any, where: tuple[str, ...], choices: Collection[str]) -> str:
        if value not in choices:
            self.refuse(where, f"{'.'.join(where[2:])} is {value!r:.99}: choose one of {', '.join(choices)}.")
        return str(value)


@contextmanager
def _only(variables: Mapping[str, str]) -> Iterator[None]:
    """The process has these environment variables only, as far as the block."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
