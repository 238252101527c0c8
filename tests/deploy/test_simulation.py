"""The simulation counts what engines compute, and it repeats."""

import itertools
import random
from collections.abc import Mapping

import pytest

from deploy.simulation import POLICIES, Call, Outcome, Replica, Speed, Traffic, length, simulate
from lmtp.protocol import Generate, Operation, Score
from tests.tiny import VOCABULARY, answers, build, start

TRAFFIC = Traffic(programs=3, head=(40, 80), question=(40, 60), answer=(3, 10), variables=(1, 3), options=(2, 3))


def run(policy: str, replicas: int, *, seed: int = 0, memory: int = 100_000) -> Outcome:
    return simulate(
        POLICIES[policy](seed),
        replicas,
        traffic=Traffic(),
        clients=4 * replicas,
        count=20 * replicas,
        memory=memory,
        speed=Speed(),
        seed=seed,
    )


def test_a_replica_computes_only_what_it_does_not_hold() -> None:
    replica = Replica(1000)
    assert replica.take(Call(((1, 100), (2, 10)), ((3, 5),))) == 110
    assert replica.take(Call(((1, 100), (2, 10), (3, 5), (4, 7)))) == 7
    assert replica.take(Call(((1, 100), (5, 3)))) == 3
    assert replica.take(Call(((1, 100), (5, 3)))) == 1, "the last token is computed again"


def test_a_replica_drops_the_least_recently_used_text() -> None:
    replica = Replica(250)
    for name in (1, 2, 1, 3):
        replica.take(Call(((name, 100),)))
    assert replica.take(Call(((1, 100),))) == 1
    assert replica.take(Call(((2, 100),))) == 100


def test_the_same_seed_gives_the_same_outcome() -> None:
    assert run("prefix", 3) == run("prefix", 3)
    assert run("prefix", 3) != run("prefix", 3, seed=1)


def test_routing_by_prefix_computes_little_more_than_one_replica_does() -> None:
    alone, together, scattered = run("prefix", 1), run("prefix", 8), run("random", 8)
    share, others = together.computed / together.sent, scattered.computed / scattered.sent
    assert share < 1.1 * alone.computed / alone.sent
    assert others > 1.5 * share
    assert together.busiest < 2


def test_less_memory_means_more_computation() -> None:
    assert run("prefix", 2, memory=2_000).computed > 1.5 * run("prefix", 2).computed


@pytest.mark.parametrize("policy", ["round robin", "prefix"])
def test_two_engines_compute_what_the_simulation_says(policy: str) -> None:
    model = build("llama")
    engines = {name: start(model) for name in "01"}
    calls: list[tuple[Call, str]] = []
    choose = POLICIES[policy](0)

    def note(call: Call, loads: Mapping[str, int]) -> str:
        calls.append((call, choose(call, loads)))
        return calls[-1][1]

    said = simulate(note, 2, traffic=TRAFFIC, clients=4, count=12, memory=100_000, speed=Speed(), seed=0)
    tokens: dict[int, list[int]] = {}
    computed = 0
    try:
        for call, replica in calls:
            prompt = list(itertools.chain.from_iterable(tokens.setdefault(*drawn(*segment)) for segment in call.text))
            count = length(call.answer)
            option = call.text[-1][1]
            operation: Operation = (
                Generate(stream_id=0, prompt=prompt, max_tokens=count, min_tokens=count)
                if count
                else Score(stream_id=0, prompt=prompt[:-option], scored=prompt[-option:])
            )
            got = answers(engines[replica], operation)
            computed += got.counters.computed_tokens
            if call.answer:
                tokens[call.answer[0][0]] = got.ids()
    finally:
        for engine in engines.values():
            engine.stop()
    assert computed == pytest.approx(said.computed, rel=0.05)


def drawn(name: int, count: int) -> tuple[int, list[int]]:
    """A segment's name and tokens."""
    return name, random.Random(name).choices(range(3, VOCABULARY), k=count)
