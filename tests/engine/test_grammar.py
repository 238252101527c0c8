"""Constrained generation: what comes out is valid by construction, costs what it must, and fails with a reason.

The tokenizer is the demo model's; most tests use a tiny random model of the same vocabulary, whose wild choices try a
grammar harder than a sensible model does.
"""

import asyncio
import json
import os
import random
import re
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import llguidance.hf
import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmtp.engine.compiler import Compiler
from lmtp.engine.engine import Engine
from lmtp.engine.grammar import Grammar
from lmtp.engine.schema import JSON_STYLE
from lmtp.engine.source import Source, compile_source
from lmtp.engine.stream import OperationStream
from lmtp.protocol import Failure, Generate, ModelInfo, Token
from lmtp.runners.cache_runner import CacheRunner
from lmtp.runners.step import Step
from lmtp.text import render_prompt
from lmtp.weights import load as weights
from tests.tiny import Answers, answers, begin, build, own_greedy, own_logits, start

GENERATIONS = 20_000 if os.environ.get("NIGHTLY") else 1_000
TOGETHER = 64
ENDS = [0, 2]
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "shade": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["colour", "shade"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def matching(tokenizer: PreTrainedTokenizerBase) -> LLTokenizer:
    """llguidance's view of the tokenizer, made apart from the engine's."""
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=len(tokenizer), eos_token=ENDS)  # type: ignore[arg-type]


def wild(tokenizer: PreTrainedTokenizerBase, name: str = "llama") -> PreTrainedModel:
    sizes = {} if name == "rwkv" else {"max_position_embeddings": 2048}
    return build(name, vocab_size=len(tokenizer), eos_token_id=ENDS, **sizes)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return wild(tokenizer)


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Engine]:
    engine = start(model, tokenizer)
    yield engine
    engine.stop()


def text_of(tokens: list[Token]) -> str:
    return "".join(str(token.text) for token in tokens)


def random_text(draw: random.Random) -> str:
    return "".join(draw.choice(string.ascii_letters + " éß漢😀\"\\/'\n\x7f{}[]") for _ in range(draw.randint(1, 12)))


def random_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose texts are short, so that most generations come to their end."""
    kind = draw.choice(["string", "pattern", "integer", "number", "boolean", "null", "enum", "const", "any_of"])
    if depth and draw.random() < 0.6:
        kind = draw.choice(["object", "object", "array"])
    low = draw.randint(-1000, 1000)
    match kind:
        case "object":
            names = draw.sample(["name", "age", "a b", "Größe", '"quoted"', "x"], draw.randint(0, 3))
            return {
                "type": "object",
                "properties": {name: random_schema(draw, depth - 1) for name in names},
                "required": [name for name in names if draw.random() < 0.7],
                "additionalProperties": False,
            }
        case "array":
            most = draw.randint(0, 3)
            items = random_schema(draw, depth - 1)
            return {"type": "array", "items": items, "minItems": draw.randint(0, most), "maxItems": most}
        case "string":
            most = draw.randint(0, 8)
            return {"type": "string", "minLength": draw.randint(0, most), "maxLength": most}
        case "pattern":
            return {"type": "string", "pattern": draw.choice([r"^[a-z]{2,5}$", r"^[0-9]{4}-[0-9]{2}$", r"^(on|off)$"])}
        case "integer":
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 5000)}
        case "number":
            return {"type": "number", "exclusiveMinimum": low, "maximum": low + draw.randint(1, 50)}
        case "enum":
            return {"enum": [draw.choice([1, True, None, "a", random_text(draw)]) for _ in range(draw.randint(1, 4))]}
        case "const":
            return {"const": draw.choice([0, -2.5, "fixed", random_text(draw), [1, "two"]])}
        case "any_of":
            return {"anyOf": [random_schema(draw, 0) for _ in range(2)]}
    return {"type": kind}


def random_regex(draw: random.Random, depth: int = 2) -> str:
    atoms = [r"[a-f]{1,4}", r"[0-9]{2,3}", r"[^,\n]{1,3}", r"(yes|no|maybe)", r"[A-Z_]?", r".{0,3}", r"[éü😀]", "x+y"]
    parts = [draw.choice(atoms) for _ in range(draw.randint(1, 3))] + [re.escape(random_text(draw)).replace("/", "\\/")]
    draw.shuffle(parts)
    joined = "".join(parts)
    if depth and draw.random() < 0.5:
        return f"({joined}|{random_regex(draw, depth - 1)})" + draw.choice(["", "?", "{1,2}"])
    return joined


def random_constraint(draw: random.Random, kind: str) -> Any:
    if kind == "choices":
        start = random_text(draw)
        return [start * draw.randint(0, 1) + random_text(draw) for _ in range(draw.randint(1, 8))]
    return random_regex(draw) if kind == "regex" else random_schema(draw)


def violation(kind: str, constraint: Any, text: str) -> str | None:
    """Why the text is not valid, by somebody else's judgement."""
    if kind == "choices":
        return None if text in constraint else "not one of them"
    if kind == "regex":
        return None if re.fullmatch(constraint, text) else "no match"
    try:
        jsonschema.validate(json.loads(text), constraint, cls=jsonschema.Draft202012Validator)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["json_schema", "regex", "choices"])
