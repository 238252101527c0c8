"""models.lock: the commit of each repository and revision, so that a build today and one next year are the same."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from lmtp.deploy import DeployError
from lmtp.deploy.models import Source
from lmtp.weights import hub

Lock = dict[str, str]
"""Commits by `org/name@revision`."""


def read(path: Path) -> Lock:
    """The lock in the file; empty if there is none. Raises DeployError if it is damaged."""
    try:
        lock = msgspec.json.decode(path.read_bytes(), type=Lock)
    except FileNotFoundError:
        return {}
    except msgspec.DecodeError as error:
        raise DeployError(
            f"{path} is damaged ({error}): restore it, or delete it to take the newest commits."
        ) from None
    for key, commit in lock.items():
        if not hub.COMMIT.fullmatch(commit):
            raise DeployError(f"{path}: {key} has {commit!a:.50}, which is no commit: delete the line and build again.")
    return lock


def commit_in(lock: Lock, source: Source) -> str | None:
    """The commit to take for the source, or the demo package's version; None if it is not locked."""
    fixed = source.repository == "demo" or hub.COMMIT.fullmatch(source.revision)
    return source.revision if fixed else lock.get(str(source))


def complete(lock: Lock, sources: Iterable[Source], update: bool) -> Lock:
    """The lock with a commit for each of the sources; asks the hub for those that it has none of, or all (`update`).

    Raises WeightsError if the hub does not tell.
    """
    found = {
        str(source): hub.commit_of(source.repository, source.revision)
        for source in dict.fromkeys(sources)
        if commit_in(lock, source) is None or (update and str(source) in lock)
    }
    return lock | found


def write(path: Path, lock: Lock, known: Iterable[Source]) -> None:
    """Write the lock's entries of the known sources, if that changes the file. It is replaced in one move."""
    kept = {key: lock[key] for key in sorted({str(source) for source in known} & lock.keys())}
    if kept != read(path):
        draft = path.with_name(f".{path.name}.new")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n")
        draft.replace(path)
