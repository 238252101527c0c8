"""Constraints from strangers: what they cost, what is kept of them, and that nobody else notices."""

import asyncio
import contextlib
import gc
import json
import random
import signal
import string
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerBase

from lmtp.engine import compiler as compiling
from lmtp.engine import constraint_cache, lanes, source, vetting
from lmtp.engine.compiler import Batch, Compiler
from lmtp.engine.constraint_cache import ConstraintCache
from lmtp.engine.grammar import Grammar
from lmtp.engine.source import Source
from lmtp.engine.vetting import QUICK_SECONDS, Vetter
from lmtp.protocol import Generate, RequestError

ENDS = [0, 2]
EXPLOSIVE = {"type": "string", "allOf": [{"pattern": f".*a.{{{i}}}.*"} for i in range(22)]}
"""A kilobyte that takes a minute and gigabytes to compile."""


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerBase) -> Compiler:
    compiler = Compiler(tokenizer, len(tokenizer), ENDS)
    ask(compiler, regex="warm-up")
    return compiler


def ask(compiler: Compiler, **constraint: Any) -> Grammar:
    grammar = asyncio.run(compiler.batch().grammar(Generate(stream_id=0, prompt="x", **constraint)))
    assert grammar is not None
    return grammar


def refusal(compiler: Compiler, **constraint: Any) -> str:
    with pytest.raises(RequestError) as refused:
        ask(compiler, **constraint)
    return str(refused.value)


def memory() -> int:
    """Bytes of this process and its children."""
    own = psutil.Process()
    total: int = own.memory_info().rss
    for child in own.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def test_an_explosive_schema_is_refused_after_a_second_of_processor_time_and_leaves_no_memory(
    compiler: Compiler,
) -> None:
    before = memory()
    assert "json_schema: not compiled within 0.8 s" in refusal(compiler, json_schema=EXPLOSIVE)
    time.sleep(0.2)
    assert memory() - before < 30e6


def test_four_explosive_schemas_at_once_delay_no_other_constraint(compiler: Compiler) -> None:
    with ThreadPoolExecutor(4) as pool:
        several = [
            pool.submit(refusal, compiler, json_schema=EXPLOSIVE | {"description": f"{i} of 4"}) for i in range(4)
        ]
        time.sleep(0.1)
        ask(compiler, regex="a small one beside them")
        assert not any(attempt.done() for attempt in several)
        assert all("not compiled within" in attempt.result() for attempt in several)


@dataclass
class FakeVetter:
    """Compiles nothing. Constraints that contain "slow" take longer than the first attempt, and then until allowed;
    those that contain "held" take their first attempt until allowed."""

    allowed: threading.Event = field(default_factory=threading.Event)
    began: list[str] = field(default_factory=list)
    waiting: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    at_once: int = 0
    most_at_once: int = 0

    def vet(self, source: Source, seconds: float) -> int:
        self.began.append(source.text)
        if "held" in source.text:
            self.waiting.release()
            assert self.allowed.wait(20)
        if "slow" in source.text:
            if seconds <= QUICK_SECONDS:
                raise TimeoutError
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self.waiting.release()
            assert self.allowed.wait(20)
            self.at_once -= 1
        return 2**20

    def check(self, schema: str, texts: Sequence[str], seconds: float) -> list[bool | None]:
        self.vet(Source("json_schema", schema), seconds)
        return [True] * len(texts)


@pytest.fixture
def fake(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVetter]:
    fake = FakeVetter()
    monkeypatch.setattr(compiler, "_opened", (compiler._open()[0], fake))
    yield fake
    fake.allowed.set()


def asked(batch: Batch, regex: str) -> asyncio.Task[Grammar | None]:
    return asyncio.ensure_future(batch.grammar(Generate(stream_id=0, prompt="x", regex=regex)))


async def test_no_small_constraint_waits_for_slow_ones_whoever_asked_for_them(
    compiler: Compiler, fake: FakeVetter
) -> None:
    one = compiler.batch()
    slow = [asked(one, f"slow {i} of one prediction") for i in range(20)]
    slow += [asked(compiler.batch(), f"slow, of prediction {i}") for i in range(30)]
    victims = [asked(compiler.batch(), f"small {i}") for i in range(20)]
    assert all(await asyncio.gather(*victims))
    assert not any(attempt.done() for attempt in slow)
    assert len([text for text in fake.began if "of one" in text]) <= 2 * 2  # it has two at a time, begun twice
    fake.allowed.set()
    assert all(await asyncio.gather(*slow))
    assert fake.most_at_once == lanes.MAX_SLOW


