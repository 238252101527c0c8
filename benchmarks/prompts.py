"""The prompts and operations of all rows: the same in every benchmark, never the same twice within one."""

import base64
import random
from collections.abc import Mapping, Sequence
from typing import Any

VOCABULARY = 49152
"""Size of the demo model's vocabulary."""

FIRST, LAST = 1000, 40000
"""A range of ordinary tokens: no special tokens and few single bytes."""


def tokens(count: int, *key: object, last: int = LAST) -> list[int]:
    """`count` token ids below `last`, determined by `key`."""
    draw = random.Random(repr(key))
    return [draw.randrange(FIRST, last) for _ in range(count)]


def half_mask(*key: object) -> str:
    """An LMTP mask that allows half of the vocabulary, determined by `key`."""
    draw = random.Random(repr(key))
    return base64.b64encode(draw.getrandbits(VOCABULARY).to_bytes(VOCABULARY // 8, "little")).decode()


def story(*key: object) -> str:
    """The beginning of a text that the demo model does not end soon, determined by `key`."""
    draw = random.Random(repr(key))
    name = draw.choice(["Anna", "Bashir", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Hiro"])
    place = draw.choice(["a small village", "the harbour", "an old library", "the mountains", "a quiet farm"])
    return f"Chapter {draw.randrange(2, 999)}. Once upon a time {name} lived in {place}, and one morning"


def operations(
    prompts: Sequence[list[int] | str], own: Sequence[Mapping[str, Any]] | None = None, **common: Any
) -> list[Any]:
    """A GENERATE operation for each prompt, with the `common` options and each stream's `own`."""
    return [
        ["GENERATE", {"stream_id": i, "prompt": prompt, **common, **(own[i] if own else {})}]
        for i, prompt in enumerate(prompts)
    ]
