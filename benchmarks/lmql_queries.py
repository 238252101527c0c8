"""LMQL queries through Replicate's interface, against LMQL's own server."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median

from msgspec.structs import replace

from benchmarks import peers
from benchmarks.plan import Plan, say
from benchmarks.report import Row, Samples, Skipped, cost, speedup
from benchmarks.servers import Clients, Turn, both, lmql_server
from tests.replicate_stand_in import StandIn

QUERIES = {
    "sentiment": '''
argmax
    """Review {run}: We had a great stay. Hiking in the mountains was fabulous and the food is really good.\\n
    Q: What is the underlying sentiment of this review and why?\\n
    A:[ANALYSIS]\\n
    Q: Summarizing the above analysis in a single word -- of the options "positive", "negative", and "neutral" -- \
how is the review best described?\\n
    A:[CLASSIFICATION]"""
from
    {model}
where
    STOPS_AT(ANALYSIS, "\\n") and len(TOKENS(ANALYSIS)) < 200
distribution
    CLASSIFICATION in [" positive", " negative", " neutral"]
''',
    "choice": """
argmax
    "Picture {run}. Between red and blue, the colour of the sky is[COLOUR] and that of blood is[OTHER]."
from
    {model}
where
    COLOUR in [" blue", " red", " extremely green"] and OTHER in [" extremely green", " purple"]
""",
    "integer": """
argmax
    "Question {run}: How many days does a week have?\\nA: [DAYS]"
from
    {model}
where
    INT(DAYS) and len(TOKENS(DAYS)) < 4
""",
    "sample": """
sample(n=3, temperature=1.5)
    "Interview {run}. My favourite animal is[ANIMAL], and I would call it[NAME]"
from
    {model}
where
    ANIMAL in [" a cat", " a dog", " an eel"] and len(TOKENS(NAME)) < 8
""",
    "beam": """
beam(n=2)
    "Lesson {run}. The opposite of hot is[WORD]"
from
    {model}
where
    len(TOKENS(WORD)) < 5
""",
}
"""By name. In a benchmark `{run}` is a number, so that no run can use the cached work of another."""

TIMED_ROWS = ("queries", *(f"queries-{name}" for name in QUERIES))
SHARE = "queries-share"
ROWS = (*TIMED_ROWS, SHARE)

Sides = list[list[Turn]]
"""Our turns and the peer's."""


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The row queries for all queries together, a row for each, and our server's share of the processor time."""
    if not peers.has_lmql():
        yield Skipped([row for row in ROWS if plan.wants(row)], peers.LMQL_HOW_TO)
        return
    with both(plan, lmql_server(plan)) as clients:
        yield from rows(plan, clients, _row, share)


def _row(name: str, unit: str, samples: Samples) -> Row:
    together = "the LMQL queries of the rows queries-…, one after the other"
    work = together if name == "queries" else f"the LMQL query {name[8:]}"
    at_least, goal = (3, 5) if name == "queries" else (2, 2)
    return speedup(name, work, "LMQL's own server", unit, samples, at_least=at_least, goal=goal)


def rows(
    plan: Plan,
    clients: Clients,
    row: Callable[[str, str, Samples], Row],
    share: Callable[[Sequence[Sides]], Row] | None = None,
) -> Iterator[Row]:
    """Measure the queries on both sides. `row` makes a row of its name, unit and samples, `share` that of the share."""
    measured: list[Sides] = []
    for name in QUERIES:
        if not plan.wants("queries", SHARE, f"queries-{name}"):
            continue
        say(f"  query {name}")
        sides = plan.alternate(*(partial(query, plan, clients, name, api) for api in (clients.ours, clients.theirs)))
        measured.append(sides)
        ours, theirs = (median(_tokens_sent(turn) for turn in side) for side in sides)
        each = row(f"queries-{name}", "s", _seconds([sides]))
        counted = f"{ours:.0f} tokens sent, {theirs:.0f} by the peer"
        yield replace(each, note="; ".join(filter(None, (counted, processor_times([sides]), each.note))))
    if len(measured) == len(QUERIES):
        whole = row("queries", "s", _seconds(measured))
        yield replace(whole, note="; ".join(filter(None, (processor_times(measured), whole.note))))
        if share:
            yield share(measured)


def share(measured: Sequence[Sides]) -> Row:
    """How much of the processor time of our turns is our server's."""
    server = _summed(measured, 0, lambda turn: turn.server)
    whole = _summed(measured, 0, lambda turn: turn.server + turn.client)
    return cost(
        SHARE,
        "processor time of this project's server, the model included, in the row queries",
        "that of the server and of LMQL's client",
        "s",
        [server, whole],
        at_most=0.2,
        goal=0.2,
        note=limit(measured),
    )


def processor_times(measured: Sequence[Sides]) -> str:
    """Where the processor time of our turns went, in words."""
    client, stand_in, server = (
        median(_summed(measured, 0, part))
        for part in (lambda turn: turn.client, lambda turn: turn.stand_in, lambda turn: turn.server)
    )
    return (
        f"processor time: LMQL's client {client:.2f} s, the stand-in for Replicate {stand_in:.2f} s,"
        f" our server {server:.2f} s"
    )


def limit(measured: Sequence[Sides]) -> str:
    """What the row would be at most if our server cost nothing, in words.

    LMQL's client and the stand-in are threads of one Python process, so that their processor times add up.
    """
    _, theirs = _seconds(measured)
    without_server = median(_summed(measured, 0, lambda turn: turn.client + turn.stand_in))
    return f"if our server cost nothing, the ratio of queries would be at most {median(theirs) / without_server:.2f}"


def _seconds(measured: Sequence[Sides]) -> Samples:
    return [_summed(measured, side, lambda turn: turn.seconds) for side in (0, 1)]


def _summed(measured: Sequence[Sides], side: int, part: Callable[[Turn], float]) -> list[float]:
    """A part of one side's turns, added up over the queries, for each run."""
    return [sum(map(part, turns)) for turns in zip(*(sides[side] for sides in measured), strict=True)]


def _tokens_sent(turn: Turn) -> int:
    return sum(chunk.count("TOKEN ") for prediction in turn.predictions for chunk in prediction.chunks)


def text(name: str, model: str, run: int | None = None) -> str:
    """A query's text, with its `from` clause."""
    return QUERIES[name].replace(" {run}", "" if run is None else f" {run}").replace("{model}", model)


def query(plan: Plan, clients: Clients, name: str, api: StandIn, run: int) -> Turn:
    """Run a query."""
    import lmql

    from benchmarks.lmql_client import model_clause

    asked = text(name, model_clause(plan.weights), 100 + run)
    return clients.timed(api, lambda: lmql.run(asked))
