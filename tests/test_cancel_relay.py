"""The relay in the control channel between Cog's server and its worker."""

import errno
import itertools
import json
import os
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from lmtp import cancel_relay
from lmtp.cancel_relay import HOLD_SECONDS, Relay
from tests.server import ROOT, child

PREDICTOR = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
import cog

from lmtp import cancel_relay

cancel_relay.MAX_RECEIPT_SECONDS = cancel_relay.SETTLE_SECONDS = 3600


class Predictor(cog.BasePredictor):
    def setup(self) -> None:
        cancel_relay.install()

    @cog.concurrent(max=1)
    async def predict(self) -> str:
        return "done"
"""

LONG = 0.3
"""Seconds in which anything that the relay will do has happened."""


class End:
    """One end of the control channel."""

    def __init__(self, receives: int, sends: int) -> None:
        self.receives, self.sends = receives, sends
        self.arrived: list[tuple[float, bytes]] = []
        self.closed = threading.Event()
        self.answer_checks = threading.Event()
        self.answer_checks.set()
        self.reader = threading.Thread(target=self._read, daemon=True)

    def send(self, **message: Any) -> None:
        self.send_body(json.dumps(message).encode())

    def send_body(self, body: bytes) -> None:
        os.write(self.sends, len(body).to_bytes(4) + body)

    def wait_for(self, count: int) -> list[Any]:
        """The messages that have arrived, once there are so many."""
        deadline = time.monotonic() + 10
        while len(self.arrived) < count:
            assert time.monotonic() < deadline, self.arrived
            time.sleep(0.001)
        return [body and json.loads(body) for _, body in self.arrived]

    def _read(self) -> None:
        with os.fdopen(self.receives, "rb") as file:
            while length := file.read(4):
                body = file.read(int.from_bytes(length))
                if cancel_relay.CHECK.encode() in body:  # as the worker answers it: after what came before
                    self.answer_checks.wait(10)
                    self.send(type="healthcheck_result", id=cancel_relay.CHECK, status="healthy")
                else:
                    self.arrived.append((time.monotonic(), body))
        self.closed.set()


class SlotReader:
    """The server's end of a slot's socket. As the server does, it reads the files that messages name, one by one."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.go_on = threading.Event()
        self.go_on.set()
        self.before_each: Callable[[], object] = lambda: None
        """Called when a message has come, before it is handled."""
        self.contents: list[bytes] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with self._connection.makefile("rb") as file:
            while length := file.read(4):
                message = json.loads(file.read(int.from_bytes(length)))
                assert message["type"] == "file_output"
                self.go_on.wait(10)
                self.before_each()
                self.contents.append(Path(message["filename"]).read_bytes())


class Channel:
    """A server and a worker with a relay between them, and the sockets of slots a and b."""

    def __init__(self) -> None:
        from_server, server_sends = os.pipe()
        worker_receives, to_worker = os.pipe()
        from_worker, worker_sends = os.pipe()
        server_receives, to_server = os.pipe()
        self.server = End(server_receives, server_sends)
        self.worker = End(worker_receives, worker_sends)
        self._to_server = to_server
        pairs = {slot: socket.socketpair() for slot in "ab"}
        self._slot_sockets = [worker_end for worker_end, _ in pairs.values()]
        for worker_end in self._slot_sockets:
            worker_end.setblocking(False)
        self.slots = {slot: SlotReader(server_end) for slot, (_, server_end) in pairs.items()}
        descriptors = [worker_end.fileno() for worker_end in self._slot_sockets]
        self.relay = Relay(from_server, to_worker, from_worker, to_server, dict(enumerate(descriptors)))
        self.thread = threading.Thread(target=self.relay.run, daemon=True)
        self.thread.start()

    def start(self) -> None:
        """Read at both ends; the server learns of the slots."""
        self.server.reader.start()
        self.worker.reader.start()
        self.worker.send(type="ready", slots=list(self.slots))
        self.server.wait_for(1)
        self.server.arrived.clear()

    def close(self) -> None:
        os.close(self.server.sends)
        self.thread.join(10)
        assert not self.thread.is_alive()
        os.close(self.worker.sends)
        os.close(self._to_server)
        for worker_end in self._slot_sockets:
            worker_end.close()


