"""Which files make a model. File names are untrusted: a file is taken only if its name matches a pattern here."""

import re
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from lmtp.weights import adapters
from lmtp.weights.manifest import ADAPTER_NAME, MANIFEST, STAGING, WeightsError, first_line

INDEX = "model.safetensors.index.json"
"""Lists the shards of a model stored in several files."""

MAX_INDEX_BYTES = 100_000_000
MAX_CONFIG_BYTES = 10_000_000
"""Of config.json, whose tables of labels or speakers can be long."""

_ADAPTER = re.compile(
    rf"({adapters.FOLDER}|{adapters.FOLDERS}/{ADAPTER_NAME.pattern})/({'|'.join(map(re.escape, adapters.FILES))})"
)
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}"
_SHARD = re.compile(rf"{_NAME}\.safetensors")
_CODE = re.compile(rf"({_NAME}/)*{_NAME}\.py")
_ACCOMPANYING = re.compile(
    rf"""(generation_)?config\.json | tokenizer(_config)?\.json | special_tokens_map\.json | added_tokens\.json
    | vocab\.(json|txt) | merges\.txt | {_NAME}\.(model|tiktoken)
    | chat_template\.(jinja|json) | additional_chat_templates/{_NAME}\.jinja
    | (?i:licen[cs]e|notice|use_policy)[A-Za-z0-9_-]{{0,99}}(?i:\.(md|txt|rst|html|pdf))?""",
    re.VERBOSE | re.ASCII,
)
"""What a model needs besides its weights: configuration, tokenizer, chat template, licence."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def needed_files(
    available: Collection[str], read_index: Callable[[], bytes], source: str, trust_remote_code: bool
) -> list[str]:
    """Choose from a model's file names those that Transformers reads.

    `read_index` returns the content of INDEX. Raises WeightsError, naming the source, if the files are no Transformers
    model with safetensors or if the index is malformed or names anything but shards.
    """
    if "config.json" not in available:
        raise WeightsError(f"{source} is no Transformers model: it has no config.json.")
    names = [
        name
        for name in sorted(available)
        if _ACCOMPANYING.fullmatch(name) or (trust_remote_code and _CODE.fullmatch(name))
    ]
    if "model.safetensors" in available:
        names.append("model.safetensors")
    elif INDEX in available:
        shards = shards_in(read_index(), source)
        if missing := set(shards).difference(available):
            raise WeightsError(f"{source} is incomplete: its {INDEX} names {min(missing)}, which is not there.")
        names += [INDEX, *shards]
    else:
        others = [
            name for name in available if name.endswith((".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx"))
        ]
        found = f"only {_shown(others[0])}" if others else "and no other weights"
        raise WeightsError(
            f"{source} has no model.safetensors, {found}: choose a model stored as safetensors, the one format loaded."
        )
    by_lower: dict[str, str] = {}
    for name in names:
        if (other := by_lower.setdefault(name.lower(), name)) != name:
            raise WeightsError(f"{source} has both {other} and {name}, which some file systems cannot tell apart.")
    return names


def shards_in(index: bytes, source: str) -> list[str]:
    """The shards that the index names. Raises WeightsError if it is malformed or a name is not a plain shard name."""
    try:
        shards = sorted(set(msgspec.json.decode(index, type=_Index).weight_map.values()))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{source} has a malformed {INDEX}: {first_line(error)}.") from None
    if not shards:
        raise WeightsError(f"{source} has a malformed {INDEX}: it names no files.")
    for name in shards:
        if not _SHARD.fullmatch(name):
            raise WeightsError(
                f"{source} is not safe to install: its {INDEX} names {_shown(name)}, which is no plain file name ending"
                " in .safetensors."
            )
    return shards


def belongs_to_an_adapter(name: str) -> bool:
    """Whether a file of this name, in a weights directory, is an adapter's."""
    return bool(_ADAPTER.fullmatch(name))


def belongs_to_a_model(name: str) -> bool:
    """Whether a file of this name, found in a weights directory, may be replaced by another model's."""
    return (
        bool(_ACCOMPANYING.fullmatch(name) or _SHARD.fullmatch(name))
        or name in (INDEX, f".{MANIFEST}")
        or belongs_to_an_adapter(name)
    )


def read_index_in(directory: Path, source: str) -> bytes:
    """The content of the directory's INDEX. Raises WeightsError if it is too large to be one."""
    if (directory / INDEX).stat().st_size > MAX_INDEX_BYTES:
        raise WeightsError(f"{source} has a malformed {INDEX}: it is larger than {MAX_INDEX_BYTES:,} bytes.")
    return (directory / INDEX).read_bytes()


def files_in(directory: Path) -> list[str]:
    """The names of all files below the directory except its manifest, .gitignore and staging directories."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in (MANIFEST, ".gitignore") and not name.startswith(STAGING))


def _shown(name: str) -> str:
    """A name as an error message shows it: one line, ASCII, short."""
    return name if re.fullmatch(rf"({_NAME}/)*{_NAME}", name) and len(name) < 100 else ascii(name[:100])
