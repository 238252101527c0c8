"""Fetch a model from the Hugging Face Hub.

huggingface_hub transfers the files: it continues after a dropped connection, shows progress, and keeps finished files,
which are never fetched again. A file that was unfinished when the process ended is fetched from its beginning.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lmtp.weights import adapters
from lmtp.weights.files import INDEX, MAX_CONFIG_BYTES, MAX_INDEX_BYTES, needed_files, read_index_in
from lmtp.weights.manifest import WeightsError, first_line, printable
from lmtp.weights.staging import require_space, verify

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"[\w.\-/]{1,200}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")


def commit_of(source: str, revision: str) -> str:
    """The commit that a branch, tag or abbreviated commit names now. A full commit needs no network."""
    if COMMIT.fullmatch(revision):
        return revision
    if not REVISION.fullmatch(revision):
        raise WeightsError(f"{ascii(revision)[:99]} is no revision of {source}: give a branch, a tag or a commit.")
    from huggingface_hub import HfApi

    with _errors_explained(source, revision):
        commit = HfApi().model_info(source, revision=revision, timeout=30).sha
        if not COMMIT.fullmatch(str(commit)):
            raise ValueError("no commit")
    return str(commit)


def collect_adapter(source: str, commit: str, mixed: bool, directory: Path) -> dict[str, str | None]:
    """Fetch an adapter's files into the directory. ``mixed``: as for `adapters.read_config`. Returns their names with
    the hub's checksums."""
    listed = _listing(source, commit)
    if missing := [name for name in adapters.FILES if name not in listed]:
        raise WeightsError(f"{source} is no adapter stored as safetensors: it has no {missing[0]}.")
    claims = {name: _size_and_checksum(source, listed[name]) for name in adapters.FILES}
    if claims[adapters.CONFIG][0] > adapters.MAX_CONFIG_BYTES:
        raise WeightsError(f"{source} has a malformed {adapters.CONFIG}: it is too large.")
    directory.mkdir(exist_ok=True)
    for name, (size, checksum) in claims.items():  # the configuration first
        fetch(source, commit, {name: size}, directory)
        verify(directory, {name: checksum})
        adapters.read_config(directory / adapters.CONFIG, source, mixed)
    return {name: checksum for name, (_, checksum) in claims.items()}


def _listing(source: str, commit: str) -> dict[str, "RepoSibling"]:
    """The repository's files by name."""
    from huggingface_hub import HfApi

    with _errors_explained(source, commit):
        info = HfApi().model_info(source, revision=commit, files_metadata=True, timeout=30)
        return {str(file.rfilename): file for file in info.siblings or []}


def collect(
    source: str, commit: str, trust_remote_code: bool, adapted: bool, check: Callable[[Path], object], directory: Path
) -> dict[str, str | None]:
    """Fetch the model's files into the directory. Returns their names with the hub's checksums.

    Raises AdapterFound if the repository holds an adapter, unless one is chosen (`adapted`). `check` is called once the
    directory holds config.json, before anything large is fetched; it raises WeightsError for a model that could not be
    loaded.
    """
    listed = _listing(source, commit)
    if adapters.CONFIG in listed and not adapted:
        size, checksum = _size_and_checksum(source, listed[adapters.CONFIG])
        if "config.json" not in listed and size <= adapters.MAX_CONFIG_BYTES:
            fetch(source, commit, {adapters.CONFIG: size}, directory)
            verify(directory, {adapters.CONFIG: checksum})
        adapters.raise_found("config.json" in listed, directory / adapters.CONFIG, source)

    def read_index() -> bytes:
        size, _ = _size_and_checksum(source, listed[INDEX])
        if size <= MAX_INDEX_BYTES:
            fetch(source, commit, {INDEX: size}, directory)
            return read_index_in(directory, source)
        raise WeightsError(f"{source} has a malformed {INDEX}: it is larger than {MAX_INDEX_BYTES:,} bytes.")

    names = needed_files(listed, read_index, source, trust_remote_code)
    claims = {name: _size_and_checksum(source, listed[name]) for name in names}
    if claims["config.json"][0] > MAX_CONFIG_BYTES:
        raise WeightsError(f"{source} has a malformed config.json: it is larger than {MAX_CONFIG_BYTES:,} bytes.")
    total = sum(size for size, _ in claims.values())
    require_space(directory, total - sum(claims[name][0] for name in claims if (directory / name).exists()))
    fetch(source, commit, {"config.json": claims["config.json"][0]}, directory)
    verify(directory, {"config.json": claims["config.json"][1]})
    check(directory)
    print(f"Fetching {source} at {commit}: {len(names)} files, {total / 1e6:,.0f} MB.", flush=True)
    fetch(source, commit, {name: size for name, (size, _) in claims.items()}, directory)
    return {name: checksum for name, (_, checksum) in claims.items()}


