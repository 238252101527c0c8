"""This project's engine in a process of its own, set up by the predictor as in the container."""

import asyncio
import dataclasses
import json
import time
from typing import Any

from lmtp import protocol
from lmtp.protocol import Failure, Token
from lmtp.scheduler import Step
from predict import Predictor


class Engine:
    """Runs predictions and tells when each token came and how long each step spent in the model.

    WEIGHTS_DIR, DTYPE and COMPILE come from the environment, as for the predictor.
    """

    def __init__(self, endless: bool = True) -> None:
        """``endless``: no token ends a stream, so that every stream is as long as it was asked to be."""
        predictor = Predictor()
        predictor.setup()
        self._engine = predictor.engine
        if endless:
            self._engine.limits = dataclasses.replace(self._engine.limits, end_of_sequence=())
        self._steps: list[tuple[int, int, float, float]] = []
        self._time_steps()

    def describe(self) -> str:
        """Which runner serves the model."""
        return self._engine.runner_description

    def run(self, predictions: list[dict[str, Any]]) -> dict[str, Any]:
        """Run predictions, each ``{"operations": [...], "after": seconds}``.

        Returns ``seconds`` until the last was done, ``tokens`` in all, ``arrivals``: for each stream when its tokens
        came, ``steps``: rows, most tokens of a row, start and seconds inside the runner, and the tokens ``computed``.
        Times are in seconds from the start.
        """
        return asyncio.run(self._run(predictions))

    async def _run(self, predictions: list[dict[str, Any]]) -> dict[str, Any]:
        self._steps.clear()
        before = self._engine.counters.computed_tokens
        started = time.perf_counter()
        arrivals = await asyncio.gather(
            *(self._predict(json.dumps(each["operations"]), each.get("after", 0.0), started) for each in predictions)
        )
        seconds = time.perf_counter() - started
        streams = [times for prediction in arrivals for times in prediction]
        return {
            "seconds": seconds,
            "tokens": sum(len(times) for times in streams),
            "arrivals": streams,
            "steps": [[rows, most, start - started, spent] for rows, most, start, spent in self._steps],
            "computed": self._engine.counters.computed_tokens - before,
        }

    async def _predict(self, operations: str, after: float, started: float) -> list[list[float]]:
        if after:
            await asyncio.sleep(max(started + after - time.perf_counter(), 0))
        batch = protocol.parse_batch(operations)
        times: dict[Any, list[float]] = {operation.stream_id: [] for operation in batch}
        async with self._engine.predict(batch) as answer:
            async for replies in answer:
                protocol.encode(replies)
                now = time.perf_counter() - started
                for reply in replies:
                    if isinstance(reply, Failure):
                        raise RuntimeError(reply.error)
                    if isinstance(reply, Token):
                        times[reply.stream_id].append(now)
        return list(times.values())

    def _time_steps(self) -> None:
        run = self._engine.runner.run

        def timed(step: Step, *others: Any, **more: Any) -> Any:
            started = time.perf_counter()
            result = run(step, *others, **more)
            self._steps.append((len(step.streams), max(step.counts), started, time.perf_counter() - started))
            return result

        self._engine.runner.run = timed  # type: ignore[method-assign]
