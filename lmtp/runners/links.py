"""What the processes of one machine tell each other, by Unix sockets between each two of them: messages of the first
process, and sums and logits on a CPU.

Gloo gives each operation to a thread, which another thread wakes when data comes. A decode step of the demo model adds
up 2 KB 60 times. Beside busy processes gloo took 0.4 ms for each and 0.29 ms of processor time, and sockets 0.06 ms and
0.02 ms (two processes on two cores).
"""

import itertools
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_BYTES = 96 << 10
"""Of a tensor to add up. Two such messages fit into a socket's buffer, so that no process waits while it sends."""

BUFFER_BYTES = 416 << 10
"""Asked for a socket's buffer: two messages and what the kernel adds to them."""

SPIN_SECONDS = 50e-6
"""How long to ask for data before sleeping, where each process has a core: a core that sleeps takes as long to wake."""

SPARE = 8
"""How many times to sleep at once after asking in vain: the others are waiting for a core themselves."""


class Links:
    """One process's sockets to the others. Its methods raise OSError where a process has ended or does not answer."""

    def __init__(self, rank: int, sockets: Sequence[socket.socket]) -> None:
        """``sockets`` are those to the other processes, in order of rank."""
        self.rank, self.count = rank, len(sockets) + 1
        self._sockets = sockets
        self._spins = len(os.sched_getaffinity(0)) >= self.count
        self._spared = 0

    def takes(self, tensor: Tensor) -> bool:
        """Whether `sum` can be used for a tensor of this size, in every process alike."""
        return bool(self._sockets) and tensor.device.type == "cpu" and tensor.nbytes <= MAX_BYTES

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, to the last bit the same in all of them."""
        parts = self.exchange(tensor)
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        """The processes' tensors of one shape, in order of rank."""
        tensor = tensor.contiguous()
        self.send(tensor)
        others = [self._received(link, torch.empty_like(tensor)) for link in self._sockets]
        return [*others[: self.rank], tensor, *others[self.rank :]]

    def gather(self, part: Tensor, size: int) -> Tensor:
        """In the first process, the parts of all ``[..., size]``, as torch.distributed.tensor shards ``size``. In the
        others zeros of that shape."""
        if self.rank:
            _send(self._sockets[0], part.contiguous())
            return part.new_zeros(*part.shape[:-1], size)
        each = shard_size(size, self.count)
        parts = [part]
        for rank, link in enumerate(self._sockets, start=1):
            width = max(min(each, size - rank * each), 0)
            parts.append(self._received(link, part.new_empty(*part.shape[:-1], width)))
        return torch.cat(parts, -1)

    def send(self, tensor: Tensor) -> None:
        """Send a tensor to all others."""
        for link in self._sockets:
            _send(link, tensor)

    def receive(self, tensor: Tensor) -> Tensor:
        """Fill a tensor with what the first process sends, however long that takes."""
        return _filled(tensor, self._sockets[0])

    def wait_at_most(self, seconds: float) -> None:
        """Bound how long to wait for the others. The default is for ever."""
        for link in self._sockets:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # settimeout would poll before each call
                link.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))

    def close(self) -> None:
        """Close the sockets."""
        for link in self._sockets:
            link.close()

    def _received(self, link: socket.socket, tensor: Tensor) -> Tensor:
        """What another process is about to send."""
        if self._spins and not self._spared:
            until = time.perf_counter() + SPIN_SECONDS
            while not _has_data(link):
                if time.perf_counter() > until:
                    self._spared = SPARE
                    break
        elif self._spared:
            self._spared -= 1
        return _filled(tensor, link)


def pairs(count: int) -> list[list[socket.socket]]:
    """Sockets between each two of so many processes: for each process those to the others, in order of rank."""
    ends: list[list[socket.socket]] = [[] for _ in range(count)]
    for one, other in itertools.combinations(range(count), 2):
        for rank, end in zip((one, other), socket.socketpair(), strict=True):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            ends[rank].append(end)
    return ends


def shard_size(size: int, count: int) -> int:
    """What each of so many processes has of a dimension that torch.distributed.tensor shards; the last ones have
    less."""
    return -(-size // count)


def _send(link: socket.socket, tensor: Tensor) -> None:
    try:
        link.sendall(_bytes(tensor))
    except BlockingIOError:
        raise TimeoutError("it does not answer") from None


def _has_data(link: socket.socket) -> bool:
    try:
        link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True  # or the end


def _filled(tensor: Tensor, link: socket.socket) -> Tensor:
    left = _bytes(tensor)
    while left:
        try:
            count = link.recv_into(left)
        except BlockingIOError:
            raise TimeoutError("it does not answer") from None
        if not count:
            raise ConnectionError("it has ended")
        left = left[count:]
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
