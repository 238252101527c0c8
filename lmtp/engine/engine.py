"""The loop: admit, step, deliver. The engine owns the one thread that touches the model.

Predictions hand operations over through a queue and get replies through another, once a step for all streams of a
prediction.
"""

import asyncio
import contextlib
import ctypes
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import msgspec
import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmtp import text
from lmtp.engine import sampling
from lmtp.engine.grammar import Allowed, Compiler, Grammar, MaskFiller
from lmtp.engine.scheduler import Scheduler, Step
from lmtp.engine.stream import Generation, Limits, Scoring, Stream, open_stream
from lmtp.protocol import CONSTRAINTS, Failure, Generate, Info, ModelInfo, Operation, Reply, RequestError, Score, Token
from lmtp.runners.cache_runner import FallbackRunner, ModelCaches
from lmtp.runners.compiled import CompiledStep
from lmtp.runners.graphs import GraphedStep
from lmtp.runners.slot_runner import Reference, SlotRunner, UnsupportedModel, check, layers_of
from lmtp.runners.slots import Memory, Slots

log = logging.getLogger(__name__)

OMP_PAUSE_SOFT = 1
MOST_STREAMS = 256
FALLBACK_STREAMS = 16
"""Streams at once where each has a cache of its own, which nothing bounds but the context."""
CHUNK = 2048
BUSY_CHUNK = 256
LOGITS_ELEMENTS = 2**24
"""Logits of one step at most, so that a long scored prompt with a large vocabulary fits: 64 MB in float32."""

GPU_RESERVE = 0.1
"""The part of GPU memory left for activations when the KV budget is chosen."""


class Runner(Protocol):
    """Runs steps: runner.py through slots, fallback.py through the model's own caches."""

    def prepare(self, step: Step) -> Callable[[], Tensor]:
        """What runs the model. It returns the logits at the step's wanted positions, ``[wanted, vocabulary]``, row by
        row in order of position. What can be done before is done at once."""


@dataclass
class Counters:
    """What a prediction's streams took; figures without a clock."""

    input_tokens: int = 0
    output_tokens: int = 0
    reused_tokens: int = 0
    computed_tokens: int = 0
    """Without those of a draft that were wrong."""
    drafted_tokens: int = 0
    """Tokens that were guessed, and computed along with others; see drafts.py."""
    accepted_tokens: int = 0
    """Those of them that were right."""
    steps: int = 0
    """Steps in which one of its streams took part; with slots, each is one forward pass of the model."""
    rows: int = 0
    """Rows of those steps, other predictions' included."""
    unfinished_constraints: int = 0
    """Streams that ended where their grammar may not: at max_tokens or a stop sequence."""


@dataclass(eq=False)
class Prediction:
    """Some operations under way together. Iterate over it, on any one thread, for the replies of one step after the
    other; every operation has its terminal reply when they end. As a context it ends what is still running."""

    operations: Sequence[tuple[Operation | Failure, Grammar | None]]
    end: Callable[["Prediction"], None]
    """Ends its streams, whose slots are then free; on any thread."""
    streams: list[Stream] = field(default_factory=list)
    outbox: list[Reply] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    """What it took so far."""
    arrived: queue.SimpleQueue[list[Reply] | asyncio.CancelledError | None] = field(default_factory=queue.SimpleQueue)

    def cancel(self) -> None:
        """End it; whoever waits for its replies gets asyncio.CancelledError. On any thread."""
        self.arrived.put(asyncio.CancelledError())  # first, or it might end as if nothing had happened
        self.end(self)

    def deliver(self) -> None:
        """Hand over the replies of a step and, where no stream is left, the end."""
        if self.outbox:
            self.arrived.put(self.outbox)
            self.outbox = []
        if not self.streams:
            self.arrived.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(self)

    def __iter__(self) -> Iterator[list[Reply]]:
        while (replies := self.arrived.get()) is not None:
            if isinstance(replies, asyncio.CancelledError):
                raise replies
            yield replies


