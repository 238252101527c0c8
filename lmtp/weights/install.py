"""What script/download_weights does: put a model into a weights directory, or verify and repair the one in place."""

import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lmtp.protocol import NO_ADAPTER
from lmtp.weights import adapters, demo, hub, quantization
from lmtp.weights.files import belongs_to_an_adapter, files_in, needed_files, read_index_in
from lmtp.weights.kinds import Kind
from lmtp.weights.manifest import (
    ADAPTER_NAME,
    MANIFEST,
    Adapter,
    Manifest,
    WeightsError,
    download_command,
    fetch_command,
    printable,
    read_manifest,
    write_manifest,
)
from lmtp.weights.plan import plan_without_code, quantizes
from lmtp.weights.staging import (
    FILES,
    Origin,
    discard_staging,
    exclusive,
    install,
    origin_of,
    refuse_foreign_files,
    require_space,
    seal,
    sha256,
    staging_for,
)
from lmtp.weights.staging import verify as verify_checksums


def download(
    source: str,
    revision: str | None,
    target: Path,
    trust_remote_code: bool = False,
    model_args: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    named: Mapping[str, str] | None = None,
) -> None:
    """Make the target directory hold the source's model, unless it does already.

    `model_args` are the manifest's but for `trust_remote_code`. `adapter` is a directory or a repository, with
    `@revision` or without, which is merged; `named` are others that stay beside the model, by name. A source that is an
    adapter gets the model that it names; one with an adapter beside the model gets both. What could not be loaded is
    refused before the weights are fetched.
    """
    path = Path(source).expanduser()
    loading = {"trust_remote_code": trust_remote_code, **(model_args or {})}
    with exclusive(target):
        if source != "demo" and path.resolve() == target:
            if adapter or named or (target / adapters.CONFIG).exists():
                raise WeightsError(f"{target} cannot take an adapter where it is: choose a directory with --to.")
            _adopt(target, loading, partial(_check, target, source, revision, loading, {}, target))
            return
        refuse_foreign_files(target)
        chosen = _adapter(adapter) if adapter else None
        others = _named(named or {})
        local = source != "demo" and path.is_dir()
        try:
            _download(str(path.resolve()) if local else source, revision, target, loading, chosen, others, local)
        except adapters.AdapterFound as found:
            own = (
                Adapter(str(path.resolve()), None)
                if local
                else Adapter(source, hub.commit_of(source, revision or "main"))
            )
            if found.base is None:
                _download(own.source, own.revision, target, loading, own, others, local)
            elif trust_remote_code:
                raise WeightsError(
                    f"{source} is an adapter: name the model whose code you trust, and give --adapter {source}."
                ) from None
            else:
                # Only a directory of the user's own may name another one.
                base = Path(found.base).expanduser()
                beside = local and base.is_dir()
                if not beside and (found.base == "demo" or not re.fullmatch(REPOSITORY, found.base)):
                    raise WeightsError(
                        f"{source} is an adapter of {ascii(found.base)[:99]}, which is no repository: name the model,"
                        f" and give --adapter {source}."
                    ) from None
                print(f"{source} is an adapter of {ascii(found.base)[1:-1]}.", flush=True)
                name = str(base.resolve()) if beside else found.base
                _download(name, found.revision, target, loading, own, others, beside)


def _download(
    source: str,
    revision: str | None,
    target: Path,
    loading: dict[str, Any],
    adapter: Adapter | None,
    named: Mapping[str, Adapter],
    local: bool,
) -> None:
    """Install a model whose files are in the `local` directory of this name, or else on the hub, with adapters."""
    if adapter and named:
        raise WeightsError(
            f"{adapter.source} would be merged, and so change the model that {', '.join(named)} were trained for: name"
            f" it as well, with --adapter NAME={adapter.source}, or give no names."
        )
    folders = _folders(adapter, named)
    check = partial(_check, target, source, revision, loading, folders)
    trusted = loading["trust_remote_code"]
    chosen = adapter is not None or source in [each.source for each in named.values()]
    collect: Collect
    if local:
        origin = Origin(source, None, trusted, adapter, named)
        collect = partial(_copy_model, Path(source), trusted, chosen)
    elif source == "demo":
        quantization.check(None, loading, source)
        origin = Origin("demo", demo.VERSION, False, adapter, named)
        collect = _convert_demo
    elif re.fullmatch(REPOSITORY, source):
        origin = Origin(source, hub.commit_of(source, revision or "main"), trusted, adapter, named)
        collect = partial(hub.collect, source, str(origin.revision), trusted, chosen)
    else:
        raise WeightsError(f"{ascii(source)[1:-1]} is neither a directory nor a repository's name, such as org/name.")
    install(origin, loading, target, partial(_with_adapters, folders, collect, check), partial(check, target))


