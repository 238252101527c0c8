"""This project against another checkout of itself: the same work on both, in turns."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from benchmarks import arrivals, decode, engines, lmql_queries, overhead, peers, prefill, reuse, startup
from benchmarks.plan import ROOT, Plan, say
from benchmarks.report import Row, Samples, Skipped, speedup
from benchmarks.servers import both, our_server

DECODE = {f"decode-{streams}": streams for streams in decode.STREAMS}
ENGINE_ROWS = (*DECODE, "sampling", "prefill", "mixed")
LMQL_ROWS = (*lmql_queries.TIMED_ROWS, "continuation", "score")
ROWS = (*ENGINE_ROWS, *LMQL_ROWS, "overhead", *startup.ROWS)
MIN_RATIO = 0.95
"""A change may cost a twentieth of the speed: less cannot be measured."""


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """All rows, each against the checkout `plan.against`. Ratios are medians of the paired ratios."""
    other = plan.against or ROOT
    parts = {ENGINE_ROWS: _engines, LMQL_ROWS: _lmql, ("overhead",): _overhead, startup.ROWS: _startup}
    for rows, part in parts.items():
        if plan.wants(*rows):
            for each in part(plan, other):
                yield replace(each, paired=True) if isinstance(each, Row) else each


def commit(checkout: Path) -> str:
    """A checkout's commit, or its directory's name outside git."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return checkout.name


def _row(plan: Plan, name: str, unit: str, samples: Samples) -> Row:
    return speedup(
        name,
        f"the work of {name}",
        f"checkout {commit(plan.against or ROOT)}",
        unit,
        samples,
        at_least=MIN_RATIO,
        goal=1.0,
    )


def _engines(plan: Plan, other: Path) -> Iterator[Row]:
    works = {
        **{name: partial(decode.greedy, plan, streams) for name, streams in DECODE.items()},
        "sampling": partial(decode.sampling, plan, True),
        "prefill": partial(prefill.first_token, plan),
        "mixed": partial(arrivals.together, plan),
    }
    with ExitStack() as stack:
        sides = [engines.our_engine(plan, stack, root=root) for root in (ROOT, other)]
        runners = [side.call("describe") for side in sides]
        if len(set(runners)) > 1:
            say("  the runners differ: run script/build in both checkouts, or set COMPILE=off")
        for name, run in works.items():
            if plan.wants(name):
                say(f"  {name}")
                results = plan.alternate(*(partial(run, side) for side in sides))
                if name in ("sampling", "prefill"):
                    yield _row(plan, name, "s", [engines.seconds(side) for side in results])
                else:
                    yield _row(plan, name, "tokens/s", [engines.rates(side) for side in results])


def _lmql(plan: Plan, other: Path) -> Iterator[Row | Skipped]:
    if not peers.has_lmql():
        yield Skipped([row for row in LMQL_ROWS if plan.wants(row)], peers.LMQL_HOW_TO)
        return
    with both(plan, our_server(plan, other)) as clients:
        if plan.wants(*lmql_queries.TIMED_ROWS):
            yield from lmql_queries.rows(plan, clients, partial(_row, plan))
        for name, sample in (("continuation", reuse.continuation), ("score", reuse.score)):
            if plan.wants(name):
                say(f"  {name}")
                samples = plan.alternate(
                    *(partial(sample, plan, clients, api) for api in (clients.ours, clients.theirs))
                )
                yield _row(plan, name, "s", [reuse.seconds(side) for side in samples])


def _overhead(plan: Plan, other: Path) -> Iterator[Row]:
    with our_server(plan) as ours, our_server(plan, other) as theirs:
        say(f"  {overhead.streams(plan)} predictions over HTTP")

        def rate(url: str, run: int) -> float:
            return overhead.tokens_per_second(overhead.through_http(plan, url, run))

        yield _row(plan, "overhead", "tokens/s", plan.alternate(*(partial(rate, s.url) for s in (ours, theirs))))


def _startup(plan: Plan, other: Path) -> Iterator[Row | Skipped]:
    for name in startup.ROWS:
        if not plan.wants(name):
            continue
        say(f"  starting with COMPILE={startup.MODES[name]}")
        if skipped := startup.unavailable(plan, name) or startup.unavailable(plan, name, other):
            yield skipped
            continue

        def seconds(root: Path, run: int, name: str = name) -> float:
            return startup.start(plan, name, root)[0]

        yield _row(plan, name, "s", plan.alternate(partial(seconds, ROOT), partial(seconds, other)))