@pytest.fixture
def channel() -> Iterator[Channel]:
    channel = Channel()
    channel.start()
    yield channel
    channel.close()


def test_messages_pass_unchanged_in_both_directions(channel: Channel) -> None:
    channel.server.send(type="healthcheck", id="hc_1")
    channel.server.send(type="shutdown")
    channel.worker.send(type="log", source="stdout", data="x" * 300_000)
    channel.worker.send(type="idle", slot="a")
    assert channel.worker.wait_for(2) == [{"type": "healthcheck", "id": "hc_1"}, {"type": "shutdown"}]
    log, idle = channel.server.wait_for(2)
    assert len(log["data"]) == 300_000
    assert idle == {"type": "idle", "slot": "a"}


@pytest.mark.parametrize("body", [b"[1]", b"not JSON", b'{"slot": 1}', b""])
def test_a_message_that_the_relay_does_not_know_passes(channel: Channel, body: bytes) -> None:
    channel.server.send_body(body)
    channel.server.send(type="shutdown")
    deadline = time.monotonic() + 10
    while len(channel.worker.arrived) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [arrived for _, arrived in channel.worker.arrived] == [body, b'{"type": "shutdown"}']


def test_a_cancel_is_held_back_and_repeated_until_its_slot_is_idle(channel: Channel) -> None:
    sent = time.monotonic()
    channel.server.send(type="cancel", slot="a")
    assert channel.worker.wait_for(3) == [{"type": "cancel", "slot": "a"}] * 3
    times = [arrived - sent for arrived, _ in channel.worker.arrived]
    assert times[0] >= HOLD_SECONDS
    channel.worker.send(type="idle", slot="a")
    assert channel.server.wait_for(1) == [{"type": "idle", "slot": "a"}]
    count = len(channel.worker.arrived)
    time.sleep(LONG)
    assert len(channel.worker.arrived) == count


def test_a_cancelled_slot_is_idle_for_the_server_only_when_the_worker_is_done_with_the_last_cancel(
    channel: Channel,
) -> None:
    channel.worker.answer_checks.clear()
    channel.server.send(type="cancel", slot="a")
    channel.worker.wait_for(1)
    channel.worker.send(type="idle", slot="a")
    time.sleep(0.1)
    assert channel.server.arrived == []
    channel.worker.answer_checks.set()
    assert channel.server.wait_for(1) == [{"type": "idle", "slot": "a"}]


def test_a_cancel_of_a_prediction_that_ends_meanwhile_is_dropped(channel: Channel) -> None:
    channel.server.send(type="cancel", slot="a")
    channel.worker.send(type="idle", slot="a")
    channel.server.wait_for(1)
    time.sleep(LONG)
    assert channel.worker.arrived == []


def test_the_intervals_between_repetitions_grow() -> None:
    descriptors = [*os.pipe(), *os.pipe()]
    from_server, _, worker_receives, to_worker = descriptors
    relay = Relay(from_server, to_worker, from_server, to_worker, {})
    cancel = cancel_relay._frame({"type": "cancel", "slot": "a"})
    relay._down(cancel)
    begun = relay._cancels["a"].due - HOLD_SECONDS
    sent = []
    for milliseconds in range(2_000):
        relay._tick(begun + (milliseconds + 0.5) / 1_000)
        if cancel_relay._unread(worker_receives):
            assert os.read(worker_receives, 1_000) == cancel
            sent.append(milliseconds)
    intervals = [later - earlier for earlier, later in itertools.pairwise(sent)]
    assert sent[0] == pytest.approx(1_000 * HOLD_SECONDS, abs=1)
    assert intervals == pytest.approx([40, 80, 160, 320, 640, 640], abs=1)
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_slot_is_idle_for_the_server_only_when_it_has_handled_the_last_message_of_its_prediction(
    channel: Channel,
) -> None:
    channel.slots["a"].go_on.clear()
    channel.worker.send(type="idle", slot="a")
    time.sleep(0.1)
    assert channel.server.arrived == []
    channel.slots["a"].go_on.set()
    assert channel.server.wait_for(1) == [{"type": "idle", "slot": "a"}]
    assert channel.slots["a"].contents == [b"null"]


