"""Answers that a schema or a regular expression constrains, beside free ones and beside vLLM's structured output."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from benchmarks import decode, prompts
from benchmarks.plan import Plan, say
from benchmarks.report import Row, Skipped
from benchmarks.side import Side

ROWS = ("json", "json-1", "json-vllm", "constrained")
STREAMS = 8
TEMPERATURE = 0.7
MOST_TOKENS = 256
"""More than nearly all records take."""

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
"""It forces no token and does not come to its end. It counts nothing either: a grammar that does, as `{5000}` would, is
in another state after every token, and llguidance finds its mask anew, in 0.3 ms instead of 0.005."""


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """The rows json, json-1, json-vllm and constrained."""
    with ExitStack() as stack:
        # Not endless: tokens past an end of the sequence have little text. min_tokens keeps free streams from ending.
        ours = decode.our_engine(plan, stack, endless=False)
        for name, streams in (("json", plan.size(STREAMS, 2)), ("json-1", 1)):
            if plan.wants(name):
                yield _beside_free_text(plan, ours, name, streams)
        if plan.wants("json-vllm"):
            yield _beside_vllm(plan, stack, ours)
        if plan.wants("constrained"):
            yield _steps(plan, ours)


def questions(streams: int, side: int, run: int) -> list[str]:
    """What a run asks for. Messages are numbered by side and run, so that nothing is won by what is remembered."""
    return [
        f"Message {1000 * side + 10 * run + stream}: {MESSAGES[stream % len(MESSAGES)]}\n"
        "Write customer_name, category, priority, needs_reply, summary and tags of this message as one JSON object."
        for stream in range(streams)
    ]


def seeds(streams: int, run: int) -> list[int]:
    """A run's seeds, a stream each."""
    return [1000 * run + stream for stream in range(streams)]


def is_record(text: str) -> bool:
    """Whether it is a whole record."""
    try:
        record = json.loads(text)
    except ValueError:
        return False
    return isinstance(record, dict) and record.keys() == SCHEMA["properties"].keys()


def _records(ours: Side, streams: int, side: int, run: int) -> dict[str, Any]:
    """A run of constrained streams. Raises RuntimeError where one is not what the schema asks for."""
    result = _run(ours, streams, side, run, [{"max_tokens": MOST_TOKENS, "json_schema": SCHEMA}] * streams)
    for text, times in zip(result["texts"], result["arrivals"], strict=True):
        if len(times) < MOST_TOKENS and not is_record(text):
            raise RuntimeError(f"this is not a record by the schema: {text}")
    return result


def _run(ours: Side, streams: int, side: int, run: int, settings: list[dict[str, Any]]) -> dict[str, Any]:
    asked = ours.call("chat", prompts=questions(streams, side, run))
    operations = [
        ["GENERATE", {"stream_id": i, "prompt": prompt, "temperature": TEMPERATURE, "seed": seed, "text": True, **own}]
        for i, (prompt, seed, own) in enumerate(zip(asked, seeds(streams, run), settings, strict=True))
    ]
    result: dict[str, Any] = ours.call("run", predictions=[{"operations": operations}])
    return result


def _beside_free_text(plan: Plan, ours: Side, name: str, streams: int) -> Row:
    say(f"  JSON by a schema, {streams} at once")
    lengths: list[int] = []
    tokens: list[int] = []

    def constrained(run: int) -> float:
        result = _records(ours, streams, 1 if streams > 1 else 3, run)
        lengths[:] = [len(times) for times in result["arrivals"]]
        tokens.append(result["tokens"])
        return _rate(result)

    def free(run: int) -> float:
        # Its turn comes after the constrained one of the same run.
        settings = [{"max_tokens": length, "min_tokens": length} for length in lengths]
        result = _run(ours, streams, 2 if streams > 1 else 4, run, settings)
        if result["tokens"] != sum(lengths):
            raise RuntimeError(f"{result['tokens']} tokens came, not {sum(lengths)}")
        return _rate(result)

    our_samples, free_samples = plan.alternate(constrained, free)
    return Row(
        name=name,
        work=f"JSON by a schema of six properties, {_at_once(streams)}, temperature {TEMPERATURE}",
        against="the same model unconstrained, as many tokens after the same prompts",
        unit="characters/s",
        ours=our_samples,
        peer=free_samples,
        more_is_better=True,
        at_least=1.0,
        goal=1.5,
        note=f"{sum(tokens[1:]) / (streams * plan.runs):.0f} tokens a stream",
    )


