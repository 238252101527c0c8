"""Greedy decoding of the demo model with int8 weights, against llama.cpp's Q8_0."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks import decode, engines
from benchmarks.plan import Plan, say
from benchmarks.report import Row, Skipped, speedup
from lmtp.weights.manifest import MANIFEST, read_manifest

ROWS = tuple(f"int8-{streams}" for streams in decode.STREAMS)
NOTE = (
    "Ours has one scale for each output, activations in float32, and embeddings and output layer as in the checkpoint;"
    " Q8_0 has a scale for every 32 weights, 8 bits in every matrix, and quantizes activations too."
)


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The rows int8-…."""
    wanted = {f"int8-{streams}": streams for streams in decode.STREAMS if plan.wants(f"int8-{streams}")}
    with ExitStack() as stack:
        theirs = engines.llama_cpp(plan, stack, list(wanted), quantized=True)
        if isinstance(theirs, Skipped):
            yield theirs
            return
        ours = engines.our_engine(replace(plan, weights=weights(plan), dtype="float32"), stack)
        for name, streams in wanted.items():
            say(f"  {streams} streams")
            results, their_results = plan.alternate(
                partial(decode.greedy, plan, streams, ours), partial(decode.generate, plan, streams, theirs)
            )
            steps = median(len(result["steps"]) for result in results)
            tokens = decode.new_tokens(plan)
            yield speedup(
                name,
                f"greedy decoding with int8 weights, {streams} at once, {decode.PROMPT}-token prompts,"
                f" {tokens} new tokens",
                "llama.cpp, Q8_0",
                "tokens/s",
                [engines.rates(results), engines.rates(their_results)],
                at_least=1.0,
                goal=1.2,
                note=f"{ours.call('describe')}; {tokens} tokens of each stream in {steps:.0f} steps; the others are"
                f" accepted drafts. {NOTE}"
                f" {decode.NO_CHOICE}",
            )


def weights(plan: Plan) -> Path:
    """The demo model's directory with `--load-in int8`, made once. script/build with WEIGHTS_DIR and DTYPE=float32
    compiles its step."""
    from benchmarks.random_models import CACHE  # needs torch
    from lmtp.weights.install import download

    directory = CACHE / "demo-int8"
    if not (directory / MANIFEST).is_file() or read_manifest(directory).files != read_manifest(plan.weights).files:
        download(str(plan.weights), None, directory, False, {"load_in": "int8"})
    return directory
