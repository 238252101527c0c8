"""The command script/benchmark: runs the suites, writes and prints their rows."""

import argparse
import fcntl
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import msgspec
import psutil

from benchmarks import (
    against,
    arrivals,
    claims,
    constraints,
    decode,
    drafts,
    encoder_decoder,
    gateway,
    int8,
    lmql_queries,
    overhead,
    parallel,
    prefill,
    report,
    reuse,
    startup,
)
from benchmarks.load import Load
from benchmarks.plan import ROOT, Plan, native_dtype, processor_flags, say
from lmtp.weights.manifest import WeightsError, read_manifest, verify_sizes

RESULTS = ROOT / "benchmarks" / "results"
LOAD_SECONDS = 0.5
"""How long the load of other processes is watched before a suite."""
PEERS = (
    lmql_queries,
    reuse,
    decode,
    int8,
    drafts,
    encoder_decoder,
    constraints,
    arrivals,
    prefill,
    overhead,
    parallel,
    gateway,
    startup,
)


def main() -> int:
    """Measure the requested rows; 1 if some of them could not be measured."""
    options = _options()
    # Raise SystemExit, so that servers and sides are stopped.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        if options.gpu:
            from benchmarks import gpu  # needs torch

            return gpu.main(options.results or RESULTS, options.quick)
        if options.counters:
            return _count(options.weights.resolve())
        if options.report:
            return _write_pages(options.results or RESULTS)
        return _run(options)
    except (WeightsError, report.ReportError, BusyError) as error:
        say(f"script/benchmark: {error}")
        return 1
    except KeyboardInterrupt:
        say("script/benchmark: interrupted")
        return 130


def _run(options: argparse.Namespace) -> int:
    """Measure rows."""
    suites = (against,) if options.against else PEERS
    names = [row for suite in suites for row in suite.ROWS]
    plan = Plan(
        options.weights.resolve(), options.runs, options.quick, options.only, options.dtype, options.against, names
    )
    unknown = [name for name in plan.only if not any(row == name or row.startswith(f"{name}-") for row in names)]
    if unknown:
        say(f"script/benchmark: there is no row {', '.join(unknown)}. Rows: {', '.join(names)}.")
        return 2
    manifest = read_manifest(plan.weights)
    verify_sizes(plan.weights, manifest)
    if manifest.source != "demo":
        say(f"script/benchmark: {plan.weights} holds {manifest.source}, but benchmarks need the demo model. Run")
        say("`script/download_weights demo --to DIRECTORY` and pass that directory with --weights.")
        return 1
    machine = report.machine(plan.dtype)
    if plan.against:
        machine["against"] = against.commit(plan.against)
    results = report.Report(machine=machine, rows=[], skipped=[])
    by_default = not options.quick and not plan.against
    directory = options.results or (RESULTS if by_default else None)
    if directory:
        _require_writable(report.file_of(machine, directory))
    failed: list[str] = []
    with _alone(measures=not plan.quick or directory is not None):
        try:
            for suite in suites:
                if plan.wants(*suite.ROWS):
                    failed += _measure(plan, suite, results, directory)
        finally:
            print(report.plain(results), flush=True)
            if directory and results.rows:
                say("written:", *report.write(results, directory))
    if failed:
        say(f"script/benchmark: could not measure {', '.join(failed)}; the errors are above")
        return 1
    return 0


def _measure(plan: Plan, suite: ModuleType, results: report.Report, directory: Path | None) -> list[str]:
    """Add the suite's rows to the results, and save each in the directory. Returns those that could not be measured."""
    wanted = [row for row in suite.ROWS if plan.wants(row)]
    say(f"{suite.__name__.rpartition('.')[2]}: {', '.join(wanted)}")
    before = psutil.cpu_percent(LOAD_SECONDS) / 100
    if before > report.MAX_BUSY and not plan.quick:
        say(f"  other processes use {before:.0%} of the processors: the figures will be marked as loaded")
    started, load = time.monotonic(), Load()
    try:
        for each in suite.measure(plan):
            busy = max(before, load.since_last())
            if isinstance(each, report.Skipped):
                results.skipped.append(each)
            elif plan.wants(each.name):
                row = msgspec.structs.replace(each, measured=report.now(), busy=busy)
                results.rows.append(row)
                say(f"  {row.name}: ratio {row.ratio:.3f}, from {min(row.ratios):.3f} to {max(row.ratios):.3f}")
                if row.loaded and not plan.quick:
                    say(f"  other processes used {busy:.0%} of the processors: it is marked as loaded")
                if directory:
                    report.save(results, directory)
    except Exception:
        traceback.print_exc()
        done = {row.name for row in results.rows} | {row for each in results.skipped for row in each.rows}
        return [row for row in wanted if row not in done]
    finally:
        say(f"  took {time.monotonic() - started:.0f} s")
    return []


