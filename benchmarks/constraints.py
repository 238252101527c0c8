"""Answers constrained by a schema or a regular expression, against free answers and vLLM's structured output."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks import engines, prompts
from benchmarks.plan import Plan, say
from benchmarks.report import Row, Skipped, cost, speedup
from benchmarks.side import Caller, Side

ROWS = ("json", "json-1", "json-vllm", "constrained")
STREAMS = 8
TEMPERATURE = 0.7
MAX_TOKENS = 256
"""Enough for nearly all records."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 40},
        "category": {"enum": ["billing", "technical", "delivery", "account", "other"]},
        "priority": {"type": "integer", "minimum": 1, "maximum": 5},
        "needs_reply": {"type": "boolean"},
        "summary": {"type": "string", "maxLength": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 15}, "minItems": 1, "maxItems": 4},
    },
    "required": ["customer_name", "category", "priority", "needs_reply", "summary", "tags"],
    "additionalProperties": False,
}

MESSAGES = (
    "I was charged twice in March. Please send one payment back. Anna Weber",
    "The app closes whenever I open my photos. It did not last week. Bashir Khan",
    "My parcel was to come on Monday and is still not there. Carla Rossi",
    "I have a new phone number and cannot log in any more. Dmitri Orlov",
    "Thank you for the quick help, all is well again. Elena Petrova",
    "Where do I find the invoice for my last three orders? Farid Haddad",
    "The lamp came broken, with glass all over the box. Greta Lund",
    "Can two people in one household share an account? Hiro Tanaka",
)

STEPS_STREAMS = 32
STEPS_TOKENS = 64
STEPS_PROMPT = 5
FREE_REGEX = "[a-z ]+"
"""It forces no token, never ends, and does not count. A grammar that counts, such as `{5000}`, changes its state with
every token, and llguidance recomputes its mask in 0.3 ms instead of 0.005."""


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The rows json, json-1, json-vllm and constrained."""
    with ExitStack() as stack:
        # Not endless: tokens after an end of sequence have little text. min_tokens keeps free streams from ending.
        ours = engines.our_engine(plan, stack, endless=False)
        for name, streams in (("json", plan.size(STREAMS, 2)), ("json-1", 1)):
            if plan.wants(name):
                yield _beside_free_text(plan, ours, name, streams)
        if plan.wants("json-vllm"):
            yield _beside_vllm(plan, stack, ours)
        if plan.wants("constrained"):
            yield _steps(plan, ours)


def questions(streams: int, side: int, run: int) -> list[str]:
    """A run's questions. Messages are numbered by side and run, so that no cache answers them."""
    return [
        f"Message {1000 * side + 10 * run + stream}: {MESSAGES[stream % len(MESSAGES)]}\n"
        "Write customer_name, category, priority, needs_reply, summary and tags of this message as one JSON object."
        for stream in range(streams)
    ]


def seeds(streams: int, run: int) -> list[int]:
    """A run's seeds, one for each stream."""
    return [1000 * run + stream for stream in range(streams)]


def is_record(text: str) -> bool:
    """Whether the text is a complete record."""
    try:
        record = json.loads(text)
    except ValueError:
        return False
    return isinstance(record, dict) and record.keys() == SCHEMA["properties"].keys()


def records(ours: Caller, streams: int, side: int, run: int) -> dict[str, Any]:
    """Run constrained streams. Raises RuntimeError if one does not follow the schema."""
    result = _run(ours, streams, side, run, [{"max_tokens": MAX_TOKENS, "json_schema": SCHEMA}] * streams)
    for text, times in zip(result["texts"], result["arrivals"], strict=True):
        if len(times) < MAX_TOKENS and not is_record(text):
            raise RuntimeError(f"not a record that follows the schema: {text}")
    return result


def _run(ours: Caller, streams: int, side: int, run: int, settings: list[dict[str, Any]]) -> dict[str, Any]:
    asked = ours.call("chat", prompts=questions(streams, side, run))
    own = [{"seed": seed, **each} for seed, each in zip(seeds(streams, run), settings, strict=True)]
    return engines.run(ours, prompts.operations(asked, own, temperature=TEMPERATURE, text=True))


