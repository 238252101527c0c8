"""The loop: admit, step, deliver. The engine owns the one thread that touches the model, from loading on.

Predictions hand operations over through a queue of commands, and get replies through a queue of their own.
"""

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmtp.engine import heap, sampling
from lmtp.engine.compiler import Batch, Compiler
from lmtp.engine.encoding import describe, open_encoding, prepare_tokenizer, refuse
from lmtp.engine.grammar import Drafted, Grammar, MaskFiller
from lmtp.engine.masks import Allowed, Bias, packed_bias
from lmtp.engine.scheduler import Scheduler
from lmtp.engine.stream import Generation, OperationStream, open_stream
from lmtp.prediction import Counters, Prediction
from lmtp.protocol import (
    BATCH_LIMIT,
    CONSTRAINTS,
    NO_ADAPTER,
    Failure,
    Generate,
    Info,
    ModelInfo,
    Operation,
    RequestError,
    Score,
    Token,
    printable,
    quoted,
)
from lmtp.runners.model import defaults_of, limits_of
from lmtp.runners.runner import Runner
from lmtp.runners.step import Step, Stream
from lmtp.settings import Bounds
from lmtp.text import BYTES_PER_TOKEN, Tokenizers

log = logging.getLogger(__name__)

_BOTH = ("adapter", "cache_salt", "allow_special_tokens")
EXTENSIONS = {
    "GENERATE": [
        "seed",
        "min_p",
        "min_tokens",
        "stop",
        "text",
        "prompt as a string",
        "target",
        "mask",
        *CONSTRAINTS,
        *_BOTH,
    ],
    "SCORE": ["top_logprobs", "text", "prompt and scored as strings", *_BOTH],
    "MODEL_INFO": ["tokens"],
}

IDLE_SECONDS = 1.0
"""How often to look after predictions whose streams are all paused; without any, after memory that is free."""


BIAS_CHARACTERS = 64
"""Reading an entry of ``logit_bias`` takes as long as parsing about so many characters."""


class LoadedModel(NamedTuple):
    """A loaded model and the runner that serves it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    runner: Runner
    adapters: Sequence[str] = ()
    """The names of the adapters beside the model."""
    name: str = ""
    """What MODEL_INFO calls the model; by default what its configuration says."""
    check: Callable[[], None] = lambda: None
    """Raises once the model can run no more steps."""


class Prepared(NamedTuple):
    """What a stream is opened from."""

    operation: Operation | Failure
    """With token ids in place of texts."""
    bias: Bias | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Begin:
    """Open a prediction's streams."""

    prediction: Prediction
    operations: Sequence[Prepared]


@dataclass(frozen=True)
class End:
    """End what still runs of a prediction."""

    prediction: Prediction


@dataclass(frozen=True)
class Resume:
    """Look whether a paused prediction may go on."""


@dataclass(frozen=True)
class Stop:
    """End the thread after the step it is in."""


