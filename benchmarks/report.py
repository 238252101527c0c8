"""Results: rows with ratios and targets, as a table, as files and as a plot."""

import platform
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Literal

import msgspec
import psutil
from msgspec import Struct

TOLERANCE = 1e-9
"""Slack for the rounding error of a ratio that meets its target exactly."""


class Row(Struct, frozen=True, kw_only=True):
    """One comparison: samples of the same work on both sides, taken in turns, with targets for their ratio."""

    name: str
    work: str
    """What both sides did, in words."""
    against: str
    """The peer, in words."""
    unit: str
    """A unit per second, such as tokens/s, is a rate: more is better."""
    ours: list[float]
    peer: list[float]
    kind: Literal["speedup", "cost"] = "speedup"
    """`speedup`: how many times as fast as the peer; the target is a minimum. `cost`: our figure over the peer's; the
    target is a maximum."""
    paired: bool = False
    """Whether the ratio is the median of each turn's ratio, which cancels slow drift of the machine's speed."""
    at_least: float
    """The target; for a cost, the maximum."""
    goal: float
    note: str = ""
    measured: str = ""

    @property
    def ratio(self) -> float:
        """Ratio of the medians, or median of the paired ratios, in the sense of `kind`."""
        turns = zip(self.ours, self.peer, strict=True) if self.paired else [(median(self.ours), median(self.peer))]
        ours_first = self.kind == "cost" or self.unit.endswith("/s")
        return median(ours / peer if ours_first else peer / ours for ours, peer in turns)

    @property
    def reached(self) -> Literal["goal", "yes", "no"]:
        """Which target the ratio reaches."""
        return "goal" if self._reaches(self.goal) else "yes" if self._reaches(self.at_least) else "no"

    def _reaches(self, target: float) -> bool:
        return self.ratio <= target + TOLERANCE if self.kind == "cost" else self.ratio >= target - TOLERANCE


Samples = list[list[float]]
"""Ours and the peer's, as Plan.alternate returns them."""


def speedup(
    name: str, work: str, against: str, unit: str, samples: Samples, *, at_least: float, goal: float, note: str = ""
) -> Row:
    """A row that says how many times as fast as the peer this project is."""
    ours, peer = samples
    return Row(
        name=name, work=work, against=against, unit=unit, ours=ours, peer=peer, at_least=at_least, goal=goal, note=note
    )


def cost(
    name: str, work: str, against: str, unit: str, samples: Samples, *, at_most: float, goal: float, note: str = ""
) -> Row:
    """A row that says what something costs, the peer's figure being 1."""
    row = speedup(name, work, against, unit, samples, at_least=at_most, goal=goal, note=note)
    return msgspec.structs.replace(row, kind="cost")


class Skipped(Struct, frozen=True):
    """Rows that were not measured, and the reason."""

    rows: list[str]
    why: str


class Report(Struct, kw_only=True):
    """A machine and the rows measured on it."""

    machine: dict[str, str]
    rows: list[Row]
    skipped: list[Skipped]


class _Line(Struct):
    """A row in the JSON file, with the values derived from its samples."""

    row: Row
    median_ours: float
    median_peer: float
    ratio: float
    reached: str


class _Document(Struct, kw_only=True):
    machine: dict[str, str]
    rows: list[_Line]
    skipped: list[Skipped]


def machine(dtype: str) -> dict[str, str]:
    """The machine, and the versions that the figures depend on."""
    return {
        "CPU": _processor(),
        "cores": str(psutil.cpu_count()),
        "RAM": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "Python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "cog")},
        "dtype": dtype,
    }


def slug(machine: dict[str, str]) -> str:
    """A file name: the machine, the dtype unless it is bfloat16, and the checkout compared with, if any."""
    words = [re.sub(r"\((r|tm)\)", "", machine["CPU"].lower()), machine["cores"], "cores"]
    words += [machine["dtype"]] * (machine["dtype"] != "bfloat16")
    words += ["against", machine["against"]] if "against" in machine else []
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words)).strip("-")


def table(rows: Iterable[Row]) -> list[list[str]]:
    """The header and the rows, as text."""
    lines = [["row", "work", "ours", "peer", "unit", "against", "ratio", "at least", "goal", "reached"]]
    for row in rows:
        sign = "≤" if row.kind == "cost" else "≥"
        figures = [f"{sign} {_number(row.at_least)}", f"{sign} {_number(row.goal)}", row.reached]
        medians = [_number(median(row.ours)), _number(median(row.peer)), row.unit]
        lines.append([row.name, row.work, *medians, row.against, _ratio(row.ratio), *figures])
    return lines


