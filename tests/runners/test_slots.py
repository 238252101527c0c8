"""Slots: whose prefix is taken over, who has to go, what the memory holds after it was moved."""

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmtp.runners.slot_runner import SlotCache
from lmtp.runners.slots import Layer, Memory, Slots, check_budget, common_prefix
from lmtp.runners.step import StepInputs, Stream
from lmtp.settings import SettingsError

CONTEXT = 1024
CPU = torch.device("cpu")
LAYERS = [Layer(heads=1, key_dim=2, value_dim=2, device=CPU), Layer(heads=1, key_dim=2, value_dim=4, device=CPU)]
PER_TOKEN = (2 + 2 + 2 + 4) * 4


def make(tokens: int = 10_000, max_slots: int = 64) -> tuple[Memory, Slots]:
    memory = Memory(LAYERS, torch.float32)
    assert memory.bytes_per_token == PER_TOKEN
    return memory, Slots(memory, tokens * PER_TOKEN, max_slots, CONTEXT)


def stream(prompt: list[int], max_tokens: int = 8) -> Stream:
    return Stream(list(prompt), min(len(prompt) + max_tokens, CONTEXT))


def compute(memory: Memory, some: Stream) -> None:
    """Write what the model would: here a token's keys and values are the token itself."""
    ids = torch.tensor(some.tokens, dtype=torch.float32)[None, :, None]
    for tensor in (*memory.keys, *memory.values):
        tensor[some.slot, :, some.computed : len(some.tokens)] = ids[:, some.computed :]
    some.computed = len(some.tokens)


def check(memory: Memory, some: Stream) -> None:
    ids = torch.tensor(some.tokens[: some.computed], dtype=torch.float32)[None, :, None]
    for tensor in (*memory.keys, *memory.values):
        assert (tensor[some.slot, :, : some.computed] == ids).all()


def test_a_prefix_is_taken_over_from_an_idle_slot_and_the_last_prompt_token_is_left_to_compute() -> None:
    memory, slots = make()
    first = stream([1, 2, 3, 4])
    assert slots.admit(first)
    compute(memory, first)
    slots.release(first)
    second = stream([1, 2, 3, 4])
    assert slots.shared_prefix(second) == (3, 3)
    assert slots.admit(second)
    assert (second.computed, second.reused) == (3, 3)
    check(memory, second)


class Moved(TorchDispatchMode):
    """Counts the numbers that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default):
            self.numbers += result.numel()
        return result


@pytest.mark.parametrize("long_first", [True, False])
def test_streams_that_change_places_move_no_more_than_they_hold(long_first: bool) -> None:
    memory, slots = make()
    long, short, last = stream(list(range(900))), stream([5] * 4), stream([6] * 4)
    for some in (long, short, last) if long_first else (short, last, long):
        slots.admit(some)
        compute(memory, some)
    gone = long if long_first else short
    with Moved() as moved:
        slots.release(gone)
    assert moved.numbers == (900 + 4 + 4) * PER_TOKEN // 4
    for some in slots.active:
        check(memory, some)
    again = stream(list(range(900)) if long_first else [5] * 4)
    slots.admit(again)
    assert again.reused == len(again.tokens) - 1
    check(memory, again)


class Launched(TorchDispatchMode):
    """Notes the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_a_step_finds_the_places_that_it_writes_to_once_for_all_layers_of_as_many_heads() -> None:
    heads = (1, 2, 1, 2, 2)
    memory = Memory([Layer(each, 2, 4, CPU) for each in heads], torch.float32)
    memory.resize(4, 32)
    writes = torch.tensor([[3, 4], [7, 32]])
    inputs = StepInputs(writes, writes, writes, writes, [], memory.keys, memory.values)
    cache = SlotCache(inputs, 16)
    with Launched() as launched:
        for layer, each in enumerate(heads):
            keys, values = torch.randn(2, each, 2, 2), torch.randn(2, each, 2, 4)
            read = cache.update(keys, values, layer)
            for states, seen, whole in zip(
                (keys, values), read, (memory.keys[layer], memory.values[layer]), strict=True
            ):
                assert seen.shape == (2, each, 16, states.shape[3])
                assert torch.equal(whole[0, :, 3:5], states[0])
                assert torch.equal(whole[1, :, [7, 32]], states[1])
                assert torch.count_nonzero(whole) == states.numel()
    assert launched.names.count("aten.arange.default") == 2 * len(set(heads))


