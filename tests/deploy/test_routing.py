"""Calls go to the replica that holds the longest beginning of their text, unless it is overloaded."""

import asyncio
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.routing import PrefixRouter

IDLE = {"a": 0, "b": 0, "c": 0}


def text(*names: str) -> str:
    """A text of blocks of four characters, one of each name."""
    return "".join(name * 4 for name in names)


def test_a_text_goes_on_where_it_began() -> None:
    router = PrefixRouter(block=4)
    first = router.choose(text("p", "q"), IDLE)
    assert router.choose(text("x"), {**IDLE, first: 1}) != first
    assert router.choose(text("p", "q", "r"), {**IDLE, first: 1}) == first


def test_the_longest_beginning_wins() -> None:
    router = PrefixRouter(block=4)
    short = router.choose(text("p", "x"), IDLE)
    long = router.choose(text("p", "q", "r"), {**IDLE, short: 99})
    assert router.choose(text("p", "q", "r", "s"), {**IDLE, long: 1}) == long
    assert router.choose(text("p", "x", "y"), {**IDLE, short: 1}) == short


def test_equal_blocks_after_different_beginnings_are_different_texts() -> None:
    router = PrefixRouter(block=4)
    first = router.choose(text("p", "q"), IDLE)
    assert router.choose(text("r", "q"), {**IDLE, first: 1}) != first


def test_an_overloaded_replica_gets_no_more() -> None:
    router = PrefixRouter(block=4, max_load=1.25, free_load=4)
    loads = dict(IDLE)
    for _ in range(30):
        loads[router.choose(text("p", "q"), loads)] += 1
        assert max(loads.values()) <= max(4, 1.25 * sum(loads.values()) / 3 + 1)
    assert min(loads.values()) >= 5


def test_calls_without_a_shared_beginning_go_to_the_least_loaded() -> None:
    assert PrefixRouter().choose("new", {"a": 2, "b": 1, "c": 3}) == "b"


def test_a_replica_that_is_gone_is_forgotten() -> None:
    router = PrefixRouter(block=4)
    first = router.choose(text("p"), IDLE)
    router.forget(first)
    assert router.choose(text("p"), {**IDLE, first: 1}) != first


def test_a_replica_that_left_the_list_gets_no_calls() -> None:
    router = PrefixRouter(block=4)
    first = router.choose(text("p"), IDLE)
    others = {name: 5 for name in IDLE if name != first}
    assert router.choose(text("p"), others) in others


def test_the_least_recently_used_blocks_are_forgotten_first() -> None:
    router = PrefixRouter(block=4, max_blocks=2)
    kept = router.choose(text("k"), IDLE)
    old = router.choose(text("o"), {**IDLE, kept: 1})
    assert router.choose(text("k"), {**IDLE, kept: 1}) == kept
    router.choose(text("x"), IDLE)
    assert router.choose(text("k"), {**IDLE, kept: 1}) == kept
    assert router.choose(text("o"), {**IDLE, old: 1}) != old


def test_a_text_that_shares_only_a_few_words_goes_to_the_least_loaded() -> None:
    router = PrefixRouter(block=4)
    first = router.choose(text("p", "q"), IDLE)
    busy = {**IDLE, first: 1}
    assert router.choose(text("p", "q", "r", "s"), busy) == first
    assert router.choose(text("p", "x", "y", "z"), busy) != first
    long = router.choose(text(*"abcdefghijklmnop"), busy)
    assert router.choose(text(*"abcdefghijklmnop") + "a long answer to it " * 20, {**busy, long: 2}) == long


# How Ray's request router uses it.


@dataclass(frozen=True)
class Call:
    """What the router reads of Ray's pending request."""

    kwargs: Mapping[str, str]
    metadata: SimpleNamespace
    future: asyncio.Future[object]


@dataclass(frozen=True)
class Replica:
    """What the router reads of Ray's running replica."""

    replica_id: SimpleNamespace
    max_ongoing_requests: int = 3


REPLICAS = [Replica(SimpleNamespace(unique_id=name)) for name in IDLE]
SOME = "The capital of France is a city on the river Seine."


