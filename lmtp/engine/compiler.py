"""Compiles constraints for streams, and keeps compiled ones for everybody."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from llguidance import LLTokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmtp.engine.constraint_cache import OVERHEAD, ConstraintCache
from lmtp.engine.grammar import Compiled, Grammar
from lmtp.engine.lanes import Lanes
from lmtp.engine.source import (
    MAX_STATES,
    PREDICTION_STATES,
    Source,
    compile_source,
    hide_special_tokens,
    leading_space,
    source_of,
    states_of,
)
from lmtp.engine.vetting import Vetter
from lmtp.protocol import Generate, RequestError

log = logging.getLogger(__name__)

T = TypeVar("T")

COMPILE_SECONDS = {"choices": 4.0, "regex": 0.8, "json_schema": 0.8, "grammar": 0.8}
"""Processor time that one constraint may take. The work for choices grows only with their length."""

CHECK_SECONDS = 1.0

QUEUE_SECONDS = 30
"""How long a constraint waits until it is compiled."""

MAX_COMPILING = 2
"""Constraints of one prediction that are compiled at once."""

STACK = 2**30
"""Bytes of address space for the stack of a compiling thread: more than in vetting, as an overflow ends the process."""

CACHE_BYTES = 2**28
"""Memory for compiled constraints that were used lately."""

STATE_RESERVE = 32
"""Bytes of the cache for each state that a lexer may have. A state takes 250 to 450, but few lexers have many. So the
cache keeps 50 constraints of `MAX_STATES` at least, and they take less than 4 GB whatever streams did with them."""

LIVE_BYTES = 2**30
"""Memory for compiled constraints that streams use."""

MAX_LARGE = 4
"""How many predictions at once get `PREDICTION_STATES` each. Others get `MAX_STATES` each, so all lexers of 64
predictions together take 6 GB at most."""


class Later(RequestError):
    """A refusal that is not forever."""


@dataclass(eq=False)
class _Asked:
    """A constraint that somebody asks for."""

    compiled: Future[Compiled]
    askers: int = 0


class Compiler:
    """Compiles constraints, each after a child process has shown that it can be compiled."""

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
        self.space = ""
        if begins_text and isinstance(tokenizer, PreTrainedTokenizerFast):
            self.space = leading_space(tokenizer.backend_tokenizer.to_str())
        self._lanes = Lanes()
        self._opening = threading.Lock()
        self._opened: tuple[LLTokenizer, Vetter] | None = None
        self._compiling: dict[bytes, _Asked] = {}
        self._cache = ConstraintCache(CACHE_BYTES)
        self._in_use = 0
        self._large: weakref.WeakSet[Batch] = weakref.WeakSet()
        self._lock = threading.RLock()  # a batch may be released by whoever holds it

    def batch(self, operations: Iterable[object] = ()) -> Batch:
        """For the constraints of one prediction's operations."""
        different = set()
        for operation in operations:
            if isinstance(operation, Generate):
                with contextlib.suppress(RequestError):  # its stream will get it
                    different.add(source_of(operation, self.space))
        states = states_of(len(different), MAX_STATES)
        with self._lock:
            if states < MAX_STATES and len(self._large) < MAX_LARGE:
                batch = Batch(self, states_of(len(different), PREDICTION_STATES))
                self._large.add(batch)
                return batch
        return Batch(self, states)

    async def compile(self, source: Source, batch: Batch) -> Compiled:
        """Compile a constraint. Raises RequestError for one that cannot be used or whose turn does not come."""
        with self._asking(source, batch) as compiled:
            try:
                return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(compiled)), QUEUE_SECONDS)
            except TimeoutError:
                raise RequestError(
                    f"{source.field}: too many constraints are being compiled; ask again later."
                ) from None

    def hold(self, batch: Batch, compiled: Compiled) -> bool:
        """Count a constraint as used by a batch until that is gone. False if the batch would use too much memory.

        It may use a quarter of what others leave, so that something is left for whoever comes next.
        """
        size = OVERHEAD + compiled.size
        with self._lock:
            if batch.size + size > (LIVE_BYTES - (self._in_use - batch.size)) // 4:
                return False
            batch.size += size
            self._in_use += size
        weakref.finalize(batch, self._release, size)
        return True

    def check(self, operation: Generate, texts: Sequence[str]) -> list[bool | None]:
        """Whether finished texts satisfy the operation's constraint; None where that cannot be told.

        May take a second and the time until its turn comes, on any thread.
        """
        source = source_of(operation, self.space)
        assert source is not None
        owner = object()  # it takes its own turn
        try:
            if source.field != "json_schema":
                with self._asking(source, owner) as compiling:
                    compiled = compiling.result(QUEUE_SECONDS)
                return [_follows(compiled, self._open()[0], text) for text in texts]
            checking = self._lanes.run(owner, partial(self._check, source.text, texts), CHECK_SECONDS)
            try:
                return checking.result(QUEUE_SECONDS)
            finally:
                checking.cancel()
        except Exception as error:  # whatever happens to the check, the texts are finished
            if isinstance(error, RuntimeError):
                log.error("finished texts were not checked: %r", error)
            return [None] * len(texts)

    def spellings(self) -> list[str | list[int]]:
        """What each id of the vocabulary spells: text, or bytes that are no whole characters. Takes seconds."""
        tokenizer, _ = self._open()
        assert self._model_tokenizer is not None
        special = {i: token.content for i, token in self._model_tokenizer.added_tokens_decoder.items() if token.special}
        found: list[str | list[int]] = []
        for token in range(self._vocabulary):
            spelt = tokenizer.decode_bytes([token])
            try:
                found.append(special.get(token) or spelt.decode())
            except UnicodeDecodeError:
                found.append(list(spelt))
        return found

    def _open(self) -> tuple[LLTokenizer, Vetter]:
        """What is needed to compile, made in a second or two. Should it fail, the next constraint tries again."""
        with self._opening:
            if self._opened is None:
                if not isinstance(self._model_tokenizer, PreTrainedTokenizerFast):
                    raise Later("constraints need a fast tokenizer, which this model does not have.")
                backend = copy(self._model_tokenizer.backend_tokenizer)
                backend.no_padding()
                backend.no_truncation()
                try:
                    hidden = hide_special_tokens(backend.to_str())
                    vetter = Vetter(hidden, self._vocabulary, self._end_of_sequence)
                    with contextlib.suppress(OSError):  # each constraint starts it if it does not run
                        vetter.start()
                    tokenizer = LLTokenizer(hidden, n_vocab=self._vocabulary, eos_token=self._end_of_sequence or None)
                except Exception as error:  # only constraints need the tokenizer in this form
                    raise Later(f"this model's tokenizer cannot be used with constraints: {error}.") from error
                self._opened = tokenizer, vetter
            return self._opened

    @contextlib.contextmanager
    def _asking(self, source: Source, owner: object) -> Iterator[Future[Compiled]]:
        """The constraint, which is compiled when its owner's turn comes, unless nobody asks for it any more by then."""
        key = hashlib.sha256("\0".join(map(str, source)).encode()).digest()
        with self._lock:
            asked = self._compiling.get(key) or self._ask(key, source, owner)
            asked.askers += 1
        try:
            yield asked.compiled
        finally:
            with self._lock:
                asked.askers -= 1
                if asked.askers == 0:
                    asked.compiled.cancel()

    def _ask(self, key: bytes, source: Source, owner: object) -> _Asked:
        if (found := self._cache.get(key)) is not None:
            return _Asked(_done(found))
        asked = _Asked(self._lanes.run(owner, partial(self._attempt, source), COMPILE_SECONDS[source.field]))
        self._compiling[key] = asked
        asked.compiled.add_done_callback(partial(self._keep, key))
        return asked

    def _attempt(self, source: Source, seconds: float) -> Compiled:
        tokenizer, vetter = self._open()
        limit = COMPILE_SECONDS[source.field]
        try:
            size = vetter.vet(source, seconds)
        except TimeoutError:
            if seconds < limit:
                raise
            raise Later(
                f"{source.field}: not compiled within {limit} s; make it smaller, or ask again later."
            ) from None
        except OSError as error:
            raise Later(f"{source.field}: cannot be compiled now: {error}; ask again later.") from error
        reserve = 0 if source.field == "choices" else source.states * STATE_RESERVE
        return Compiled(_with_deep_stack(partial(compile_source, source, tokenizer)), size, reserve)

    def _check(self, schema: str, texts: Sequence[str], seconds: float) -> list[bool | None]:
        return self._open()[1].check(schema, texts, seconds)

    def _keep(self, key: bytes, compiled: Future[Compiled]) -> None:
        with self._lock:
            del self._compiling[key]
            if compiled.cancelled():
                return
            error = compiled.exception()
            if error is None:
                self._cache.add(key, compiled.result())
            elif isinstance(error, RequestError) and not isinstance(error, Later):
                self._cache.add(key, str(error))

    def _release(self, size: int) -> None:
        with self._lock:
            self._in_use -= size


