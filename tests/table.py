"""docs/models.md: written from what the probe found, and read back for tests."""

import re
from collections.abc import Mapping, Sequence

import transformers

from tests.probe import EXACT, UNBUILT, Row
from tests.server import ROOT

PAGE = ROOT / "docs" / "models.md"

INTRODUCTION = """# Models

Which of the architectures of Transformers {version} are served, and by which runner. `script/models_table` writes this page.

For each type of model it makes a tiny random model in float32 whose windows and chunks are shorter than its texts, and
serves it. *Exact* means equal to Transformers: greedy streams to `generate`, alone and beside other streams; a text that
continues an earlier one to `generate` from its beginning; log-probabilities to those of one forward pass within 0.001.

The comparison departs from this in a few places. Doge and Moshi get windows as long as their context, and BigBird as a
decoder full attention, since beyond these Transformers' own results depend on how it cuts a text; longer texts are not served.
Where `generate` fails with its cache (BLT), it runs without one. RoBERTa and its like are compared with a forward pass that has
the positions `generate` gives, which are not those of a plain one. M2M100 and its like (NLLB, SeamlessM4T) and TrOCR with
sinusoidal positions give padding inside a text no position, but count it once it is in their cache: served is what they compute
without one. T5Gemma's plain pass masks padding: served is what it computes with a mask of ones, as `generate` does. What a
configuration forces on `generate`, such as a last token, is left out.

At setup a runner proves itself again on the real model (`lmtp/runners/selfcheck.py`). A model that no runner serves exactly
is refused with the reason.

- **slots**: streams of all prompts in one batch, with reuse of any common beginning. The fastest.
- **own caches**: the model's own caches, one stream at a time. A finished stream is reused by a text that continues it.
- **own state**: the model keeps its state in its modules. A stream waits for the end of the one before.
- **no cache**: every token computes its whole text, since the model's own cache does not work.
- **whole prompts**: the prompt attends both ways, as Transformers' token types say. It is computed whole, and not reused.

The prompts of encoder-decoder models are their sources, which are encoded at once; log-probabilities are those of targets.

Masked language models and sequence classifiers read texts whole. *Exact* means log-probabilities equal to one forward pass
over each text within 0.001, beside others and alone. Texts share a pass **padded**, **by length** with those of equal
length, or run **one by one**; a note says why not padded. Decoders with a classifier's head are among the classifiers.

Of multimodal models text alone is served, and compared. The section has those that are not among the causal models.

BERT and its like are served as decoders only if their configuration says `is_decoder`: the rows are for such models.
"""

RUNNERS = {"slots": "slots", "the model's own caches": "own caches", "the model's own state": "own state", "no cache": "no cache", "the model's own caches over whole prompts": "whole prompts"}  # fmt: skip

WAYS = {"all texts of a step in one padded pass": "padded", "texts of equal length in one pass": "by length", "one text at a time": "one by one"}  # fmt: skip


def page(found: Mapping[str, Sequence[Row]]) -> str:
    """The whole page: the rows of each kind of model, by title."""
    parts = [INTRODUCTION.format(version=transformers.__version__)]
    for title, rows in found.items():
        exact = sum(row.verdict == EXACT for row in rows)
        head = [f"## {title}", "", f"{exact} of {len(rows)} are exact.", "", "| type | class | served | note |"]
        parts.append("\n".join([*head, "| --- | --- | --- | --- |", *map(line, rows)]) + "\n")
    return "\n".join(parts)


def line(row: Row) -> str:
    """One row of the table."""
    return f"| `{row.model_type}` | `{row.architecture}` | {served(row)} | {note(row)} |"


def served(row: Row) -> str:
    """The runner's short name where it is exact."""
    if row.verdict != EXACT:
        return row.verdict
    way = row.runner.removeprefix("encoder, ")
    return f"exact, {WAYS.get(way) or RUNNERS[way.split(',')[0]]}"


def note(row: Row) -> str:
    """Why it is not served, or why not in slots."""
    if row.verdict == UNBUILT:
        package = re.search(r"requires the (\w+) library|No module named '(\w+)'", row.reason)
        needed = package and (package[1] or package[2])
        return (
            f"it needs the package {needed}" if needed else "Transformers makes no model of such a small configuration"
        )
    reason = row.reason.removeprefix("slots do not serve it: ").partition(". Choose an")[0]
    reason = re.sub(r"\w+Error: .*?(?=; nor do|$)", "its own code fails there", reason)
    return " ".join(reason.replace("|", "\\|").split())


def committed() -> dict[tuple[str, str], str]:
    """What the committed page says is served, by type and class: of several rows the first."""
    cells = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {(kind.removeprefix("| ").strip("`"), name.strip("`")): served for kind, name, served, *_ in reversed(cells)}
