"""What the rows without a clock compute, counted on a tiny random model: tokens, steps, forward passes, host reads.

The counts are the same on every machine, so that tests compare them exactly with `expectations.json`. A change that
makes a row compute more, wait more often or reuse less shows there, however noisy the machine is.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import constraints, decode, engines, prefill, prompts, reuse
from benchmarks.our_side import Recorder
from benchmarks.plan import ROOT, Plan
from lmtp.engine import sampling
from tests import tiny

EXPECTATIONS = ROOT / "benchmarks" / "expectations.json"
CONTEXT = 1024
RUN = 1

Counts = dict[str, dict[str, int]]
"""By row and by counter."""


Work = Callable[["_Counted"], object]


class _Counted:
    """A recorder as a side in this process. It adds up what its calls count."""

    def __init__(self, recorder: Recorder, counts: dict[str, int]) -> None:
        self._recorder = recorder
        self._counts = counts

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the recorder."""
        result = getattr(self._recorder, method)(**arguments)
        if method == "run":
            for name, count in result["counters"].items():
                self._counts[name] = self._counts.get(name, 0) + count
        return result


def count(weights: Path) -> Counts:
    """Run the rows at their quick size. ``weights`` holds the demo model's tokenizer, the only part that is used."""
    from transformers import AutoTokenizer

    plan = Plan(weights, runs=1, quick=True, dtype="float32")
    model = tiny.build("llama", vocab_size=prompts.VOCABULARY, max_position_embeddings=CONTEXT)
    engine = tiny.start(model, AutoTokenizer.from_pretrained(weights, local_files_only=True))
    counted: Counts = {}
    try:
        with _watched(model) as watched:
            for endless, works in ((False, _ending(plan)), (True, _endless(plan))):
                recorder = Recorder(engine, endless)
                for name, work in works.items():
                    watched.update(forwards=0, host_reads=0)
                    counts: dict[str, int] = {}
                    work(_Counted(recorder, counts))
                    counted[name] = counts | watched
    finally:
        engine.stop()
    return counted


def _ending(plan: Plan) -> dict[str, Work]:
    """The rows whose streams may end by a token."""
    return {
        "json": lambda side: constraints.records(side, 2, 1, RUN),
        "constrained": lambda side: constraints.steps(plan, side, {"regex": constraints.FREE_REGEX}, RUN),
    }


def _endless(plan: Plan) -> dict[str, Work]:
    """The rows whose streams have the requested length."""
    return {
        "decode-1": lambda side: decode.greedy(plan, 1, side, RUN),
        "decode-8": lambda side: decode.greedy(plan, 8, side, RUN),
        "decode-32": lambda side: decode.greedy(plan, 32, side, RUN),
        "sampling": lambda side: decode.sampling(plan, True, side, RUN),
        "prefill": lambda side: prefill.first_token(plan, side, RUN),
        "continuation": lambda side: _continuation(plan, side),
        "score": lambda side: _score(plan, side),
    }


def _continuation(plan: Plan, side: _Counted) -> None:
    length, chunks = reuse.continuation_size(plan)
    text = prompts.tokens(length, "continuation", RUN)
    for _ in range(chunks):
        (chunk,) = engines.run(side, prompts.operations([text], max_tokens=reuse.CHUNK), reuse.CHUNK)["ids"]
        text = text + chunk


def _score(plan: Plan, side: _Counted) -> None:
    length, options = reuse.score_size(plan)
    prompt = prompts.tokens(length, "score", RUN)
    scored = [prompts.tokens(reuse.OPTION, "option", RUN, i) for i in range(options)]
    operations = [["SCORE", {"stream_id": i, "prompt": prompt, "scored": own}] for i, own in enumerate(scored)]
    engines.run(side, operations, options * reuse.OPTION)


@contextmanager
def _watched(model: Any) -> Iterator[dict[str, int]]:
    """Count forward passes, and the times that numbers of a step are read on the host: on a GPU each one waits."""
    counts = {"forwards": 0, "host_reads": 0}
    to_host = sampling._to_host

    def counting_to_host(*arguments: Any) -> Any:
        counts["host_reads"] += 1
        return to_host(*arguments)

    def counting_forward(*_: Any) -> None:
        counts["forwards"] += 1

    hook = model.get_input_embeddings().register_forward_hook(counting_forward)
    try:
        with mock.patch.object(sampling, "_to_host", counting_to_host):
            yield counts
    finally:
        hook.remove()


def expected() -> Counts:
    """The committed counts."""
    return json.loads(EXPECTATIONS.read_text(encoding="utf-8")) if EXPECTATIONS.exists() else {}


def differences(old: Counts, new: Counts) -> list[str]:
    """What changed, a line for each count."""
    flat_old, flat_new = (
        {f"{row} {name}": count for row, counts in each.items() for name, count in counts.items()}
        for each in (old, new)
    )
    names = [*flat_new, *(name for name in flat_old if name not in flat_new)]
    return [
        f"{name}: {flat_old.get(name, 'none')} before, {flat_new.get(name, 'none')} now"
        for name in names
        if flat_old.get(name) != flat_new.get(name)
    ]


def write(counts: Counts) -> None:
    """Make the counts the expected ones."""
    EXPECTATIONS.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
