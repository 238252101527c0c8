"""What script/download_weights does: put a model into a weights directory, or verify and repair the one in place."""

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lmtp.weights import demo, hub, quantization
from lmtp.weights.files import files_in, needed_files, read_index_in
from lmtp.weights.manifest import (
    MANIFEST,
    Manifest,
    WeightsError,
    download_command,
    fetch_command,
    read_manifest,
    write_manifest,
)
from lmtp.weights.plan import plan_of
from lmtp.weights.staging import (
    FILES,
    Origin,
    discard_staging,
    exclusive,
    install,
    refuse_foreign_files,
    require_space,
    seal,
    sha256,
    staging_for,
)
from lmtp.weights.staging import verify as verify_checksums

DEMO = Origin("demo", demo.VERSION, False)


def download(
    source: str,
    revision: str | None,
    target: Path,
    trust_remote_code: bool = False,
    model_args: Mapping[str, Any] | None = None,
) -> None:
    """Make the target directory hold the source's model, unless it does already.

    `model_args` are the manifest's but for `trust_remote_code`. What could not be loaded is refused before the weights
    are fetched.
    """
    path = Path(source).expanduser()
    loading = {"trust_remote_code": trust_remote_code, **(model_args or {})}
    check = partial(_check, target, source, revision, loading)
    with exclusive(target):
        if source != "demo" and path.resolve() == target:
            _adopt(target, loading, check)
            return
        refuse_foreign_files(target)
        if source == "demo":
            quantization.check(None, loading.get("load_in"), source)
            install(DEMO, loading, target, partial(_convert_demo, check), check)
        elif path.is_dir():
            copied = partial(_copy_model, path, trust_remote_code, check)
            install(Origin(str(path.resolve()), None, trust_remote_code), loading, target, copied)
        elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
            commit = hub.commit_of(source, revision or "main")
            fetched = partial(hub.collect, source, commit, trust_remote_code, check)
            install(Origin(source, commit, trust_remote_code), loading, target, fetched, check)
        else:
            raise WeightsError(f"{source} is neither a directory nor a repository's name, such as org/name.")


def _check(target: Path, source: str, revision: str | None, model_args: Mapping[str, Any], directory: Path) -> None:
    """Raise WeightsError if the model whose config.json is in the directory could not be loaded. Runs no code of it."""
    if model_args["trust_remote_code"] and b'"auto_map"' in (directory / "config.json").read_bytes():
        return  # Only its own code can tell.
    options = ("--revision", revision) if revision else ()
    plan_of(directory, model_args, source, download_command(target, source, *options, "--trust-remote-code"))


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
    source: Path, trust_remote_code: bool, check: Callable[[Path], object], directory: Path
) -> dict[str, None]:
    """Copy what is needed of a model's directory. Returns the files' names."""
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
    if manifest.source == "demo":  # One conversion makes all its files.
        install(DEMO, manifest.model_args, target, demo.collect, again=True)
        return
    source = Path(manifest.source)
    fetch_again = f"`{fetch_command(target, manifest)}`"
    if source == target:
        raise WeightsError(
            f"{target} was filled by hand: put {', '.join(broken)} back and verify again, or run {fetch_again} if the"
            " files are right as they are."
        )
    origin = Origin(manifest.source, manifest.revision, manifest.trust_remote_code)
    files = staging_for(origin, target) / FILES
    if source.is_absolute():
        for name in broken:
            if not (source / name).is_file() or sha256(source / name) != manifest.files[name].sha256:
                raise WeightsError(
                    f"{source / name} is no longer what was copied, so {name} cannot be repaired: run {fetch_again} to"
                    " copy the model as it is now."
                )
        _copy(source, broken, files)
    else:
        sizes = {name: manifest.files[name].size for name in broken}
        hub.fetch(manifest.source, str(manifest.revision), sizes, files)
    verify_checksums(files, {name: manifest.files[name].sha256 for name in broken})
    for name in broken:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).replace(target / name)
    discard_staging(target)
