"""What script/models does: build, list, push and clean the directories of the containers in a models.toml."""

import json
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmtp.deploy import DeployError, lock, models
from lmtp.deploy.container import HEADER, tree_of
from lmtp.deploy.lock import Lock
from lmtp.deploy.models import Model
from lmtp.deploy.store import ADAPTER, WITH_CODE, Part, Parts, entry_of, fetch, holds, parts_of
from lmtp.deploy.tree import differences, discard, replace
from lmtp.settings import ROOT
from lmtp.weights.hub import COMMIT
from lmtp.weights.manifest import read_manifest
from lmtp.weights.staging import exclusive

MAX_SHOWN = 4
"""How many changed files a line names."""


@dataclass(frozen=True)
class Workshop:
    """A models.toml and what is beside it: models.lock, and work/ with the store and a directory for each container."""

    file: Path

    @property
    def lock(self) -> Path:
        """The locked commits."""
        return self.file.with_suffix(".lock")

    @property
    def work(self) -> Path:
        """The directory of the build directories."""
        return self.file.parent / "work"

    @property
    def store(self) -> Path:
        """The directory of the fetched repositories; it may be a symbolic link to another disk."""
        return self.work / ".store"


@dataclass(frozen=True)
class Container:
    """A model, what it is made of, and its build directory compared with that."""

    model: Model
    parts: Parts
    directory: Path
    changes: Sequence[str]
    """The files that a build would write or remove; empty if not all is fetched."""

    @property
    def missing(self) -> list[Part]:
        """What is to be fetched."""
        return [part for part in self.parts.all if not holds(part.entry)]

    @property
    def current(self) -> bool:
        """Whether a build would change nothing."""
        return not self.missing and not self.changes

    @property
    def state(self) -> str:
        """What the directory is, in words."""
        if self.current:
            return "up to date"
        if not self.directory.exists():
            return "not built"
        if self.missing:
            return "of other commits or repositories"
        rest = f" and {len(self.changes) - MAX_SHOWN} more" if len(self.changes) > MAX_SHOWN else ""
        return f"changed in {', '.join(self.changes[:MAX_SHOWN])}{rest}"


def containers(shop: Workshop, names: Sequence[str]) -> list[Container]:
    """The containers of these names, or all, as they are. Needs no network. Raises DeployError."""
    locked = lock.read(shop.lock)
    return [_container(shop, model, locked) for model in models.choose(models.read(shop.file), names, shop.file)]


def _container(shop: Workshop, model: Model, locked: Lock) -> Container:
    parts, directory = parts_of(shop.store, model, locked), shop.work / model.name
    fetched = all(holds(part.entry) for part in parts.all)
    return Container(model, parts, directory, differences(tree_of(ROOT, model, parts), directory) if fetched else ())


def build(shop: Workshop, names: Sequence[str], update: bool = False) -> None:
    """Make the directories of these models, or of all. What is as it should be stays untouched.

    ``update`` locks the newest commits. Raises DeployError or WeightsError; what is finished stays, and the same
    command goes on from there.
    """
    known = models.read(shop.file)
    chosen = models.choose(known, names, shop.file)
    locked = lock.read(shop.lock)
    with exclusive(shop.work):
        locked = lock.complete(locked, [source for model in chosen for source in model.sources], update)
        lock.write(shop.lock, locked, [source for model in known.values() for source in model.sources])
        for model in chosen:
            if _container(shop, model, locked).current:
                print(f"work/{model.name} is up to date.", flush=True)
                continue
            parts = parts_of(shop.store, model, locked)
            fetch(model, parts)
            replace(shop.work / model.name, tree_of(ROOT, model, parts))
            print(f"work/{model.name} is built: {parts.base.source.repository} at {parts.base.commit}.", flush=True)


def preview(shop: Workshop, names: Sequence[str]) -> None:
    """Print what `build` would do. Needs no network and changes nothing."""
    for each in containers(shop, names):
        missing = ", ".join(
            f"{part.source.repository} at {part.commit or part.source.revision}" for part in each.missing
        )
        would = "nothing would change" if each.current else "it would be built"
        print(f"work/{each.model.name} is {each.state}: {would}{f', after fetching {missing}' if missing else ''}.")


def listing(shop: Workshop, names: Sequence[str], as_json: bool = False) -> None:
    """Print each model, where it comes from, and whether it is built. Needs no network."""
    rows: list[dict[str, Any]] = [
        {
            "name": each.model.name,
            "repository": each.parts.base.source.repository,
            "commit": each.parts.base.commit,
            "quantization": each.model.model_args.get("load_in", ""),
            "adapters": [part.source.repository for part in each.parts.all[1:]],
            "image": each.model.image,
            "state": each.state,
        }
        for each in containers(shop, names)
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = [key for key in rows[0] if key != "image"]
    cells = [columns, *([_cell(row[key]) for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def push(shop: Workshop, names: Sequence[str], dry_run: bool = False) -> None:
    """Push the images of these models, or of all, one after the other.

    Raises DeployError where one is not built as models.toml says, or cannot be pushed.
    """
    chosen = containers(shop, names)
    for each in chosen:
        if not each.current:
            name = each.model.name
            raise DeployError(f"work/{name} is {each.state}: run `script/models build {name}` first.")
    for each in chosen:
        name, image = each.model.name, each.model.image
        if dry_run:
            print(f"work/{name} would be pushed to {image}.")
            continue
        print(f"Pushing work/{name} to {image}.", flush=True)
        if code := subprocess.run([each.directory / "push"], check=False).returncode:
            raise DeployError(f"{image} is not pushed: work/{name}/push ended with exit code {code}.")


def clean(shop: Workshop, names: Sequence[str], dry_run: bool = False) -> None:
    """Remove the directories of these models, or of all, and what the store then holds for none. Raises DeployError."""
    there = {path.name: path for path in sorted(shop.work.glob("[!.]*")) if _is_built(path)}
    for name in names:
        if name not in there:
            known = ", ".join(there) or "none"
            raise DeployError(f"There is no build directory work/{ascii(name)[1:-1]}: {known} is there.")
    kept = [path for name, path in there.items() if names and name not in names]
    going = [path for path in there.values() if path not in kept]
    with nullcontext() if dry_run else exclusive(shop.work):
        used = {entry for path in kept for entry in _used(shop, path)}
        going += [entry for entry in sorted(shop.store.glob("*@*")) if entry not in used]
        going += sorted([*shop.work.glob(".*.new"), *shop.work.glob(".*.old")])  # of builds that were killed
        for path in going:
            if not dry_run:
                discard(path)
            print(f"{path.relative_to(shop.file.parent)} {'would be' if dry_run else 'is'} removed.")
    if not going:
        print("There is nothing to remove.")


def _cell(value: str | list[str]) -> str:
    text = ", ".join(value) if isinstance(value, list) else value
    return text[:12] if COMMIT.fullmatch(text) else text or "-"


def _is_built(directory: Path) -> bool:
    config = directory / "cog.yaml"
    return config.is_file() and config.read_text(encoding="utf-8", errors="replace").startswith(HEADER)


def _used(shop: Workshop, directory: Path) -> list[Path]:
    """The store's entries that a build directory was made from."""
    weights = directory / "model" if (directory / "model").is_dir() else directory / "weights"
    manifest = read_manifest(weights)
    own = WITH_CODE if manifest.trust_remote_code else ""
    used = [entry_of(shop.store, manifest.source, str(manifest.revision), own)]
    chosen = [each for each in (manifest.adapter, *manifest.adapters.values()) if each]
    return used + [entry_of(shop.store, each.source, str(each.revision), ADAPTER) for each in chosen]
