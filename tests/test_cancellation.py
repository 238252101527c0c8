"""Cancelling a prediction that Cog's runtime starts or runs."""

import _thread
import asyncio
import operator
import threading
import time
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import pytest

from lmtp import cancellation
from lmtp.protocol import Generate, ModelInfo
from predict import Predictor
from tests.tiny import answers, begin, build, start

SECONDS = 10


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on its own thread, as the runtime has one for all predictions."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class Prediction:
    """A prediction that records whether it was told to end."""

    def __init__(self) -> None:
        self.told = threading.Event()

    async def _ctx_wrapper(self) -> str:  # the runtime's name for it
        cancellation.when_cancelled(self.told.set)
        return "output"


def test_a_prediction_that_is_not_cancelled_has_its_result(loop: asyncio.AbstractEventLoop) -> None:
    prediction = Prediction()
    assert cancellation._submit_cancellable(prediction._ctx_wrapper(), loop).result() == "output"
    assert not prediction.told.is_set()


def test_other_coroutines_are_left_alone(loop: asyncio.AbstractEventLoop) -> None:
    async def of_a_library() -> int:
        return 5

    future = cancellation._submit_cancellable(of_a_library(), loop)
    assert future.result(timeout=SECONDS) == future.result() == 5


def test_a_prediction_whose_coroutine_has_ended_is_told(loop: asyncio.AbstractEventLoop) -> None:
    prediction = Prediction()
    future = cancellation._submit_cancellable(prediction._ctx_wrapper(), loop)
    assert future.result() == "output"
    future.cancel()
    assert prediction.told.is_set()


def test_the_runtime_raises_its_exception_in_no_thread_that_runs_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """It notes the thread and raises later, when the thread may start another caller's prediction."""
    monkeypatch.setattr(threading, "get_ident", threading.get_ident)
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", asyncio.run_coroutine_threadsafe)
    cancellation.install()
    own = threading.get_ident()
    assert own == _thread.get_ident()
    sink = next(thread for thread in threading.enumerate() if thread.name == "cancel-sink")
    assert sink.is_alive()
    assert sink.ident != own
    asked: list[int | None] = []
    ask = map(operator.call, [threading.get_ident])
    _thread.start_new_thread(asked.extend, (ask,))  # without a calling frame, as the runtime asks
    while not asked:
        time.sleep(0.001)
    assert asked == [sink.ident]


def test_output_that_nobody_reads_ends_the_prediction() -> None:
    engine = start(build("llama"))
    prediction = begin(engine, Generate(stream_id=0, prompt=[5, 6, 7], max_tokens=400, min_tokens=400))
    chunks = Predictor()._chunks(prediction, None, 0.0, copy_context())
    assert next(chunks) == ""
    chunks.close()
    answers(engine, ModelInfo(stream_id=0))  # the engine has taken the end once it answers this
    assert engine.runner.active == []
    engine.stop()


def test_a_cancel_while_finished_texts_are_checked_is_not_lost() -> None:
    engine = start(build("llama"))
    prediction = begin(engine, Generate(stream_id=0, prompt=[5, 6, 7], max_tokens=2))

    class Checked:
        """Completions whose check is interrupted by the cancel."""

        def add(self, replies: object) -> str:
            return ""

        def end(self, *_: object) -> str:
            prediction.cancel()
            return "the answer"

    completions: Any = Checked()
    predictor = Predictor()
    predictor.engine = engine
    with pytest.raises(asyncio.CancelledError):
        list(predictor._chunks(prediction, completions, 0.0, copy_context()))
    engine.stop()
