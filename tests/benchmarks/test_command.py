"""The command script/benchmark: its arguments, what an interrupted run leaves, and two runs at once."""

import fcntl
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import claims, command, report
from benchmarks.plan import Plan
from benchmarks.report import Row, speedup

Main = Callable[..., int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_weights: Path) -> Main:
    """The command in this process, with the demo model."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(command, "LOAD_SECONDS", 0.01)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["script/benchmark", "--weights", str(demo_weights), *arguments])
        return command.main()

    return run


def suite(*rows: str, error: BaseException | None = None) -> SimpleNamespace:
    """A suite that measures these rows and then fails, if told to."""

    def measure(plan: Plan) -> Iterator[Row]:
        for name in rows:
            yield speedup(name, "work", "peer", "s", [[1.0], [2.0]], at_least=1, goal=1)
        if error:
            raise error

    return SimpleNamespace(ROWS=("a", "b"), measure=measure, __name__="suite")


@pytest.mark.parametrize("runs", ["0", "-3", "many", "1.5"])
def test_a_number_of_runs_that_is_none_is_refused(main: Main, runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("--runs", runs)
    assert f"'{runs}' is not a whole number of at least 1" in capsys.readouterr().err


def test_an_unknown_row_is_refused_with_the_rows_there_are(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--only", "decode-1", "decod") == 2
    assert "there is no row decod. Rows: queries" in capsys.readouterr().err


def test_only_one_mode_can_be_asked_for(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("--gpu", "--counters")
    assert "not allowed with" in capsys.readouterr().err


def test_results_that_cannot_be_written_are_refused_before_measuring(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PEERS", (suite(error=AssertionError("measured")),))
    (tmp_path / "file").touch()
    assert main("--results", str(tmp_path / "file")) == 1
    assert "cannot be written" in capsys.readouterr().err
    damaged = tmp_path / "results" / f"{report.slug(report.machine('float32'))}.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    assert main("--results", str(damaged.parent), "--dtype", "float32") == 1
    assert f"{damaged} is not a benchmark's results" in capsys.readouterr().err


def test_an_interrupted_run_keeps_the_rows_that_it_has(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PEERS", (suite("a", error=KeyboardInterrupt()),))
    assert main("--results", str(tmp_path / "results"), "--runs", "1") == 130
    (path,) = (tmp_path / "results").glob("*.json")
    assert [row.name for row in report.read(path).rows] == ["a"]


def test_each_row_is_saved_before_the_next_is_measured(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[list[str]] = []
    measured = suite("a", "b")

    def watched(plan: Plan) -> Iterator[Row]:
        for row in suite("a", "b").measure(plan):
            saved.append([each.name for path in tmp_path.glob("results/*.json") for each in report.read(path).rows])
            yield row

    measured.measure = watched
    monkeypatch.setattr(command, "PEERS", (measured,))
    assert main("--results", str(tmp_path / "results"), "--runs", "1") == 0
    assert saved == [[], ["a"]]


def test_each_row_is_marked_by_the_load_while_it_was_measured(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = iter([0.0, 0.6])
    monkeypatch.setattr(command, "PEERS", (suite("a", "b"),))
    monkeypatch.setattr(command, "Load", lambda: SimpleNamespace(since_last=lambda: next(busy)))
    monkeypatch.setattr("psutil.cpu_percent", lambda seconds: 3.0)
    assert main("--results", str(tmp_path / "results"), "--runs", "1") == 0
    (path,) = (tmp_path / "results").glob("*.json")
    assert [(row.name, row.busy, row.loaded) for row in report.read(path).rows] == [
        ("a", 0.03, False),
        ("b", 0.6, True),
    ]
    assert "other processes used 60% of the processors: it is marked as loaded" in capsys.readouterr().err


def test_a_row_that_fails_leaves_the_others(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "PEERS", (suite("a", error=RuntimeError("no luck")),))
    assert main("--quick") == 1
    told = capsys.readouterr()
    assert "could not measure b" in told.err
    assert told.out.splitlines()[1].startswith("a ")


def test_a_second_run_at_once_is_refused(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "PEERS", (suite("a", "b"),))
    arguments = ("--results", str(tmp_path / "results"))
    with (tmp_path / f"benchmark-{os.getuid()}.lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(*arguments) == 1
        assert "process 4711 is measuring" in capsys.readouterr().err
        assert main("--quick") == 0  # measures nothing
    assert main(*arguments) == 0


def test_pages_and_readme_say_what_the_results_say() -> None:
    """If not, run `script/benchmark --report`."""
    machines = claims.reports(command.RESULTS)
    for machine in machines:
        page = report.file_of(machine.machine, command.RESULTS).with_suffix(".md")
        assert page.read_text() == report.markdown(machine)
    readme = claims.README.read_text()
    assert readme == claims.stated(readme, machines)
    assert all(report.named(machine.machine) in readme for machine in machines)