def test_random_constraints_are_never_violated(engine: Engine, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    draw = random.Random(kind)
    total = GENERATIONS // 3 + 1
    ended = 0
    for first in range(0, total, TOGETHER):
        given = [random_constraint(draw, kind) for _ in range(min(TOGETHER, total - first))]
        operations = [
            Generate(
                stream_id=i,
                prompt=tokenizer.encode(f"Prompt {i % 5}:"),
                max_tokens=80,
                temperature=draw.choice([0.0, 0.7, 1.5]),
                seed=i,
                text=True,
                **{kind: constraint},
            )
            for i, constraint in enumerate(given)
        ]
        batch = answers(engine, *operations)
        for i, constraint in enumerate(given):
            tokens = batch.tokens(i)
            if tokens[-1].finish_reason == "stop":
                ended += 1
                assert violation(kind, constraint, text_of(tokens)) is None, (constraint, text_of(tokens))
    assert ended > 0.9 * total
    assert engine.runner.active == []


def check_logprobs(
    model: PreTrainedModel, matcher: LLMatcher, prompt: list[int], tokens: list[Token], greedy: bool
) -> None:
    """Every token against one plain forward pass under the masks of a matcher of the test's own."""
    logits = own_logits(model, prompt + [token.token for token in tokens])
    for offset, token in enumerate(tokens):
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: logits.shape[-1]].astype(bool))
        row = torch.log_softmax(logits[len(prompt) - 1 + offset].masked_fill(~allowed, -torch.inf), -1)
        assert token.logprob == pytest.approx(row[token.token].item(), abs=1e-4)
        assert isinstance(token.top_logprobs, dict)
        assert all(allowed[other] for other in token.top_logprobs)
        for other, logprob in token.top_logprobs.items():
            assert logprob == pytest.approx(row[other].item(), abs=1e-4)
        if greedy:
            assert token.logprob == pytest.approx(row.max().item(), abs=1e-4)
        assert matcher.consume_token(token.token)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_those_of_one_plain_forward_pass_under_the_grammars_masks(
    engine: Engine,
    model: PreTrainedModel,
    matching: LLTokenizer,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
) -> None:
    grammars: dict[str, tuple[Any, str]] = {
        "json_schema": (COLOURS, LLMatcher.grammar_from_json_schema(COLOURS, defaults=JSON_STYLE)),
        "regex": (r"Call [0-9]{3}-[0-9]{4} or [a-z]+\.", LLMatcher.grammar_from_regex(r"Call [0-9]{3}-[0-9]{4} or [a-z]+\.")),
        "choices": (["yes", "yesterday", "no"], LLMatcher.grammar_from_lark('start: "yes" | "yesterday" | "no"')),
    }  # fmt: skip
    prompt = tokenizer.encode("The answer:")
    operations = [
        Generate(stream_id=kind, prompt=prompt, temperature=temperature, seed=4, top_logprobs=5, **{kind: constraint})
        for kind, (constraint, _) in grammars.items()
    ]
    batch = answers(engine, *operations, Generate(stream_id="free", prompt=prompt, max_tokens=10))
    for kind, (_, grammar) in grammars.items():
        check_logprobs(model, LLMatcher(matching, grammar), prompt, batch.tokens(kind), temperature == 0.0)
    assert batch.ids("free") == own_greedy(model, prompt, 10)


