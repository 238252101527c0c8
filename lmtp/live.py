"""Output sent while it is made, and cancellation that still arrives: a bridge over two gaps in Cog's runtime 0.23.

The runtime collects what an async generator yields and sends it when the generator has ended. It sends what comes, as
it comes, from a plain generator, which it runs on a thread of the prediction's own; an async `predict` may return one.
But then the coroutine, which is all that the runtime cancels, has ended. So the cancellation is taken where the runtime
asks for it: at the future of the coroutine, that asyncio.run_coroutine_threadsafe makes.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any


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


_current: ContextVar[_Cancellation | None] = ContextVar("cancellation", default=None)
_submit = asyncio.run_coroutine_threadsafe


def _submit_cancellable(coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Future[Any]:
    cancellation = _Cancellation()

    async def run() -> Any:
        _current.set(cancellation)
        return await coroutine

    future = _submit(run(), loop)
    cancel_coroutine = future.cancel

    def cancel() -> bool:
        cancellation.cancel()
        return cancel_coroutine()

    future.cancel = cancel  # type: ignore[method-assign]
    return future


def install() -> None:
    """Make the predictions of this process cancellable; once, when predict.py is loaded."""
    asyncio.run_coroutine_threadsafe = _submit_cancellable  # type: ignore[assignment]


def stream(chunks: AsyncIterator[str]) -> Iterator[str]:
    """The chunks as a plain generator, for an async `predict` to return. They are made on the running event loop."""
    loop = asyncio.get_running_loop()
    made: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

    async def make() -> None:
        try:
            async for chunk in chunks:
                made.put(chunk)
            made.put(None)
        except BaseException as error:
            made.put(error)

    task = loop.create_task(make())

    def cancel() -> None:
        loop.call_soon_threadsafe(task.cancel)

    if cancellation := _current.get():
        cancellation.act(cancel)

    def send() -> Iterator[str]:
        try:
            while (chunk := made.get()) is not None:
                if isinstance(chunk, BaseException):
                    raise chunk
                yield chunk
        finally:
            cancel()

    return send()
