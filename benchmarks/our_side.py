"""This project's engine, set up by the predictor as in the container. All use of the engine's API is in this file."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmtp import protocol, text
from lmtp.engine.engine import Engine as LmtpEngine
from lmtp.protocol import Failure, Token
from lmtp.runners.step import Step, Stream
from predict import Predictor


class Recorder:
    """Runs predictions on an engine; records when each token arrives and how long each step spends in the runner."""

    def __init__(self, engine: LmtpEngine, endless: bool) -> None:
        """``endless``: no token ends a stream, so that every stream has the requested length."""
        self._engine = engine
        if endless:
            self._engine.limits = dataclasses.replace(self._engine.limits, end_of_sequence=())
        self._limits = engine.runner.step_limits
        self._steps: list[tuple[int, int, float, float]] = []
        self._time_steps()

    def describe(self) -> str:
        """The runner that serves the model."""
        return self._engine.runner.description

    def draft(self, on: bool) -> None:
        """Let streams draft, as usual, or not."""
        limits = self._limits if on else dataclasses.replace(self._limits, drafts=0)
        self._engine.runner.step_limits = limits

    def chat(self, prompts: list[str]) -> list[list[int]]:
        """Tokens of each prompt in the model's chat template."""
        return [text.render_prompt(self._engine.tokenizer, prompt) for prompt in prompts]

    def run(self, predictions: list[dict[str, Any]]) -> dict[str, Any]:
        """Run predictions, each ``{"operations": [...], "after": seconds}``.

        Returns ``seconds`` until the last prediction ended; ``tokens`` in all; ``arrivals``, the times of each
        stream's tokens, and ``ids``, the tokens; ``texts``, each stream's text if requested; ``steps``, each with its
        rows, the tokens of its longest row, its start and its seconds inside the runner; and ``counters``, how far each
        of the engine's counters rose. Times count from the start.
        """
        self._steps.clear()
        before = dataclasses.asdict(self._engine.counters)
        started = time.perf_counter()
        with ThreadPoolExecutor(len(predictions)) as pool:
            predicted = list(
                pool.map(
                    lambda each: self._predict(json.dumps(each["operations"]), each.get("after", 0.0), started),
                    predictions,
                )
            )
        seconds = time.perf_counter() - started
        streams = [stream for prediction in predicted for stream in prediction]
        return {
            "seconds": seconds,
            "tokens": sum(len(stream) for stream in streams),
            "arrivals": [[came for came, _ in stream] for stream in streams],
            "ids": [[token.token for _, token in stream] for stream in streams],
            "texts": ["".join(token.text or "" for _, token in stream) for stream in streams],
            "steps": [[rows, longest, start - started, spent] for rows, longest, start, spent in self._steps],
            "counters": {name: now - before[name] for name, now in dataclasses.asdict(self._engine.counters).items()},
        }

    def _predict(self, operations: str, after: float, started: float) -> list[list[tuple[float, Token]]]:
        """The tokens of each stream, and when they came."""
        if after:
            time.sleep(max(started + after - time.perf_counter(), 0))
        batch = protocol.parse_batch(operations)
        streams: dict[Any, list[tuple[float, Token]]] = {operation.stream_id: [] for operation in batch}
        with asyncio.run(self._engine.predict(batch)) as prediction:
            for replies in prediction:
                protocol.encode(replies)
                now = time.perf_counter() - started
                for reply in replies:
                    if isinstance(reply, Failure):
                        raise RuntimeError(reply.error)
                    if isinstance(reply, Token):
                        streams[reply.stream_id].append((now, reply))
        return list(streams.values())

    def _time_steps(self) -> None:
        prepare = self._engine.runner.prepare

        def timed(step: Step[Stream]) -> Callable[[], Any]:
            started = time.perf_counter()
            run = prepare(step)
            preparing = time.perf_counter() - started

            def timed_run() -> Any:
                running = time.perf_counter()
                logits = run()
                spent = preparing + time.perf_counter() - running
                self._steps.append((len(step.streams), max(step.counts), started, spent))
                return logits

            return timed_run

        self._engine.runner.prepare = timed  # type: ignore[method-assign]


class Engine(Recorder):
    """The predictor's engine. Settings such as WEIGHTS_DIR, DTYPE and COMPILE come from the environment."""

    def __init__(self, endless: bool = True) -> None:
        predictor = Predictor()
        predictor.setup()
        super().__init__(predictor.engine, endless)