class Batch:
    """The constraints of one prediction. All stay in memory until the last stream that follows one is gone."""

    def __init__(self, compiler: Compiler, states: int) -> None:
        """``states``: the most that the lexer of each may have."""
        self._compiler = compiler
        self._states = states
        self._turns = asyncio.Semaphore(MAX_COMPILING)
        self._held: set[Compiled] = set()
        self.size = 0
        """Bytes of memory."""

    async def grammar(self, operation: Generate) -> Grammar | None:
        """The operation's grammar, at its beginning; None if it has no constraint of this kind.

        Raises RequestError for a constraint that cannot be used.
        """
        source = source_of(operation, self._compiler.space)
        if source is None:
            return None
        if source.field != "choices":
            source = source._replace(states=self._states)
        async with self._turns:
            compiled = await self._compiler.compile(source, self)
        if compiled not in self._held:
            if not self._compiler.hold(self, compiled):
                raise RequestError(
                    f"{source.field}: constraints in use take too much memory; use fewer at once, or ask again later."
                )
            self._held.add(compiled)
        return Grammar(compiled, self)


def _done(found: Compiled | str) -> Future[Compiled]:
    future: Future[Compiled] = Future()
    if isinstance(found, Compiled):
        future.set_result(found)
    else:
        future.set_exception(RequestError(found))
    return future


def _follows(compiled: Compiled, tokenizer: LLTokenizer, text: str) -> bool | None:
    """Whether the constraint allows the text; None if its lexer has reached its limits."""
    matcher = compiled.matcher.deep_copy()
    if matcher.consume_tokens(tokenizer.greedy_tokenize(text)):
        return matcher.is_accepting()
    lexer = compiled.matcher.deep_copy()  # shared by all copies
    lexer.compute_bitmask()
    return None if lexer.is_error() else False


def _with_deep_stack(work: Callable[[], T]) -> T:
    """Do it on a thread with room for deep recursion, which ends with it: so the stack's memory is given back."""
    with ThreadPoolExecutor(1) as thread:
        with _STACK_SIZE:
            usual = threading.stack_size(STACK)
            try:
                doing = thread.submit(work)
            finally:
                threading.stack_size(usual)
        return doing.result()


_STACK_SIZE = threading.Lock()
