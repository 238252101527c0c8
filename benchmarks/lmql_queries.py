"""LMQL queries through Replicate's interface: this project beside LMQL's own server."""

import time
from collections.abc import Iterator
from statistics import median

from benchmarks import peers
from benchmarks.plan import Plan, say
from benchmarks.report import Row, Skipped
from benchmarks.servers import Clients, both, model_clause
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
"""By name. The number of the run stands at the beginning, so that no run can be answered with another run's work."""

ROWS = ("queries", *(f"queries-{name}" for name in QUERIES))


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The row queries, for all of them together, and one row for each."""
    wanted = [name for name in QUERIES if plan.wants("queries", f"queries-{name}")]
    if not peers.has_lmql():
        yield Skipped([row for row in ROWS if plan.wants(row)], peers.LMQL_HOW_TO)
        return
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    rows = []
    with both(plan) as clients:
        for name in wanted:
            say(f"  query {name}")
            tokens: dict[str, list[int]] = {"ours": [], "LMQL's": []}

            def ask(
                api: StandIn, side: str, run: int, name: str = name, tokens: dict[str, list[int]] = tokens
            ) -> float:
                seconds, count = query(plan, clients, api, name, run)
                tokens[side].append(count)
                return seconds

            ours[name], theirs[name] = plan.alternate(
                lambda run, ask=ask: ask(clients.ours, "ours", run),  # type: ignore[misc]
                lambda run, ask=ask: ask(clients.lmqls, "LMQL's", run),  # type: ignore[misc]
            )
            counts = {side: median(runs[1:]) for side, runs in tokens.items()}
            rows.append(
                _row(
                    f"queries-{name}",
                    f"the LMQL query {name}",
                    ours[name],
                    theirs[name],
                    (2, 2),
                    f"{counts['ours']:.0f} tokens sent back, by LMQL's server {counts[_THEIRS]:.0f}",
                )
            )
    if len(wanted) == len(QUERIES):
        our_sums, their_sums = ([sum(run) for run in zip(*side.values(), strict=True)] for side in (ours, theirs))
        yield _row("queries", "the LMQL queries below, one after the other", our_sums, their_sums, (3, 5), "")
    yield from rows


_THEIRS = "LMQL's"


def query(plan: Plan, clients: Clients, api: StandIn, name: str, run: int) -> tuple[float, int]:
    """Run a query; its wall time in seconds, and how many tokens the server sent for it."""
    import lmql

    text = QUERIES[name].replace("{run}", str(100 + run)).replace("{model}", model_clause(plan))
    before = len(api.predictions)
    clients.wait_until_idle()
    started = time.perf_counter()
    clients.run(api, lambda: lmql.run(text))
    seconds = time.perf_counter() - started
    sent = [prediction.chunks for prediction in list(api.predictions.values())[before:]]
    return seconds, sum(chunk.count("TOKEN ") for chunks in sent for chunk in chunks)


def _row(name: str, work: str, ours: list[float], theirs: list[float], targets: tuple[float, float], note: str) -> Row:
    return Row(
        name=name,
        work=work,
        against="LMQL's own server",
        unit="s",
        ours=ours,
        peer=theirs,
        at_least=targets[0],
        goal=targets[1],
        note=note,
    )
