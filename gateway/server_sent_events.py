"""Server-sent events, read from the pieces in which they arrive.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation. Lines end in LF,
CRLF or CR.
"""

MAX_EVENT = 2**28
"""Bytes of an event. A prediction's last event repeats its whole output."""

LINE_FEED, RETURN = b"\n\r"

Event = tuple[bytes, bytes]
"""A name, and data with its lines joined."""


class Events:
    """Puts the pieces of a stream together to events."""

    def __init__(self) -> None:
        self._line = bytearray()
        """The line that has not ended."""
        self._name = b"message"
        self._data: list[bytes] = []
        self._size = 0
        """Bytes since the last event."""
        self._ended_in_return = False
        """Whether the last piece did, so a line feed that comes next belongs to it."""

    def feed(self, piece: bytes) -> list[Event]:
        """The events that end in the next piece. Raises ValueError for one that is too large."""
        if self._ended_in_return or RETURN in piece:
            piece = self._with_line_feeds(piece)
        self._size += len(piece)
        if self._size > MAX_EVENT:
            raise ValueError(f"An event has more than {MAX_EVENT} bytes.")
        if self._line:
            # The last event repeats the whole output: it must be neither copied nor searched for each of its pieces.
            self._line += piece
            if LINE_FEED not in piece:
                return []
            piece = bytes(self._line)
            self._line.clear()
        *lines, rest = piece.split(b"\n")
        self._line += rest
        events = []
        for line in lines:
            if not line:
                events.append((self._name, b"\n".join(self._data)))
                self._name, self._data, self._size = b"message", [], 0
                continue
            field, _, value = line.partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
            elif field == b"event":
                self._name = value.strip()
        return events

    def _with_line_feeds(self, piece: bytes) -> bytes:
        if self._ended_in_return:
            piece = piece.removeprefix(b"\n")
        self._ended_in_return = piece.endswith(b"\r")
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
