"""Grammars: ``choices``, ``regex``, ``json_schema`` and ``grammar``, compiled and followed by llguidance.

A Grammar is one stream's place in its constraint. After each token it allows other ones.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import llguidance.hf
import msgspec
import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmtp.protocol import Generate, RequestError, constraint_of

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SOURCE = 2**20
"""Characters of one constraint."""

MAX_GRAMMAR = 2**16
"""The same for ``grammar``, whose rules can be chained."""

COMPILE_THREADS = 4
STACK = 2**30
"""Bytes of address space for the stack of a compiling thread. Only what is touched takes memory."""

QUEUE_SECONDS = 30
"""How long a grammar waits for its turn."""

COMPILE_SECONDS = 0.8
"""How long a stream waits for its grammar. The compiler's own limits end the work soon after."""

CACHED_GRAMMARS = 128

MAX_QUOTED = 400
"""Characters of an error message."""

JSON_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON by schema is on one line, spaced like most JSON that models were trained on. With free whitespace a model can
emit it without end, and hardly any token is forced. A schema's own ``x-guidance`` overrides this."""


class Grammar:
    """One stream's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

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
            raise RequestError(f"the constraint cannot be followed here: {_one_line(self.matcher.get_error())}.")


class MaskFiller:
    """Computes what the grammars of a step allow, in parallel and while the model runs."""

    def __init__(self, vocabulary: int) -> None:
        self._words = -(-vocabulary // 32)
        self._executor: LLExecutor | None = None
        self._thread = ThreadPoolExecutor(1, "masks")

    def start(self, grammars: Sequence[Grammar]) -> Future[Tensor]:
        """Begin. The result is uint8 ``[grammars, bytes]``; until it is there, the grammars must be left alone."""
        return self._thread.submit(self._fill, grammars)

    def _fill(self, grammars: Sequence[Grammar]) -> Tensor:
        if self._executor is None:
            self._executor = LLExecutor()
        bits = np.zeros((len(grammars), self._words), dtype=np.int32)
        matchers = [(grammar.matcher, row) for row, grammar in enumerate(grammars)]
        self._executor.unsafe_compute_mask_ptr(matchers, bits.ctypes.data, self._words * 4, len(grammars))
        return torch.from_numpy(bits.view(np.uint8))


class Compiler:
    """Compiles constraints on threads of its own, and keeps the last ones for everybody."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, end_of_sequence: Sequence[int]
    ) -> None:
        self._model_tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_of_sequence = list(end_of_sequence)
        self._pool = _deep_threads(COMPILE_THREADS)
        self._tokenizer: Future[LLTokenizer] | None = None
        self._compiled: OrderedDict[tuple[str, str], _Work] = OrderedDict()
        self._lock = threading.Lock()

    async def grammar(self, operation: Generate) -> Grammar | None:
        """The operation's grammar, at its beginning; None if it has no constraint of this kind.

        Raises RequestError within a second for a constraint that cannot be used.
        """
        source = _source(operation)
        if source is None:
            return None
        tokenizer, work = self._submit(source)
        await asyncio.shield(asyncio.wrap_future(tokenizer))  # the first time takes a second or two
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(work.begun)), QUEUE_SECONDS)
            matcher = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(work.matcher)), COMPILE_SECONDS)
        except TimeoutError:
            raise RequestError(
                f"{source[0]}: not compiled within {COMPILE_SECONDS} s; make it smaller, or ask again later."
            ) from None
        return Grammar(matcher.deep_copy())

    def _submit(self, source: tuple[str, str]) -> tuple[Future[LLTokenizer], _Work]:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._pool.submit(self._read_tokenizer)
            if source in self._compiled:
                self._compiled.move_to_end(source)
            else:
                begun: Future[None] = Future()
                self._compiled[source] = _Work(begun, self._pool.submit(_compile, source, self._tokenizer, begun))
                if len(self._compiled) > CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
            return self._tokenizer, self._compiled[source]

    def _read_tokenizer(self) -> LLTokenizer:
        if not isinstance(self._model_tokenizer, PreTrainedTokenizerFast):
            raise RequestError("constraints need a fast tokenizer, which this model does not have.")
        try:
            return llguidance.hf.from_tokenizer(
                self._model_tokenizer, n_vocab=self._vocabulary, eos_token=self._end_of_sequence or None
            )
        except Exception as error:  # only constraints need the tokenizer in this form
            raise RequestError(f"this model's tokenizer cannot be used with constraints: {error}.") from error