def test_a_seeded_constrained_stream_is_the_same_alone_and_in_a_batch(
    engine: Engine, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer.encode("Say something:")
    draw = random.Random(3)
    several = [
        Generate(stream_id=i, prompt=prompt[: i % 3 + 1], temperature=1.5, seed=i, json_schema=random_schema(draw))
        for i in range(12)
    ]
    together = answers(engine, *several, Generate(stream_id="free", prompt=prompt * 30, max_tokens=40, temperature=1.0))
    for operation in several:
        assert answers(engine, operation).ids(operation.stream_id) == together.ids(operation.stream_id)


def test_forced_tokens_cost_no_step_and_are_all_reported(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tokenizer.encode("x")
    forced = answers(engine, Generate(stream_id=0, prompt=prompt, choices=["nothing else will do"], text=True))
    assert text_of(forced.tokens()) == "nothing else will do"
    assert forced.ids() == tokenizer.encode("nothing else will do")
    assert all(t.logprob == 0.0 and t.top_logprobs == {t.token: 0.0} for t in forced.tokens())
    assert (forced.counters.steps, forced.counters.output_tokens) == (0, len(forced.ids()))
    colours = answers(engine, Generate(stream_id=0, prompt=prompt, json_schema=COLOURS, text=True, max_tokens=99))
    assert violation("json_schema", COLOURS, text_of(colours.tokens())) is None
    assert colours.counters.steps < len(colours.ids()) / 2


def test_forced_runs_change_nothing_for_the_streams_beside_them(
    engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer.encode("Many words follow:")
    long_run = "[ab] " + "word after word, " * 20 + "[ab]"
    batch = answers(
        engine,
        *(Generate(stream_id=i, prompt=prompt * (i + 1), max_tokens=30) for i in range(4)),
        *(Generate(stream_id=f"c{i}", prompt=prompt, json_schema=COLOURS, text=True, seed=i) for i in range(4)),
        Generate(stream_id="run", prompt=prompt, regex=re.escape(long_run).replace(r"\[ab\]", "[ab]"), max_tokens=500),
    )
    for i in range(4):
        assert batch.ids(i) == own_greedy(model, prompt * (i + 1), 30)
        assert violation("json_schema", COLOURS, text_of(batch.tokens(f"c{i}"))) is None
    assert re.fullmatch(long_run, str(tokenizer.decode(batch.ids("run"))))


def one(engine: Engine, **fields: Any) -> Answers:
    return answers(engine, Generate(stream_id=0, prompt="x", text=True, **fields))


def test_a_forced_run_is_computed_at_once_alone_and_rides_along_in_a_crowd(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[int]] = []
    prepare = engine.runner.prepare

    def recording(step: Step[OperationStream]) -> Callable[[], torch.Tensor]:
        steps.append(list(step.counts))
        return prepare(step)

    monkeypatch.setattr(engine.runner, "prepare", recording)
    with_run = Generate(stream_id="run", prompt="x", regex="[ab]: one two three four [ab]", seed=1)
    length = len(answers(engine, with_run).ids("run"))
    assert len(steps) < length / 2
    steps.clear()
    crowd = [Generate(stream_id=i, prompt="x", max_tokens=20, min_tokens=20) for i in range(12)]
    assert len(answers(engine, *crowd, with_run).ids("run")) == length
    assert all(max(counts) == 1 for counts in steps)
    assert len(steps) == 20


def test_a_complete_grammar_ends_the_stream_with_its_last_token(engine: Engine) -> None:
    tokens = one(engine, regex="[a-z]{3}", temperature=1.0).tokens()
    assert len(text_of(tokens)) == 3
    assert [t.finish_reason for t in tokens] == [None] * (len(tokens) - 1) + ["stop"]
    assert tokens[-1].token not in ENDS


def test_where_a_grammar_may_end_or_go_on_the_end_is_sampled_and_sent(
    engine: Engine, tokenizer: PreTrainedTokenizerBase
) -> None:
    bias = {tokenizer.encode("7")[0]: 50.0}
    again = one(engine, regex="[0-9]+", max_tokens=5, logit_bias=bias)
    assert text_of(again.tokens()) == "77777"
    assert again.tokens()[-1].finish_reason == "length"
    assert again.counters.unfinished_constraints == 0
    ended = one(engine, regex="[0-9]*", max_tokens=5, logit_bias={2: 50.0}).tokens()
    assert [(t.token, t.finish_reason, t.text) for t in ended] == [(2, "stop", "")]


def test_max_tokens_inside_a_grammar_is_a_length_that_counts_as_unfinished(engine: Engine) -> None:
    answer = one(engine, regex="one two three four [a-z]", max_tokens=2)
    assert [t.finish_reason for t in answer.tokens()] == [None, "length"]
    assert text_of(answer.tokens()) == "one two"
    assert answer.counters.unfinished_constraints == 1
    exactly = one(engine, choices=["one two"], max_tokens=2)
    assert exactly.tokens()[-1].finish_reason == "stop"
    assert exactly.counters.unfinished_constraints == 0


def test_a_stop_sequence_ends_a_forced_run(engine: Engine) -> None:
    answer = one(engine, choices=["one two three four"], stop=["two"])
    assert text_of(answer.tokens()) == "one "
    assert answer.tokens()[-1].finish_reason == "stop"
    assert answer.counters.unfinished_constraints == 1


def test_a_lark_grammar_and_the_same_in_gbnf_are_followed(engine: Engine) -> None:
    lark = 'start: "<" word ("," word)* ">"\nword: /[a-c]/ | start\n'
    gbnf = 'root ::= "<" word ("," word)* ">"\nword ::= [a-c] | root\n'
    nested = re.compile(r"<[a-c](,[a-c])*>")
    for grammar in (lark, gbnf):
        ended = 0
        for seed in range(8):
            tokens = one(engine, grammar=grammar, temperature=1.0, seed=seed, max_tokens=60).tokens()
            text = text_of(tokens)
            ended += tokens[-1].finish_reason == "stop"
            while tokens[-1].finish_reason == "stop" and text != "a":
                text, replaced = nested.subn("a", text)
                assert replaced, text
        assert ended > 0


def test_a_mask_and_a_grammar_both_have_to_allow_a_token(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    digits = {tokenizer.encode(digit)[0]: 100.0 for digit in "369"}
    tokens = one(engine, regex="[0-9]{20}", temperature=1.5, logit_bias=digits).tokens()
    assert re.fullmatch("[369]{20}", text_of(tokens))


def forbid(tokenizer: PreTrainedTokenizerBase, character: str) -> dict[int, float]:
    return {i: -100.0 for i in range(len(tokenizer)) if character in tokenizer.decode([i])}


@pytest.mark.parametrize(
    ("regex", "sent"), [("y[ab]", ""), ("[yY]", None), ("x[ab]y", "x?[ab]?"), ("[ab][xy]y", "([ab]x?)?")]
)
def test_a_grammar_that_the_mask_makes_impossible_fails_that_stream_at_once_or_midway(
    engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, regex: str, sent: str | None
) -> None:
    bias = forbid(tokenizer, "y") | (forbid(tokenizer, "Y") if sent is None else {})
    prompt = tokenizer.encode("Beside it:")
    batch = answers(
        engine,
        Generate(stream_id=0, prompt="x", regex=regex, logit_bias=bias, text=True),
        Generate(stream_id="free", prompt=prompt, max_tokens=12),
        Generate(stream_id="drawn", prompt=prompt, max_tokens=12, temperature=1.0, seed=1),
    )
    *tokens, failure = batch.replies[0]
    assert isinstance(failure, Failure)
    assert "forbid every token that the constraint allows here" in failure.error
    assert re.fullmatch(sent or "", text_of([t for t in tokens if isinstance(t, Token)]))
    assert batch.ids("free") == own_greedy(model, prompt, 12)
    drawn = Generate(stream_id=0, prompt=prompt, max_tokens=12, temperature=1.0, seed=1)
    assert batch.ids("drawn") == answers(engine, drawn).ids()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regex": "[0-9"}, "regex: unclosed character class: '[' in '[0-9'."),
        ({"regex": "(?<=a)b"}, "regex: look-around, including look-ahead and look-behind, is not supported: '(?<='"),
        ({"regex": r"(a)\1"}, "regex: backreferences are not supported"),
        ({"regex": "(a?){300}a{300}"}, "cannot be followed here: lexer error: too many expressions"),
        ({"regex": "a" * (2**20 + 1)}, "regex has 1048577 characters; 1048576 is the most."),
        ({"json_schema": {"not": {}, "uniqueItems": True}}, 'json_schema: unsupported keywords: "not", "uniqueItems".'),
        ({"json_schema": {"type": "strin"}}, "json_schema: Invalid type: strin."),
        ({"json_schema": {"type": "string", "pattern": "(?=a)b"}}, "is not supported: '(?=' in '(?=a)b'."),
        ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 1}}, "minimum (3) is greater than maximum (1)."),
        ({"json_schema": {"$ref": "https://example.org/x"}}, "json_schema: Resource 'https://example.org/x'"),
        ({"json_schema": False}, "json_schema: false allows nothing"),
        ({"grammar": 'start: "a" | bar'}, "grammar: unknown name: \"bar\" at line 1, column 8 of 'start: \"a\" | bar'."),
        ({"grammar": 'root ::= "a'}, "grammar: Failed to convert the grammar from GBNF to Lark: Unexpected end"),
        ({"grammar": "start: start"}, "grammar: no text can satisfy it."),
        ({"grammar": ""}, "grammar: "),
        ({"choices": []}, "choices is empty; give at least one text."),
        ({"choices": ["a"], "regex": "a"}, "choices and regex: give one constraint at most."),
        ({"choices": [""], "min_tokens": 9}, "forbid every token that the constraint allows here"),
    ],
)  # fmt: skip
def test_a_constraint_that_cannot_be_used_fails_its_stream_within_a_second(
    engine: Engine, fields: dict[str, Any], message: str
) -> None:
    started = time.monotonic()
    batch = answers(
        engine,
        Generate(stream_id=0, prompt="x", **fields),
        Generate(stream_id="good", prompt="x", choices=["good"], text=True),
    )
    assert time.monotonic() - started < 1.0
    failure = batch.replies[0][-1]
    assert isinstance(failure, Failure)
    assert message in failure.error
    assert text_of(batch.tokens("good")) == "good"