class Engine:
    """Serves one model. Start it, then run predictions, several at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        kv_budget: int | None = None,
        compiled: Path | None = None,
        graphs: bool = True,
    ) -> None:
        """``kv_budget``: bytes for keys and values; by default what is left on the GPU less a reserve, or a quarter of
        the free memory on a CPU. ``compiled``: a file with the model's compiled step; see compiled.py.
        ``graphs``: decode by CUDA graphs on a GPU; see graphs.py."""
        self.tokenizer = tokenizer
        self.limits = limits_of(model)
        self.counters = Counters()
        """Totals since the start."""
        self._model = model
        self.runner, self.scheduler, self.runner_description = _choose_runner(
            model, self.limits, kv_budget, compiled, graphs
        )
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")
        self._broken = ""
        """Why the thread has ended though nobody stopped it."""
        self._compiler = Compiler(tokenizer, self.limits.vocabulary, self.limits.end_of_sequence)
        self._mask_filler = MaskFiller(self.limits.vocabulary)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._owners: dict[Stream, Prediction] = {}
        self._touched: set[Prediction] = set()
        """Predictions with replies to hand over."""
        _end_openmp_threads()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in; streams still running are told."""
        self._commands.put(None)
        self._thread.join()

    def adopt(self, compiled: Path) -> None:
        """From the next step on, decode with this compiled step, which script/build has checked."""
        step = CompiledStep(compiled)

        def swap() -> None:
            if isinstance(self.runner, SlotRunner):
                self.runner.fast = step
                self.runner_description = "slots, compiled step"

        self._commands.put(swap)

    async def predict(self, operations: Sequence[Operation | Failure]) -> Prediction:
        """Begin operations together. What this waits for is their text turned into tokens, and their grammars."""
        prepared = await asyncio.gather(*map(self._prepare, operations))
        prediction = Prediction(prepared, lambda ended: self._commands.put(lambda: self._end(ended)))
        self._commands.put(lambda: self._begin(prediction))
        return prediction

    async def tokenize(self, function: Callable[..., list[int]], *arguments: Any) -> list[int]:
        """Call what uses the tokenizer on a thread of its own: a long text takes seconds, which no other prediction
        should wait for. One thread, since tokenizers are not made for several."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *arguments)

    async def _prepare(self, operation: Operation | Failure) -> tuple[Operation | Failure, Grammar | None]:
        """The operation with token ids in place of text, and its grammar: what the engine's thread never waits for."""
        try:
            if isinstance(operation, Generate | Score) and isinstance(operation.prompt, str):
                ids = await self.tokenize(text.encode, self.tokenizer, operation.prompt)
                operation = msgspec.structs.replace(operation, prompt=ids)
            if isinstance(operation, Score) and isinstance(operation.scored, str):
                ids = await self.tokenize(text.encode, self.tokenizer, operation.scored, False)
                operation = msgspec.structs.replace(operation, scored=ids)
            return operation, await self._compiler.grammar(operation) if isinstance(operation, Generate) else None
        except RequestError as error:
            return _failure(operation, str(error)), None

    def model_info(self) -> dict[str, Any]:
        """What MODEL_INFO answers."""
        config = self._model.config
        return {
            "model": getattr(config, "name_or_path", "") or config.model_type,
            "model_type": config.model_type,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": str(self._model.device),
            "vocabulary": self.limits.vocabulary,
            "context": self.limits.context,
            "longest_stream": self.scheduler.memory.longest,
            "end_of_sequence": list(self.limits.end_of_sequence),
            "runner": self.runner_description,
            "extensions": {"GENERATE": EXTENSIONS["GENERATE"], "SCORE": EXTENSIONS["SCORE"]},
        }

    # What follows runs on the engine's thread.

    def _serve(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            # A step's own errors are dealt with in the loop. Here not even the memory can be tidied up: a GPU that
            # has failed answers every call with an error. So nobody is left waiting, now or later.
            log.exception("the engine has stopped")
            self._broken = f"the engine has stopped and has to be started again: {type(error).__name__}: {error}"
            for stream, prediction in self._owners.items():
                prediction.outbox.append(_failure(stream.operation, self._broken))
            self._touched |= set(self._owners.values())
            for prediction in self._touched:
                prediction.streams.clear()
            self._owners.clear()
            while self._take_commands():
                pass

    @torch.inference_mode()
    def _loop(self) -> None:
        while self._take_commands():
            if self.scheduler.waiting:  # memory may grow for them
                self._deliver()
            try:
                step = self.scheduler.next_step()
                streams = step.streams if step else self.scheduler.waiting
            except Exception as error:
                log.exception("scheduling failed")
                self._fail_all(list(self._owners), f"internal error: {error}")
                continue
            if step is None:
                # With nothing running, a stream that still was not admitted never will be.
                self._fail_all(streams, "there is no memory for its keys and values; raise KV_CACHE_GB.")
                continue
            try:
                self._run(step)
            except Exception as error:
                log.exception("step failed")
                self._fail_all(streams, f"the model failed: {error}")
        self._fail_all(list(self._owners), "the server is stopping.")
        self._deliver()

    def _take_commands(self) -> bool:
        """Do what predictions asked for; wait for it where no stream is under way. False once stopped."""
        while True:
            if not self._owners or not self._commands.empty():
                self._deliver()
            try:
                command = self._commands.get(block=not self._owners)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _begin(self, prediction: Prediction) -> None:
        for operation, grammar in prediction.operations:
            try:
                self._open(prediction, operation, grammar)
            except RequestError as error:
                prediction.outbox.append(_failure(operation, str(error)))
            except Exception as error:
                log.exception("operation failed")
                prediction.outbox.append(_failure(operation, f"internal error: {error}"))
        self._touched.add(prediction)

    def _open(self, prediction: Prediction, operation: Operation | Failure, grammar: Grammar | None) -> None:
        if self._broken:
            raise RequestError(self._broken)
        if isinstance(operation, Failure):
            prediction.outbox.append(operation)
            return
        if isinstance(operation, ModelInfo):
            prediction.outbox.append(Info(stream_id=operation.stream_id, model_info=self.model_info()))
            return
        stream = open_stream(operation, self.limits, self.tokenizer, grammar)
        longest = self.scheduler.memory.longest
        if stream.prompt_length >= longest or (isinstance(stream, Scoring) and stream.most_tokens > longest):
            raise RequestError(
                f"prompt is {stream.prompt_length} tokens; memory for keys and values (KV_CACHE_GB) holds {longest}."
            )
        stream.most_tokens = min(stream.most_tokens, longest)
        prediction.counters.input_tokens += len(stream.tokens)
        if stream.pending == 0:  # one token to score after nothing
            prediction.outbox += stream.receive([])
            return
        begun = stream.begin()
        prediction.streams.append(stream)
        self._owners[stream] = prediction
        self.scheduler.add(stream)
        self._deliver_tokens(stream, begun)

    def _end(self, prediction: Prediction) -> None:
        for stream in list(prediction.streams):
            self._close(stream)

    def _close(self, stream: Stream, keep: bool = True) -> None:
        self.scheduler.remove(stream, keep)
        self._owners.pop(stream).streams.remove(stream)

    def _fail(self, stream: Stream, error: str) -> None:
        prediction = self._owners[stream]
        self._close(stream, keep=False)  # should that fail, it is answered with all the others
        prediction.outbox.append(_failure(stream.operation, error))

    def _fail_all(self, streams: Sequence[Stream], error: str) -> None:
        for stream in list(streams):
            if prediction := self._owners.get(stream):  # else it had its terminal reply before the step failed
                self._fail(stream, error)
                self._touched.add(prediction)

    def _deliver(self) -> None:
        """Hand over what there is.

        Called when this thread is about to wait, to do what may take long, or to run the model: other threads want
        Python's lock as soon as they have something to do, and would take it in the middle of this one's work, for
        milliseconds.
        """
        for prediction in self._touched:
            prediction.deliver()
        self._touched.clear()

    def _run(self, step: Step) -> None:
        for stream in step.streams:
            if stream.computed == stream.reused and stream.reused:
                self._owners[stream].counters.reused_tokens += stream.reused
                self.counters.reused_tokens += stream.reused
        constrained = {
            stream: stream.grammar
            for stream, count in zip(step.streams, step.counts, strict=True)
            if isinstance(stream, Generation) and stream.grammar and stream.pending == count
        }
        run = self.runner.prepare(step)
        self._deliver()
        filling = self._mask_filler.start(list(constrained.values())) if constrained else None
        try:
            logits = run()
        finally:
            bits = filling.result() if filling else None
        self._touched |= (predictions := {self._owners[stream] for stream in step.streams})
        for counters in (self.counters, *(prediction.counters for prediction in predictions)):
            counters.steps += 1
            counters.rows += len(step.streams)
        first = 0
        generations: list[tuple[Generation, int, int]] = []
        scorings: list[tuple[Scoring, int, list[int]]] = []
        chosen: list[tuple[Stream, list[sampling.Choice]]] = []
        for stream, count in zip(step.streams, step.counts, strict=True):
            before = stream.computed
            drafted = max(count - stream.pending, 0)
            stream.computed += count - drafted
            for counters in (self.counters, self._owners[stream].counters):
                counters.computed_tokens += count - drafted
                counters.drafted_tokens += drafted
            if isinstance(stream, Scoring):
                targets = stream.targets(before, stream.computed)
                if targets:
                    scorings.append((stream, first, targets))
                first += len(targets)
            elif isinstance(stream, Generation) and stream.pending == 0:
                generations.append((stream, first, 1 + drafted))
                first += 1 + drafted
        if generations:
            rows = [stream for stream, _, wanted in generations for _ in range(wanted)]
            places = [place for _, first, wanted in generations for place in range(first, first + wanted)]
            allowed = (
                Allowed([i for i, row in enumerate(rows) if row in constrained], bits) if bits is not None else None
            )
            choices = iter(_sample(_rows(logits, places), rows, allowed))
            chosen += [(stream, list(itertools.islice(choices, wanted))) for stream, _, wanted in generations]
        for scoring, index, targets in scorings:
            top = [scoring.operation.top_logprobs] * len(targets)
            chosen.append((scoring, sampling.score(logits[index : index + len(targets)], targets, top)))
        received = [(stream, self._receive(stream, choices)) for stream, choices in chosen]
        # Where a stream ends another's keys and values are moved to its slot: all that is computed has to count by now.
        for stream, replies in received:
            if isinstance(replies, RequestError):
                self._fail(stream, str(replies))
            else:
                self._deliver_tokens(stream, replies)

    def _receive(self, stream: Stream, choices: list[sampling.Choice]) -> list[Token] | RequestError:
        before = stream.computed
        try:
            replies = stream.receive(choices)
        except RequestError as error:
            return error
        for counters in (self.counters, self._owners[stream].counters):
            counters.computed_tokens += stream.computed - before
            counters.accepted_tokens += stream.computed - before
        return replies

    def _deliver_tokens(self, stream: Stream, replies: list[Token]) -> None:
        prediction = self._owners[stream]
        if stream.finished:
            self._close(stream)  # should that fail, the failure is its answer
        prediction.outbox += replies
        unfinished = stream.finished and isinstance(stream, Generation) and stream.inside_grammar
        for counters in (self.counters, prediction.counters):
            counters.output_tokens += len(replies)
            counters.unfinished_constraints += unfinished


EXTENSIONS = {
    "GENERATE": ["seed", "min_p", "min_tokens", "stop", "text", "prompt as a string", "mask", *CONSTRAINTS],
    "SCORE": ["top_logprobs", "text", "prompt and scored as strings"],
}


def limits_of(model: PreTrainedModel) -> Limits:
    """What the model can take, from its configuration and generation configuration."""
    config = model.config.get_text_config(decoder=True)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 2**20
    ends: set[int] = set()
    for source in (model.generation_config, config, model.config):
        ids = getattr(source, "eos_token_id", None)
        ends.update([ids] if isinstance(ids, int) else ids or [])
    return Limits(vocabulary, context, tuple(sorted(end for end in ends if 0 <= end < vocabulary)))


def _rows(logits: Tensor, index: list[int]) -> Tensor:
    return logits if len(index) == len(logits) else logits[torch.tensor(index, device=logits.device)]


def _sample(logits: Tensor, rows: Sequence[Generation], allowed: Allowed | None) -> list[sampling.Choice]:
    """sampling.sample; should it fail, row by row, so that only the row that is to blame fails."""
    try:
        return sampling.sample(logits, rows, allowed)
    except Exception as error:
        if len(rows) == 1:
            log.exception("sampling failed")
            return [sampling.Choice(0, 0.0, {}, error=f"sampling failed: {error}")]
    return [
        choice
        for i, row in enumerate(rows)
        for choice in _sample(logits[i : i + 1], [row], allowed.part(slice(i, i + 1)) if allowed else None)
    ]


def _failure(operation: Operation | Failure, error: str) -> Failure:
    return Failure(
        stream_id=operation.stream_id, error=error, kind="MSG" if isinstance(operation, ModelInfo) else "TOKEN"
    )


def _choose_runner(
    model: PreTrainedModel, limits: Limits, kv_budget: int | None, compiled: Path | None, graphs: bool
) -> tuple[Runner, Scheduler, str]:
    """Slots where they prove themselves on this model, else the fallback runner; and words for the log."""
    try:
        layers = layers_of(model)
        memory = Memory(*layers, model.dtype)
        budget = kv_budget if kv_budget is not None else _default_budget(model.device)
        slots = Slots(memory, budget, MOST_STREAMS, limits.context)
        runner = SlotRunner(model, memory)
        reference = Reference.of(model)
        check(model, layers, reference)
    except Exception as error:  # whatever the model's code raises, the fallback runner is the answer
        reason = str(error) if isinstance(error, UnsupportedModel) else f"{type(error).__name__}: {error}"
        caches = ModelCaches(FALLBACK_STREAMS, limits.context)
        scheduler = Scheduler(caches, chunk=limits.context, busy_chunk=0, most_logits=limits.context)
        return FallbackRunner(model, caches), scheduler, f"fallback, one stream at a time ({reason})"
    most_logits = max(LOGITS_ELEMENTS // limits.vocabulary, MOST_STREAMS)
    description = "slots"
    try:
        if compiled:
            check(model, layers, reference, step := CompiledStep(compiled))
            runner.fast, description = step, "slots, compiled step"
        elif graphs and model.device.type == "cuda" and len(set(layers[1])) == 1:
            check(model, layers, reference, graphed := GraphedStep(runner.step))
            runner.fast, description = graphed, "slots, decode steps as CUDA graphs"
    except Exception as error:  # the model's own code is there to go on with
        description = f"slots; not faster, since {type(error).__name__}: {error}"
    # On a GPU a step of single tokens is the fast one; see graphs.py. More tokens take more experts' weights to read.
    config = model.config.get_text_config(decoder=True)
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    drafts = model.device.type == "cpu" and not experts
    return runner, Scheduler(slots, CHUNK, BUSY_CHUNK, most_logits, drafts), description


def _end_openmp_threads() -> None:
    """End the OpenMP threads that have computed for the calling thread so far.

    They would go on waiting for its next work. libgomp then counts more threads than processors, and lets all of them
    sleep at once where they wait, the engine's too, between the hundreds of parallel parts of a compiled step: steps
    took 1.4 times as long. Another OpenMP library may lack the function.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).omp_pause_resource_all(OMP_PAUSE_SOFT)


def _default_budget(device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # While the memory grows, old and new are there together.
        return max(free - int(total * GPU_RESERVE), 0) // 2
    return psutil.virtual_memory().available // 4