@dataclass(frozen=True)
class _Work:
    """A grammar being compiled. ``begun`` is done once its turn has come."""

    begun: Future[None]
    matcher: Future[LLMatcher]


def _deep_threads(count: int) -> ThreadPoolExecutor:
    """Threads with room for deep recursion: the compiler descends through a grammar's rules, and a stack overflow ends
    the whole process."""
    pool = ThreadPoolExecutor(count, "grammars")
    usual = threading.stack_size(STACK)
    try:
        together = threading.Barrier(count + 1)
        for _ in range(count):
            pool.submit(together.wait)
        together.wait()
    finally:
        threading.stack_size(usual)
    return pool


def _source(operation: Generate) -> tuple[str, str] | None:
    """The constraint's field and its text."""
    field = constraint_of(operation)
    if field is None:
        return None
    value = getattr(operation, field)
    if value == []:
        raise RequestError("choices is empty; give at least one text.")
    if value is False:
        raise RequestError("json_schema: false allows nothing; give an object, or true for any JSON.")
    text = value if isinstance(value, str) else msgspec.json.encode({} if value is True else value).decode()
    most = MAX_GRAMMAR if field == "grammar" else MAX_SOURCE
    if len(text) > most:
        raise RequestError(f"{field} has {len(text)} characters; {most} is the most.")
    return field, text


def _compile(source: tuple[str, str], tokenizer: Future[LLTokenizer], begun: Future[None]) -> LLMatcher:
    begun.set_result(None)
    field, text = source
    try:
        if field == "choices":
            # DEL is the one character that JSON leaves unescaped and the grammar's lexer does not accept.
            options = [json.dumps(option, ensure_ascii=False).replace("\x7f", "\\u007f") for option in json.loads(text)]
            grammar = LLMatcher.grammar_from_lark(f"start: {' | '.join(options)}")
        elif field == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        elif field == "json_schema":
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=JSON_STYLE)
        else:
            grammar = grammar_from("grammar", text)
    except ValueError as error:
        raise RequestError(f"{field}: {_one_line(str(error))}.") from error
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokenizer.result(), grammar, log_level=0, limits=limits)
    allowed = b"" if matcher.is_error() else matcher.compute_bitmask()  # an expensive grammar shows in its first mask
    if matcher.is_error():
        raise RequestError(f"{field}: {_explain(matcher.get_error())}.")
    if not any(allowed):
        raise RequestError(f"{field}: no text can satisfy it.")
    return matcher


_REGEX_ERROR = re.compile(r"regex parse error:\n    (.*)\n    ( *)(\^+)\s*\nerror: (.*)")
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)")
_KEYWORDS = re.compile(r"Unimplemented keys: \[(.*)\]")


def _explain(error: str) -> str:
    """llguidance's message as one line that quotes what is wrong."""
    if found := _REGEX_ERROR.search(error):
        pattern, before, carets, reason = found.groups()
        start = len(before)
        part, around = pattern[start : start + len(carets)], pattern[max(start - 40, 0) : start + len(carets) + 40]
        return _one_line(f"{reason}: {part!r} in {around!r}")
    if found := _KEYWORDS.search(error):
        return f"unsupported keywords: {found[1]}"
    if found := _PLACE.match(error):
        line, column, reason = found.groups()
        written = re.search(rf"^ *{line} \| (.*)$", error, re.MULTILINE)
        return _one_line(
            f"{reason} at line {line}, column {column}" + (f" of {written[1].strip()!r}" if written else "")
        )
    return "no text can satisfy it" if "NoExtension" in error else _one_line(error)


def _one_line(error: str) -> str:
    line = " ".join(error.replace("<non-verbose/>", "").split()).rstrip(".")
    return line if len(line) <= MAX_QUOTED else f"{line[:MAX_QUOTED]} …"
