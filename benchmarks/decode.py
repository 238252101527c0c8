"""Plain greedy decoding, against Transformers' generate, vLLM and llama.cpp; and the cost of masks and sampling."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

from benchmarks import engines, prompts
from benchmarks.plan import Plan, say
from benchmarks.report import Row, Skipped, cost, speedup
from benchmarks.side import Caller, Side

STREAMS = (1, 8, 32)
PROMPT = 5
NEW_TOKENS = 64
SAMPLING_STREAMS = 32, 4
SAMPLING = "a mask of half the vocabulary, top_logprobs 20, temperature 0.8, top-p 0.9"
PEERS = {"decode": "generate", "vllm": "vLLM", "llama": "llama.cpp"}
TARGETS = {
    "decode": {1: (1.8, 2.0), 8: (1.4, 2.0), 32: (1.4, 1.6)},
    "vllm": dict.fromkeys(STREAMS, (1.0, 1.2)),
    "llama": dict.fromkeys(STREAMS, (1.0, 1.2)),
}
NO_CHOICE = "llama.cpp's benchmark decodes random tokens and chooses none from the logits."
NOTES = {"llama": f"llama.cpp's weights have the checkpoint's dtype. {NO_CHOICE}"}
ROWS = (*(f"{family}-{streams}" for family in PEERS for streams in STREAMS), "sampling")


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The rows decode-…, vllm-…, llama-… and sampling."""
    with ExitStack() as stack:
        ours = engines.our_engine(plan, stack)
        if plan.wants(*ROWS[:-1]):
            yield from _decode(plan, stack, ours)
        if plan.wants("sampling"):
            streams = plan.size(*SAMPLING_STREAMS)
            say(f"  sampling, {streams} streams")
            results = plan.alternate(partial(sampling, plan, True, ours), partial(sampling, plan, False, ours))
            yield cost(
                "sampling",
                f"{streams} streams, each with {SAMPLING}",
                "the same without",
                "s",
                [engines.seconds(side) for side in results],
                at_most=1.25,
                goal=1.1,
            )


def _decode(plan: Plan, stack: ExitStack, ours: Side) -> Iterator[Row | Skipped]:
    theirs: dict[str, Side] = {}
    if plan.wants(*ROWS[:3]):
        theirs["decode"] = engines.transformers(plan, stack)
    for family, start in (("vllm", engines.vllm), ("llama", engines.llama_cpp)):
        rows = [f"{family}-{streams}" for streams in STREAMS if plan.wants(f"{family}-{streams}")]
        started = start(plan, stack, rows) if rows else None
        if isinstance(started, Skipped):
            yield started
        elif started:
            theirs[family] = started
    for streams in STREAMS:
        families = [family for family in theirs if plan.wants(f"{family}-{streams}")]
        if not families:
            continue
        say(f"  {streams} streams")
        sides = [partial(generate, plan, streams, theirs[family]) for family in families]
        results, *their_results = plan.alternate(partial(greedy, plan, streams, ours), *sides)
        rates = engines.rates(results)
        steps = median(len(result["steps"]) for result in results)
        note = f"{new_tokens(plan)} tokens of each stream in {steps:.0f} steps; the others are accepted drafts"
        for family, peer_results in zip(families, their_results, strict=True):
            at_least, goal = TARGETS[family][streams]
            yield speedup(
                f"{family}-{streams}",
                f"greedy decoding, {streams} at once, {PROMPT}-token prompts, {new_tokens(plan)} new tokens",
                PEERS[family],
                "tokens/s",
                [rates, engines.rates(peer_results)],
                at_least=at_least,
                goal=goal,
                note=f"{note}. {NOTES[family]}" if family in NOTES else note,
            )


def new_tokens(plan: Plan) -> int:
    """Tokens of each stream."""
    return plan.size(NEW_TOKENS, 8)


def greedy(plan: Plan, streams: int, engine: Caller, run: int) -> dict[str, Any]:
    """A greedy run of this project's engine."""
    return continued(plan, _batch(streams, run), engine)


def generate(plan: Plan, streams: int, peer: Side, run: int) -> dict[str, Any]:
    """The same run of a peer."""
    return generated(plan, _batch(streams, run), peer)


def continued(plan: Plan, batch: list[list[int]], engine: Caller) -> dict[str, Any]:
    """A greedy run of this project's engine, from a batch of token ids."""
    operations = prompts.operations(batch, max_tokens=new_tokens(plan))
    return engines.run(engine, operations, len(batch) * new_tokens(plan))


def generated(plan: Plan, batch: list[list[int]], peer: Side) -> dict[str, Any]:
    """The same of a peer."""
    result = peer.call("generate", prompts=batch, max_tokens=new_tokens(plan))
    return engines.checked(result, len(batch) * new_tokens(plan))


def _batch(streams: int, run: int) -> list[list[int]]:
    return [prompts.tokens(PROMPT, "decode", streams, run, stream) for stream in range(streams)]


def sampling(plan: Plan, rich: bool, engine: Caller, run: int) -> dict[str, Any]:
    """A run of streams with masks and sampling (`rich`), or of greedy ones."""
    streams = plan.size(*SAMPLING_STREAMS)
    batch = [prompts.tokens(PROMPT, "sampling", rich, run, i) for i in range(streams)]
    options = {"temperature": 0.8, "top_p": 0.9, "top_logprobs": 20} if rich else {}
    own = [{"seed": i, "mask": prompts.half_mask("sampling", i)} for i in range(streams)] if rich else None
    operations = prompts.operations(batch, own, max_tokens=new_tokens(plan), **options)
    return engines.run(engine, operations, streams * new_tokens(plan))
