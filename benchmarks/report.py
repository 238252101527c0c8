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

from benchmarks.plan import matrix_units, processor_flags

TOLERANCE = 1e-9
"""Slack for the rounding error of a ratio that meets its target exactly."""


MAX_BUSY = 0.1
"""Part of the processors that other processes may use beside a measurement."""


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
    busy: float = 0.0
    """Which part of the processors other processes used, before the suite or since the row before, from 0 to 1."""

    @property
    def ratio(self) -> float:
        """Ratio of the medians, or median of the paired ratios, in the sense of `kind`."""
        return median(self.ratios) if self.paired else self._ratio(median(self.ours), median(self.peer))

    @property
    def ratios(self) -> list[float]:
        """The ratio of each turn."""
        return [self._ratio(ours, peer) for ours, peer in zip(self.ours, self.peer, strict=True)]

    @property
    def loaded(self) -> bool:
        """Whether other work shared the processors, which makes the figures worthless."""
        return self.busy > MAX_BUSY

    def _ratio(self, ours: float, peer: float) -> float:
        return ours / peer if self.kind == "cost" or self.unit.endswith("/s") else peer / ours

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


class ReportError(Exception):
    """A results file cannot be read; the message says which one and what to do."""


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
        "matrix units": matrix_units(processor_flags()),
        "dtype": dtype,
    }


def slug(machine: dict[str, str]) -> str:
    """A file name: the machine, the dtype unless it is bfloat16, and the checkout compared with, if any.

    Virtual machines give very different processors one name, so that the matrix units are part of it.
    """
    words = [re.sub(r"\((r|tm)\)", "", machine["CPU"], flags=re.IGNORECASE), machine.get("matrix units", "")]
    words += [machine["cores"], "cores"]
    words += [machine["dtype"]] * (machine["dtype"] != "bfloat16")
    words += ["against", machine["against"]] if "against" in machine else []
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def named(machine: dict[str, str]) -> str:
    """The machine in a few words."""
    units = f" ({machine['matrix units']})" if "matrix units" in machine else ""
    return f"{machine['CPU']}{units}, {machine['cores']} cores, {machine['dtype']}"


def table(rows: Iterable[Row]) -> list[list[str]]:
    """The header and the rows, as text."""
    lines = [["row", "work", "ours", "peer", "unit", "against", "ratio", "range", "at least", "goal", "reached"]]
    for row in rows:
        sign = "≤" if row.kind == "cost" else "≥"
        figures = [f"{sign} {number(row.at_least)}", f"{sign} {number(row.goal)}", row.reached]
        medians = [number(median(row.ours)), number(median(row.peer)), row.unit]
        spread = f"{_ratio(min(row.ratios))} to {_ratio(max(row.ratios))}" if len(row.ratios) > 1 else ""
        lines.append([row.name, row.work, *medians, row.against, _ratio(row.ratio), spread, *figures])
    return lines


def plain(report: Report) -> str:
    """The table for a terminal, without the column `work`, then notes and skipped rows."""
    lines = [[*line[:1], *line[2:]] for line in table(report.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"{row.name}: {note}" for row in report.rows if (note := _note(row))]
    text += [f"skipped {', '.join(skipped.rows)}: {skipped.why}" for skipped in report.skipped]
    return "\n".join(text)


def markdown(report: Report) -> str:
    """The report as a Markdown page."""
    facts = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    page = [
        "# Benchmark",
        "",
        f"{facts}.",
        "",
        "Both sides of a row ran in turns on this machine in one run; figures are medians. A ratio with ≥ says",
        "how many times as fast as the peer this project is; one with ≤ says what it costs, the peer's figure being 1.",
        "The range is that of the ratios of single turns.",
        "",
        markdown_table(*table(report.rows)),
    ]
    notes = [f"- `{row.name}`: {note}" for row in report.rows if (note := _note(row))]
    notes += [f"- Not measured: {', '.join(f'`{row}`' for row in each.rows)}. {each.why}" for each in report.skipped]
    return "\n".join([*page, *(["", *notes] if notes else [])]) + "\n"


def markdown_table(head: Sequence[str], *lines: Sequence[str]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def write(report: Report, directory: Path) -> list[Path]:
    """Write JSON, Markdown and a plot into the directory and return their paths."""
    data = save(report, directory)
    return [data, *render(data)]


def save(report: Report, directory: Path) -> Path:
    """Write the JSON into the directory and return its path.

    Rows that this run did not measure are kept; each row holds the time of its measurement.
    """
    directory.mkdir(parents=True, exist_ok=True)
    data = file_of(report.machine, directory)
    whole = merged(report, read(data) if data.exists() else None)
    lines = [_Line(row, median(row.ours), median(row.peer), row.ratio, row.reached) for row in whole.rows]
    document = _Document(machine=whole.machine, rows=lines, skipped=whole.skipped)
    unfinished = data.with_suffix(".part")
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
    return unfinished.replace(data)  # whole or not at all, whenever the run is interrupted


def file_of(machine: dict[str, str], directory: Path) -> Path:
    """The JSON file of a machine."""
    return directory / f"{slug(machine)}.json"


def render(data: Path) -> list[Path]:
    """Write the page and the plot of a JSON file that `save` wrote; their paths."""
    report = read(data)
    page, plot = data.with_suffix(".md"), data.with_suffix(".png")
    page.write_text(markdown(report), encoding="utf-8")
    return [page, *([plot] if "against" not in report.machine and draw(report, plot) else [])]


def read(path: Path) -> Report:
    """Read a report from the JSON that `save` wrote. Raises ReportError if it is none."""
    try:
        document = msgspec.json.decode(path.read_bytes(), type=_Document)
    except (OSError, msgspec.DecodeError) as error:
        raise ReportError(f"{path} is not a benchmark's results ({error}). Move it away and run again.") from error
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
    queries = [row for row in report.rows if row.name.startswith("queries-") and row.kind == "speedup"]
    if not curves and not queries:
        return False
    colors = {"this project": "#0b6e99", "Transformers generate": "#b5651d", "vLLM": "#6b6b6b", "llama.cpp": "#7a9a3a"}
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
        right.bar_label(bars, [number(value) for value in seconds], padding=2, fontsize=8)
    right.set_xticks(range(len(queries)), [row.name.removeprefix("queries-") for row in queries])
    right.set(title="LMQL queries", xlabel="query", ylabel="seconds (less is better)")
    if queries:
        right.set_ylim(top=1.15 * right.get_ylim()[1])  # room for the legend
        right.legend(frameon=False, loc="upper right", ncols=2)
    for panel in (left, right):
        panel.grid(axis="y", linewidth=0.5, alpha=0.5)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{named(report.machine)}, SmolLM2-135M-Instruct", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def decode_curves(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Tokens a second by number of streams, for each engine."""
    curves: dict[str, dict[int, float]] = {}
    for family, peer in (("decode", "Transformers generate"), ("vllm", "vLLM"), ("llama", "llama.cpp")):
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


def _note(row: Row) -> str:
    loaded = f"loaded: other processes used {row.busy:.0%} of the processors" if row.loaded else ""
    return "; ".join(filter(None, (loaded, row.note)))


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 1.5 else f"{value:.2f}"
