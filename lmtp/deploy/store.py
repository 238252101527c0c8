"""The store: one weights directory for each repository and commit. Containers link to its files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lmtp.deploy import DeployError
from lmtp.deploy.lock import Lock, commit_in
from lmtp.deploy.models import Model, Source
from lmtp.weights import adapters, demo, hub, quantization
from lmtp.weights.adapters import AdapterFound
from lmtp.weights.kinds import Kind
from lmtp.weights.manifest import WeightsError, read_manifest, verify_sizes
from lmtp.weights.plan import plan_without_code, quantizes
from lmtp.weights.staging import Origin, exclusive, install

WITH_CODE, ADAPTER = "+code", "+adapter"
"""What else an entry may hold than a model without code of its own."""


@dataclass(frozen=True)
class Part:
    """A repository that a model is made of."""

    source: Source
    commit: str
    """Empty if none is locked."""
    entry: Path
    """Its directory in the store."""


@dataclass(frozen=True)
class Parts:
    """What a model is made of: the model, the adapter to merge, those to serve side by side."""

    base: Part
    adapter: Part | None
    adapters: Mapping[str, Part]

    @property
    def all(self) -> list[Part]:
        """The model first."""
        return [self.base, *([self.adapter] if self.adapter else []), *self.adapters.values()]


def parts_of(store: Path, model: Model, locked: Lock) -> Parts:
    """Where the store holds the model's repositories at the locked commits, or will."""

    def part(source: Source, what: str) -> Part:
        commit = commit_in(locked, source) or ""
        return Part(source, commit, entry_of(store, source.repository, commit, what))

    return Parts(
        part(model.source, WITH_CODE if model.model_args["trust_remote_code"] else ""),
        part(model.adapter, ADAPTER) if model.adapter else None,
        {name: part(source, ADAPTER) for name, source in model.adapters.items()},
    )


def entry_of(store: Path, repository: str, commit: str, what: str = "") -> Path:
    """The directory of a repository's files at a commit; ``what`` is empty, WITH_CODE or ADAPTER."""
    name = repository.replace("/", "--")  # the hub allows no name with two hyphens
    return store / f"{name}@{commit}{what}"


def holds(entry: Path) -> bool:
    """Whether the entry is complete: its files have the sizes of its manifest. Nothing is hashed."""
    try:
        verify_sizes(entry, read_manifest(entry))
    except WeightsError:
        return False
    return True


def fetch(model: Model, parts: Parts) -> None:
    """Make the store hold the parts, the small ones first, and check that they go together.

    Raises WeightsError or DeployError for what could not be served as models.toml says.
    """
    for part in parts.all[1:]:
        _fetch_adapter(part, mixed=bool(parts.adapters))
    _fetch_model(model, parts)


def _fetch_adapter(part: Part, mixed: bool) -> None:
    """``mixed``: it is to be served beside others."""
    repository = part.source.repository
    if not holds(part.entry):
        collect = partial(hub.collect_adapter, repository, part.commit, mixed)
        with exclusive(part.entry):
            install(Origin(repository, part.commit, False), {"trust_remote_code": False}, part.entry, collect)
    adapters.read_config(part.entry / adapters.CONFIG, repository, mixed)
    if mixed:
        adapters.check_tensors(part.entry, repository)


def _fetch_model(model: Model, parts: Parts) -> None:
    part = parts.base
    repository, trusted = part.source.repository, model.model_args["trust_remote_code"]
    check = partial(_check, model, parts)
    if not holds(part.entry):
        chosen = repository in [source.repository for source in model.sources[1:]]
        collect: Callable[[Path], Mapping[str, str | None]] = partial(
            hub.collect, repository, part.commit, trusted, chosen, check
        )
        if repository == "demo":
            quantization.check(None, model.model_args, "demo")
            collect = demo.collect
        with exclusive(part.entry):
            try:
                install(Origin(repository, part.commit, trusted), {"trust_remote_code": trusted}, part.entry, collect)
            except AdapterFound as found:
                base = f"huggingface.repo = '{ascii(found.base)[1:-1]:.99}' and " if found.base else ""
                raise DeployError(
                    f"{model.name}: {repository} holds an adapter: set {base}adapters = '{repository}'."
                ) from None
    check(part.entry)


def _check(model: Model, parts: Parts, directory: Path) -> None:
    """Raise WeightsError if the model whose config.json is in the directory could not be served with its arguments and
    its adapters, which are in the store."""
    with_code = f"script/models build {model.name}` with `config.trust_remote_code = true` in `models.toml"
    plan = plan_without_code(directory, model.model_args, model.source.repository, with_code)
    if plan and model.adapters and plan.kind not in (Kind.CAUSAL, Kind.MULTIMODAL):
        raise WeightsError(
            f"{model.name} is a model of the kind {plan.kind}, which serves no named adapters: give one, as adapters ="
            ' "org/name", which is merged.'
        )
    if plan.quantized if plan else quantizes(model.model_args):
        for part in parts.all[1:]:
            adapters.check_quantized(part.entry / adapters.CONFIG, part.source.repository)
