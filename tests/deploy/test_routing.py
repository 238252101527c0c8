"""Calls go to the replica that holds the longest beginning of their text, unless it is overloaded."""

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
    router = PrefixRouter(block=4, max_load=1.25)
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
