"""What a target answers: LMTP's lines, read into replies."""

from collections.abc import AsyncIterator, Iterable
from typing import Any

import msgspec
from msgspec import Struct

from gateway.target import TargetError


class Reply(Struct):
    """One line of an answer. ``error`` is set on the last line of a stream that failed; ``model_info`` answers
    MODEL_INFO; all others are tokens."""

    stream_id: int | str | None = None
    token: int = -1
    text: str = ""
    logprob: float = 0.0
    finish_reason: str | None = None
    top_logprobs: dict[int, float] = {}
    error: str | None = None
    model_info: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(Reply)


async def lines(chunks: AsyncIterator[str]) -> AsyncIterator[list[str]]:
    """The whole lines of each chunk, as soon as they are whole; without their ends."""
    rest = ""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        if whole:
            yield whole
    if rest:
        yield [rest]


def parse(whole: Iterable[str]) -> list[Reply]:
    """The replies that lines hold. Raises TargetError if they are none."""
    try:
        return [_decoder.decode(line.partition(" ")[2]) for line in whole]
    except (msgspec.DecodeError, RecursionError) as error:
        raise TargetError(502, f"The target's output is not LMTP: {error}.") from error
