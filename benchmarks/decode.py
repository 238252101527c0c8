"""Plain greedy decoding beside Transformers' generate and vLLM, and what masks and sampling cost."""

from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any

from benchmarks import peers, prompts
from benchmarks.plan import Plan, say
from benchmarks.report import Row, Skipped
from benchmarks.side import Side, SideError

STREAMS = (1, 8, 32)
PROMPT = 5
NEW_TOKENS = 64
TARGETS = {1: (1.8, 2.0), 8: (1.4, 2.0), 32: (1.4, 1.6)}
ROWS = (*(f"decode-{streams}" for streams in STREAMS), *(f"vllm-{streams}" for streams in STREAMS), "sampling")


def our_engine(plan: Plan, stack: ExitStack, endless: bool = True) -> Side:
    """This project's engine, started."""
    environment = {"WEIGHTS_DIR": str(plan.weights), "DTYPE": plan.dtype}
    side = stack.enter_context(Side("benchmarks.our_side:Engine", environment=environment))
    side.make(endless=endless)
    say("  engine: runner", side.call("describe"))
    return side


def transformers(plan: Plan, stack: ExitStack) -> Side:
    """Transformers, started."""
    environment = {"HF_HUB_OFFLINE": "1"}
    side = stack.enter_context(Side("benchmarks.transformers_side:Transformers", environment=environment))
    side.make(weights=str(plan.weights), dtype=plan.dtype)
    return side


def vllm(plan: Plan, stack: ExitStack, rows: list[str]) -> Side | Skipped:
    """vLLM, started; or why the rows that need it are left out."""
    python = peers.vllm_python()
    if python is None:
        return Skipped(rows, peers.VLLM_HOW_TO)
    say("  starting vLLM, which takes a minute or two")
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_CPU_KVCACHE_SPACE"] = "2"
    try:
        side = stack.enter_context(Side("benchmarks.vllm_side:VLLM", python=python, environment=environment))
        side.make(weights=str(plan.weights), dtype=plan.dtype)
    except (SideError, OSError) as error:
        say(f"  {error}")
        return Skipped(rows, "vLLM is there and does not start.")
    return side


def greedy(streams: list[list[int]], new_tokens: int, **options: Any) -> list[Any]:
    """GENERATE operations, a stream for each prompt."""
    return [
        ["GENERATE", {"stream_id": i, "prompt": prompt, "max_tokens": new_tokens, **options}]
        for i, prompt in enumerate(streams)
    ]


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The rows decode-…, vllm-… and sampling."""
    with ExitStack() as stack:
        ours = our_engine(plan, stack)
        if plan.wants(*ROWS[:-1]):
            yield from _decode(plan, stack, ours)
        if plan.wants("sampling"):
            yield _sampling(plan, ours)


def _decode(plan: Plan, stack: ExitStack, ours: Side) -> Iterator[Row | Skipped]:
    theirs: dict[str, Side] = {}
    if plan.wants(*ROWS[:3]):
        theirs["decode"] = transformers(plan, stack)
    if beside_vllm := [row for row in ROWS[3:6] if plan.wants(row)]:
        started = vllm(plan, stack, beside_vllm)
        if isinstance(started, Skipped):
            yield started
        else:
            theirs["vllm"] = started
    new_tokens = plan.size(NEW_TOKENS, 8)
    for streams in STREAMS:
        families = [family for family in theirs if plan.wants(f"{family}-{streams}")]
        if not families:
            continue
        say(f"  {streams} streams")

        def batch(run: int, streams: int = streams) -> list[list[int]]:
            return [prompts.tokens(PROMPT, "decode", streams, run, stream) for stream in range(streams)]

        steps: list[int] = []

        def our_rate(run: int, expected: int = streams * new_tokens, steps: list[int] = steps) -> float:
            result = ours.call("run", predictions=[{"operations": greedy(batch(run), new_tokens)}])
            steps.append(len(result["steps"]))
            return _rate(result, expected)

        def rate_of(side: Side, run: int, expected: int = streams * new_tokens) -> float:
            return _rate(side.call("generate", prompts=batch(run), max_tokens=new_tokens), expected)

        sides = [lambda run, side=theirs[family]: rate_of(side, run) for family in families]
        our_samples, *samples = plan.alternate(our_rate, *sides)
        for family, their_samples in zip(families, samples, strict=True):
            at_least, goal = TARGETS[streams] if family == "decode" else (0.9, 1.0)
            yield Row(
                name=f"{family}-{streams}",
                work=f"greedy decoding, {streams} at once, {PROMPT}-token prompts, {new_tokens} new tokens",
                against="generate" if family == "decode" else "vLLM",
                unit="tokens/s",
                ours=our_samples,
                peer=their_samples,
                more_is_better=True,
                at_least=at_least,
                goal=goal,
                note=f"{new_tokens} tokens of each stream in {median(steps[1:]):.0f} steps, the others guessed rightly",
            )


def _sampling(plan: Plan, ours: Side) -> Row:
    streams = plan.size(32, 4)
    new_tokens = plan.size(NEW_TOKENS, 8)

    def batch(run: int, rich: bool) -> list[Any]:
        operations = greedy([prompts.tokens(PROMPT, "sampling", rich, run, i) for i in range(streams)], new_tokens)
        if rich:
            for i, (_, payload) in enumerate(operations):
                payload |= {"temperature": 0.8, "top_p": 0.9, "seed": i, "top_logprobs": 20}
                payload["mask"] = prompts.half_mask("sampling", i)
        return operations

    def seconds(run: int, rich: bool) -> float:
        result = ours.call("run", predictions=[{"operations": batch(run, rich)}])
        return streams * new_tokens / _rate(result, streams * new_tokens)

    say(f"  sampling, {streams} streams")
    rich, plain = plan.alternate(lambda run: seconds(run, True), lambda run: seconds(run, False))
    return Row(
        name="sampling",
        work=f"{streams} streams, each with a mask of half the vocabulary, top_logprobs 20, temperature 0.8, top-p 0.9",
        against="the same without",
        unit="s",
        ours=rich,
        peer=plain,
        kind="cost",
        at_least=1.25,
        goal=1.1,
    )


def _rate(result: dict[str, float], expected: int) -> float:
    if result["tokens"] != expected:
        raise RuntimeError(f"{result['tokens']} tokens came, not {expected}")
    return expected / result["seconds"]
