"""The command script/benchmark: runs the suites, writes and prints their rows."""

import argparse
import signal
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

import msgspec

from benchmarks import (
    against,
    arrivals,
    constraints,
    decode,
    gateway,
    lmql_queries,
    overhead,
    prefill,
    report,
    reuse,
    startup,
)
from benchmarks.plan import ROOT, Plan, native_dtype, say
from lmtp.weights.manifest import WeightsError, read_manifest, verify_sizes

PEERS = (lmql_queries, reuse, decode, constraints, arrivals, prefill, overhead, gateway, startup)


def main() -> int:
    """Measure the requested rows; 1 if some of them could not be measured."""
    options = _options()
    # Raise SystemExit on SIGTERM, so that servers and sides are stopped.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if options.gpu:
        from benchmarks import gpu  # needs torch

        return gpu.main(options.results or ROOT / "benchmarks" / "results", options.quick)
    suites = (against,) if options.against else PEERS
    names = [row for suite in suites for row in suite.ROWS]
    plan = Plan(options.weights.resolve(), options.runs, options.quick, options.only, options.dtype, options.against)
    unknown = [name for name in plan.only if not any(row == name or row.startswith(f"{name}-") for row in names)]
    if unknown:
        say(f"script/benchmark: there is no row {', '.join(unknown)}. Rows: {', '.join(names)}.")
        return 2
    try:
        manifest = read_manifest(plan.weights)
        verify_sizes(plan.weights, manifest)
    except WeightsError as error:
        say(f"script/benchmark: {error}")
        return 1
    if manifest.source != "demo":
        say(f"script/benchmark: {plan.weights} holds {manifest.source}, but benchmarks need the demo model. Run")
        say("`script/download_weights demo --to DIRECTORY` and pass that directory with --weights.")
        return 1
    machine = report.machine(plan.dtype)
    if plan.against:
        machine["against"] = against.commit(plan.against)
    results = report.Report(machine=machine, rows=[], skipped=[])
    by_default = not options.quick and not plan.against
    directory = options.results or (ROOT / "benchmarks" / "results" if by_default else None)
    failed: list[str] = []
    try:
        for suite in suites:
            if plan.wants(*suite.ROWS):
                failed += _measure(plan, suite, results)
    finally:  # an interrupted run leaves the rows that it has
        print(report.plain(results), flush=True)
        if directory and results.rows:
            say("written:", *report.write(results, directory))
    if failed:
        say(f"script/benchmark: could not measure {', '.join(failed)}; the errors are above")
        return 1
    return 0


def _measure(plan: Plan, suite: ModuleType, results: report.Report) -> list[str]:
    """Add the suite's rows to the results. Returns the rows that could not be measured."""
    wanted = [row for row in suite.ROWS if plan.wants(row)]
    say(f"{suite.__name__.rpartition('.')[2]}: {', '.join(wanted)}")
    started = time.monotonic()
    try:
        for each in suite.measure(plan):
            if isinstance(each, report.Skipped):
                results.skipped.append(each)
            elif plan.wants(each.name):
                results.rows.append(msgspec.structs.replace(each, measured=report.now()))
    except Exception:
        traceback.print_exc()
        done = {row.name for row in results.rows} | {row for each in results.skipped for row in each.rows}
        return [row for row in wanted if row not in done]
    finally:
        say(f"  took {time.monotonic() - started:.0f} s")
    return []


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure this project against its peers, in turns on this machine, and write a table, the samples"
        " and a plot. Peers that are not installed are skipped, with a note how to install them. Nothing else should"
        " run on the machine meanwhile.",
        epilog=f"Rows: {', '.join(row for suite in PEERS for row in suite.ROWS)}."
        f" Rows with --against: {', '.join(against.ROWS)}.",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="only these rows; `decode` means every `decode-...`"
    )
    parser.add_argument(
        "--against",
        type=_checkout,
        metavar="DIRECTORY",
        help="measure against another checkout of this project instead of the peers, such as a git worktree of an older"
        " commit; it may have its own .venv",
    )
    parser.add_argument(
        "--gpu", action="store_true", help="run the tests that need a GPU and measure what it does, instead of the rows"
    )
    parser.add_argument("--runs", type=_positive, help="samples for each side (default: 5; with --quick 1)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to check that everything runs; the figures mean nothing"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=native_dtype(),
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
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _checkout(text: str) -> Path:
    directory = Path(text).resolve()
    if not (directory / "benchmarks" / "our_side.py").is_file():
        raise argparse.ArgumentTypeError(f"{directory} is not a checkout of this project with benchmarks/our_side.py")
    return directory
