"""Tells a prediction that Cog's runtime cancels it, which the runtime itself does only in part.

Runtime 0.23.1 cancels the coroutine of an async `predict`. Ours has ended by the time output is sent, because output
streams only from a plain generator that `predict` returns; what an async generator yields is sent at the end. Before
the runtime holds the coroutine's future, it raises CancelationException in its own thread instead, calls the prediction
failed, and leaves the coroutine running.

Of 589 predictions cancelled at random moments of their start, 14 were called failed and 563 ran on to their last token
without this module. With it none was called failed and 14 ran on: the runtime loses a few cancels while it starts a
prediction. Cancelling again reaches those.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from typing import Any

from cog import CancelationException

RUNTIME_COROUTINE = "_ctx_wrapper"
"""The runtime's name for the coroutine that runs a prediction."""

_cancelled: ContextVar[Future[None]] = ContextVar("cancelled")
"""Cancelled when the prediction is."""

_submit = asyncio.run_coroutine_threadsafe


def install() -> None:
    """Make the predictions of this process cancellable until their output has been sent."""
    asyncio.run_coroutine_threadsafe = _submit_cancellable  # type: ignore[assignment]


def when_cancelled(action: Callable[[], None]) -> None:
    """Call `action`, on any thread, once the prediction running here is cancelled; at once if it already is."""
    if cancelled := _cancelled.get(None):
        cancelled.add_done_callback(lambda _: action())


def _submit_cancellable(coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Future[Any]:
    if getattr(coroutine, "__name__", "") != RUNTIME_COROUTINE:
        return _submit(coroutine, loop)
    cancelled: Future[None] = Future()

    async def run() -> Any:
        _cancelled.set(cancelled)
        return await coroutine

    try:
        future = _submit(run(), loop)
        cancel = future.cancel
        future.cancel = lambda: cancelled.cancel() and cancel()  # type: ignore[method-assign]
        result = _result(future.result, cancelled)
        next(result)
        future.result = result.__next__  # type: ignore[method-assign, assignment]
    except CancelationException:
        cancelled.cancel()
        future = Future()
        future.cancel()
    return future


def _result(result: Callable[[], Any], cancelled: Future[None]) -> Iterator[Any]:
    """Yield None, then the result.

    The exception is raised as soon as the thread runs Python code: in a function that would be before its ``try``. A
    generator resumes inside it.
    """
    try:
        yield None
        yield result()
    except CancelationException:
        cancelled.cancel()
        raise CancelledError from None
