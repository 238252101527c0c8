"""A directory described by its files: compare it, and replace it as a whole."""

import errno
import filecmp
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from lmtp.weights.staging import require_space

Content = bytes | Path | str
"""A file's bytes; the file to link to it, whose bytes are shared; or the relative target of a symbolic link."""

Tree = Mapping[str, Content]
"""Contents by relative path."""

CACHE = ".cog"
"""What Cog keeps in a project's directory: no part of it, and kept when it is replaced."""


def differences(tree: Tree, directory: Path) -> list[str]:
    """The paths at which the directory differs from the tree, sorted. Caches do not count."""
    there = {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if (path.is_symlink() or not path.is_dir())
        and not {CACHE, "__pycache__"} & set(path.relative_to(directory).parts)
    }
    return sorted(
        (there - tree.keys())
        | {name for name, content in tree.items() if name not in there or not _same(directory / name, content)}
    )


def replace(directory: Path, tree: Tree) -> None:
    """Make the directory what the tree says: built beside, then exchanged. Raises WeightsError for want of space."""
    new, old = (directory.with_name(f".{directory.name}.{state}") for state in ("new", "old"))
    try:
        discard(new)
        for name, content in tree.items():
            there = directory / name
            shared = isinstance(content, Path) and there.is_file() and _same(there, content)
            _put(new / name, there if shared else content)  # a copy on another file system is not made again
        if (directory / CACHE).is_dir():
            shutil.copytree(directory / CACHE, new / CACHE)
        discard(old)
        if os.path.lexists(directory):
            directory.rename(old)
        new.rename(directory)
    finally:
        discard(new)
        discard(old)


def discard(directory: Path) -> None:
    """Remove the directory if it is there; of a symbolic link only the link."""
    if directory.is_dir() and not directory.is_symlink():
        shutil.rmtree(directory)
    else:
        directory.unlink(missing_ok=True)


def _same(path: Path, content: Content) -> bool:
    match content:
        case bytes():
            return not path.is_symlink() and path.read_bytes() == content
        case str():
            return path.is_symlink() and os.readlink(path) == content
        case _:
            return not path.is_symlink() and filecmp.cmp(path, content)


def _put(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match content:
        case bytes():
            path.write_bytes(content)
            if content.startswith(b"#!"):
                path.chmod(0o755)
        case str():
            path.symlink_to(content)
        case _:
            _share(content, path)


def _share(source: Path, path: Path) -> None:
    """Link the file, or copy it where links are not possible: to another file system, or beyond its number of links."""
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        require_space(path.parent, source.stat().st_size)
        shutil.copy2(source, path)
