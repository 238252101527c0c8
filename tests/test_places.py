"""Places for predictions: counting them, noticing that the runtime has lost some, removing what each leaves behind."""

import asyncio
import time
from collections.abc import Generator
from contextvars import ContextVar, copy_context
from pathlib import Path

import pytest

from lmtp import places
from lmtp.engine.engine import Begin
from lmtp.places import MAX_SUSPICIONS, Places
from lmtp.protocol import Generate, RequestError
from predict import MAX_CHUNK, Predictor, _pieces
from tests.tiny import build, start

runtimes_id: ContextVar[str] = ContextVar("_coglet_prediction_id")


@pytest.fixture
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the runtime makes directories."""
    monkeypatch.setattr(places, "DIRECTORIES", tmp_path / "predictions")
    return tmp_path / "predictions"


def begin(counted: Places, prediction_id: str) -> None:
    """Begin a prediction of this id, as the runtime does, in a task that ends with it."""

    async def predict() -> None:
        runtimes_id.set(prediction_id)
        counted.begin(copy_context())

    asyncio.run(predict())


def make(directory: Path) -> Path:
    """Make a prediction's directories as the runtime does."""
    (directory / "inputs").mkdir(parents=True)
    (directory / "outputs").mkdir()
    return directory


class TestDirectories:
    @pytest.mark.parametrize("name", ["pred_17a", "...a", "with space", "ü"])
    def test_those_of_a_prediction_are_removed_when_it_begins(self, directories: Path, name: str) -> None:
        other = make(directories / "other")
        mine = make(directories / name)
        begin(Places(8), name)
        assert not mine.exists()
        assert [path.name for path in other.iterdir()] != []

    def test_a_prediction_without_any_runs(self, directories: Path) -> None:
        begin(Places(8), "without")

    def test_one_that_holds_files_stays(self, directories: Path) -> None:
        (make(directories / "spilled") / "outputs" / "spill.json").write_text("{}")
        begin(Places(8), "spilled")
        assert (directories / "spilled" / "outputs" / "spill.json").exists()

    @pytest.mark.parametrize("name", ["", ".", "..", "../neighbour", "a/../../neighbour", "a/b", "/"])
    def test_an_id_that_is_a_path_is_refused_and_nothing_is_removed(self, directories: Path, name: str) -> None:
        neighbour = make(directories.parent / "neighbour")
        nested = make(directories / "a" / "b")
        with pytest.raises(RequestError, match=r"id cannot be a path"):
            begin(Places(8), name)
        assert (neighbour / "outputs").exists()
        assert (nested / "outputs").exists()


class TestLostPlaces:
    def test_places_are_lost_when_the_server_is_busy_and_nothing_runs(self) -> None:
        counted = Places(8)
        for _ in range(MAX_SUSPICIONS):
            assert counted.problem == ""
            counted.compare(busy=True)
        assert "lost 8 or more of its 8 places" in counted.problem
        counted.compare(busy=False)
        assert counted.problem

    def test_a_server_that_is_not_busy_has_lost_none(self) -> None:
        counted = Places(8)
        for busy in [True] * (MAX_SUSPICIONS - 1) + [False] + [True] * (MAX_SUSPICIONS - 1):
            counted.compare(busy)
        assert counted.problem == ""

    def test_predictions_that_wait_or_send_output_take_places(self) -> None:
        counted = Places(8)

        async def waiting() -> None:
            counted.begin(copy_context())
            await asyncio.sleep(60)

        async def main() -> None:
            tasks = [asyncio.create_task(waiting()) for _ in range(5)]
            await asyncio.sleep(0)
            with counted.hold(), counted.hold():
                for _ in range(MAX_SUSPICIONS + 1):
                    counted.compare(busy=True)
            assert counted.problem == ""
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

        asyncio.run(main())
        for _ in range(MAX_SUSPICIONS):
            counted.compare(busy=True)
        assert counted.problem

    def test_some_lost_places_are_noticed_while_others_are_taken(self) -> None:
        counted = Places(8)
        with counted.hold(), counted.hold(), counted.hold(), counted.hold(), counted.hold(), counted.hold():
            for _ in range(MAX_SUSPICIONS):
                counted.compare(busy=True)
        assert "lost 2 or more of its 8 places" in counted.problem

    def test_short_predictions_that_come_and_go_take_places(self, directories: Path) -> None:
        counted = Places(8)
        for _ in range(MAX_SUSPICIONS + 1):
            for name in "abcdefg":
                begin(counted, name)
            counted.compare(busy=True)
        assert counted.problem == ""

    def test_a_prediction_takes_a_place_until_its_output_is_closed(self) -> None:
        predictor = Predictor()
        engine = start(build("llama"))
        prediction = asyncio.run(engine.predict([Generate(stream_id=0, prompt=[5], max_tokens=400, min_tokens=400)]))
        chunks: Generator[str] = predictor._chunks(prediction, None, 0.0, copy_context())
        next(chunks)
        assert len(predictor.places._taken) == 1
        chunks.close()
        assert len(predictor.places._taken) == 0
        engine.stop()


class TestHealth:
    @pytest.fixture
    def predictor(self) -> Predictor:
        predictor = Predictor()
        predictor.engine = start(build("llama"))
        return predictor

    def test_a_predictor_that_serves_is_healthy(self, predictor: Predictor) -> None:
        assert predictor.healthcheck() is True
        predictor.engine.stop()

    def test_a_predictor_whose_engine_has_stopped_says_so(self, predictor: Predictor) -> None:
        predictor.engine._commands.put(Begin(None, None))  # type: ignore[arg-type]  # an error outside a step
        deadline = time.monotonic() + 10
        while not predictor.engine.problem and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="the engine has stopped and"):
            predictor.healthcheck()
        predictor.engine.stop()

    def test_a_predictor_without_places_says_so(self, predictor: Predictor) -> None:
        predictor.places.problem = "Cog's runtime has lost places."
        with pytest.raises(RuntimeError, match="lost places"):
            predictor.healthcheck()
        predictor.engine.stop()


class TestChunks:
    """The runtime would send a chunk of more than 6 MiB through a file."""

    def test_short_output_is_one_chunk(self) -> None:
        assert list(_pieces("")) == []
        assert list(_pieces("one\ntwo\n")) == ["one\ntwo\n"]

    def test_long_lines_are_kept_whole(self) -> None:
        lines = [f"{index} {'x' * 300_000}\n" for index in range(9)]
        pieces = list(_pieces("".join(lines)))
        assert "".join(pieces) == "".join(lines)
        assert all(len(piece) <= MAX_CHUNK and piece.endswith("\n") for piece in pieces)
        assert len(pieces) == 3

    def test_one_endless_line_is_cut(self) -> None:
        line = "x" * (2 * MAX_CHUNK + 5)
        assert [len(piece) for piece in _pieces(line)] == [MAX_CHUNK, MAX_CHUNK, 5]
