"""What the build directory of a container holds.

predict.py  lmtp/       the project's
requirements.txt        what this model needs of the project's
cog.yaml                the project's, with the image's name and the model's settings
weights/                the model's files, linked to the store's
model/                  only for a model with code of its own: `_apart`
README.md  push  .dockerignore
"""

import json
import os.path
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from lmtp.deploy import pages
from lmtp.deploy.models import Model
from lmtp.deploy.store import Parts
from lmtp.deploy.tree import Content, Tree
from lmtp.weights import adapters, quantization
from lmtp.weights.manifest import MANIFEST, Adapter, File, Manifest, read_manifest

HEADER = "# Written by script/models build: change models.toml instead.\n"

FETCHING = ("gguf",)
"""Requirements of fetching alone."""

SEPARATE = ".safetensors"
"""Files that Cog keeps in a layer of their own, from directories without code."""


def tree_of(project: Path, model: Model, parts: Parts) -> Tree:
    """The files of the container's directory. The entries must be complete."""
    manifest, files = _weights(model, parts)
    environment = dict(model.environment)
    if any(name.endswith(".py") for name in files):
        placed = _apart(files)
        environment["WEIGHTS_DIR"] = "model"
    else:
        placed = {f"weights/{name}": content for name, content in files.items()}
    config = yaml.safe_load((project / "cog.yaml").read_text())
    return {
        **_code(project),
        **placed,
        "requirements.txt": _requirements(project, model, files, parts.base.entry / "config.json").encode(),
        "cog.yaml": (HEADER + yaml.safe_dump(_cog(config, model, environment), sort_keys=False)).encode(),
        ".dockerignore": pages.DOCKERIGNORE.encode(),
        "README.md": pages.readme(model, manifest).encode(),
        "push": pages.push(model.image).encode(),
    }


def _code(project: Path) -> dict[str, Content]:
    names = [path.relative_to(project) for path in (project / "lmtp").rglob("*.py")]
    served = [name.as_posix() for name in names if name.parts[1] != "deploy"]
    return {name: (project / name).read_bytes() for name in ("predict.py", *sorted(served))}


def _weights(model: Model, parts: Parts) -> tuple[Manifest, dict[str, Content]]:
    """The manifest and the files of the model with its adapters, as script/download_weights would place them."""
    folders = {"": parts.base}
    if parts.adapter:
        folders[f"{adapters.FOLDER}/"] = parts.adapter
    folders |= {f"{adapters.folder_of(name)}/": part for name, part in parts.adapters.items()}
    sizes: dict[str, File] = {}
    files: dict[str, Content] = {}
    for folder, part in folders.items():
        for name, file in read_manifest(part.entry).files.items():
            sizes[folder + name] = file
            files[folder + name] = part.entry / name
    manifest = Manifest(
        parts.base.source.repository,
        parts.base.commit,
        sizes,
        dict(model.model_args),
        Adapter(parts.adapter.source.repository, parts.adapter.commit) if parts.adapter else None,
        {name: Adapter(part.source.repository, part.commit) for name, part in parts.adapters.items()},
    )
    files[MANIFEST] = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    return manifest, files


def _apart(files: Mapping[str, Content]) -> dict[str, Content]:
    """Code and weights in two directories: Cog takes no weights from a directory whose path begins a code file's.

    The model is loaded from model/, which links to the weights.
    """
    placed: dict[str, Content] = {}
    for name, content in files.items():
        if name.endswith(SEPARATE):
            placed[f"weights/{name}"] = content
            content = os.path.relpath(f"weights/{name}", os.path.dirname(f"model/{name}"))
        placed[f"model/{name}"] = content
    return placed


def _cog(config: dict[str, Any], model: Model, environment: Mapping[str, str]) -> dict[str, Any]:
    """The project's cog.yaml for one model."""
    build = config["build"]
    if model.hardware == "cpu":
        build = {key: value for key, value in build.items() if key != "cuda"} | {"gpu": False}
    variables = dict(line.split("=", 1) for line in config["environment"]) | dict(environment)
    return {
        "image": model.image,
        **config,
        "build": build,
        "environment": [f"{name}={value}" for name, value in variables.items()],
    }


def _requirements(project: Path, model: Model, files: Collection[str], config: Path) -> str:
    """The project's requirements that serving needs, and those of the model's quantization and adapters."""
    unneeded = {*FETCHING, *([] if any(name.endswith(".model") for name in files) else ["sentencepiece"])}
    lines = [
        line
        for line in (project / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#") and line.partition("==")[0] not in unneeded
    ]
    if format := _format(model, config):
        lines += quantization.REQUIREMENTS.get(format, "").split(", ")
    if model.adapter or model.adapters:
        lines += [line for line in (project / "requirements" / "peft.txt").read_text().splitlines() if line[0] != "#"]
    return HEADER + "".join(f"{line}\n" for line in lines if line)


def _format(model: Model, config: Path) -> str | None:
    """The format of the model's quantization, its own or the one of models.toml."""
    if "load_in" in model.model_args:
        return quantization.LOAD_IN[model.model_args["load_in"]]
    stored = json.loads(config.read_bytes())
    stored = (
        model.model_args.get("quantization_config")
        or stored.get("quantization_config")
        or (stored.get("text_config") or {}).get("quantization_config")
    )
    return quantization.format_of(stored) if stored else None
