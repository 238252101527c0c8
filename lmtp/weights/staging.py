"""New files are collected and hashed in a staging directory, then exchanged for the old ones by renames.

The staging directory is inside the weights directory, so on its file system and out of git's sight:

    weights/.download-…/files/        a model's files; every name in here is untrusted
    weights/.download-…/sealed.json   their manifest, written last: only what it names is moved out of files/
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from lmtp.weights.files import belongs_to_a_model, files_in
from lmtp.weights.manifest import (
    MANIFEST,
    SEAL,
    STAGING,
    Adapter,
    File,
    Manifest,
    WeightsError,
    first_line,
    read_manifest,
    verify_sizes,
    write_manifest,
)

FILES = "files"


@dataclass(frozen=True)
class Origin:
    """Where weights come from. Two downloads of one origin with a revision give the same files."""

    source: str
    revision: str | None
    trust_remote_code: bool
    adapter: Adapter | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    def __str__(self) -> str:
        sources = [adapter.source for adapter in (self.adapter, *self.adapters.values()) if adapter]
        model = f"{self.source} at {self.revision}" if self.revision else self.source
        return f"{model} with {', '.join(sources)}" if sources else model

    @property
    def fixed(self) -> bool:
        """Whether all of it comes from repositories, at commits that do not change."""
        adapters = [adapter for adapter in (self.adapter, *self.adapters.values()) if adapter]
        return self.revision is not None and all(adapter.revision is not None for adapter in adapters)


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Make the target and lock it, waiting for a download that holds it. File system errors become WeightsErrors."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        directory = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(directory, target)
            finish_exchange(target)
            yield
        finally:
            os.close(directory)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; the weights are as they were: make room and run the command again, it resumes"
        raise WeightsError(f"{error.filename or target}: {reason}.") from None


def _lock(directory: int, target: Path) -> None:
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Waiting for another download into {target} to end.", flush=True)
        fcntl.flock(directory, fcntl.LOCK_EX)
    except OSError:
        pass  # Some network file systems cannot lock directories; there, run one download at a time.


def install(
    origin: Origin,
    model_args: Mapping[str, Any],
    target: Path,
    collect: Callable[[Path], Mapping[str, str | None]],
    check: Callable[[Path], object] = lambda directory: None,
    *,
    again: bool = False,
) -> None:
    """Collect the origin's files, seal them with a manifest, and exchange them for what the target holds.

    `collect` puts files into the directory it is given and returns their names, each with its checksum if the origin
    tells it. An origin that is in place already is not collected unless `again`; the manifest then takes the
    `model_args`, once `check` has found nothing wrong with them.
    """
    if not again and is_installed(origin, target):
        discard_staging(target)
        manifest = read_manifest(target)
        if manifest.model_args == model_args:
            print(f"{target} holds {origin} already.")
        else:
            check(target)
            write_manifest(target, msgspec.structs.replace(manifest, model_args=dict(model_args)))
            print(f"{target} holds {origin} already; its {MANIFEST} now says how to load it.")
        return
    staging = staging_for(origin, target)
    manifest = seal(staging / FILES, collect(staging / FILES), origin, model_args)
    write_manifest(staging, manifest, SEAL)
    exchange(staging, target)
    print(f"{target} now holds {origin}: {len(manifest.files)} files, {manifest.bytes / 1e6:,.0f} MB.")


def is_installed(origin: Origin, target: Path) -> bool:
    """Whether the target's manifest names this origin and its files have the manifest's sizes. Nothing is hashed.

    Never true for a directory, which may have changed since.
    """
    try:
        manifest = read_manifest(target)
        verify_sizes(target, manifest)
    except WeightsError:
        return False
    return origin_of(manifest) == origin and origin.fixed


def origin_of(manifest: Manifest) -> Origin:
    """Where the manifest's files came from."""
    return Origin(
        manifest.source, manifest.revision, manifest.trust_remote_code, manifest.adapter, dict(manifest.adapters)
    )


def staging_for(origin: Origin, target: Path) -> Path:
    """Make the staging directory that every run for this origin uses; remove those of other origins."""
    staging = target / f"{STAGING}{hashlib.sha256(repr(origin).encode()).hexdigest()[:12]}"
    # This program makes no symbolic links: what follows one was put there by something else.
    keep = staging.is_dir() and not any(path.is_symlink() for path in (staging, *staging.rglob("*")))
    discard_staging(target, staging if keep else None)
    (staging / FILES).mkdir(parents=True, exist_ok=True)
    return staging