def fetch(source: str, commit: str, sizes: dict[str, int], directory: Path) -> None:
    """Fetch the named files, several at a time, except those finished earlier. The first failure ends it."""
    from huggingface_hub import hf_hub_download

    for unfinished in directory.glob(".cache/huggingface/download/**/*.incomplete"):
        unfinished.unlink()  # huggingface_hub neither reuses nor removes what a killed process left.
    require_space(directory, sum(sizes.values()) - sum(sizes[name] for name in sizes if (directory / name).exists()))
    pool = ThreadPoolExecutor(8, "fetch")
    try:
        with _errors_explained(source, commit):
            transfers = [
                # A cache directory that does not exist: files come from the hub, not from the user's cache.
                pool.submit(
                    hf_hub_download, source, name, revision=commit, local_dir=directory, cache_dir=directory / "none"
                )
                for name in sizes
            ]
            for transfer in as_completed(transfers):
                transfer.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _size_and_checksum(source: str, file: "RepoSibling") -> tuple[int, str]:
    """What the hub says of a file: its size; its SHA-256 if stored with LFS, else its git blob id."""
    checksum, pattern = (file.lfs.sha256, SHA256) if file.lfs else (file.blob_id, COMMIT)
    if not isinstance(file.size, int) or file.size < 0 or not pattern.fullmatch(str(checksum)):
        raise WeightsError(f"{source} cannot be verified: the hub gives no size or no checksum for {file.rfilename}.")
    return file.size, str(checksum)


@contextmanager
def _errors_explained(source: str, revision: str) -> Iterator[None]:
    """Turn hub and network errors into WeightsErrors that say what to do."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
        message = _explanation(cause or error, source, revision)
        if message is None:
            raise
        raise WeightsError(message) from error


def _explanation(error: BaseException, source: str, revision: str) -> str | None:
    import httpx2
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{source}"
    match error:
        case errors.HFValidationError():
            return f"{source} is neither a directory nor a repository's name, such as org/name."
        case errors.GatedRepoError():
            rest = (
                "the account of HF_TOKEN has none yet" if get_token() else "then set HF_TOKEN to that account's token"
            )
            return f"{source} is gated: ask for access at {page}; {rest}."
        case errors.RevisionNotFoundError():
            return f"{source} has no revision {revision}: see {page}/commits/main."
        case errors.RepositoryNotFoundError():
            return f"No repository {page}, or it is private: then set HF_TOKEN to a token with access."
        case errors.HfHubHTTPError():
            code = error.response.status_code
            rest = "check HF_TOKEN" if code in (401, 403) else "run the command again later, it resumes"
            return f"{printable(str(error.response.url.copy_with(query=None)))} answered {code}: {rest}."
        case errors.OfflineModeIsEnabled():
            return f"HF_HUB_OFFLINE is set, so {source} cannot be fetched: unset it."
        case httpx2.HTTPError():
            return (
                f"No connection to {constants.ENDPOINT} ({first_line(error)}):"
                " check the network and run the command again, it resumes."
            )
        # A file of another length than announced, or one without the headers a hub sends.
        case OSError() if error.errno is None:
            return f"{constants.ENDPOINT}: {first_line(error)} Run the command again."
        case ValueError() | TypeError() | LookupError() | AttributeError() | RecursionError() | httpx2.InvalidURL():
            return f"{constants.ENDPOINT} does not answer as a Hugging Face hub does: check HF_ENDPOINT."
    return None
