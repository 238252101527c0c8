"""The table of README.md that says how fast this project is: a column for each machine in results/."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.plan import ROOT
from benchmarks.report import Report

README = ROOT / "README.md"
BEGIN, END = "<!-- speed -->", "<!-- /speed -->"
NOT_MEASURED = "not measured"

CLAIMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("greedy decoding, 1, 8, 32 streams", "Transformers' `generate`", ("decode-1", "decode-8", "decode-32")),
    ("the same", "vLLM", ("vllm-1", "vllm-8", "vllm-32")),
    ("the same", "llama.cpp", ("llama-1", "llama-8", "llama-32")),
    ("repetitive text, sampled", "the same without drafts", ("drafts",)),
    ("a T5 of 250M, greedy decoding, 8 streams", "Transformers' `generate`", ("encoder-decoder",)),
    ("five LMQL queries", "LMQL's own server", ("queries",)),
    ("a text of 1,000 tokens continued in 20 calls", "LMQL's own server", ("continuation",)),
    ("16 options scored after a prompt of 500 tokens", "LMQL's own server", ("score",)),
    ("32 streams arriving over 5 s", "`generate`, one stream at a time", ("mixed",)),
    ("JSON by a schema, 1, 8 streams, characters/s", "the same model unconstrained", ("json-1", "json")),
    ("JSON by a schema, 8 streams, characters/s", "vLLM", ("json-vllm",)),
    ("OpenAI's API, 32 streams", "the time of `/predictions`", ("gateway-streams",)),
)
"""Work, what it is compared with, and the rows."""


def reports(directory: Path) -> list[Report]:
    """The machines' reports in a directory of results. Raises ReportError."""
    read = [report.read(path) for path in sorted(directory.glob("*-cores*.json"))]
    # The machine with most rows first.
    return sorted((each for each in read if "against" not in each.machine), key=lambda each: -len(each.rows))


def table(machines: Sequence[Report]) -> str:
    """The table in Markdown: how many times as fast as the peer, on each machine."""
    head = ["work", "compared with", *(report.named(each.machine) for each in machines)]
    lines = ([work, against, *(_claim(each, names) for each in machines)] for work, against, names in CLAIMS)
    return report.markdown_table(head, *lines)


def _claim(machine: Report, names: Sequence[str]) -> str:
    rows = {row.name: row for row in machine.rows if not row.loaded}
    if not rows.keys() & set(names):
        return NOT_MEASURED
    return ", ".join(f"{rows[name].ratio:.2f}" if name in rows else "–" for name in names)


def stated(readme: str, machines: Sequence[Report]) -> str:
    """README.md with the table in its place."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(machines)}\n{END}{after}"