class BusyError(Exception):
    """Another benchmark is running; the message says which process."""


@contextmanager
def _alone(measures: bool) -> Iterator[None]:
    """Let no other benchmark of this user measure meanwhile. Raises BusyError if one does."""
    if not measures:
        yield
        return
    path = Path(tempfile.gettempdir()) / f"benchmark-{os.getuid()}.lock"
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            other = lock.read().strip()
            raise BusyError(
                f"process {other} is measuring, and two benchmarks slow each other down. Wait for its end."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _require_writable(path: Path) -> None:
    """Find out before hours of measuring whether results can be written. Raises ReportError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise report.ReportError(
            f"{path.parent} cannot be written ({error.strerror}). Choose another --results."
        ) from error
    if path.exists():
        report.read(path)


def _count(weights: Path) -> int:
    """Count what the deterministic rows compute, say what changed, and make it the expected counts."""
    from benchmarks import counters  # needs torch

    read_manifest(weights)
    counts = counters.count(weights)
    changed = counters.differences(counters.expected(), counts)
    print("\n".join(changed) or "nothing changed")
    counters.write(counts)
    return 0


def _write_pages(directory: Path) -> int:
    """Write each machine's page and plot, and the table of README.md, from the results in the directory."""
    machines = claims.reports(directory)
    for machine in machines:
        say("written:", *report.render(report.file_of(machine.machine, directory)))
    if directory == RESULTS:
        readme = claims.README.read_text(encoding="utf-8")
        claims.README.write_text(claims.stated(readme, machines), encoding="utf-8")
        say("written:", claims.README)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure this project against its peers, in turns on this machine, and write a table, the samples"
        " and a plot. Peers that are not installed are skipped, with a note how to install them. Nothing else should"
        " run on the machine meanwhile.",
        epilog=f"Rows: {', '.join(row for suite in PEERS for row in suite.ROWS)}."
        f" Rows with --against: {', '.join(against.ROWS)}.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="ROW",
        help="only these rows; a name that is no row's means its family: `decode` every `decode-...`",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--against",
        type=_checkout,
        metavar="DIRECTORY",
        help="measure against another checkout of this project instead of the peers, such as a git worktree of an older"
        " commit; it may have its own .venv",
    )
    modes.add_argument(
        "--gpu", action="store_true", help="run the tests that need a GPU and measure what it does, instead of the rows"
    )
    modes.add_argument(
        "--counters",
        action="store_true",
        help="instead of the rows, count what the deterministic ones compute, print what changed, and write"
        " benchmarks/expectations.json, with which tests compare",
    )
    modes.add_argument(
        "--report",
        action="store_true",
        help="measure nothing: write the pages, plots and README.md's table from the results that there are",
    )
    parser.add_argument("--runs", type=_positive, help="samples for each side (default: 5; with --quick 1)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to check that everything runs; the figures mean nothing"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=native_dtype(processor_flags()),
        help="dtype of all sides (default: bfloat16 if the processor computes it in hardware, else float32)",
    )
    parser.add_argument("--weights", type=Path, default=ROOT / "weights", help="the demo model's directory")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIRECTORY",
        help="where to write (default: benchmarks/results; with --quick or --against nowhere)",
    )
    options = parser.parse_args()
    options.runs = options.runs or (1 if options.quick else 5)
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _checkout(text: str) -> Path:
    directory = Path(text).resolve()
    if not (directory / "benchmarks" / "our_side.py").is_file():
        raise argparse.ArgumentTypeError(f"{directory} is not a checkout of this project with benchmarks/our_side.py")
    return directory
