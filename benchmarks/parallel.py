"""A step of two processes that share a model, against one of a single process. Each process has one thread."""

from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median

from benchmarks import prompts
from benchmarks.plan import Plan, say
from benchmarks.report import Row, cost
from benchmarks.side import Side

STREAMS = (1, 8)
ROWS = tuple(f"parallel-{streams}" for streams in STREAMS)
PROCESSES = 2
PROMPT = 20
STEPS = 40


def measure(plan: Plan) -> Iterator[Row]:
    """The rows parallel-…, in float32 whatever the dtype of the others."""
    from benchmarks import random_models  # needs torch

    with ExitStack() as stack:
        variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        side = stack.enter_context(Side("benchmarks.parallel_side:Both", variables))
        side.make(weights=str(random_models.llama(plan)), processes=PROCESSES)
        for streams in STREAMS:
            if plan.wants(f"parallel-{streams}"):
                yield _row(plan, streams, side)


def _row(plan: Plan, streams: int, side: Side) -> Row:
    def turn(run: int) -> list[float]:
        batch = [prompts.tokens(PROMPT, "parallel", streams, run, i) for i in range(streams)]
        seconds: list[float] = side.call("steps", prompts=batch, count=plan.size(STEPS, 2))
        return seconds

    say(f"  {streams} streams in {PROCESSES} processes and in one")
    (turns,) = plan.alternate(turn)
    several, one, telling = map(list, zip(*turns, strict=True))
    return cost(
        f"parallel-{streams}",
        f"a decoding step, {streams} at once, in {PROCESSES} processes of one thread, a random model of the demo"
        " model's size, float32",
        "the same step in one process of one thread",
        "s",
        [several, one],
        at_most=1.0,
        goal=0.9,
        note=f"steps take turns; telling the inputs of one takes {median(telling) * 1000:.2f} ms (at most 0.5)",
    )