def _beside_vllm(plan: Plan, stack: ExitStack, ours: Side) -> Row | Skipped:
    vllm = decode.vllm(plan, stack, ["json-vllm"])
    if isinstance(vllm, Skipped):
        return vllm
    streams = plan.size(STREAMS, 2)
    say(f"  JSON by a schema beside vLLM, {streams} at once")

    def our_run(run: int) -> dict[str, Any]:
        return _records(ours, streams, 5, run)

    def their_run(run: int) -> dict[str, Any]:
        asked = ours.call("chat", prompts=questions(streams, 5, run))
        result: dict[str, Any] = vllm.call(
            "structured",
            prompts=asked,
            schema=SCHEMA,
            max_tokens=MOST_TOKENS,
            temperature=TEMPERATURE,
            seeds=seeds(streams, run),
        )
        return result

    our_results, their_results = plan.alternate(our_run, their_run)
    return Row(
        name="json-vllm",
        work=f"JSON by a schema of six properties, {_at_once(streams)}, temperature {TEMPERATURE}",
        against="vLLM's structured output",
        unit="characters/s",
        ours=[_rate(each) for each in our_results],
        peer=[_rate(each) for each in their_results],
        more_is_better=True,
        at_least=1.0,
        goal=1.0,
        note=f"this project: {_described(our_results)}; vLLM, which leaves white space to the model: "
        f"{_described(their_results)}",
    )


def _steps(plan: Plan, ours: Side) -> Row:
    streams, new_tokens = plan.size(STEPS_STREAMS, 4), plan.size(STEPS_TOKENS, 8)
    say(f"  a regular expression on each of {streams} streams")

    def seconds(run: int, constraint: dict[str, str]) -> float:
        settings = {"max_tokens": new_tokens, "min_tokens": new_tokens, "temperature": TEMPERATURE, **constraint}
        operations = [
            [
                "GENERATE",
                {
                    "stream_id": i,
                    "prompt": prompts.tokens(STEPS_PROMPT, "constrained", sorted(constraint), run, i),
                    "seed": seed,
                    **settings,
                },
            ]
            for i, seed in enumerate(seeds(streams, run))
        ]
        result = ours.call("run", predictions=[{"operations": operations}])
        if result["tokens"] != streams * new_tokens:
            raise RuntimeError(f"{result['tokens']} tokens came, not {streams * new_tokens}")
        return float(result["seconds"])

    constrained, free = plan.alternate(lambda run: seconds(run, {"regex": FREE_REGEX}), lambda run: seconds(run, {}))
    return Row(
        name="constrained",
        work=f"{streams} streams, each with a regular expression that forces no token, {new_tokens} new tokens",
        against="the same without",
        unit="s",
        ours=constrained,
        peer=free,
        kind="cost",
        at_least=1.1,
        goal=1.1,
    )


def _at_once(streams: int) -> str:
    return "one stream" if streams == 1 else f"{streams} at once"


def _rate(result: dict[str, Any]) -> float:
    return sum(map(len, result["texts"])) / float(result["seconds"])


def _described(results: list[dict[str, Any]]) -> str:
    """How many of the answers are whole, and the rate without the white space that JSON can be written without."""
    texts = [text for result in results for text in result["texts"]]
    whole = [text for text in texts if is_record(text)]
    dense = sum(len(json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))) for text in whole)
    seconds = sum(float(result["seconds"]) for result in results)
    return f"{len(whole)} of {len(texts)} records whole, {dense / seconds:.0f} characters/s of them without white space"