def test_a_prefix_is_copied_from_a_running_stream_which_keeps_its_own() -> None:
    memory, slots = make()
    first, second = stream([1, 2, 3, 4, 5]), stream([1, 2, 3, 9])
    slots.admit(first)
    assert slots.shared_prefix(second) == (0, 3)
    compute(memory, first)
    assert slots.shared_prefix(second) == (3, 3)
    slots.admit(second)
    assert second.computed == 3
    compute(memory, second)
    check(memory, first)
    check(memory, second)


def test_a_short_part_of_a_long_idle_text_is_copied_so_that_the_text_stays() -> None:
    memory, slots = make()
    text = list(range(100))
    first = stream(text)
    slots.admit(first)
    compute(memory, first)
    slots.release(first)
    branch = stream([*text[:20], 999])
    slots.admit(branch)
    assert branch.computed == 20
    assert slots.shared_prefix(stream(text))[0] == 99


def test_contents_that_are_not_to_be_kept_are_not_reused() -> None:
    memory, slots = make()
    first = stream([1, 2, 3, 4])
    slots.admit(first)
    compute(memory, first)
    slots.release(first, keep=False)
    assert slots.shared_prefix(stream([1, 2, 3, 4])) == (0, 0)


def test_the_idle_slot_used_longest_ago_has_to_go() -> None:
    memory, slots = make(max_slots=3)
    for start in (100, 200, 300):
        some = stream(list(range(start, start + 60)))
        slots.admit(some)
        compute(memory, some)
        slots.release(some)
    slots.admit(stream(list(range(500, 560))))
    kept = [slots.shared_prefix(stream(list(range(start, start + 60))))[0] for start in (100, 200, 300)]
    assert kept == [0, 59, 59]


def test_streams_wait_when_the_budget_is_used_and_run_when_it_is_free() -> None:
    _, slots = make(tokens=600)
    long = stream([1] * 400, max_tokens=100)
    assert slots.admit(long)
    other = stream([2] * 10)
    assert not slots.admit(other)
    slots.release(long)
    assert slots.admit(other)
    assert slots.longest == 600


def test_common_prefix_counts_shared_tokens() -> None:
    for length in (0, 1, 2, 3, 17, 100):
        for shared in range(0, length + 1, max(length // 7, 1)):
            one = list(range(length))
            other = [*one[:shared], -1, *one[shared + 1 :]]
            assert common_prefix(one, other) == shared
    assert common_prefix([1, 2, 3], [1, 2]) == 2


@pytest.mark.parametrize("tokens", [700, 3000, 100_000])
def test_whatever_comes_and_goes_every_stream_finds_its_own_keys_and_values(tokens: int) -> None:
    generator = random.Random(tokens)
    memory, slots = make(tokens, max_slots=12)
    texts = [[generator.randrange(900) for _ in range(300)] for _ in range(4)]
    running: list[Stream] = []
    admitted = 0
    for _ in range(600):
        if generator.random() < 0.5 or not running:
            text = generator.choice(texts)
            prompt = [
                *text[: generator.randint(1, 300)],
                *(generator.randrange(900) for _ in range(generator.randint(0, 9))),
            ]
            some = stream(prompt, generator.randint(1, 100))
            if slots.admit(some):
                admitted += 1
                running.append(some)
                check(memory, some)
                compute(memory, some)
        elif generator.random() < 0.5:
            grown = generator.choice(running)
            if len(grown.tokens) < grown.max_length:
                grown.tokens.append(generator.randrange(900))
                compute(memory, grown)
        else:
            gone = running.pop(generator.randrange(len(running)))
            slots.release(gone, keep=generator.random() < 0.8)
        assert [s.slot for s in slots.active] == list(range(len(running)))
        assert memory.slots * memory.capacity <= max(tokens, memory.capacity)
        for some in running:
            check(memory, some)
    assert admitted > 100


@pytest.mark.parametrize("budget", [1, PER_TOKEN * 15, 10**15])
def test_a_budget_that_holds_nothing_or_more_than_there_is_is_refused_with_both_limits(budget: int) -> None:
    with pytest.raises(SettingsError, match=r"^KV_CACHE_GB is .*; this model needs at least .*, and there are .* GB"):
        Slots(Memory(LAYERS, torch.float32), budget, 64, CONTEXT)


def test_a_refused_budget_is_written_as_it_was_given() -> None:
    with pytest.raises(SettingsError, match=r"^KV_CACHE_GB is 1000; .* needs at least 0.5, and there are 24 GB"):
        check_budget(1000 * 2**30, 2**29, 24 * 2**30)


def test_memory_that_the_system_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, slots = make()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    assert not slots.admit(stream([1, 2, 3]))
    assert slots.refusal == "no memory for keys and values: [Errno 12] Cannot allocate memory"
