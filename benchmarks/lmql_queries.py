"""LMQL queries through Replicate's interface, against LMQL's own server."""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

from msgspec.structs import replace

from benchmarks import peers
from benchmarks.plan import Plan, say
from benchmarks.report import Row, Samples, Skipped, speedup
from benchmarks.servers import Clients, both, lmql_server
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

ROWS = ("queries", *(f"queries-{name}" for name in QUERIES))


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The row queries for all queries together, and a row for each."""
    if not peers.has_lmql():
        yield Skipped([row for row in ROWS if plan.wants(row)], peers.LMQL_HOW_TO)
        return
    with both(plan, lmql_server(plan)) as clients:
        yield from rows(plan, clients, _row)


def _row(name: str, unit: str, samples: Samples) -> Row:
    work = "the LMQL queries below, one after the other" if name == "queries" else f"the LMQL query {name[8:]}"
    at_least, goal = (3, 5) if name == "queries" else (2, 2)
    return speedup(name, work, "LMQL's own server", unit, samples, at_least=at_least, goal=goal)


def rows(plan: Plan, clients: Clients, row: Callable[[str, str, Samples], Row]) -> Iterator[Row]:
    """Measure the queries on both sides; `row` makes a row of its name, unit and samples."""
    measured = []
    seconds: list[Samples] = []
    for name in QUERIES:
        if not plan.wants("queries", f"queries-{name}"):
            continue
        say(f"  query {name}")
        sides = plan.alternate(*(partial(query, plan, clients, name, api) for api in (clients.ours, clients.theirs)))
        seconds.append([[took for took, _ in side] for side in sides])
        ours, theirs = (median(tokens for _, tokens in side) for side in sides)
        each = row(f"queries-{name}", "s", seconds[-1])
        counted = f"{ours:.0f} tokens sent, {theirs:.0f} by the peer"
        measured.append(replace(each, note="; ".join(filter(None, (counted, each.note)))))
    if len(measured) == len(QUERIES):
        sums = [[sum(run) for run in zip(*runs, strict=True)] for runs in zip(*seconds, strict=True)]
        yield row("queries", "s", sums)
    yield from measured


def text(name: str, model: str, run: int | None = None) -> str:
    """A query's text, with its `from` clause."""
    return QUERIES[name].replace(" {run}", "" if run is None else f" {run}").replace("{model}", model)


def query(plan: Plan, clients: Clients, name: str, api: StandIn, run: int) -> tuple[float, int]:
    """Run a query; its seconds, and how many tokens the server sent for it."""
    import lmql

    from benchmarks.lmql_client import model_clause

    asked = text(name, model_clause(plan.weights), 100 + run)
    seconds, predictions = clients.timed(api, lambda: lmql.run(asked))
    return seconds, sum(chunk.count("TOKEN ") for prediction in predictions for chunk in prediction.chunks)