Collect = Callable[[Callable[[Path], object], Path], Mapping[str, str | None]]
"""Puts a model's files into a directory, once a check has passed the one that holds its config.json. Returns their
names, each with its checksum if it is known."""

REPOSITORY = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?"


def _adapter(given: str) -> Adapter:
    """What `--adapter` names."""
    path = Path(given).expanduser()
    if path.is_dir():
        return Adapter(str(path.resolve()), None)
    source, _, revision = given.partition("@")
    if not re.fullmatch(REPOSITORY, source):
        raise WeightsError(
            f"--adapter {printable(given)} is neither a directory nor a repository's name, such as org/name."
        )
    return Adapter(source, hub.commit_of(source, revision or "main"))


def chosen_adapters(given: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The adapter to merge and the named ones, of what `--adapter` was given. Raises WeightsError."""
    merged: list[str] = []
    named: dict[str, str] = {}
    for each in given:
        name, equals, source = each.partition("=")
        if not equals or "/" in name:
            merged.append(each)
        elif name in named:
            raise WeightsError(f"--adapter {each}: {name} is given twice; choose another name.")
        else:
            named[name] = source
    if len(merged) > 1:
        raise WeightsError(f"--adapter {merged[1]}: only one is merged; give several as --adapter NAME=SOURCE.")
    return (merged[0] if merged else None), named


def _named(given: Mapping[str, str]) -> dict[str, Adapter]:
    """What `--adapter NAME=SOURCE` names."""
    for name in given:
        if not ADAPTER_NAME.fullmatch(name) or name == NO_ADAPTER:
            raise WeightsError(
                f"--adapter {ascii(name)[1:-1]}=...: choose a name of at most 64 letters, digits and hyphens, other"
                f" than {NO_ADAPTER}, which is no adapter."
            )
    return {name: _adapter(source) for name, source in given.items()}


def _folders(adapter: Adapter | None, named: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters by the folders of their files."""
    merged = {adapters.FOLDER: adapter} if adapter else {}
    return merged | {adapters.folder_of(name): each for name, each in named.items()}


def _with_adapters(
    folders: Mapping[str, Adapter],
    collect: Collect,
    check: Callable[[Path, Path], object],
    directory: Path,
) -> Mapping[str, str | None]:
    """Collect the adapters, which are small, and then the model. `check` takes the directory of the adapters' folders,
    and that of the model's config.json."""
    found: dict[str, str | None] = {}
    for folder, adapter in folders.items():
        mixed = folder != adapters.FOLDER
        names = _collect_adapter(adapter, mixed, directory / folder)
        if mixed:
            adapters.check_tensors(directory / folder, adapter.source)
        found |= {f"{folder}/{name}": checksum for name, checksum in names.items()}
    return {**collect(partial(check, directory), directory), **found}


def _collect_adapter(adapter: Adapter, mixed: bool, folder: Path) -> Mapping[str, str | None]:
    folder.mkdir(parents=True, exist_ok=True)
    if adapter.revision is not None:
        return hub.collect_adapter(adapter.source, adapter.revision, mixed, folder)
    source = Path(adapter.source)
    if missing := [name for name in adapters.FILES if not (source / name).is_file()]:
        raise WeightsError(f"{source} is no adapter stored as safetensors: it has no {missing[0]}.")
    adapters.read_config(source / adapters.CONFIG, adapter.source, mixed)
    _copy(source, adapters.FILES, folder)
    return dict.fromkeys(adapters.FILES)


def _check(
    target: Path,
    source: str,
    revision: str | None,
    model_args: Mapping[str, Any],
    folders: Mapping[str, Adapter],
    beside: Path,
    directory: Path,
) -> None:
    """Raise WeightsError if the model whose config.json is in the directory could not be loaded, or not with the
    adapters in their folders `beside` it. Runs no code of it."""
    options = ("--revision", revision) if revision else ()
    with_code = download_command(target, source, *options, "--trust-remote-code")
    plan = plan_without_code(directory, model_args, source, with_code)
    named = folders and adapters.FOLDER not in folders
    if plan and named and plan.kind not in (Kind.CAUSAL, Kind.MULTIMODAL):
        raise WeightsError(
            f"{source} is a model of the kind {plan.kind}, which serves no named adapters: give one --adapter SOURCE,"
            " without a name, which is merged."
        )
    if plan.quantized if plan else quantizes(model_args):
        for folder, adapter in folders.items():
            adapters.check_quantized(beside / folder / adapters.CONFIG, adapter.source)


def _convert_demo(check: Callable[[Path], object], directory: Path) -> Mapping[str, None]:
    names = demo.collect(directory)
    check(directory)
    return names


def _adopt(target: Path, model_args: Mapping[str, Any], check: Callable[[Path], object]) -> None:
    """Write the manifest of files that were put into the target by hand. None of them is moved or removed."""
    trust_remote_code = model_args["trust_remote_code"]
    names = _names_in(target, trust_remote_code)
    check(target)
    manifest = seal(target, dict.fromkeys(names), Origin(str(target), None, trust_remote_code), model_args)
    write_manifest(target, manifest)
    discard_staging(target)
    print(f"{target / MANIFEST} written: {len(manifest.files)} files, {manifest.bytes / 1e6:,.0f} MB.")


def _names_in(directory: Path, trust_remote_code: bool) -> list[str]:
    source = str(directory)
    return needed_files(files_in(directory), lambda: read_index_in(directory, source), source, trust_remote_code)


def _copy_model(
    source: Path, trust_remote_code: bool, adapted: bool, check: Callable[[Path], object], directory: Path
) -> dict[str, None]:
    """Copy what is needed of a model's directory. Returns the files' names.

    Raises AdapterFound if the directory holds an adapter, unless one is chosen (`adapted`).
    """
    if (source / adapters.CONFIG).is_file() and not adapted:
        adapters.raise_found((source / "config.json").is_file(), source / adapters.CONFIG, str(source))
    names = _names_in(source, trust_remote_code)
    check(source)
    _copy(source, names, directory)
    return dict.fromkeys(names)


def _copy(source: Path, names: Collection[str], directory: Path) -> None:
    from huggingface_hub.utils.tqdm import tqdm

    require_space(directory, sum((source / name).stat().st_size for name in names))
    for name in tqdm(names, desc="Copying", unit="file", disable=None):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, directory / name)


