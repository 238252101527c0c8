"""Server-sent events, read from the pieces in which they arrive.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation. Lines end in LF,
CRLF or CR.
"""

MAX_EVENT = 2**28
"""Bytes of an event. A prediction's last event repeats its whole output."""

Event = tuple[bytes, bytes]
"""A name, and data with its lines joined."""


class Events:
    """Puts the pieces of a stream together to events."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._ended_in_return = False
        """Whether the last piece did, so a line feed that comes next belongs to it."""

    def feed(self, piece: bytes) -> list[Event]:
        """The events that end in the next piece. Raises ValueError for one that is too large."""
        if self._ended_in_return and piece.startswith(b"\n"):
            piece = piece[1:]
        self._ended_in_return = piece.endswith(b"\r")
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        waiting = self._waiting
        if waiting:
            # The last event repeats the whole output: it must be neither copied nor searched for each of its pieces.
            searched = len(waiting) - 1
            waiting += piece
            if waiting.find(b"\n\n", searched) < 0:
                if len(waiting) > MAX_EVENT:
                    raise ValueError(f"An event has more than {MAX_EVENT} bytes.")
                return []
            piece = bytes(waiting)
        *blocks, rest = piece.split(b"\n\n")
        self._waiting = bytearray(rest)
        return [_event(block) for block in blocks]


def _event(block: bytes) -> Event:
    name, data = b"message", []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.strip()
    return name, b"\n".join(data)