class Engine:
    """Serves one model: runs predictions, several at a time."""

    def __init__(
        self,
        open_model: Callable[[], LoadedModel],
        bounds: Bounds = Bounds(),  # noqa: B008 - immutable
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``open_model`` loads the model and opens its runner. It is called on the engine's thread, so that its OpenMP
        threads are the only ones that compute: with a second team of them libgomp counts more threads than cores and
        lets all of them sleep at every barrier. Its exceptions are raised here."""
        self.counters = Counters()
        """Totals since the start."""
        self.bounds = bounds
        self._clock = clock
        self._commands: queue.SimpleQueue[Begin | End | Resume | Stop] = queue.SimpleQueue()
        self._running: dict[Prediction, list[OperationStream]] = {}
        """The streams of each prediction that still await their terminal reply."""
        self._touched: set[Prediction] = set()
        """Predictions with replies to hand over."""
        self._spellings: list[str | list[int]] | None = None
        """What MODEL_INFO answers for ``tokens``, once it was asked."""
        self.problem = ""
        """Why the thread has ended by itself; empty while it runs."""
        opened: Future[LoadedModel] = Future()
        self._thread = threading.Thread(target=self._serve, args=(open_model, opened), name="engine", daemon=True)
        self._thread.start()
        self._model, self.tokenizer, self.runner, self.adapters, self._name, _ = opened.result()
        self.limits = limits_of(self._model)
        self.defaults = defaults_of(self._model)
        self.longest_input = max(self.limits.context, self.runner.longest_source)
        """Tokens of the longest list of ids that an operation can have."""
        max_bytes = bounds.max_prompt_bytes
        if max_bytes is None:
            max_bytes = self.longest_input * BYTES_PER_TOKEN
        mask = self.tokenizer.mask_token if self.limits.head and not self.limits.head.labels else None
        self.tokenizers = Tokenizers(self.tokenizer, bounds.tokenizer_threads, max_bytes, mask)
        self.compiler = Compiler(
            self.tokenizer,
            self.limits.vocabulary,
            self.limits.end_of_sequence,
            begins_text=self.limits.source is not None,
        )

    def stop(self) -> None:
        """End the thread after the step it is in. Running streams get an error reply."""
        self._commands.put(Stop())
        self._thread.join()

    @asynccontextmanager
    async def preparing(self, began: float) -> AsyncIterator[None]:
        """Bound by MAX_SECONDS what a prediction does before its streams open. Raises RequestError.

        ``began``: when the prediction did, by the engine's clock.
        """
        seconds = self.bounds.max_seconds
        try:
            async with asyncio.timeout(began + seconds - self._clock() if seconds else None):
                yield
        except TimeoutError:
            raise RequestError(_took_longer(seconds)) from None

    async def predict(self, operations: Sequence[Operation | Failure], began: float | None = None) -> Prediction:
        """Begin operations together. Waits only until their text is tokenized and their grammars are compiled.

        ``began``: when the prediction did, by the engine's clock; now by default. Its time counts from there.
        """
        prediction = Prediction(
            lambda ended: self._commands.put(End(ended)), resume=lambda: self._commands.put(Resume())
        )
        prediction.turns.began = self._clock() if began is None else began
        # One text at a time, so that a batch of long ones leaves the other threads to other predictions.
        read = [await self._read(operation) for operation in operations]
        constraints = self.compiler.batch(each.operation for each in read)
        prepared = await asyncio.gather(*(self._compile(each, constraints) for each in read))
        self._commands.put(Begin(prediction, prepared))
        return prediction

    async def _read(self, operation: Operation | Failure) -> Prepared:
        """Put token ids in place of texts, and a bias in place of ``logit_bias`` and ``mask``."""
        try:
            if isinstance(operation, ModelInfo) and operation.tokens and self._spellings is None:
                self._spellings = await asyncio.to_thread(self.compiler.spellings)
            if not isinstance(operation, Generate | Score):
                return Prepared(operation)
            operation = replace(operation, adapter=self._adapter(operation.adapter))
            if self.limits.head:
                refuse(operation, self.limits.head)
            most = self.bounds.max_top_logprobs
            if most and operation.top_logprobs > most:
                raise RequestError(f"top_logprobs is {operation.top_logprobs}; MAX_TOP_LOGPROBS is {most}.")
            allow = operation.allow_special_tokens
            if isinstance(operation.prompt, str):
                ids = await self.tokenizers.encode("prompt", operation.prompt, True, allow)
                operation = replace(operation, prompt=ids)
            # What an encoder-decoder model writes begins a text of its own; its start token is the stream's.
            begins, special = bool(self.limits.source), not self.limits.source
            if isinstance(operation, Score):
                if isinstance(operation.scored, str):
                    ids = await self.tokenizers.encode("scored", operation.scored, begins, allow, special)
                    operation = replace(operation, scored=ids)
                return Prepared(operation)
            if isinstance(operation.target, str):
                ids = await self.tokenizers.encode("target", operation.target, begins, allow, special)
                operation = replace(operation, target=ids)
            length = BIAS_CHARACTERS * len(operation.logit_bias or ())
            bias = await self.tokenizers.parse(length, packed_bias, operation, self.limits)
            # As Python objects they take many times the memory.
            return Prepared(replace(operation, logit_bias=None, mask=None), bias)
        except Exception as error:
            return Prepared(_refusal(operation, error))

    def _adapter(self, name: str) -> str:
        """The adapter that a caller names; empty for none. Raises RequestError for one that is not served."""
        if name in ("", NO_ADAPTER):
            return ""
        if not self.adapters:
            raise RequestError(f"adapter: {quoted(name)} is not served, nor is any other; leave it empty.")
        if name not in self.adapters:
            known = ", ".join([*self.adapters, NO_ADAPTER])
            raise RequestError(f"adapter: {quoted(name)} is not served; choose one of {known}.")
        return name

    async def _compile(self, read: Prepared, constraints: Batch) -> Prepared:
        """Compile the operation's grammar."""
        if not isinstance(read.operation, Generate):
            return read
        try:
            return read._replace(grammar=await constraints.grammar(read.operation))
        except Exception as error:
            return Prepared(_refusal(read.operation, error))

    def model_info(self) -> dict[str, Any]:
        """What MODEL_INFO answers."""
        config = self._model.config
        return {
            "model": self._name or getattr(config, "name_or_path", "") or config.model_type,
            "model_type": config.model_type,
            **(describe(self.limits.head, self.tokenizer) if self.limits.head else {}),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": str(self._model.device),
            "vocabulary": self.limits.vocabulary,
            "context": self.limits.context,
            "longest_stream": self.runner.longest,
            "longest_source": self.runner.longest_source,
            "end_of_sequence": list(self.limits.end_of_sequence),
            "generation_defaults": self.defaults.described,
            "adapters": list(self.adapters),
            "runner": self.runner.description,
            "runner_reason": self.runner.reason,
            "extensions": EXTENSIONS,
        }

    # The engine's thread runs what follows.

    def _serve(self, open_model: Callable[[], LoadedModel], opened: "Future[LoadedModel]") -> None:
        try:
            made = open_model()
            limits = limits_of(made.model)
            self._on_cpu = made.model.device.type == "cpu"  # asked each time, it walks over all modules
            if limits.head:
                prepare_tokenizer(made.tokenizer, limits.head)
            self._scheduler = Scheduler(made.runner)
            self._mask_filler = MaskFiller(limits.vocabulary)
            opened.set_result(made)
        except BaseException as error:
            opened.set_exception(error)
            return
        try:
            self._loop(made.check)
        except BaseException as error:
            # The loop handles the errors of a step. Here not even the memory can be tidied up: after a GPU fault every
            # call fails. So all open and future streams fail.
            log.exception("the engine has stopped")
            self.problem = f"the engine has stopped and must be restarted: {type(error).__name__}: {_first_line(error)}"
            running, self._running = self._running, {}
            for prediction, streams in running.items():
                prediction.outbox += [_failure(stream.operation, self.problem) for stream in streams]
            self._touched |= running.keys()
            while self._obey():
                pass

    @torch.inference_mode()
    def _loop(self, check: Callable[[], None]) -> None:
        while self._obey():
            check()
            self._bound()
            self._advance()
        self._fail(self._all_streams(), "the server is stopping.")
        self._hand_over()

    def _obey(self) -> bool:
        """Carry out commands; wait for one while no stream can run. False once stopped.

        After opening as many streams as one prediction may have, the ones that run have a step.
        """
        opened = 0
        while opened < BATCH_LIMIT:
            idle = not self._running or self._scheduler.idle
            if idle or not self._commands.empty():
                self._hand_over()
            if not self._running:
                sampling.stacked_biases.cache_clear()
            try:
                count = self._carry_out(self._commands.get(block=idle, timeout=IDLE_SECONDS))
            except queue.Empty:
                if not self._running:
                    heap.give_back()
                return True
            if count is None:
                return False
            if self._running and self._scheduler.idle:
                return True  # a paused prediction may go on
            opened += count
        return True

    def _carry_out(self, command: Begin | End | Resume | Stop) -> int | None:
        """Carry out one command, and keep nothing of it. Returns how many operations it began; None for Stop."""
        if isinstance(command, Stop):
            return None
        if isinstance(command, Begin):
            self._begin(command.prediction, command.operations)
            return len(command.operations)
        if isinstance(command, End):
            for stream in list(self._running.get(command.prediction, ())):
                self._close(stream)
        return 0

    def _bound(self) -> None:
        """End predictions that take too long or whose replies nobody takes; pause those with too many replies."""
        now, bounds = self._clock(), self.bounds
        for prediction, streams in list(self._running.items()):
            turns, unread = prediction.turns, prediction.unread
            if not unread or prediction.taken != turns.taken:
                turns.read, turns.taken = now, prediction.taken
            if bounds.max_seconds and now - turns.began > bounds.max_seconds:
                self._fail(streams, _took_longer(bounds.max_seconds), keep=True)
            elif bounds.max_unread_seconds and now - turns.read > bounds.max_unread_seconds:
                error = f"its output was not taken within MAX_UNREAD_SECONDS ({bounds.max_unread_seconds:g} s)."
                self._fail(streams, error, keep=True)
            elif turns.paused:
                turns.paused = unread > bounds.max_unread_bytes // 2
            elif bounds.max_unread_bytes and unread > bounds.max_unread_bytes:
                self._scheduler.pause(prediction)

    def _admit(self) -> Step[OperationStream] | None:
        """Admit waiting streams and choose the next step."""
        if self._scheduler.waits:  # memory may grow for them, which takes time
            self._hand_over()
        try:
            step = self._scheduler.next_step()
        except Exception as error:
            log.exception("scheduling failed")
            self._fail(self._all_streams(), f"internal error: {_first_line(error)}")
            return None
        if step is None and not self._scheduler.idle:
            # With nothing running, a stream that was not admitted now never will be.
            reason = self.runner.refusal or "raise KV_CACHE_GB"
            refused = [self._scheduler.refused] if self._scheduler.refused else self._scheduler.waiting()
            self._fail(refused, f"there is no memory for its keys and values: {reason}.")
        return step

    def _advance(self) -> None:
        """Admit, step, deliver. No variable of the loop keeps a step's streams."""
        step = self._admit()
        while step is not None:
            try:
                choices = self._attempt(step)
                if choices is not None:
                    self._deliver(step, choices)
                    return
            except Exception as error:
                log.exception("step failed")
                _check_device(self._model.device)
                self._fail(step.streams, f"the model failed: {_first_line(error)}")
                return
            step = self._scheduler.smaller(step)

    def _attempt(self, step: Step[OperationStream]) -> list[list[sampling.Choice]] | None:
        """`_step`; None where a GPU has too little memory for it and a smaller one can be tried."""
        try:
            return self._step(step)
        except torch.OutOfMemoryError as error:
            if self._scheduler.smaller(step) is None:
                raise
            log.warning("no memory for a step of %d tokens: %s", sum(step.counts), _first_line(error))
        # Not before the error is gone, which keeps the tensors of the step.
        sampling.stacked_biases.cache_clear()
        torch.cuda.empty_cache()
        self._scheduler.shorten(step)
        return None

    def _step(self, step: Step[OperationStream]) -> list[list[sampling.Choice]]:
        """Run the model, and meanwhile find out what grammars allow. Returns each stream's choices.

        A GPU is only told what to do by `run`. While it does so, the host makes ready what sampling takes, and hands
        over the replies of the step before.
        """
        constrained, grammars = _constrained(step)
        run = self.runner.prepare(step)
        if self._on_cpu:
            self._hand_over()
        filling = self._mask_filler.start(grammars) if grammars else None
        try:
            logits = run()
            wanted = [stream.rows(count) for stream, count in zip(step.streams, step.counts, strict=True)]
        finally:
            bits = filling.result() if filling else None
        allowed = Allowed(constrained, bits) if bits is not None else None
        rows = list(itertools.chain(*wanted))
        choices = iter(_sample(logits, rows, allowed, self._hand_over) if rows else [])
        self._hand_over()  # where nobody waited
        return [list(itertools.islice(choices, len(of_stream))) for of_stream in wanted]

    def _deliver(self, step: Step[OperationStream], choices: Sequence[Sequence[sampling.Choice]]) -> None:
        """Give each stream its choices, count, and answer."""
        for prediction in {stream.prediction for stream in step.streams}:
            for counters in (prediction.counters, self.counters):
                counters.steps += 1
                counters.rows += len(step.streams)
            self._touched.add(prediction)
        received = []
        for stream, count, its_choices in zip(step.streams, step.counts, choices, strict=True):
            before = stream.computed
            stream.advance(count)
            known = stream.computed
            (encoded, found), stream.source_counts = stream.source_counts, (0, 0)
            received.append((stream, _receive(stream, its_choices) if its_choices or stream.problem else []))
            for counters in (stream.prediction.counters, self.counters):
                counters.reused_tokens += found + (before if before == stream.reused else 0)
                counters.computed_tokens += encoded + stream.computed - before
                counters.drafted_tokens += count - (known - before)
                counters.accepted_tokens += stream.computed - known
        # The end of a stream moves the slots of others, so all that was computed has to count by now.
        for stream, replies in received:
            if isinstance(replies, RequestError):
                self._fail([stream], str(replies))
            else:
                self._answer(stream, replies)

    def _begin(self, prediction: Prediction, operations: Sequence[Prepared]) -> None:
        prediction.turns.read = self._clock()
        for prepared in operations:
            try:
                self._open(prediction, prepared)
            except Exception as error:
                prediction.outbox.append(_refusal(prepared.operation, error))
        self._touched.add(prediction)

    def _open(self, prediction: Prediction, prepared: Prepared) -> None:
        operation = prepared.operation
        if self.problem:
            raise RequestError(self.problem)
        if isinstance(operation, Failure):
            prediction.outbox.append(operation)
            return
        if isinstance(operation, ModelInfo):
            info = self.model_info() | ({"tokens": self._spellings} if operation.tokens else {})
            prediction.outbox.append(Info(stream_id=operation.stream_id, model_info=info))
            return
        stream: OperationStream
        if self.limits.head:
            stream = open_encoding(prediction, operation, self.limits, self.tokenizer, prepared.bias)
        else:
            stream = open_stream(prediction, operation, self.limits, self.tokenizer, prepared.bias, prepared.grammar)
        stream.adapter = operation.adapter
        stream.salt = self._salt(prediction, operation)
        longest = self.runner.longest_source
        if len(stream.source) > longest:
            raise RequestError(
                f"prompt is {len(stream.source)} tokens; memory for encoding a prompt (KV_CACHE_GB) holds {longest}."
            )
        longest = self.runner.longest
        name = "target" if stream.source else "prompt"
        if stream.least_length > longest:
            what = f"{name} is {stream.prompt_length}"
            if isinstance(operation, Score):
                what = f"{name} and scored are {stream.max_length}"
            raise RequestError(f"{what} tokens; memory for keys and values (KV_CACHE_GB) holds {longest}.")
        stream.max_length = min(stream.max_length, longest)
        given = operation.scored if isinstance(operation, Score) else operation.target or ()
        tokens = len(operation.prompt) + len(given) if stream.source else len(stream.tokens)
        for counters in (prediction.counters, self.counters):
            counters.input_tokens += tokens
        if stream.pending == 0:  # one token to score after nothing
            prediction.outbox += stream.receive([])
            return
        begun = stream.begin()
        self._running.setdefault(prediction, []).append(stream)
        self._scheduler.add(stream)
        self._answer(stream, begun)

    def _salt(self, prediction: Prediction, operation: Generate | Score) -> object:
        """Which streams may share prefixes with this operation's: those of an equal salt."""
        if self.bounds.prefix_reuse == "off":
            return object()
        own = Stream.SHARED if self.bounds.prefix_reuse == "shared" else prediction.salt
        salt = operation.cache_salt or own
        return (salt, operation.adapter) if operation.adapter else salt

    def _answer(self, stream: OperationStream, replies: list[Token]) -> None:
        if stream.finished:
            self._close(stream)  # should that fail, the failure is the answer
        stream.prediction.outbox += replies
        unfinished = stream.finished and isinstance(stream, Generation) and stream.inside_grammar
        for counters in (stream.prediction.counters, self.counters):
            counters.output_tokens += len(replies)
            counters.unfinished_constraints += unfinished

    def _close(self, stream: OperationStream, keep: bool = True) -> None:
        self._scheduler.remove(stream, keep)
        streams = self._running[stream.prediction]
        streams.remove(stream)
        if not streams:
            del self._running[stream.prediction]

    def _fail(self, streams: Iterable[OperationStream], error: str, keep: bool = False) -> None:
        """End the streams with an error. ``keep``: what they computed is sound and may be reused."""
        for stream in list(streams):
            if stream in self._running.get(stream.prediction, ()):  # otherwise it already had its terminal reply
                self._close(stream, keep)
                stream.prediction.outbox.append(_failure(stream.operation, error))
                self._touched.add(stream.prediction)

    def _all_streams(self) -> Iterable[OperationStream]:
        return itertools.chain(*self._running.values())

    def _hand_over(self) -> None:
        """Hand over the replies there are.

        Called when this thread is about to wait, to do something slow, or to run the model on a CPU. Other threads want
        the GIL as soon as they have something to do; in the middle of this thread's work they would hold it for
        milliseconds.
        """
        for prediction in self._touched:
            prediction.deliver(last=prediction not in self._running)
        self._touched.clear()


def _constrained(step: Step[OperationStream]) -> tuple[list[int], list[Drafted]]:
    """The rows that grammars constrain, and the grammars with the drafts that these rows follow."""
    constrained: list[int] = []
    grammars: list[Drafted] = []
    end = 0
    for stream, count in zip(step.streams, step.counts, strict=True):
        begin, end = end, end + stream.wanted(count)
        if end > begin and isinstance(stream, Generation) and stream.grammar:
            constrained += range(begin, end)
            grammars.append(Drafted(stream.grammar, stream.draft[: end - begin - 1]))
    return constrained, grammars


def _receive(stream: OperationStream, choices: Sequence[sampling.Choice]) -> list[Token] | RequestError:
    if stream.problem:
        return RequestError(f"the model failed: {stream.problem}")
    try:
        return stream.receive(choices)
    except RequestError as error:
        return error


def _sample(
    logits: Tensor, rows: Sequence[sampling.Row], allowed: Allowed | None, meanwhile: Callable[[], None]
) -> list[sampling.Choice]:
    """sampling.sample. Should it fail, sample the rows in halves, so that only the row at fault fails."""
    try:
        return sampling.sample(logits, rows, allowed, meanwhile)
    except Exception as error:
        _check_device(logits.device)
        if len(rows) == 1:
            log.exception("sampling failed")
            return [sampling.Choice(0, 0.0, {}, error=f"sampling failed: {error}")]
    half = len(rows) // 2
    return [
        choice
        for part in (slice(0, half), slice(half, len(rows)))
        for choice in _sample(logits[part], rows[part], allowed.part(part) if allowed else None, meanwhile)
    ]


def _check_device(device: torch.device) -> None:
    """Raise what a GPU raises from every call once it has failed, as after an assertion in a kernel. Then the engine
    stops, since no stream can go on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _failure(operation: Operation | Failure, error: str) -> Failure:
    kind: Literal["TOKEN", "MSG"] = "MSG" if isinstance(operation, ModelInfo) else "TOKEN"
    return Failure(stream_id=operation.stream_id, error=printable(error), kind=kind)


def _took_longer(seconds: float) -> str:
    return f"took longer than MAX_SECONDS ({seconds:g} s)."


def _first_line(error: BaseException) -> str:
    """The message without the stack that native code adds to it."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _refusal(operation: Operation | Failure, error: Exception) -> Failure:
    """The answer to an operation that does not get as far as a stream."""
    if isinstance(error, RequestError):
        return _failure(operation, str(error))
    if isinstance(error, RecursionError):
        return _failure(operation, "json_schema or grammar: nested too deep.")
    log.error("operation failed", exc_info=error)
    return _failure(operation, f"internal error: {_first_line(error)}")
