"""Compiles constraints for streams, and keeps compiled ones for everybody."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import copy
from functools import partial

from llguidance import LLTokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmtp.engine.grammar import Compiled, Grammar
from lmtp.engine.source import Source, compile_source, hide_special_tokens, leading_space, source_of
from lmtp.engine.vetting import NICE, QUICK_SECONDS, Vetter
from lmtp.protocol import Generate, RequestError

COMPILE_SECONDS = {"choices": 4.0, "regex": 0.8, "json_schema": 0.8, "grammar": 0.8}
"""How long one constraint may take. The work for choices grows only with their length."""

CHECK_SECONDS = 1.0

QUEUE_SECONDS = 30
"""How long a constraint waits for others to be compiled."""

COMPILED_TOGETHER = 8

STACK = 2**30
"""Bytes of address space for the stack of a compiling thread: more than in vetting, as an overflow ends the process."""

CACHE_BYTES = 2**28
"""Memory for compiled constraints that no stream uses."""

LIVE_BYTES = 2**30
"""Memory for all compiled constraints."""

OVERHEAD = 2**14
"""Bytes of a compiled constraint beside what its compilation took."""


class Later(RequestError):
    """A refusal that is not forever."""


class Cache:
    """Compiled constraints and refusals, up to a number of bytes; the least recently used go first.

    New ones share a quarter of it. On its second use one moves to the rest, so that many new ones, which evict each
    other, leave it alone.
    """

    def __init__(self, size: int) -> None:
        self._new = _Recent(size // 4)
        self._used = _Recent(size - size // 4)

    def get(self, key: bytes) -> Compiled | str | None:
        """What is kept under a key."""
        found = self._used.pop(key) or self._new.pop(key)
        if found is None or (isinstance(found, Compiled) and found.broken):
            return None
        for key_, evicted in self._used.add(key, found):
            self._new.add(key_, evicted)
        return found

    def add(self, key: bytes, value: Compiled | str) -> None:
        """Keep a new one."""
        self._new.add(key, value)


class _Recent(OrderedDict[bytes, Compiled | str]):
    """A part of the cache."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._free = size

    def pop(self, key: bytes, default: None = None) -> Compiled | str | None:  # type: ignore[override]
        value = super().pop(key, default)
        if value is not None:
            self._free += _size(value)
        return value

    def add(self, key: bytes, value: Compiled | str) -> list[tuple[bytes, Compiled | str]]:
        """Add one as the most recently used; returns what had to go."""
        self[key] = value
        self._free -= _size(value)
        evicted = []
        while self._free < 0:
            oldest = next(iter(self))
            evicted.append((oldest, self[oldest]))
            self.pop(oldest)
        return evicted


def _size(value: Compiled | str) -> int:
    return OVERHEAD + (value.size if isinstance(value, Compiled) else len(value))