def plain(report: Report) -> str:
    """The table for a terminal, without the column `work`, then notes and skipped rows."""
    lines = [[*line[:1], *line[2:]] for line in table(report.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"{row.name}: {row.note}" for row in report.rows if row.note]
    text += [f"skipped {', '.join(skipped.rows)}: {skipped.why}" for skipped in report.skipped]
    return "\n".join(text)


def markdown(report: Report) -> str:
    """The report as a Markdown page."""
    head, *lines = table(report.rows)
    named = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    page = [
        "# Benchmark",
        "",
        f"{named}.",
        "",
        "Both sides of a row ran in turns on this machine in one run; figures are medians. A ratio with ≥ says",
        "how many times as fast as the peer this project is; one with ≤ says what it costs, the peer's figure being 1.",
        "",
        _markdown_line(head),
        _markdown_line(["---"] * len(head)),
        *map(_markdown_line, lines),
    ]
    notes = [f"- `{row.name}`: {row.note}" for row in report.rows if row.note]
    notes += [f"- Not measured: {', '.join(f'`{row}`' for row in each.rows)}. {each.why}" for each in report.skipped]
    return "\n".join([*page, *(["", *notes] if notes else [])]) + "\n"


def write(report: Report, directory: Path) -> list[Path]:
    """Write JSON, Markdown and a plot into the directory and return their paths.

    Rows that this run did not measure are kept; each row holds the time of its measurement.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / slug(report.machine)
    data, page, plot = (stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "md", "png"))
    whole = merged(report, read(data) if data.exists() else None)
    lines = [_Line(row, median(row.ours), median(row.peer), row.ratio, row.reached) for row in whole.rows]
    document = _Document(machine=whole.machine, rows=lines, skipped=whole.skipped)
    data.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
    page.write_text(markdown(whole), encoding="utf-8")
    return [data, page, *([plot] if "against" not in whole.machine and draw(whole, plot) else [])]


def read(path: Path) -> Report:
    """Read a report from the JSON that `write` wrote."""
    document = msgspec.json.decode(path.read_bytes(), type=_Document)
    return Report(machine=document.machine, rows=[line.row for line in document.rows], skipped=document.skipped)


def merged(new: Report, old: Report | None) -> Report:
    """The new report, with the old report's rows where the new one has none."""
    if old is None:
        return new
    measured = {row.name: row for row in new.rows}
    kept = [measured.pop(row.name, row) for row in old.rows]
    rows = kept + list(measured.values())
    names = {row.name for row in rows}
    mentioned = {name for skipped in new.skipped for name in skipped.rows} | names
    skipped = [Skipped([name for name in each.rows if name not in names], each.why) for each in new.skipped]
    skipped += [Skipped([name for name in each.rows if name not in mentioned], each.why) for each in old.skipped]
    return Report(machine=new.machine, rows=rows, skipped=[each for each in skipped if each.rows])


def now() -> str:
    """The current time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def draw(report: Report, path: Path) -> bool:
    """Plot tokens a second by streams, and the time of each LMQL query. False without matplotlib or such rows."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = decode_curves(report.rows)
    queries = [row for row in report.rows if row.name.startswith("queries-")]
    if not curves and not queries:
        return False
    colors = {"this project": "#0b6e99", "Transformers generate": "#b5651d", "vLLM": "#6b6b6b"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4))
    for side, points in curves.items():
        places = range(len(points))
        left.plot(places, list(points.values()), marker="o", linewidth=2, label=side, color=colors.get(side))
        left.set_xticks(places, [str(streams) for streams in points])
    left.set(title="Greedy decoding", xlabel="streams at once", ylabel="tokens a second, all streams together")
    left.set_ylim(bottom=0)
    if curves:
        left.legend(frameon=False)
    for offset, side, color in ((-0.2, "this project", "#0b6e99"), (0.2, "LMQL's own server", "#b5651d")):
        seconds = [median(row.ours if offset < 0 else row.peer) for row in queries]
        bars = right.bar([place + offset for place in range(len(queries))], seconds, 0.38, label=side, color=color)
        right.bar_label(bars, [_number(value) for value in seconds], padding=2, fontsize=8)
    right.set_xticks(range(len(queries)), [row.name.removeprefix("queries-") for row in queries])
    right.set(title="LMQL queries", xlabel="query", ylabel="seconds (less is better)")
    if queries:
        right.set_ylim(top=1.15 * right.get_ylim()[1])  # room for the legend
        right.legend(frameon=False, loc="upper right", ncols=2)
    for panel in (left, right):
        panel.grid(axis="y", linewidth=0.5, alpha=0.5)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    what = report.machine
    figure.suptitle(f"{what['CPU']}, {what['cores']} cores, {what['dtype']}, SmolLM2-135M-Instruct", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def decode_curves(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Tokens a second by number of streams, for each engine."""
    curves: dict[str, dict[int, float]] = {}
    for family, peer in (("decode", "Transformers generate"), ("vllm", "vLLM")):
        for row in rows:
            name, _, streams = row.name.partition("-")
            if name == family:
                curves.setdefault("this project", {}).setdefault(int(streams), median(row.ours))
                curves.setdefault(peer, {})[int(streams)] = median(row.peer)
    return curves


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 1.5 else f"{value:.2f}"


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
