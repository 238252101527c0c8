"""Extents of a flat pool: whose prefix is taken over, who has to go, what moves, what the pool holds after that."""

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmtp.runners.extents import MAX_EXTENTS, MAX_STREAMS, Extents, Pool
from lmtp.runners.slots import Layer
from lmtp.runners.step import Stream

CONTEXT = 1024
CPU = torch.device("cpu")
LAYERS = [Layer(heads=1, key_dim=2, value_dim=2, device=CPU), Layer(heads=1, key_dim=4, value_dim=4, device=CPU)]


def make(tokens: int) -> Extents:
    return Extents(Pool(LAYERS, torch.float32, tokens), CONTEXT)


def stream(prompt: list[int], max_tokens: int = 8) -> Stream:
    return Stream(list(prompt), min(len(prompt) + max_tokens, CONTEXT))


def run(first: int, count: int, max_tokens: int = 8) -> Stream:
    """A stream whose prompt is the numbers from ``first`` on."""
    return stream(list(range(first, first + count)), max_tokens)


def held(extents: Extents, some: Stream) -> torch.Tensor:
    start = extents.start_of(some)
    return torch.cat(
        [tensor[start : start + some.computed, 0, :2] for tensor in (*extents.pool.keys, *extents.pool.values)], dim=1
    )


def compute(extents: Extents, some: Stream) -> None:
    """Write what the model would: here a token's keys and values are the token itself."""
    start = extents.start_of(some)
    ids = torch.tensor(some.tokens[some.computed :], dtype=torch.float32)[:, None, None]
    for tensor in (*extents.pool.keys, *extents.pool.values):
        tensor[start + some.computed : start + len(some.tokens)] = ids
    some.computed = len(some.tokens)


def check(extents: Extents, some: Stream) -> None:
    ids = torch.tensor(some.tokens[: some.computed], dtype=torch.float32)[:, None]
    assert (held(extents, some) == ids).all()


def admit(extents: Extents, some: Stream) -> Stream:
    assert extents.admit(some)
    check(extents, some)
    compute(extents, some)
    return some


def finish(extents: Extents, some: Stream) -> None:
    admit(extents, some)
    extents.release(some)


def test_a_stream_owns_as_much_as_it_may_come_to_hold() -> None:
    extents = make(100)
    admit(extents, run(0, 30, 20))
    assert extents.owned == 50
    assert not extents.admit(run(100, 30, 21))
    admit(extents, run(100, 30, 20))
    assert extents.owned == 100


def test_a_prefix_is_taken_over_in_place_and_the_last_prompt_token_is_left_to_compute() -> None:
    extents = make(100)
    finish(extents, run(0, 40))
    again = run(0, 40)
    assert extents.shared_prefix(again) == (39, 39)
    admit(extents, again)
    assert (again.reused, extents.start_of(again)) == (39, 0)


def test_a_prefix_is_copied_from_a_running_stream_which_keeps_its_own() -> None:
    extents = make(100)
    first, second = run(0, 20), stream([*range(10), 99, 98])
    extents.admit(first)
    assert extents.shared_prefix(second) == (0, 10)
    compute(extents, first)
    assert extents.shared_prefix(second) == (10, 10)
    admit(extents, second)
    check(extents, first)
    assert second.reused == 10


def test_a_short_prefix_of_a_long_idle_text_is_copied_and_the_text_stays() -> None:
    extents = make(200)
    finish(extents, run(0, 100))
    admit(extents, stream([*range(10), 999]))
    assert extents.shared_prefix(run(0, 100)) == (99, 99)


def test_a_prefix_that_leaves_no_room_for_a_copy_is_taken_over_where_it_is() -> None:
    extents = make(110)
    finish(extents, run(0, 100))
    some = admit(extents, stream([*range(60), 999], 40))
    assert some.reused == 60
    assert extents.shared_prefix(run(0, 100)) == (60, 60)


def test_the_least_recently_used_idle_text_goes_first() -> None:
    extents = make(100)
    for first in (0, 100, 200):
        finish(extents, run(first, 30))
    finish(extents, run(0, 30))  # used again
    admit(extents, run(300, 30))
    assert [extents.shared_prefix(run(first, 30))[0] for first in (0, 100, 200)] == [29, 0, 29]


def test_streams_with_other_salts_and_sources_share_nothing() -> None:
    extents = make(100)
    finish(extents, run(0, 20))
    salted, sourced = run(0, 20), run(0, 20)
    salted.salt, sourced.source = "other", (1,)
    assert extents.shared_prefix(salted) == extents.shared_prefix(sourced) == (0, 0)


