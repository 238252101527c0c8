"""Constraints: which tokens a stream may produce, as an additive bias over the vocabulary.

A bias is a float32 tensor ``[vocabulary]`` added to the logits: 0 for an allowed token, a finite number for one made
more or less likely, negative infinity for an impossible one. Adding it is exact: an impossible token has probability 0
whatever its logit.

``logit_bias`` and ``mask`` give a stream one bias for all its tokens. ``choices``, ``regex``, ``json_schema`` and
``grammar`` give it a Grammar, which allows other tokens after each one; llguidance keeps the place in it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
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
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmtp.protocol import FORCE, Generate, RequestError, constraint_of

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MOST_SOURCE = 2**20
"""Characters that one constraint may take."""

MOST_GRAMMAR = 2**16
"""The same for ``grammar``, whose rules can be chained."""

COMPILE_THREADS = 4
STACK = 2**30
"""Bytes of address space for a compiling thread's stack; only what is touched takes memory."""

QUEUE_SECONDS = 30
"""How long a grammar waits for its turn."""

COMPILE_SECONDS = 0.8
"""How long a stream waits for its grammar. The compiler's own limits end the work itself soon after."""

CACHED_GRAMMARS = 128

MOST_QUOTED = 400
"""Characters of an error's text."""

JSON_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON by schema is on one line, spaced as most JSON that models have read. Free whitespace lets a model run away in it
and leaves hardly a token forced. A schema's own ``x-guidance`` can say otherwise."""


def bias_of(operation: Generate, vocabulary: int) -> torch.Tensor | None:
    """The operation's ``logit_bias`` and ``mask`` as one bias ``[vocabulary]`` on the CPU; None where it has neither.

    Raises RequestError for an id outside the vocabulary, a malformed mask, and a combination that allows nothing.
    """
    if not operation.logit_bias and operation.mask is None:
        return None
    bias = torch.zeros(vocabulary)
    if operation.logit_bias:
        bias += _logit_bias(operation.logit_bias, vocabulary)
    if operation.mask is not None:
        bias[~_bitset(operation.mask, vocabulary)] = -math.inf
    if torch.isneginf(bias).all():
        raise RequestError("logit_bias and mask leave no token that may be generated.")
    return bias


def _logit_bias(logit_bias: dict[int, float], vocabulary: int) -> torch.Tensor:
    """LMQL's dense-or-sparse mask (see docs/protocol.md, Masks) as a bias ``[vocabulary]``."""
    ids = torch.from_numpy(np.fromiter(logit_bias.keys(), dtype=np.int64, count=len(logit_bias)))
    values = torch.from_numpy(np.fromiter(logit_bias.values(), dtype=np.float32, count=len(logit_bias)))
    if int(ids.max()) >= vocabulary:
        raise RequestError(f"logit_bias: token id {int(ids.max())} is outside the vocabulary of {vocabulary}.")
    only_forced = bool((values >= FORCE).any())
    bias = torch.full((vocabulary,), -math.inf if only_forced else 0.0)
    if only_forced:
        bias[ids[values >= FORCE]] = 0.0
    else:
        bias[ids] = torch.where(values <= -FORCE, -math.inf, values)
    return bias


def _bitset(mask: str, vocabulary: int) -> torch.Tensor:
    """A base64 bitset, least significant bit first, as a bool tensor ``[vocabulary]``: true is allowed."""
    try:
        packed = np.frombuffer(base64.b64decode(mask, validate=True), dtype=np.uint8)
    except (binascii.Error, ValueError):
        raise RequestError("mask: not valid base64.") from None
    size = (vocabulary + 7) // 8
    if len(packed) != size:
        raise RequestError(f"mask: {len(packed)} bytes; a vocabulary of {vocabulary} takes {size}, a bit per token id.")
    return torch.from_numpy(np.unpackbits(packed, bitorder="little")[:vocabulary].astype(bool))


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
        """Whether what was generated so far is a whole text of the grammar."""
        return self.matcher.is_accepting() and not self.matcher.is_error()

    def forced(self) -> list[int]:
        """The tokens that must come next: at each of them the grammar's mask allows just that one.

        Where the same characters could be split differently, they are split as the tokenizer would.
        """
        return self.matcher.compute_ff_tokens()

    def advance(self, token: int) -> None:
        """Go on by one token. Raises RequestError where the grammar cannot be followed any further."""
        self.matcher.consume_token(token)
        self.check()

    def check(self) -> None:
        """Raise RequestError once the grammar turned out to be more than the compiler's limits."""
        if self.matcher.is_error():
            raise RequestError(f"the constraint cannot be followed here: {_one_line(self.matcher.get_error())}.")