async def hold_quick_lane(compiler: Compiler, fake: FakeVetter) -> list[asyncio.Task[Grammar | None]]:
    """Constraints that take all of its threads until allowed."""
    held = [asked(compiler.batch(), f"held {i}") for i in range(lanes.MAX_QUICK)]
    for _ in held:
        assert await asyncio.to_thread(fake.waiting.acquire, timeout=20)
    return held


async def test_predictions_take_turns_with_their_first_attempts(compiler: Compiler, fake: FakeVetter) -> None:
    held = await hold_quick_lane(compiler, fake)
    attackers = [(compiler.batch(), i) for i in range(40)]
    many = [asked(batch, f"attacker {i}, constraint {j}") for batch, i in attackers for j in range(6)]
    await asyncio.sleep(0)  # each has its first two in the queue
    victim = asked(compiler.batch(), "the victim's")
    await asyncio.sleep(0)
    fake.allowed.set()
    assert await victim
    before = fake.began[lanes.MAX_QUICK : fake.began.index("the victim's")]
    assert len(before) <= 40 + lanes.MAX_QUICK  # four are begun at once
    assert all(await asyncio.gather(*held, *many))


async def test_what_nobody_asks_for_any_more_is_not_compiled(compiler: Compiler, fake: FakeVetter) -> None:
    held = await hold_quick_lane(compiler, fake)
    batches = [compiler.batch() for _ in range(3)]
    gone = [asked(batch, f"abandoned {i}") for i, batch in enumerate(batches)]
    shared = [asked(batch, "asked for by two") for batch in batches[:2]]
    await asyncio.sleep(0)
    for task in (*gone, shared[0]):
        task.cancel()
    await asyncio.gather(*gone, shared[0], return_exceptions=True)
    fake.allowed.set()
    assert all(await asyncio.gather(*held, shared[1]))
    assert await asked(compiler.batch(), "abandoned 0")  # somebody asks again
    assert [text for text in fake.began if "held" not in text] == ["asked for by two", "abandoned 0"]


def test_finished_texts_are_checked_few_at_a_time_and_no_quick_check_waits_for_slow_ones(
    compiler: Compiler, fake: FakeVetter
) -> None:
    def checked(name: str) -> list[bool | None]:
        return compiler.check(Generate(stream_id=0, prompt="x", json_schema={"title": name}), ["1"])

    with ThreadPoolExecutor(20) as pool:
        slow = [pool.submit(checked, f"slow {i}") for i in range(20)]
        for _ in range(lanes.MAX_SLOW):
            assert fake.waiting.acquire(timeout=20)
        assert checked("quick") == [True]
        assert not any(check.done() for check in slow)
        fake.allowed.set()
        assert [check.result() for check in slow] == [[True]] * 20
    assert fake.most_at_once == lanes.MAX_SLOW


def test_a_check_whose_turn_does_not_come_claims_nothing(
    compiler: Compiler, fake: FakeVetter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "QUEUE_SECONDS", 0.05)
    operations = [Generate(stream_id=i, prompt="x", json_schema={"title": f"slow {i}"}) for i in range(63)]
    with ThreadPoolExecutor(63) as pool:
        checks = list(pool.map(lambda operation: compiler.check(operation, ["1"]), operations))
    assert checks == [[None]] * 63
    assert fake.at_once <= lanes.MAX_SLOW
    regex = Generate(stream_id=0, prompt="x", regex="slow")
    assert compiler.check(regex, ["slow"]) == [None]


def test_the_cache_sets_memory_aside_for_lexers_that_grow(compiler: Compiler) -> None:
    grown = ask(compiler, regex="a lexer that may grow")._compiled
    words = ask(compiler, choices=["a lexer", "that does not"])._compiled
    assert grown.reserve * 64 > compiling.CACHE_BYTES
    assert words.reserve == 0


