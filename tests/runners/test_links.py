"""What goes over Unix sockets, with threads in the place of processes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from lmtp.runners.links import MAX_BYTES, Links, pairs, shard_size


def sums(parts: list[Tensor], rounds: int = 1) -> list[Tensor]:
    """What each of the processes gets as the sum of their parts, the last time."""
    links = [Links(rank, sockets) for rank, sockets in enumerate(pairs(len(parts)))]

    def add(rank: int) -> Tensor:
        links[rank].wait_at_most(10)
        for _ in range(rounds - 1):
            links[rank].sum(parts[rank])
        return links[rank].sum(parts[rank])

    try:
        with ThreadPoolExecutor(len(parts)) as threads:
            return list(threads.map(add, range(len(parts))))
    finally:
        for link in links:
            link.close()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, MAX_BYTES])
def test_all_processes_get_the_same_sum(count: int, dtype: torch.dtype, size: int) -> None:
    shape = (2, size // 2 // dtype.itemsize) if size == MAX_BYTES else (1,)
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(count)]
    expected = sum(parts[1:], start=parts[0])
    before = [part.clone() for part in parts]
    for found in sums(parts, rounds=20):
        assert torch.equal(found, expected)
    assert all(map(torch.equal, parts, before))


def test_larger_tensors_are_not_taken() -> None:
    links = Links(0, pairs(2)[0])
    assert links.takes(torch.empty(MAX_BYTES, dtype=torch.uint8))
    assert not links.takes(torch.empty(MAX_BYTES + 1, dtype=torch.uint8))
    assert not Links(0, []).takes(torch.empty(1))


def test_a_process_that_has_ended_is_an_error() -> None:
    ours, theirs = (Links(rank, sockets) for rank, sockets in enumerate(pairs(2)))
    theirs.close()
    with pytest.raises(BrokenPipeError):
        ours.sum(torch.ones(2))
    ours.close()


def test_a_process_that_does_not_answer_is_an_error() -> None:
    ours, theirs = (Links(rank, sockets) for rank, sockets in enumerate(pairs(2)))
    ours.wait_at_most(0.05)
    with pytest.raises(TimeoutError):
        ours.sum(torch.ones(2))
    ours.close()
    theirs.close()


@pytest.mark.parametrize("size", [9, 4])  # three of each; two, two and none
def test_the_first_process_gathers_what_all_have_of_a_dimension(size: int) -> None:
    whole = torch.arange(2.0 * size).view(2, size)
    shards = whole.split(shard_size(size, 3), -1)
    parts = [*shards, *[whole[:, :0]] * (3 - len(shards))]
    links = [Links(rank, sockets) for rank, sockets in enumerate(pairs(3))]
    for link, part in zip(links[1:], parts[1:], strict=True):
        assert torch.equal(link.gather(part, size), torch.zeros(2, size))
    assert torch.equal(links[0].gather(parts[0], size), whole)
    for link in links:
        link.close()


def test_what_the_first_process_sends_is_received_by_all_others() -> None:
    first, *others = (Links(rank, sockets) for rank, sockets in enumerate(pairs(3)))
    first.send(torch.arange(5))
    assert [link.receive(torch.empty(5, dtype=torch.int64)).tolist() for link in others] == [[0, 1, 2, 3, 4]] * 2
    for link in (first, *others):
        link.close()