@dataclass(frozen=True)
class Allowed:
    """What the grammars of a step allow: ``bits`` uint8 ``[len(rows), bytes]``, a bit per token id, least significant
    first; ``rows`` are the rows of the step's logits that they are for."""

    rows: list[int]
    bits: Tensor

    def part(self, part: slice) -> Allowed | None:
        """The same for some neighbouring rows alone; None where it is for none of them."""
        places = [place for place, row in enumerate(self.rows) if part.start <= row < part.stop]
        return Allowed([self.rows[place] - part.start for place in places], self.bits[places]) if places else None

    def apply(self, logits: Tensor) -> Tensor:
        """The float32 logits ``[all rows, vocabulary]`` with what is not allowed at negative infinity."""
        bits = self.bits.to(logits.device, non_blocking=True)
        bias = functional.embedding(bits.int(), _byte_biases(logits.device)).flatten(1)[:, : logits.shape[-1]]
        if len(self.rows) == len(logits):
            return logits + bias
        return logits.index_add(0, torch.tensor(self.rows, device=logits.device), bias)


def _byte_biases(device: torch.device) -> Tensor:
    """``[256, 8]``: for every byte of a bitset, the bias of its eight tokens."""
    if device not in _BYTE_BIASES:
        bits = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"))
        _BYTE_BIASES[device] = torch.where(bits.bool(), 0.0, -math.inf).to(device)
    return _BYTE_BIASES[device]


_BYTE_BIASES: dict[torch.device, Tensor] = {}


class MaskFiller:
    """Finds out what grammars allow, all of a step in parallel and while the model runs."""

    def __init__(self, vocabulary: int) -> None:
        self._words = -(-vocabulary // 32)
        self._executor: LLExecutor | None = None
        self._thread = ThreadPoolExecutor(1, "masks")

    def start(self, grammars: Sequence[Grammar]) -> Future[Tensor]:
        """Begin; the result is uint8 ``[grammars, bytes]``. The grammars must be left alone until it is there."""
        return self._thread.submit(self._fill, grammars)

    def _fill(self, grammars: Sequence[Grammar]) -> Tensor:
        if self._executor is None:
            self._executor = LLExecutor()
        bits = np.zeros((len(grammars), self._words), dtype=np.int32)
        matchers = [(grammar.matcher, row) for row, grammar in enumerate(grammars)]
        self._executor.unsafe_compute_mask_ptr(matchers, bits.ctypes.data, self._words * 4, len(grammars))
        return torch.from_numpy(bits.view(np.uint8))


class Compiler:
    """Compiles constraints on threads of its own and keeps the last ones, whoever asked for them."""

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
        """The operation's grammar, at its beginning; None where it has no constraint of this kind.

        Raises RequestError for a constraint that cannot be used, within a second.
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
        except Exception as error:  # whatever is wrong with a model's tokenizer, only constraints need it in this form
            raise RequestError(f"this model's tokenizer cannot be used with constraints: {error}.") from error


@dataclass(frozen=True)
class _Work:
    """A grammar being compiled: ``begun`` is done when its turn has come."""

    begun: Future[None]
    matcher: Future[LLMatcher]


def _deep_threads(count: int) -> ThreadPoolExecutor:
    """Threads with room for deep recursion: the compiler descends through a grammar's rules, and a stack that is used
    up ends the whole process."""
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
    most = MOST_GRAMMAR if field == "grammar" else MOST_SOURCE
    if len(text) > most:
        raise RequestError(f"{field} has {len(text)} characters; {most} is the most.")
    return field, text


def _compile(source: tuple[str, str], tokenizer: Future[LLTokenizer], begun: Future[None]) -> LLMatcher:
    begun.set_result(None)
    field, text = source
    try:
        if field == "choices":
            # DEL is the one character that JSON leaves as it is and the grammar's lexer does not.
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
    allowed = b"" if matcher.is_error() else matcher.compute_bitmask()  # what a grammar costs shows in its first mask
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
    return line if len(line) <= MOST_QUOTED else f"{line[:MOST_QUOTED]} …"