def test_a_cancel_that_the_server_sends_before_the_last_message_of_its_prediction_is_dropped(channel: Channel) -> None:
    """However late the server handles that message, and however late the cancel."""
    channel.slots["a"].before_each = lambda: channel.server.send(type="cancel", slot="a")
    for count in range(1, 51):
        channel.worker.send(type="idle", slot="a")
        channel.server.wait_for(count)
    time.sleep(LONG)
    assert channel.worker.arrived == []


def test_the_next_prediction_of_a_slot_can_be_cancelled_at_once(channel: Channel) -> None:
    channel.worker.send(type="idle", slot="a")
    channel.server.wait_for(1)
    channel.server.send(type="cancel", slot="a")
    channel.worker.wait_for(2)


def test_a_server_that_is_behind_with_a_slot_is_asked_for_its_receipt_later() -> None:
    channel = Channel()
    backlog = channel._slot_sockets[0]
    channel.slots["a"].go_on.clear()
    message = json.dumps({"type": "file_output", "filename": os.devnull}).encode()
    with suppress(BlockingIOError):  # the socket takes no more
        while True:
            backlog.sendall(len(message).to_bytes(4) + message)
    try:
        channel.start()
        channel.worker.send(type="idle", slot="a")
        time.sleep(0.1)
        assert channel.server.arrived == []
        channel.slots["a"].go_on.set()
        assert channel.server.wait_for(1) == [{"type": "idle", "slot": "a"}]
        assert set(channel.slots["a"].contents[:-1]) == {b""}
        assert channel.slots["a"].contents[-1] == b"null"
    finally:
        channel.close()


def test_a_server_that_gives_no_receipt_keeps_no_slot_busy(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel_relay, "MAX_RECEIPT_SECONDS", 0.2)
    channel.slots["a"].go_on.clear()
    channel.worker.send(type="idle", slot="a")
    channel.server.wait_for(1)
    monkeypatch.setattr(cancel_relay, "MAX_RECEIPT_SECONDS", 3600)
    channel.worker.send(type="idle", slot="a")
    assert channel.server.wait_for(2) == [{"type": "idle", "slot": "a"}] * 2
    channel.slots["a"].go_on.set()


def test_what_a_server_reads_late_is_no_output_of_the_next_prediction(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancel_relay, "MAX_RECEIPT_SECONDS", 0.1)
    channel.slots["a"].go_on.clear()
    channel.worker.send(type="idle", slot="a")
    channel.server.wait_for(1)
    channel.slots["a"].go_on.set()
    deadline = time.monotonic() + 10
    while not channel.slots["a"].contents and time.monotonic() < deadline:
        time.sleep(0.001)
    assert channel.slots["a"].contents == [b""]