def test_without_a_fast_tokenizer_a_constraint_is_an_error_and_all_else_is_served() -> None:
    engine = start(build("llama"))
    batch = answers(engine, Generate(stream_id=0, prompt=[5], regex="a"), Generate(stream_id=1, prompt=[5]))
    assert "constraints need a fast tokenizer" in batch.error(0)
    assert batch.ids(1)
    engine.stop()


def test_a_slow_schema_stalls_no_other_stream_and_gives_up_in_time(engine: Engine) -> None:
    names = [f"property_{i}" for i in range(14_000)]
    slow = {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(answers, engine, Generate(stream_id=0, prompt="x", json_schema=slow))
        time.sleep(0.05)
        answers(engine, *(Generate(stream_id=i, prompt="x", max_tokens=2) for i in range(4)))
        assert not waiting.done()
        assert "json_schema: not compiled within 0.8 s" in waiting.result().error()


def test_a_batch_of_explosive_schemas_leaves_other_predictions_their_turn(engine: Engine) -> None:
    explosive = {"type": "string", "allOf": [{"pattern": f".*a.{{{i}}}.*"} for i in range(22)]}
    batch = [
        Generate(stream_id=i, prompt="x", json_schema=explosive | {"description": f"{i} of this batch"})
        for i in range(4)
    ]
    with ThreadPoolExecutor(3) as pool:
        several = [pool.submit(answers, engine, *batch[i : i + 2], *batch[:i]) for i in (0, 2)]
        time.sleep(0.2)
        assert text_of(one(engine, choices=["a new constraint"]).tokens()) == "a new constraint"
        assert not any(attempt.done() for attempt in several)
        for attempt in several:
            assert all("not compiled within" in attempt.result().error(i) for i in attempt.result().replies)  # type: ignore[arg-type]


def test_a_grammar_is_compiled_once_for_all_who_use_it(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def counting(source: Source, by: LLTokenizer) -> LLMatcher:
        compiled.append(source.text)
        return compile_source(source, by)

    monkeypatch.setattr("lmtp.engine.compiler.compile_source", counting)
    compiler = Compiler(tokenizer, len(tokenizer), ENDS)

    async def ask_for(*patterns: str) -> list[Grammar | None]:
        return await asyncio.gather(
            *(compiler.batch().grammar(Generate(stream_id=0, prompt="x", regex=pattern)) for pattern in patterns)
        )

    one, other = asyncio.run(ask_for("ab", "ab"))
    assert one is not None
    assert other is not None
    assert compiled == ["ab"]
    one.advance(one.forced()[0])
    assert one.complete
    assert other.forced()
    for pattern in ("c", "ab", "d", "ab", "c"):
        asyncio.run(ask_for(pattern))
    assert compiled == ["ab", "c", "d"]


@pytest.mark.parametrize(
    "options", [["<filename>"], ["yes<|im_end|>no"], ["<|im_start|>", "<|im_end|>"], ["a<|endoftext|>", "b<filename>"]]
)
def test_a_text_that_spells_a_special_token_is_followed(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, options: list[str]
) -> None:
    for constraint in (
        {"choices": options},
        {"regex": "|".join(map(re.escape, options))},
        {"json_schema": {"enum": options}},
    ):
        tokens = one(engine, temperature=1.0, seed=1, **constraint).tokens()
        text = text_of(tokens)
        assert (json.loads(text) if "json_schema" in constraint else text) in options
        assert not {token.token for token in tokens} & set(tokenizer.all_special_ids)


def test_a_cancelled_constrained_prediction_holds_no_slot(engine: Engine) -> None:
    with begin(engine, Generate(stream_id=0, prompt="x", regex="[ab]{400}", max_tokens=400)) as abandoned:
        next(iter(abandoned))
    answers(engine, ModelInfo(stream_id=0))  # the engine has taken the cancellation once it answers this
    assert engine.runner.active == []
    assert text_of(one(engine, choices=["still here"]).tokens()) == "still here"


def test_models_that_slots_cannot_serve_follow_grammars_too(
    tokenizer: PreTrainedTokenizerBase, matching: LLTokenizer
) -> None:
    model = wild(tokenizer, "rwkv")
    engine = start(model, tokenizer)
    assert isinstance(engine.runner, CacheRunner)
    prompt = tokenizer.encode("x y z")
    tokens = answers(engine, Generate(stream_id=0, prompt=prompt, json_schema=COLOURS, top_logprobs=3)).tokens()
    grammar = LLMatcher.grammar_from_json_schema(COLOURS, defaults=JSON_STYLE)
    check_logprobs(model, LLMatcher(matching, grammar), prompt, tokens, greedy=True)
    engine.stop()


def test_the_demo_model_answers_in_the_form_that_was_asked_for(demo_weights: Path) -> None:
    loaded = weights.load(demo_weights, dtype="float32")
    engine = start(loaded.model, loaded.tokenizer)
    city = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 30}, "capital": {"type": "boolean"}},
        "required": ["name", "capital"],
        "additionalProperties": False,
    }
    prompt = render_prompt(loaded.tokenizer, "Describe the capital of France as JSON.")
    question = render_prompt(loaded.tokenizer, "What is the capital of France?")
    operations = [
        Generate(stream_id=i, prompt=prompt, max_tokens=80, temperature=t, seed=i, json_schema=city, text=True)
        for i, t in enumerate([0.0, 0.7, 1.5, 1.5])
    ]
    choice = Generate(stream_id="choice", prompt=question, regex="The capital is (Berlin|Madrid|Paris)\\.", text=True)
    batch = answers(engine, *operations, choice)
    for i in range(4):
        assert violation("json_schema", city, text_of(batch.tokens(i))) is None
    assert json.loads(text_of(batch.tokens(0))) == {"name": "Paris", "capital": True}
    assert text_of(batch.tokens("choice")) == "The capital is Paris."
    engine.stop()


def test_a_long_chain_of_rules_is_compiled_or_refused_but_ends_no_process(demo_weights: Path) -> None:
    """In a process of its own: what it is about would end this one."""
    program = f"""
import asyncio
from transformers import AutoTokenizer
from lmtp.engine.compiler import Compiler
from lmtp.protocol import Generate, RequestError

tokenizer = AutoTokenizer.from_pretrained({str(demo_weights)!r})
compiler = Compiler(tokenizer, len(tokenizer), [2])
for count in (2_500, 20_000):
    rules = ["start: a0", *(f'a{{i}}: a{{i + 1}} "x"' for i in range(count)), f'a{{count}}: "z"']
    try:
        asyncio.run(compiler.batch().grammar(Generate(stream_id=0, prompt=[1], grammar="\\n".join(rules))))
    except RequestError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "grammar has" in done.stdout


async def test_many_constraints_at_once_wait_for_their_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    compiler = Compiler(tokenizer, len(tokenizer), ENDS)
    several = [[f"{i} {j}" for j in range(2_000)] for i in range(24)]
    grammars = await asyncio.gather(
        *(compiler.batch().grammar(Generate(stream_id=0, prompt=[1], choices=choices)) for choices in several)
    )
    assert all(grammars)
