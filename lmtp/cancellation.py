"""Cancellation while output is sent, and while a prediction starts: a bridge over two gaps in Cog's runtime 0.23.

The runtime cancels the coroutine of an async `predict`. Ours ends when it returns the generator of its output, and
nothing would be cancelled from then on. So the cancellation is taken where the runtime asks for it: at the future of
the coroutine, that asyncio.run_coroutine_threadsafe makes.

Until the runtime has that future, it raises CancelationException in the thread that starts the prediction instead,
calls the prediction failed, and leaves the coroutine running. So the exception is caught where the thread runs Python.
What comes in the moments in which it does not is lost; who asks again is heard.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from typing import Any

from cog import CancelationException


class _Cancellation:
    """Whether a prediction was cancelled, and what is to be done then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._action: Callable[[], None] | None = None

    def cancel(self) -> None:
        """The runtime asks for it; on any thread."""
        with self._lock:
            self._cancelled = True
            action = self._action
        if action:
            action()

    def act(self, action: Callable[[], None]) -> None:
        """Do this when the prediction is cancelled; at once where it is already."""
        with self._lock:
            self._action = action
            cancelled = self._cancelled
        if cancelled:
            action()


RUNTIMES_OWN = "_ctx_wrapper"
"""The coroutine by which the runtime runs predictions; others, of health checks and of libraries, are none of ours."""

_current: ContextVar[_Cancellation | None] = ContextVar("cancellation", default=None)
_submit = asyncio.run_coroutine_threadsafe


def _submit_cancellable(coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Future[Any]:
    if getattr(coroutine, "__name__", "") != RUNTIMES_OWN:
        return _submit(coroutine, loop)
    cancellation = _Cancellation()

    async def run() -> Any:
        _current.set(cancellation)
        return await coroutine

    try:
        future = _submit(run(), loop)
        cancel_coroutine = future.cancel

        def cancel() -> bool:
            cancellation.cancel()
            return cancel_coroutine()

        future.cancel = cancel  # type: ignore[method-assign]
        result = _result(future.result, cancellation)
        next(result)
        future.result = result.__next__  # type: ignore[method-assign, assignment]
    except CancelationException:
        cancellation.cancel()
        future = Future()
        future.cancel()
    return future


def _result(result: Callable[[], Any], cancellation: _Cancellation) -> Iterator[Any]:
    """Yields None, then the result. A generator since its second part begins within the ``try``; a function could meet
    the exception before that."""
    try:
        yield None
        yield result()
    except CancelationException:
        cancellation.cancel()
        raise CancelledError from None


def install() -> None:
    """Make the predictions of this process cancellable; once, when predict.py is loaded."""
    asyncio.run_coroutine_threadsafe = _submit_cancellable  # type: ignore[assignment]


def when_cancelled(action: Callable[[], None]) -> None:
    """Do this, on any thread, when the prediction that runs here is cancelled; at once where it is already."""
    if cancellation := _current.get():
        cancellation.act(action)