def test_a_constraint_that_is_in_the_slow_lane_is_compiled_once_for_all_who_ask(
    compiler: Compiler, fake: FakeVetter
) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(ask, compiler, regex="slow for both") for _ in range(2)]
        assert fake.waiting.acquire(timeout=20)
        fake.allowed.set()
        assert all(asked.result() for asked in both)
    assert fake.began == ["slow for both"] * 2


def test_what_takes_too_much_memory_or_stack_ends_only_its_own_attempt(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compiling.COMPILE_SECONDS, "json_schema", 20.0)
    assert "json_schema: too large or complex to compile; 256 MB of memory is the most." in refusal(
        compiler, json_schema=EXPLOSIVE | {"description": "with time enough"}
    )
    assert ask(compiler, regex="still served")
    monkeypatch.setattr(Vetter, "vet", None)
    assert "too large or complex" in refusal(compiler, json_schema=EXPLOSIVE | {"description": "with time enough"})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_somebody_else_ends_is_no_refusal_for_good(compiler: Compiler, number: signal.Signals) -> None:
    schema = EXPLOSIVE | {"description": number.name}
    parent = compiler._open()[1]._process
    assert parent is not None
    with ThreadPoolExecutor(1) as pool:
        attempt = pool.submit(refusal, compiler, json_schema=schema)
        while not attempt.done():
            for child in psutil.Process(parent.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(number)
            time.sleep(0.005)
    assert attempt.result() == "json_schema: cannot be compiled now: its process was ended; ask again later."
    assert "not compiled within" in refusal(compiler, json_schema=schema)


def test_the_end_of_a_child_is_told_while_others_run(compiler: Compiler) -> None:
    _, vetter = compiler._open()
    explosive = Source("json_schema", json.dumps(EXPLOSIVE))
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(vetter.vet, explosive, 0.1)
        long = pool.submit(vetter.vet, explosive, 0.7)
        with pytest.raises(TimeoutError):
            short.result()
        assert not long.done()
        with pytest.raises(TimeoutError):
            long.result()


def test_an_error_of_our_own_in_a_child_is_told_as_what_it_is(compiler: Compiler) -> None:
    _, vetter = compiler._open()
    with pytest.raises(RuntimeError, match=r"^TypeError: "):
        vetter.vet(Source("regex", 5), 1.0)  # type: ignore[arg-type]


def test_a_constraint_that_gets_no_processor_time_is_not_called_too_large(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vetting, "PATIENCE", 0.0)
    monkeypatch.setattr(vetting, "MARGIN", 0.001)
    monkeypatch.setattr(lanes, "QUICK_SECONDS", 5.0)  # of processor time
    busy = "regex: cannot be compiled now: the server is busy; ask again later."
    assert refusal(compiler, regex="a" * 300_001) == busy
    monkeypatch.undo()


def test_a_process_that_does_not_start_in_time_is_ended_and_started_again(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = Compiler(tokenizer, len(tokenizer), ENDS)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(vetting, "START_SECONDS", 0.1)
        patched.setattr(sys, "executable", str(python))
        assert "regex: cannot be compiled now: the process for it does not start" in refusal(compiler, regex="a")
        _, vetter = compiler._open()
        assert vetter._process is not None
        assert vetter._process.poll() is not None
    assert ask(compiler, regex="a")


def test_a_tokenizer_that_cannot_be_read_is_tried_again(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(tokenizer, len(tokenizer), ENDS)
    with monkeypatch.context() as patched:
        patched.setattr(compiling, "LLTokenizer", None)
        assert "tokenizer cannot be used with constraints" in refusal(compiler, regex="a")
    assert ask(compiler, regex="a")


async def test_a_constraint_does_not_wait_for_a_start_without_end(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(tokenizer, len(tokenizer), ENDS)
    monkeypatch.setattr(compiling, "QUEUE_SECONDS", 0.01)
    with compiler._opening, pytest.raises(RequestError, match="too many constraints are being compiled; ask again"):
        await compiler.batch().grammar(Generate(stream_id=0, prompt="x", regex="a"))
    monkeypatch.undo()
    assert await compiler.batch().grammar(Generate(stream_id=0, prompt="x", regex="a"))


def test_deep_stacks_are_reserved_while_they_are_used_and_one_at_most_is_kept(compiler: Compiler) -> None:
    def deep_stacks() -> int:
        with open("/proc/self/maps") as maps:
            spans = [line.split()[0].split("-") for line in maps]
        return sum(int(end, 16) - int(start, 16) >= compiling.STACK for start, end in spans)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: ask(compiler, regex=f"on deep stacks {i}"), range(16)))
    for _ in range(100):  # glibc keeps the last one, and frees the others when one more ends
        ask(compiler, regex="on a deep stack")
        compiling._with_deep_stack(lambda: None)
        if deep_stacks() <= 1:
            break
        time.sleep(0.01)
    assert deep_stacks() <= 1


def test_a_compiler_process_that_was_killed_is_started_again(compiler: Compiler) -> None:
    _, vetter = compiler._open()
    assert vetter._process is not None
    vetter._process.kill()
    vetter._process.wait()
    assert ask(compiler, regex="after the kill")


def test_a_process_that_cannot_be_started_fails_one_constraint_and_no_check(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(tokenizer, len(tokenizer), ENDS)
    with monkeypatch.context() as patched:
        patched.setattr("sys.executable", "/nonexistent")
        assert "regex: cannot be compiled now: " in refusal(compiler, regex="a")
        assert compiler.check(Generate(stream_id=0, prompt="x", json_schema={}), ["1"]) == [None]
    assert ask(compiler, regex="a")


def test_a_small_constraint_takes_milliseconds_and_a_known_one_takes_none(compiler: Compiler) -> None:
    def seconds(names: list[str]) -> float:
        times = []
        for name in names:
            started = time.monotonic()
            ask(compiler, json_schema={"type": "object", "properties": {name: {"type": "integer"}}})
            times.append(time.monotonic() - started)
        return min(times)  # other processes may take the processor meanwhile

    assert seconds([f"property {i}" for i in range(9)]) < 0.06
    assert seconds(["property 1"] * 9) < 0.005


def test_five_large_regexes_are_not_kept(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiling.COMPILE_SECONDS, "regex", 10.0)
    before = memory()
    for letter in "abcde":
        try:
            ask(compiler, regex=letter * 150_000)
        except RequestError as error:
            assert "too large or complex" in str(error)  # noqa: PT017
    assert memory() - before < 150e6


def test_the_cache_is_bounded_in_bytes_and_new_entries_leave_used_ones_alone() -> None:
    def entry(size: int) -> str:
        return "x" * (size - constraint_cache.OVERHEAD)

    cache = ConstraintCache(64 * 2**16)
    cache.add(b"used", entry(2**16))
    assert cache.get(b"used")
    for i in range(1_000):
        cache.add(str(i).encode(), entry(2**16))
    kept = [i for i in range(1_000) if str(i).encode() in cache._new]
    assert kept == list(range(984, 1_000))
    assert cache.get(b"used")
    cache.add(b"too large", entry(17 * 2**16))
    assert cache.get(b"too large") is None
    for i in range(984, 1_000):
        cache.get(str(i).encode())
    cache.add(b"last", entry(2**16))
    assert cache.get(b"last")


def test_a_refusal_is_remembered_but_not_one_for_lack_of_time(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    vet = Vetter.vet

    def counting(self: Vetter, source: Any, seconds: float) -> int:
        asked.append(source.text)
        return vet(self, source, seconds)

    monkeypatch.setattr(Vetter, "vet", counting)
    assert refusal(compiler, regex="(unclosed") == refusal(compiler, regex="(unclosed")
    assert asked == ["(unclosed"]
    monkeypatch.setitem(compiling.COMPILE_SECONDS, "regex", 0.001)
    assert "not compiled within" in refusal(compiler, regex="a" * 300_000)
    monkeypatch.setitem(compiling.COMPILE_SECONDS, "regex", 5.0)
    assert ask(compiler, regex="a" * 300_000)


def test_constraints_in_use_have_a_bound_on_their_memory(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    used = ask(compiler, regex="one that a stream follows")
    monkeypatch.setattr(compiling, "LIVE_BYTES", 2**10)
    assert "constraints in use take too much memory" in refusal(compiler, regex="one more")
    monkeypatch.undo()
    assert ask(compiler, regex="one more")
    assert used.forced()


async def test_however_much_some_predictions_hold_others_find_room(
    tokenizer: PreTrainedTokenizerBase, fake: FakeVetter, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fill(batch: Batch, name: str) -> list[Grammar | None]:
        """As many constraints of a megabyte as it may have."""
        grammars: list[Grammar | None] = []
        while True:
            operation = Generate(stream_id=0, prompt="x", regex=f"{name} {len(grammars)}")
            try:
                grammars.append(await batch.grammar(operation))
            except RequestError as error:
                assert "take too much memory; use fewer at once, or ask again later" in str(error)  # noqa: PT017
                return grammars

    gc.collect()
    before = compiler._in_use
    monkeypatch.setattr(compiling, "LIVE_BYTES", 100 * 2**20)
    held = [await fill(compiler.batch(), name) for name in ("first", "second", "third", "fourth")]
    counts = [len(grammars) for grammars in held]
    assert 15 <= counts[0] <= 25  # never more than a quarter of what others leave
    assert sum(counts) < 70
    assert min(counts) >= 5
    victim = compiler.batch()
    assert await victim.grammar(Generate(stream_id=0, prompt="x", regex="first 0"))  # a known one counts, too
    assert victim.size > 2**20
    again = await victim.grammar(Generate(stream_id=1, prompt="x", regex="first 0"))
    assert again
    assert victim.size < 2 * 2**20
    del held, victim, again
    gc.collect()
    assert compiler._in_use == before


def test_a_lexer_has_a_bound_on_its_states_and_a_check_beyond_it_claims_nothing(
    compiler: Compiler, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "states_of", lambda *_: 50_000)
    monkeypatch.setitem(Source._field_defaults, "states", 50_000)
    regex = ".*[a-m].{20}x.*"
    text = "".join(random.Random(0).choices(string.ascii_lowercase, k=600))
    assert compiler.check(Generate(stream_id=0, prompt="x", regex=regex), [text[:5]]) == [False]
    grammar = ask(compiler, regex=regex)

    def follow() -> None:
        for token in tokenizer.encode(text):
            grammar.matcher.compute_bitmask()
            grammar.advance(token)

    with pytest.raises(RequestError, match=r"cannot be followed here: .*too many states"):
        follow()
    compiled = grammar._compiled
    assert compiled.broken
    assert compiling._follows(compiled, compiler._open()[0], text) is None
    assert ask(compiler, regex=regex).matcher.compute_bitmask()


def test_the_constraints_of_a_prediction_share_a_number_of_lexer_states(
    compiler: Compiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    regexes = [f".*[a-m].{{20}}x{i}.*" for i in range(256)]
    operations = [Generate(stream_id=i, prompt="x", regex=regex) for i, regex in enumerate(regexes)]

    def states_of(constraints: int) -> int:
        return source.states_of(constraints, source.PREDICTION_STATES)

    assert states_of(256) * 256 <= source.PREDICTION_STATES
    assert states_of(1) == states_of(8) == source.MAX_STATES
    assert len({states_of(count) for count in range(257)}) <= 6
    same = [Generate(stream_id=i, prompt="x", regex="the same") for i in range(256)]
    assert compiler.batch(same)._states == source.MAX_STATES
    share = compiler.batch(operations)
    text = "".join(random.Random(0).choices(string.ascii_lowercase, k=600))

    def follow(grammar: Grammar | None) -> None:
        assert grammar is not None
        for token in tokenizer.encode(text):
            grammar.matcher.compute_bitmask()
            grammar.advance(token)

    with pytest.raises(RequestError, match=rf"too many states; {states_of(256)} are the most, and more where a"):
        follow(asyncio.run(share.grammar(operations[0])))
    # What another prediction compiles alone has all of them.
    with pytest.raises(RequestError, match=rf"too many states; {source.MAX_STATES} are the most\.$"):
        follow(asyncio.run(compiler.batch().grammar(operations[0])))


def test_the_lexers_of_64_predictions_together_have_a_bound_on_their_states(compiler: Compiler) -> None:
    def batch_of(constraints: int) -> Batch:
        return compiler.batch(Generate(stream_id=i, prompt="x", regex=f"x{i}") for i in range(constraints))

    held = [batch_of(8) for _ in range(63)]
    large = compiling.MAX_LARGE * source.PREDICTION_STATES
    assert sum(8 * batch._states for batch in held) <= large + (63 - compiling.MAX_LARGE) * source.MAX_STATES
    assert batch_of(1)._states == source.MAX_STATES  # one constraint has all of them, whatever others do
    assert batch_of(64)._states >= 2_000  # enough for ordinary schemas
    del held
    gc.collect()
    assert batch_of(8)._states == source.MAX_STATES


@pytest.mark.parametrize("count", [501, 1_500])
def test_an_object_has_more_than_500_optional_properties(
    compiler: Compiler, tokenizer: PreTrainedTokenizerBase, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compiling.COMPILE_SECONDS, "json_schema", 5.0)  # beside other tests
    names = [f"p{i}" for i in range(count)]
    schema = {"type": "object", "properties": {n: {"type": "boolean"} for n in names}, "additionalProperties": False}
    grammar = ask(compiler, json_schema=schema)
    for token in tokenizer.encode(f'{{"p3": true, "p{count - 1}": false}}'):
        grammar.advance(token)
    assert grammar.complete


def test_too_many_optional_properties_are_refused_with_the_limit(compiler: Compiler) -> None:
    many = {"type": "object", "properties": {f"p{i}": {} for i in range(12_000)}}
    assert "an object has 12000 optional properties; 2000 is the most." in refusal(compiler, json_schema=many)


@pytest.mark.parametrize("count", [2_000, 100_000])
def test_thousands_of_choices_are_followed(compiler: Compiler, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    words = [f"{'abcdefghij'[i % 10]}{i * 7_919 % 999_983}" for i in range(count)]
    grammar = ask(compiler, choices=words)
    for token in tokenizer.encode(words[count // 2]):
        grammar.advance(token)
    assert grammar.accepting
    with pytest.raises(RequestError, match="cannot be followed here"):
        ask(compiler, choices=words).advance(tokenizer.encode("k")[0])


def test_choices_that_one_stream_could_not_follow_are_there_for_the_next(
    compiler: Compiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(RequestError, match="cannot be followed here"):
        ask(compiler, choices=["one", "two"]).advance(tokenizer.encode("k")[0])
    assert ask(compiler, choices=["one", "two"])


def test_a_deeply_nested_schema_fails_alone(compiler: Compiler) -> None:
    nested: Any = {"type": "integer"}
    for _ in range(300):
        nested = {"type": "array", "items": nested}
    assert "recursion limit exceeded" in refusal(compiler, json_schema=nested)


def test_a_panic_of_the_compiler_is_one_sentence_without_its_paths(compiler: Compiler) -> None:
    huge = {"anyOf": [{"properties": {f"{i} {j}": {"type": "integer"} for j in range(1_500)}} for i in range(8)]}
    message = refusal(compiler, json_schema=huge)
    assert message.count(".") == 1 or "0.8 s" in message
    assert "panic" not in message
    assert "/" not in message
    assert len(json.dumps(message)) < 200


def allows(compiler: Compiler, tokenizer: PreTrainedTokenizerBase, text: str, **constraint: Any) -> bool:
    grammar = ask(compiler, **constraint)
    try:
        for token in tokenizer.encode(text):
            grammar.advance(token)
    except RequestError:
        return False
    return grammar.accepting


@pytest.mark.parametrize(
    ("schema", "allowed", "forbidden"),
    [
        ({"properties": {"a": {"type": "integer"}}, "type": "object"}, '{"b": "x"}', '{"\\u0061": "x"}'),
        ({"type": "string", "pattern": '^[^"]*$'}, '"a\\n\\\\"', '"\\""'),
        ({"type": "string", "pattern": "^[^\\\\]b$"}, '"ab"', '"\\\\b"'),
        ({"type": "string", "pattern": "^[^]a]$"}, '"b"', '"]"'),
        ({"type": "string", "pattern": "^[^a]*$"}, '"\\""', '"\\u0061"'),
        ({"type": "object", "patternProperties": {'^[^"]$': {}}, "additionalProperties": False}, '{"a": 1}', '{"\\"": 1}'),
        ({"type": "number", "exclusiveMinimum": 0}, "0.5", "0.0"),
        ({"type": "integer", "exclusiveMinimum": 0}, "1", "0"),
        ({"$schema": "https://example.org/mine", "type": "array", "uniqueItems": False}, "[1, 1]", "[1, 1"),
    ],
)  # fmt: skip
def test_a_schema_forbids_what_it_excludes_however_it_is_spelled(
    compiler: Compiler, tokenizer: PreTrainedTokenizerBase, schema: Any, allowed: str, forbidden: str
) -> None:
    assert allows(compiler, tokenizer, allowed, json_schema=schema)
    assert not allows(compiler, tokenizer, forbidden, json_schema=schema)


def test_constants_keep_their_control_characters(compiler: Compiler, tokenizer: PreTrainedTokenizerBase) -> None:
    for constant, text in (("a\u0001b/\n", r'"a\u0001b/\n"'), ("\x7f", r'"\u007f"')):
        assert json.loads(text) == constant
        assert allows(compiler, tokenizer, text, json_schema={"const": constant})


def test_a_grammar_may_ask_for_special_tokens_by_name(compiler: Compiler, tokenizer: PreTrainedTokenizerBase) -> None:
    grammar = 'start: "a" <filename> "<filename>"'
    assert allows(compiler, tokenizer, "a", grammar=grammar) is False
    assert ask(compiler, grammar=grammar).forced()[1] == tokenizer.convert_tokens_to_ids("<filename>")


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (r'root ::= "\u0041\u00e9"', "Aé"),
        (r"root ::= [\u0041-\u0043]+", "ABC"),
        (r"root ::= [^\u005d\u0022]", "a"),
        (r'root ::= "\U0001F600"', "😀"),
        (r"root ::= [\U0001F600-\U0001F64F]", "😁"),
        (r'root ::= "\\u0041" "\x41"', "\\u0041A"),
    ],
)
def test_escapes_of_gbnf_are_read(
    compiler: Compiler, tokenizer: PreTrainedTokenizerBase, grammar: str, text: str
) -> None:
    assert allows(compiler, tokenizer, text, grammar=grammar)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"regex": "a++"}, "regex: possessive quantifiers are not supported: '++' at character 2, in 'a++'"),
        ({"regex": "[a&&b]"}, "regex: operations on character classes are not supported: '&&' at character 3"),
        ({"regex": "a\\"}, "regex: ends with a single backslash"),
        ({"grammar": "start: /a++/"}, "grammar: possessive quantifiers"),
        ({"grammar": "root ::= [a--b]"}, "grammar: operations on character classes"),
        ({"grammar": 'root ::= "\\ud800"'}, "grammar: \\ud800 is not a character."),
        ({"json_schema": {"const": 2**60}}, "json_schema: const 1152921504606846976 is beyond 2^53"),
    ],
)
def test_what_would_be_misread_is_refused(compiler: Compiler, constraint: dict[str, Any], message: str) -> None:
    assert message in refusal(compiler, **constraint)


def test_comments_and_strings_of_a_grammar_are_not_read_as_patterns(
    compiler: Compiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    grammar = '// a++ /\nstart: "/a++/" WORD // [a&&b]\nWORD: /[a-z]+/\n'
    assert allows(compiler, tokenizer, "/a++/word", grammar=grammar)


def test_finished_texts_are_checked(compiler: Compiler) -> None:
    def check(texts: list[str], **constraint: Any) -> list[bool | None]:
        return compiler.check(Generate(stream_id=0, prompt="x", **constraint), texts)

    date = {"type": "string", "format": "date"}
    assert check(['"2024-02-29"', '"2023-02-29"'], json_schema=date) == [True, False]
    assert check(["<filename>", "filename"], regex="<filename>") == [True, False]
    assert check(["b", "", "c"], choices=["a", "b", ""]) == [True, True, False]
    assert check(["x"], regex="(unclosed") == [None]
    assert check(["[" * 90 + "]" * 90], json_schema={"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [
        {"type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 1, "minItems": i} for i in range(2)
    ]}}}) in ([True], [None])  # fmt: skip