def _beside_free_text(plan: Plan, ours: Side, name: str, streams: int) -> Row:
    say(f"  JSON by a schema, {streams} at once")
    lengths: list[int] = []
    tokens: list[int] = []

    def constrained(run: int) -> float:
        result = records(ours, streams, 1 if streams > 1 else 3, run)
        lengths[:] = [len(times) for times in result["arrivals"]]
        tokens.append(result["tokens"])
        return _rate(result)

    def free(run: int) -> float:
        # It runs right after the constrained turn of the same run.
        settings = [{"max_tokens": length, "min_tokens": length} for length in lengths]
        result = _run(ours, streams, 2 if streams > 1 else 4, run, settings)
        return _rate(engines.checked(result, sum(lengths)))

    return speedup(
        name,
        _work(streams),
        "the same model unconstrained, as many tokens after the same prompts",
        "characters/s",
        plan.alternate(constrained, free),
        at_least=1.0,
        goal=1.5,
        note=f"{sum(tokens[1:]) / (streams * plan.runs):.0f} tokens a stream",
    )


def _beside_vllm(plan: Plan, stack: ExitStack, ours: Side) -> Row | Skipped:
    vllm = engines.vllm(plan, stack, ["json-vllm"])
    if isinstance(vllm, Skipped):
        return vllm
    streams = plan.size(STREAMS, 2)
    say(f"  JSON by a schema against vLLM, {streams} at once")

    def their_run(run: int) -> dict[str, Any]:
        asked = ours.call("chat", prompts=questions(streams, 5, run))
        own = seeds(streams, run)
        result: dict[str, Any] = vllm.call(
            "structured", prompts=asked, schema=SCHEMA, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seeds=own
        )
        return result

    results = plan.alternate(partial(records, ours, streams, 5), their_run)
    described, their_described = map(_described, results)
    return speedup(
        "json-vllm",
        _work(streams),
        "vLLM's structured output",
        "characters/s",
        [[_rate(each) for each in side] for side in results],
        at_least=1.0,
        goal=1.0,
        note=f"this project: {described}; vLLM, which leaves white space to the model: {their_described}",
    )


def _steps(plan: Plan, ours: Side) -> Row:
    streams, new_tokens = steps_size(plan)
    say(f"  a regular expression on each of {streams} streams")
    results = plan.alternate(partial(steps, plan, ours, {"regex": FREE_REGEX}), partial(steps, plan, ours, {}))
    return cost(
        "constrained",
        f"{streams} streams, each with a regular expression that forces no token, {new_tokens} new tokens",
        "the same without",
        "s",
        [engines.seconds(side) for side in results],
        at_most=1.1,
        goal=1.1,
    )


def steps_size(plan: Plan) -> tuple[int, int]:
    """Streams and new tokens of each in the row constrained."""
    return plan.size(STEPS_STREAMS, 4), plan.size(STEPS_TOKENS, 8)


def steps(plan: Plan, ours: Caller, constraint: dict[str, str], run: int) -> dict[str, Any]:
    """Run streams under a constraint that never ends them."""
    streams, new_tokens = steps_size(plan)
    settings = {"max_tokens": new_tokens, "min_tokens": new_tokens, "temperature": TEMPERATURE, **constraint}
    batch = [prompts.tokens(STEPS_PROMPT, "constrained", sorted(constraint), run, i) for i in range(streams)]
    operations = prompts.operations(batch, [{"seed": seed} for seed in seeds(streams, run)], **settings)
    return engines.run(ours, operations, streams * new_tokens)


def _work(streams: int) -> str:
    at_once = "one stream" if streams == 1 else f"{streams} at once"
    return f"JSON by a schema of six properties, {at_once}, temperature {TEMPERATURE}"


def _rate(result: dict[str, Any]) -> float:
    return sum(map(len, result["texts"])) / float(result["seconds"])


def _described(results: list[dict[str, Any]]) -> str:
    """The number of complete answers, and their rate in characters of JSON without optional white space."""
    texts = [text for result in results for text in result["texts"]]
    whole = [text for text in texts if is_record(text)]
    dense = sum(len(json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))) for text in whole)
    seconds = sum(float(result["seconds"]) for result in results)
    complete = f"{len(whole)} of {len(texts)} records complete"
    return f"{complete}, {dense / seconds:.0f} characters/s of them without white space"