class Compiler:
    """Compiles constraints on threads of its own, after a child process has shown that they can be compiled."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        vocabulary: int,
        end_of_sequence: Sequence[int],
        begins_text: bool = False,
    ) -> None:
        """``begins_text``: what is generated begins a text of its own, as an encoder-decoder model's does."""
        self._model_tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_of_sequence = list(end_of_sequence)
        self._space = ""
        if begins_text and isinstance(tokenizer, PreTrainedTokenizerFast):
            self._space = leading_space(tokenizer.backend_tokenizer.to_str())
        self._pool = _deep_threads(COMPILED_TOGETHER, "compile")
        self._slow = _deep_threads(1, "compile-slow")
        self._slow.submit(lambda: os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE))
        self._ready: Future[tuple[LLTokenizer, Vetter]] | None = None
        self._compiling: dict[bytes, Future[Compiled]] = {}
        self._cache = Cache(CACHE_BYTES)
        self._live = 0
        self._lock = threading.RLock()  # a constraint may be released by whoever holds it

    async def grammar(self, operation: Generate) -> Grammar | None:
        """The operation's grammar, at its beginning; None if it has no constraint of this kind.

        Raises RequestError for a constraint that cannot be used: within a second once it has its turn.
        """
        source = source_of(operation, self._space)
        if source is None:
            return None
        await asyncio.shield(asyncio.wrap_future(self._start()))  # the first time takes a second or two
        compiling = self._compile(source)
        try:
            compiled = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(compiling)), QUEUE_SECONDS)
        except TimeoutError:
            raise RequestError(f"{source.field}: too many constraints are being compiled; ask again later.") from None
        return compiled.begin()

    def check(self, operation: Generate, texts: Sequence[str]) -> list[bool | None]:
        """Whether finished texts satisfy the operation's constraint; None where that cannot be told.

        May take a second, on any thread.
        """
        source = source_of(operation, self._space)
        assert source is not None
        tokenizer, vetter = self._start().result()
        if source.field == "json_schema":
            return vetter.check(source.text, texts, CHECK_SECONDS)
        try:
            compiled = self._compile(source).result(CHECK_SECONDS)
        except Exception:  # whatever happens to the check, the texts are finished
            return [None] * len(texts)
        return [_follows(compiled, tokenizer, text) for text in texts]

    def _start(self) -> Future[tuple[LLTokenizer, Vetter]]:
        """What is needed to compile, made once."""
        with self._lock:
            if self._ready is None:
                self._ready = self._pool.submit(self._open)
            return self._ready

    def _open(self) -> tuple[LLTokenizer, Vetter]:
        if not isinstance(self._model_tokenizer, PreTrainedTokenizerFast):
            raise RequestError("constraints need a fast tokenizer, which this model does not have.")
        backend = copy(self._model_tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        try:
            hidden = hide_special_tokens(backend.to_str())
            vetter = Vetter(hidden, self._vocabulary, self._end_of_sequence)
            starting = self._pool.submit(vetter.start)
            tokenizer = LLTokenizer(hidden, n_vocab=self._vocabulary, eos_token=self._end_of_sequence or None)
        except Exception as error:  # only constraints need the tokenizer in this form
            raise RequestError(f"this model's tokenizer cannot be used with constraints: {error}.") from error
        wait([starting])  # should it have failed, the next constraint tries again
        return tokenizer, vetter

    def _compile(self, source: Source) -> Future[Compiled]:
        key = hashlib.sha256("\0".join(source).encode()).digest()
        with self._lock:
            if key in self._compiling:
                return self._compiling[key]
            future: Future[Compiled] = Future()
            found = self._cache.get(key)
            if isinstance(found, Compiled):
                future.set_result(found)
            elif found is not None:
                future.set_exception(RequestError(found))
            else:
                self._compiling[key] = future
                self._pool.submit(self._run, source, key, future)
            return future

    def _run(self, source: Source, key: bytes, future: Future[Compiled]) -> None:
        result: Compiled | BaseException
        try:
            result = self._vet_and_compile(source)
        except BaseException as error:
            result = error
        with self._lock:
            del self._compiling[key]
            if isinstance(result, Compiled):
                self._cache.add(key, result)
            elif isinstance(result, RequestError) and not isinstance(result, Later):
                self._cache.add(key, str(result))
        if isinstance(result, Compiled):
            future.set_result(result)
        else:
            future.set_exception(result)

    def _vet_and_compile(self, source: Source) -> Compiled:
        tokenizer, vetter = self._start().result()
        limit = COMPILE_SECONDS[source.field]
        try:
            seconds, size = vetter.vet(source, limit)
        except TimeoutError:
            raise Later(
                f"{source.field}: not compiled within {limit} s; make it smaller, or ask again later."
            ) from None
        except OSError as error:
            raise Later(f"{source.field}: cannot be compiled now: {error}; ask again later.") from error
        with self._lock:
            if self._live + size > LIVE_BYTES:
                raise Later(f"{source.field}: constraints in use take too much memory; ask again later.")
            self._live += size
        try:
            compile_ = partial(compile_source, source, tokenizer)
            compiled = Compiled(compile_() if seconds < QUICK_SECONDS else self._slow.submit(compile_).result(), size)
        except BaseException:
            self._release(size)
            raise
        weakref.finalize(compiled, self._release, size)
        return compiled

    def _release(self, size: int) -> None:
        with self._lock:
            self._live -= size


def _follows(compiled: Compiled, tokenizer: LLTokenizer, text: str) -> bool:
    matcher = compiled.matcher.deep_copy()
    return matcher.consume_tokens(tokenizer.greedy_tokenize(text)) and matcher.is_accepting()


def _deep_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads with room for deep recursion."""
    pool = ThreadPoolExecutor(count, name)
    usual = threading.stack_size(STACK)
    try:
        together = threading.Barrier(count + 1)
        for _ in range(count):
            pool.submit(together.wait)
        together.wait()
    finally:
        threading.stack_size(usual)
    return pool
