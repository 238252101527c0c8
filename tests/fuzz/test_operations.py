"""Whatever is sent to a tiny engine, every operation has one terminal reply, and the next answer is right."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import pytest

from lmtp.engine.engine import Engine
from lmtp.protocol import BATCH_LIMIT, Failure, Generate, Info, Reply, RequestError, Token, encode, parse_batch
from predict import Predictor
from tests.fuzz.budget import fuzz
from tests.fuzz.inputs import batches, prompts
from tests.soak.model import tiny_model, tokenizer
from tests.tiny import answers, own_greedy, start

Result = TypeVar("Result")

CONTEXT = 128
SECONDS = 30
"""No example takes longer."""

PROMPT = [504, 357, 282]


def in_time(function: Callable[[], Result]) -> Result:
    """What the function returns; raises TimeoutError if it takes longer than SECONDS."""
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(SECONDS)


class Checked:
    """An engine, and one answer of it that is known."""

    def __init__(self, engine: Engine, expected: list[int]) -> None:
        self.engine = engine
        self.predictor = Predictor()
        self.predictor.engine = engine
        self._expected = expected

    def replies(self, batch: str) -> list[Reply]:
        """All replies to a batch; raises TimeoutError if they do not end."""

        def run() -> list[Reply]:
            prediction = asyncio.run(self.engine.predict(parse_batch(batch)))
            return [reply for replies in prediction for reply in replies]

        return in_time(run)

    def output(self, inputs: dict[str, Any]) -> str:
        """The output for the predictor's inputs."""

        def run() -> str:
            async def predict() -> list[str]:
                chunks: Any = await self.predictor.predict(**inputs)
                return list(chunks)

            return "".join(asyncio.run(predict()))

        return in_time(run)

    def still_answers(self) -> None:
        """Check that a plain operation is answered rightly and that nothing else runs."""
        tokens = answers(self.engine, Generate(stream_id=0, prompt=PROMPT, max_tokens=len(self._expected))).ids()
        assert tokens == self._expected
        assert not self.engine.runner.active


@pytest.fixture(scope="module")
def checked() -> Iterator[Checked]:
    model = tiny_model(CONTEXT)
    engine = start(model, tokenizer(), kv_budget=100_000_000)
    yield Checked(engine, own_greedy(model, PROMPT, 4))
    engine.stop()


def check_error(error: str) -> None:
    """An error is one short printable line about the request; nothing in it went wrong in here."""
    assert error.isprintable(), error
    assert 0 < len(error) < 2000, error
    for words in ("internal error", "the model failed", "the engine has stopped", "Traceback", "panicked"):
        assert words not in error, error


def holds_operations(batch: str) -> bool:
    """Whether it is JSON with operations to answer, valid or not; false also where Python's json cannot tell."""
    try:
        entries = json.loads(batch, parse_constant=int)  # raises ValueError for NaN and Infinity
    except (ValueError, RecursionError):
        return False
    return isinstance(entries, list) and 0 < len(entries) <= BATCH_LIMIT


def test_every_operation_of_any_batch_has_one_terminal_reply(checked: Checked) -> None:
    def check(batch: str) -> None:
        try:
            operations = parse_batch(batch)
        except RequestError as error:
            check_error(str(error))
            if holds_operations(batch):
                pytest.fail(f"no operation is answered: {error}")
            return
        replies = checked.replies(batch)
        ended: Counter[int | str | None] = Counter()
        for reply in replies:
            assert not ended[reply.stream_id] or reply.stream_id is None, "a reply after the terminal one"
            if isinstance(reply, Failure):
                check_error(reply.error)
            if isinstance(reply, Failure | Info) or (isinstance(reply, Token) and reply.finish_reason):
                ended[reply.stream_id] += 1
        assert ended == Counter(operation.stream_id for operation in operations)
        for line in encode(replies).encode().decode().splitlines():
            word, _, content = line.partition(" ")
            assert word in ("TOKEN", "MSG")
            json.loads(content, parse_constant=pytest.fail)  # no NaN, no Infinity
        checked.still_answers()

    fuzz(check, batches)


def test_any_inputs_of_a_prompt_are_answered_or_refused_in_a_sentence(checked: Checked) -> None:
    def check(inputs: dict[str, Any]) -> None:
        try:
            output = checked.output(inputs)
        except RequestError as error:
            check_error(str(error))
        else:
            output.encode()
            if inputs["output"] == "json":
                json.loads(output, parse_constant=pytest.fail)
        checked.still_answers()

    fuzz(check, prompts())