def discard_staging(target: Path, but: Path | None = None) -> None:
    """Remove what unfinished downloads left in the target."""
    for staging in target.glob(f"{STAGING}*"):
        if staging.is_symlink() or not staging.is_dir():
            staging.unlink()
        elif staging != but:
            shutil.rmtree(staging)


def refuse_foreign_files(target: Path) -> None:
    """Raise WeightsError if the target holds files that no download created, which an exchange would delete."""
    _refuse_links(target)
    try:
        known = set(read_manifest(target).files)
    except WeightsError:
        known = set()
    for name in files_in(target):
        if name not in known and not belongs_to_a_model(name):
            raise WeightsError(
                f"{target} holds {name}, which no download put there: move it away, or choose a directory with --to."
            )


def _refuse_links(target: Path) -> None:
    """Raise WeightsError if a directory inside the target is a symbolic link, which would lead files outside."""
    for path in target.rglob("*"):
        if path.is_symlink() and path.is_dir() and not path.name.startswith(STAGING):
            raise WeightsError(f"{path} is a symbolic link to another directory: remove it.")


def require_space(directory: Path, size: int) -> None:
    """Raise WeightsError if the directory's file system has no room for `size` more bytes."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise WeightsError(
            f"The target's disk has {free / 1e6:,.0f} MB free, {size / 1e6:,.0f} MB are needed besides the weights in"
            " place: make room, or choose another disk with --to."
        )


def seal(
    directory: Path, expected: Mapping[str, str | None], origin: Origin, model_args: Mapping[str, Any]
) -> Manifest:
    """Hash the named files. Raises WeightsError as `verify`, and if the header of a safetensors file does not describe
    what it holds."""
    files = verify(directory, expected)
    for name in files:
        if name.endswith(".safetensors"):
            _check_header(directory / name, name, origin)
    return Manifest(origin.source, origin.revision, files, dict(model_args), origin.adapter, dict(origin.adapters))


def verify(directory: Path, expected: Mapping[str, str | None]) -> dict[str, File]:
    """Hash the named files. Raises WeightsError, and removes the file, if a checksum is not the expected one."""
    from huggingface_hub.utils.tqdm import tqdm

    files = {}
    for name in tqdm(sorted(expected), desc="Hashing", unit="file", disable=None if len(expected) > 1 else True):
        path = directory / name
        files[name] = File(path.stat().st_size, sha256(path))
        actual = git_blob_id(path) if len(expected[name] or "") == 40 else files[name].sha256
        if expected[name] not in (None, actual):
            path.unlink()
            raise WeightsError(f"{name} arrived damaged: run the command again, it fetches this file anew.")
    return files


def _check_header(path: Path, name: str, origin: Origin) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise WeightsError(f"{origin} has a malformed {name}: {first_line(error)[:200]}.") from None


def sha256(path: Path) -> str:
    """The file's SHA-256, which LFS names it by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_id(path: Path) -> str:
    """The file's SHA-1 with git's header, which git names it by."""
    header = b"blob %d\0" % path.stat().st_size
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


def exchange(staging: Path, target: Path) -> None:
    """Move the sealed files over the target's, remove what is left of the old ones, and put the manifest in place.

    While the files are a mixture there is no manifest, and `load` refuses them. If this is interrupted,
    `finish_exchange` completes it.
    """
    manifest = read_manifest(staging, SEAL)
    _refuse_links(target)
    (target / MANIFEST).unlink(missing_ok=True)
    for name in manifest.files:
        if (staging / FILES / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / FILES / name).replace(target / name)
    for name in files_in(target):
        if name not in manifest.files:
            (target / name).unlink()
            directory = (target / name).parent
            while directory != target and not any(directory.iterdir()):
                directory.rmdir()
                directory = directory.parent
    (staging / SEAL).replace(target / MANIFEST)
    discard_staging(target)


def finish_exchange(target: Path) -> None:
    """Complete an exchange that was interrupted: the seal shows it."""
    for sealed in target.glob(f"{STAGING}*/{SEAL}"):
        if not sealed.parent.is_symlink():
            exchange(sealed.parent, target)