def test_where_too_many_files_are_open_a_receipt_is_asked_for_later(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts, pipe = itertools.count(), os.pipe

    def pipe_at_the_third_attempt() -> tuple[int, int]:
        if next(attempts) < 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return pipe()

    monkeypatch.setattr(os, "pipe", pipe_at_the_third_attempt)
    channel.worker.send(type="idle", slot="a")
    assert channel.server.wait_for(1) == [{"type": "idle", "slot": "a"}]
    assert channel.slots["a"].contents == [b"null"]


def test_a_receipt_is_never_asked_for_over_another_slots_socket(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though that of slot x, which comes before it, is unknown."""
    monkeypatch.setattr(channel.relay, "_slot_sockets", {1: channel._slot_sockets[0].fileno()})
    channel.worker.send(type="ready", slots=["x", "a"])
    channel.worker.send(type="idle", slot="x")
    assert channel.server.wait_for(2)[1] == {"type": "idle", "slot": "x"}
    assert channel.slots["a"].contents == []
    channel.worker.send(type="idle", slot="a")
    assert channel.server.wait_for(3)[2] == {"type": "idle", "slot": "a"}
    assert channel.slots["a"].contents == [b"null"]


def test_slots_sockets_are_found_by_the_names_of_their_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        expected = {}
        for index in (0, 11, 2):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(f"\0coglet-{os.getpid()}-{index}")
            listener.listen()
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(listener.getsockname())
            expected[index] = connection.fileno()
        assert cancel_relay._slot_sockets() == expected

    def no_proc(path: str) -> list[str]:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    monkeypatch.setattr(os, "listdir", no_proc)
    assert cancel_relay._slot_sockets() == {}


def test_a_second_cancel_of_a_prediction_that_has_ended_is_dropped(
    channel: Channel,
) -> None:
    channel.worker.answer_checks.clear()  # so the idle message is held back
    channel.server.send(type="cancel", slot="a")
    channel.worker.wait_for(1)
    channel.worker.send(type="idle", slot="a")
    time.sleep(0.1)
    channel.server.send(type="cancel", slot="a")
    time.sleep(0.1)
    channel.worker.answer_checks.set()
    channel.server.wait_for(1)
    count = len(channel.worker.arrived)
    time.sleep(LONG)
    assert len(channel.worker.arrived) == count


def test_a_cancel_that_the_worker_does_not_take_is_forgotten(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime has lost the place of its prediction, which never starts."""
    monkeypatch.setattr(cancel_relay, "MAX_REPEAT_SECONDS", 0.5)
    channel.server.send(type="cancel", slot="a")
    time.sleep(cancel_relay.MAX_REPEAT_SECONDS + HOLD_SECONDS)
    count = len(channel.worker.arrived)
    time.sleep(2 * cancel_relay.MAX_REPEAT_SECONDS)
    assert len(channel.worker.arrived) == count


def test_other_slots_do_not_wait_for_a_cancelled_one(channel: Channel) -> None:
    channel.server.send(type="cancel", slot="a")
    channel.worker.send(type="idle", slot="b")
    assert channel.server.wait_for(1) == [{"type": "idle", "slot": "b"}]
    assert channel.worker.arrived == []


def test_a_slot_that_the_worker_gives_up_is_cancelled_no_more(channel: Channel) -> None:
    channel.server.send(type="cancel", slot="a")
    channel.worker.wait_for(1)
    channel.worker.send(type="failed", slot="a", error="Socket write error")
    channel.server.wait_for(1)
    count = len(channel.worker.arrived)
    time.sleep(LONG)
    assert len(channel.worker.arrived) == count


def test_a_worker_that_does_not_read_keeps_nobody_waiting() -> None:
    channel = Channel()  # nothing reads at the worker's end
    channel.server.reader.start()
    try:
        for _ in range(2_000):
            channel.server.send(type="healthcheck", id="x" * 100)
        channel.worker.send(type="idle", slot="a")
        assert channel.server.wait_for(1) == [{"type": "idle", "slot": "a"}]
        channel.worker.reader.start()
        channel.worker.wait_for(2_000)
    finally:
        channel.close()


def test_the_worker_sees_that_the_server_has_ended() -> None:
    channel = Channel()
    channel.start()
    channel.server.send(type="shutdown")
    channel.close()
    assert channel.worker.closed.wait(10)
    assert channel.worker.wait_for(1) == [{"type": "shutdown"}]


def test_the_runtime_itself_gives_receipts(tmp_path: Path) -> None:
    """Without one its only place would stay taken for an hour."""
    (tmp_path / "predict.py").write_text(PREDICTOR)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the server starts its worker as `python`
    variables = {"COG_PREDICT_TYPE_STUB": "predict.py:Predictor", "COG_MAX_CONCURRENCY": "1", "PATH": binaries}
    with child(command, tmp_path, **variables, PORT=str(port)) as server:
        deadline = time.monotonic() + 60
        done = 0
        while done < 3:
            assert time.monotonic() < deadline, server.tail()
            request = urllib.request.Request(f"http://127.0.0.1:{port}/predictions", b'{"input": {}}')
            request.add_header("Content-Type", "application/json")
            try:
                with urllib.request.urlopen(request) as response:
                    assert json.load(response)["output"] == "done"
                done += 1
            except OSError:  # not started yet, or no place is free
                time.sleep(0.05)


def test_a_process_that_is_no_worker_is_left_alone() -> None:
    threads = threading.active_count()
    cancel_relay.install()
    assert threading.active_count() == threads
