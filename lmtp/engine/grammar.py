"""A stream's place in its grammar, and what the grammars of a step allow. llguidance follows them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

from lmtp.engine.source import explain
from lmtp.protocol import RequestError


@dataclass(eq=False)
class Compiled:
    """A compiled constraint. Streams follow copies of its matcher, which share its lexer."""

    matcher: LLMatcher
    size: int
    """Bytes of memory."""
    reserve: int = 0
    """Bytes that are set aside in the cache for what its lexer grows by, while streams follow it and for good."""
    broken: bool = False
    """Whether its lexer has reached its limits: no stream can follow it any more."""


class Grammar:
    """One stream's place in its grammar. After each token it allows other ones."""

    def __init__(self, compiled: Compiled, batch: object) -> None:
        """A place at the beginning. ``batch`` lives until the last of its grammars is gone."""
        self.matcher = compiled.matcher.deep_copy()
        self._compiled = compiled
        self._batch = batch

    @property
    def complete(self) -> bool:
        """Whether nothing can follow but the end of the sequence."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def accepting(self) -> bool:
        """Whether the text so far is complete for the grammar."""
        return self.matcher.is_accepting() and not self.matcher.is_error()

    def forced(self) -> list[int]:
        """The tokens that must come next: each is the only one that the grammar allows there.

        Characters that several token sequences can spell are split as the tokenizer splits them.
        """
        return self.matcher.compute_ff_tokens()

    def advance(self, token: int) -> None:
        """Go on by one token. Raises RequestError if the grammar cannot be followed any further."""
        self.matcher.consume_token(token)
        self.check()

    def check(self) -> None:
        """Raise RequestError if the grammar has exceeded the compiler's limits."""
        if self.matcher.is_error():
            self._compiled.broken = True
            raise RequestError(f"the constraint cannot be followed here: {explain(self.matcher.get_error())}.")


class Drafted(NamedTuple):
    """A grammar, and tokens that a draft guesses to follow."""

    grammar: Grammar
    draft: Sequence[int]


class MaskFiller:
    """Computes what the grammars of a step allow, in parallel and while the model runs."""

    def __init__(self, vocabulary: int) -> None:
        self._words = -(-vocabulary // 32)
        self._executor: LLExecutor | None = None
        self._thread = ThreadPoolExecutor(1, "masks")

    def start(self, grammars: Sequence[Drafted]) -> Future[Tensor]:
        """Begin. The result is uint8 ``[rows, bytes]``; until it is there, the grammars must be left alone.

        A grammar has one row, and one more after each token of its draft. Nothing is allowed after a token that
        breaks the grammar.
        """
        return self._thread.submit(self._fill, grammars)

    def _fill(self, grammars: Sequence[Drafted]) -> Tensor:
        if self._executor is None:
            self._executor = LLExecutor()
        first = [0, *itertools.accumulate(1 + len(each.draft) for each in grammars)]
        rows = first.pop()
        bits = np.zeros((rows, self._words), dtype=np.int32)
        into = (bits.ctypes.data, self._words * 4, rows)
        places = list(zip(first, grammars, strict=True))
        if drafted := [(each.grammar.matcher, row, list(each.draft)) for row, each in places if each.draft]:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *into)
        if others := [(each.grammar.matcher, row) for row, each in places if not each.draft]:
            self._executor.unsafe_compute_mask_ptr(others, *into)
        return torch.from_numpy(bits.view(np.uint8))
