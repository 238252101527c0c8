"""Tells a prediction that Cog's runtime cancels it, which the runtime itself does only in part.

Runtime 0.23.1 cancels the coroutine of an async `predict`. Ours has ended by the time output is sent, because output
streams only from a plain generator that `predict` returns; what an async generator yields is sent at the end. Cancels
that do not get here at all are the business of `cancel_relay`.

Before the runtime holds the coroutine's future, it raises CancelationException in the thread that starts the
prediction. It notes the thread, then waits for the GIL: when it raises, that thread may start another caller's
prediction. So the runtime is told of a thread that never runs Python code, where exceptions do nothing. The relay
repeats a cancel until the runtime holds the future.
"""

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any

RUNTIME_COROUTINE = "_ctx_wrapper"
"""The runtime's name for the coroutine that runs a prediction."""

_cancelled: ContextVar[Future[None]] = ContextVar("cancelled")
"""Cancelled when the prediction is."""

_submit = asyncio.run_coroutine_threadsafe
_get_ident = threading.get_ident


def install() -> None:
    """Make the predictions of this process cancellable until their output has been sent."""
    asyncio.run_coroutine_threadsafe = _submit_cancellable  # type: ignore[assignment]
    asleep = threading.Lock()
    asleep.acquire()
    sink = threading.Thread(target=asleep.acquire, name="cancel-sink", daemon=True)
    sink.start()

    def get_ident() -> int:
        # The runtime alone asks without a calling frame, and only for the thread to raise the exception in.
        return _get_ident() if sys._getframe().f_back else sink.ident or 0

    threading.get_ident = get_ident


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

    future = _submit(run(), loop)
    cancel = future.cancel
    future.cancel = lambda: cancelled.cancel() and cancel()  # type: ignore[method-assign]
    return future