class Routed:
    """Ray's request router with three replicas. Ray's own constructor needs a cluster."""

    def __init__(self) -> None:
        by_prefix = pytest.importorskip("deploy.ray_serve", reason="requirements/ray.txt is not installed").ByPrefix
        self.router: Any = by_prefix.__new__(by_prefix)
        self.router.initialize_state()
        self._ids = itertools.count()

    def call(self, text: str) -> Call:
        """A call that is about to be routed."""
        future: asyncio.Future[object] = asyncio.Future(loop=asyncio.new_event_loop())
        return Call({"text": text, "prediction": ""}, SimpleNamespace(internal_request_id=str(next(self._ids))), future)

    def order(self, call: Call) -> list[str]:
        """The replicas that Ray is to try, the best first."""
        tried = asyncio.run(self.router.choose_replicas(REPLICAS, call))
        return [replica.replica_id.unique_id for (replica,) in tried]

    def take(self, call: Call, replica: str) -> None:
        """The replica takes the call."""
        self.router.on_request_routed(call, SimpleNamespace(unique_id=replica), None)

    def send(self, text: str) -> tuple[Call, str]:
        """Route a call; its first choice takes it."""
        call = self.call(text)
        first = self.order(call)[0]
        self.take(call, first)
        return call, first

    def end(self, call: Call, replica: str) -> None:
        """The call ends."""
        self.router.on_request_completed(SimpleNamespace(unique_id=replica), call.metadata.internal_request_id)


def test_a_full_replica_is_not_remembered_to_hold_a_text_that_it_does_not_take() -> None:
    routed = Routed()
    _, holder = routed.send(SOME)
    full = [routed.send(SOME) for _ in range(2)]
    assert {replica for _, replica in full} == {holder}
    longer = SOME + " Its name is Paris, and it has two million inhabitants."
    _, other = routed.send(longer)
    assert other != holder
    routed.end(*full[0])
    routed.end(*full[1])
    assert routed.send(longer)[1] == other


def test_a_call_that_another_replica_took_is_remembered_there() -> None:
    routed = Routed()
    call = routed.call(SOME)
    first, other, _ = routed.order(call)
    routed.take(call, other)
    routed.end(call, other)
    busy = routed.call("p" * 20)
    routed.order(busy)
    routed.take(busy, first)
    assert routed.send(SOME + " Its name is")[1] == other


def test_calls_are_counted_from_the_choice_until_they_end_however_long_they_run() -> None:
    routed = Routed()
    assert {routed.order(routed.call(name * 20))[0] for name in "xyz"} == set(IDLE)
    call, busy = routed.send("p" * 20)
    for name in "qr":
        assert routed.send(name * 20)[1] != busy
    routed.end(call, busy)
    assert routed.send("s" * 20)[1] == busy


def test_a_call_whose_client_left_before_it_was_sent_counts_no_more() -> None:
    routed = Routed()
    left = routed.call("p" * 20)
    chosen = routed.order(left)[0]
    others = [routed.send(name * 20)[1] for name in "qr"]
    left.future.cancel()
    assert chosen not in others
    assert routed.send("s" * 20)[1] == chosen


def test_a_call_that_ends_before_ray_says_who_took_it_counts_no_more() -> None:
    """Also where its first choice did not take it."""
    routed = Routed()
    for took in (0, 1):
        call = routed.call("p" * 20)
        replica = routed.order(call)[took]
        routed.end(call, replica)
        routed.take(call, replica)
    assert routed.router._loads(IDLE) == dict.fromkeys(IDLE, 0)


def test_a_call_whose_client_left_once_its_replica_was_found_counts_no_more_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray has set its future by then, and does not say that the call has ended."""
    routed = Routed()
    left, sent = routed.call("p" * 20), routed.call("q" * 20)
    for call in (left, sent):
        routed.order(call)
        call.future.set_result(None)
    routed.take(sent, "b")
    assert sum(routed.router._loads(IDLE).values()) == 2
    monkeypatch.setattr("deploy.ray_serve.PROBE_SECONDS", 0.0)
    assert routed.router._loads(IDLE) == {"a": 0, "b": 1, "c": 0}


def test_a_call_waits_while_all_replicas_are_full() -> None:
    routed = Routed()
    sent = [routed.send(f"{number} " * 20) for number in range(9)]
    waiting = routed.call("w" * 20)
    assert sorted(routed.order(waiting)) == list(IDLE)
    routed.end(*sent[4])
    assert routed.order(waiting)[0] == sent[4][1]
