"""Server-sent events, in whatever pieces and with whatever line ends they arrive."""

import pytest

from gateway.server_sent_events import Events

STREAM = b": hello\n\nevent: output\ndata: one\n\ndata:two\ndata:  three\n\nevent: done\ndata\n\nevent: cut"
EVENTS = [(b"message", b""), (b"output", b"one"), (b"message", b"two\n three"), (b"done", b"")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000])
def test_are_the_same_in_all_pieces_and_with_all_line_ends(end: bytes, size: int) -> None:
    stream = STREAM.replace(b"\n", end)
    events = Events()
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert [event for piece in pieces for event in events.feed(piece)] == EVENTS


def test_come_with_the_piece_that_ends_them() -> None:
    events = Events()
    assert events.feed(b"data: one\r\n\r") == [(b"message", b"one")]
    assert events.feed(b"\ndata: two\r\n\r\n") == [(b"message", b"two")]