def verify(target: Path) -> None:
    """Hash the target's files against its manifest, print which are damaged or missing, and repair those.

    Raises WeightsError if one cannot be repaired.
    """
    if not target.is_dir():
        read_manifest(target)  # Raises, naming the command that fetches weights.
    with exclusive(target):
        manifest = read_manifest(target)
        broken = _broken(target, manifest)
        for name in broken:
            print(f"{name} is {'damaged' if (target / name).exists() else 'missing'}.", flush=True)
        if broken:
            _repair(target, manifest, broken)
            print(f"{target} is repaired: {len(broken)} of {len(manifest.files)} files replaced.")
        else:
            discard_staging(target)  # of a repair that was interrupted at its end
            print(f"{target} is intact: all {len(manifest.files)} files are as its {MANIFEST} says.")


def _broken(target: Path, manifest: Manifest) -> list[str]:
    from huggingface_hub.utils.tqdm import tqdm

    broken = []
    for name, file in tqdm(manifest.files.items(), desc="Hashing", unit="file", disable=None):
        path = target / name
        if not path.is_file() or path.stat().st_size != file.size or sha256(path) != file.sha256:
            broken.append(name)
    return broken


def _repair(target: Path, manifest: Manifest, broken: list[str]) -> None:
    """Get the broken files again from where they came from, and replace them one by one."""
    refuse_foreign_files(target)
    fetch_again = f"`{fetch_command(target, manifest)}`"
    origin = origin_of(manifest)
    folders = _folders(manifest.adapter, manifest.adapters)
    if manifest.source == "demo" and not all(map(belongs_to_an_adapter, broken)):
        # One conversion makes all its files.
        collect = partial(_with_adapters, folders, _convert_demo, lambda *_: None)
        install(origin, manifest.model_args, target, collect, again=True)
        return
    if Path(manifest.source) == target:
        raise WeightsError(
            f"{target} was filled by hand: put {', '.join(broken)} back and verify again, or run {fetch_again} if the"
            " files are right as they are."
        )
    files = staging_for(origin, target) / FILES
    parts: list[tuple[str, str | None, Path, str]] = [(manifest.source, manifest.revision, files, "")]
    for folder, adapter in folders.items():
        (files / folder).mkdir(parents=True, exist_ok=True)
        parts.append((adapter.source, adapter.revision, files / folder, f"{folder}/"))
    for source, revision, directory, prefix in parts:
        own = [name for name in broken if name.startswith(prefix) and belongs_to_an_adapter(name) == bool(prefix)]
        names = [name.removeprefix(prefix) for name in own]
        if names and Path(source).is_absolute():
            for name in names:
                path = Path(source) / name
                if not path.is_file() or sha256(path) != manifest.files[prefix + name].sha256:
                    raise WeightsError(
                        f"{path} is no longer what was copied, so {prefix + name} cannot be repaired: run {fetch_again}"
                        " to copy the model as it is now."
                    )
            _copy(Path(source), names, directory)
        elif names:
            hub.fetch(source, str(revision), {name: manifest.files[prefix + name].size for name in names}, directory)
    verify_checksums(files, {name: manifest.files[name].sha256 for name in broken})
    for name in broken:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).replace(target / name)
    discard_staging(target)
