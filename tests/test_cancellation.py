"""Cancelling a prediction while Cog's runtime starts it: by an exception at a random point of the starting thread."""

import asyncio
import ctypes
import operator
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextvars import copy_context
from functools import partial
from typing import Any

import pytest
from cog import CancelationException

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


def cancelling() -> Callable[[], Any]:
    """Cancels as the runtime does before it has the future: by an exception in this thread's next Python code."""
    return partial(
        ctypes.pythonapi.PyThreadState_SetAsyncExc,
        ctypes.c_ulong(threading.get_ident()),
        ctypes.py_object(CancelationException),
    )


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


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_prediction_cancelled_while_it_is_submitted_is_cancelled_and_told(
    loop: asyncio.AbstractEventLoop, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = loop.call_soon_threadsafe

    def interrupted(*arguments: Any) -> None:
        if when == "after":
            submit(*arguments)
        cancelling()()
        raise AssertionError("the exception comes first")

    prediction = Prediction()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon_threadsafe", interrupted)
        future = cancellation._submit_cancellable(prediction._ctx_wrapper(), loop)
    with pytest.raises(CancelledError):
        future.result()
    if when == "after":  # before, it has not begun
        assert prediction.told.wait(SECONDS)


def test_a_prediction_cancelled_before_its_result_is_asked_for_is_cancelled_and_told(
    loop: asyncio.AbstractEventLoop,
) -> None:
    prediction = Prediction()
    future = cancellation._submit_cancellable(prediction._ctx_wrapper(), loop)
    with pytest.raises(CancelledError):
        list(map(operator.call, [cancelling(), future.result]))  # no Python code in between, as in the runtime
    assert prediction.told.wait(SECONDS)


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