def count_moves(extents: Extents, patch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each move from now on."""
    moved, move = [], extents.pool.move

    def counted(source: int, target: int, count: int) -> None:
        moved.append(count)
        move(source, target, count)

    patch.setattr(extents.pool, "move", counted)
    return moved


def test_room_in_pieces_is_brought_together_by_moving_the_fewest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    extents = make(100)
    texts = [admit(extents, run(100 * i, held, 20 - held)) for i, held in enumerate((9, 2, 7, 3, 12))]
    for text in (texts[0], texts[2], texts[4]):
        extents.release(text, keep=False)
    moved = count_moves(extents, monkeypatch)
    admit(extents, run(900, 35, 5))
    assert moved == [2]
    for text in (texts[1], texts[3]):
        check(extents, text)


def test_a_text_that_is_taken_over_grows_between_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room for a second copy of it, and too little on either side of it alone."""
    extents = make(100)
    left, taken, right, end = (admit(extents, run(100 * i, 5, 20)) for i in range(4))
    extents.release(left, keep=False)
    other = admit(extents, run(500, 5, 10))
    extents.release(taken)
    assert extents.start_of(other) == 0
    moved = count_moves(extents, monkeypatch)
    grown = admit(extents, run(100, 5, 30))
    assert grown.reused == 4
    assert sum(moved) <= 4
    for text in (other, right, end, grown):
        check(extents, text)


@pytest.mark.parametrize("distance", [-1500, -3, 3, 1500])
def test_tokens_move_to_places_that_overlap_theirs(distance: int) -> None:
    pool = Pool(LAYERS, torch.float32, 6000)
    for tensor in (*pool.keys, *pool.values):
        tensor.copy_(torch.arange(6001.0)[:, None, None].expand_as(tensor))
    pool.move(1500, 1500 + distance, 3000)
    for tensor in (*pool.keys, *pool.values):
        assert (tensor[1500 + distance :][:3000, 0, 0] == torch.arange(1500.0, 4500.0)).all()


class Operations(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **kwargs or {})


def test_moving_tokens_allocates_nothing_so_that_it_cannot_run_out_of_memory_half_done() -> None:
    pool = Pool(LAYERS, torch.float32, 2000)
    with Operations() as found:
        pool.move(0, 500, 1000)
    assert found.names == {"alias.default", "slice.Tensor", "copy_.default"}


def test_what_a_failed_stream_computed_is_neither_shared_nor_left_in_memory() -> None:
    extents = make(100)
    failed = admit(extents, run(1, 20))
    extents.release(failed, keep=False)
    assert extents.shared_prefix(run(1, 20)) == (0, 0)
    assert all((tensor == 0).all() for tensor in (*extents.pool.keys, *extents.pool.values))


def test_released_streams_leave_no_room_behind() -> None:
    extents = make(100)
    for i in range(100):
        some = admit(extents, run(100 * i, 20))
        extents.release(some, keep=i % 2 == 0)
        assert (extents.owned, extents.active, some.slot) == (0, [], -1)
    admit(extents, run(0, 50, 50))


def test_streams_and_idle_texts_are_bounded_in_number() -> None:
    extents = make(2000)
    for i in range(MAX_EXTENTS + 10):
        finish(extents, stream([i + 1], 1))
    assert extents.shared_prefix(stream([1, 1]))[0] == 0
    assert extents.shared_prefix(stream([MAX_EXTENTS + 10, 1]))[0] == 1
    for i in range(MAX_STREAMS):
        assert extents.admit(stream([i + 5000], 1))
    assert not extents.admit(stream([1], 1))


@pytest.mark.parametrize("tokens", [1100, 10_000])
def test_whatever_comes_and_goes_every_stream_finds_its_own_keys_and_values(tokens: int) -> None:
    generator = random.Random(tokens)
    extents = make(tokens)
    texts = [[generator.randrange(900) for _ in range(300)] for _ in range(4)]
    running: list[Stream] = []
    admitted = reused = 0
    for _ in range(4000):
        choice = generator.random()
        if (choice < 0.4 and len(running) < 64) or not running:
            prompt = [
                *generator.choice(texts)[: generator.randint(1, 300)],
                *(generator.randrange(900) for _ in range(generator.randint(0, 9))),
            ]
            some = stream(prompt, generator.randint(1, 200))
            if not extents.admit(some):
                assert extents.owned + some.max_length > tokens
                continue
            admitted, reused = admitted + 1, reused + some.reused
            running.append(some)
            check(extents, some)
            compute(extents, some)
        elif choice < 0.7:
            grown = generator.choice(running)
            if len(grown.tokens) < grown.max_length:
                grown.tokens.append(generator.randrange(900))
                compute(extents, grown)
        else:
            gone = running.pop(generator.randrange(len(running)))
            check(extents, gone)
            extents.release(gone, keep=generator.random() < 0.8)
        assert [s.slot for s in extents.active] == list(range(len(running)))
        assert extents.owned <= 1.15 * sum(s.max_length for s in running)
    for some in running:
        check(extents, some)
    assert admitted > 500
    assert reused > 20_000
