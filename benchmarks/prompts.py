"""The prompts that are measured: the same in every run of the benchmark, never the same twice within one."""

import base64
import random

VOCABULARY = 49152
"""The demo model's."""

FIRST, LAST = 1000, 40000
"""Ordinary tokens: no special ones, and bytes only rarely."""


def tokens(count: int, *key: object) -> list[int]:
    """`count` token ids that depend on `key` alone."""
    draw = random.Random(repr(key))
    return [draw.randrange(FIRST, LAST) for _ in range(count)]


def half_mask(*key: object) -> str:
    """An LMTP mask that allows half of the vocabulary, another half for every key."""
    draw = random.Random(repr(key))
    return base64.b64encode(draw.getrandbits(VOCABULARY).to_bytes(VOCABULARY // 8, "little")).decode()


def story(*key: object) -> str:
    """The beginning of a text that the demo model does not end soon."""
    draw = random.Random(repr(key))
    name = draw.choice(["Anna", "Bashir", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Hiro"])
    place = draw.choice(["a small village", "the harbour", "an old library", "the mountains", "a quiet farm"])
    return f"Chapter {draw.randrange(2, 999)}. Once upon a time {name} lived in {place}, and one morning"
