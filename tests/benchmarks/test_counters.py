"""The counts of the rows that depend on no clock: exactly those that are committed."""

from pathlib import Path

from benchmarks import counters


def test_rows_compute_exactly_what_is_expected(demo_weights: Path) -> None:
    changed = counters.differences(counters.expected(), counters.count(demo_weights))
    assert not changed, "if this is meant, run `script/benchmark --counters`:\n" + "\n".join(changed)


def test_what_changed_is_said_count_by_count() -> None:
    old = {"prefill": {"steps": 1, "computed_tokens": 200}, "score": {"steps": 2}}
    new = {"prefill": {"steps": 2, "computed_tokens": 200}, "json": {"steps": 9}}
    assert counters.differences(old, new) == [
        "prefill steps: 1 before, 2 now",
        "json steps: none before, 9 now",
        "score steps: 2 before, none now",
    ]
