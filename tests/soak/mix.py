"""The predictions of a soak, each with what its answer must be.

A prediction is made from a seed and its number alone, so that any of them can be made again.
"""

import base64
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import numpy as np

from tests.soak.client import Answer
from tests.soak.model import CONTEXT, VOCABULARY
from tests.soak.table import LONGEST, Row

TOLERANCE = 1e-4
"""Of a log-probability, in float32."""

ENDLESS_TOKENS = 2000
"""Tokens of a prediction that is to be cancelled or left: seconds of work, so that a lost one ends by itself."""

NO_END = {str(token): -100 for token in range(3)}

CHOICES = ["yes", "no", "I am not sure", "two\nlines", "é", "42"]
REGEX = r"(Mon|Tues|Fri)day, [0-9]{1,2} (May|June)( at noon)?"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Grace"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= ("left" | "right") (" then " ("left" | "right"))? "."'
GRAMMAR_AS_REGEX = r"(left|right)( then (left|right))?\."


class WrongError(Exception):
    """An answer is not what it must be."""


class StateError(WrongError):
    """A prediction ended in the wrong state."""


Check = Callable[[Answer], int]
"""Raises WrongError; returns how many tokens were answered."""


@dataclass(frozen=True)
class Call:
    """One prediction and the check of its answer."""

    kind: str
    inputs: dict[str, Any]
    check: Check


def expect(truth: bool, what: str) -> None:
    """Raise WrongError unless it is true."""
    if not truth:
        raise WrongError(what)


def succeeded(answer: Answer) -> None:
    """Raise StateError unless the prediction succeeded."""
    if (answer.code, answer.status) != (200, "succeeded"):
        raise StateError(f"{answer.code}, {answer.status}: {answer.document.get('error') or answer.document}")


@dataclass
class Mix:
    """Makes the predictions."""

    rows: list[Row]
    seed: int
    first: dict[str, Any] = field(default_factory=dict)
    """The first answer to each seeded request: later ones must equal it."""

    def __post_init__(self) -> None:
        self._free = [row for row in self.rows if not row.allowed]

    def call(self, number: int) -> tuple[Call, random.Random]:
        """The prediction of this number, and the chances for what else happens to it."""
        chance = random.Random(f"{self.seed}:{number}")
        kinds: dict[Callable[[random.Random], Call], int] = {
            self._text: 20,
            self._json: 12,
            self._lines: 8,
            self._batch: 24,
            self._sampled: 10,
            self._constrained: 10,
            self._compared_choices: 4,
            self._endless: 6,
            self._refused: 10,
        }
        (make,) = chance.choices(list(kinds), list(kinds.values()))
        return make(chance), chance

    # Greedy prompts: the table has their answers.

    def _prompt(self, row: Row, **inputs: Any) -> dict[str, Any]:
        given = {"prompt": row.prompt, "system_prompt": row.system_prompt, **inputs}
        if row.allowed:
            given["logit_bias"] = json.dumps(dict.fromkeys(row.allowed, 100))
        return given

    def _text(self, chance: random.Random) -> Call:
        row = chance.choice(self.rows)
        count = chance.randint(1, len(row.tokens))
        text = row.texts[count - 1]
        inputs = self._prompt(row, max_tokens=count)
        if chance.random() < 0.3 and len(text) > 2:
            start = chance.randrange(len(text) - 1)
            stop = text[start : start + chance.randint(1, 5)]
            text = text[: text.find(stop)]
            inputs["stop_sequences"] = json.dumps([stop, "never to be found"])

        def check(answer: Answer) -> int:
            succeeded(answer)
            expect("".join(answer.output) == text, f"text {''.join(answer.output)!r}, not {text!r}")
            return int(answer.document["metrics"]["output_token_count"])

        return Call("text", inputs, check)

    def _json(self, chance: random.Random) -> Call:
        row = chance.choice(self.rows)
        count, n, top = chance.randint(1, len(row.tokens)), chance.randint(1, 3), chance.randint(0, 8)
        scored = chance.random() < 0.3
        inputs = self._prompt(row, max_tokens=count, n=n, top_logprobs=top, prompt_logprobs=scored, output="json")

        def check(answer: Answer) -> int:
            succeeded(answer)
            document = json.loads("".join(answer.output))
            expect([choice["index"] for choice in document["choices"]] == list(range(n)), "other choices")
            for choice in document["choices"]:
                check_generated(row, count, top, choice["tokens"], choice["finish_reason"])
                expect(choice["text"] == row.texts[count - 1], f"text {choice['text']!r}, not {row.texts[count - 1]!r}")
            expect(("prompt_logprobs" in document) == scored, "prompt_logprobs")
            if scored:
                check_scored(row.ids, row.scores[: len(row.ids)], document["prompt_logprobs"])
            usage = document["usage"]
            expect(usage["input_token_count"] == len(row.ids) and usage["output_token_count"] == n * count, str(usage))
            return n * count

        return Call("json", inputs, check)

    def _lines(self, chance: random.Random) -> Call:
        row = chance.choice(self.rows)
        count, n, top = chance.randint(1, len(row.tokens)), chance.randint(1, 3), chance.randint(0, 8)

        def check(answer: Answer) -> int:
            streams = read_lines(answer)
            expect(set(streams) == set(range(n)), f"streams {set(streams)}")
            for tokens in streams.values():
                check_generated(row, count, top, tokens, tokens[-1]["finish_reason"])
                expect("".join(token["text"] for token in tokens) == row.texts[count - 1], "text")
            return n * count

        inputs = self._prompt(row, max_tokens=count, n=n, top_logprobs=top, output="lmtp")
        return Call("lmtp", inputs, check)

    # Batches of LMTP operations.

    def _batch(self, chance: random.Random) -> Call:
        makers = [self._generate, self._generate, self._score, self._info, self._invalid]
        made = [chance.choice(makers)(chance) for _ in range(chance.choice((1, 1, 2, 4, 12)))]
        ids: list[int | str] = [i if chance.random() < 0.7 else f"stream {i}" for i in range(len(made))]
        operations = [[name, {"stream_id": id, **fields}] for id, (name, fields, _) in zip(ids, made, strict=True)]

        def check(answer: Answer) -> int:
            streams = read_lines(answer)
            expect(set(streams) == set(ids), f"streams {set(streams)}, not {set(ids)}")
            return sum(judge(streams[id]) for id, (_, _, judge) in zip(ids, made, strict=True))

        return Call("batch", {"ops_batch_json": json.dumps(operations)}, check)

    def _generate(self, chance: random.Random) -> tuple[str, dict[str, Any], Callable[[list[Any]], int]]:
        row = chance.choice(self.rows)
        count, top = chance.randint(1, len(row.tokens)), chance.randint(0, 8)
        fields: dict[str, Any] = {"prompt": row.ids, "max_tokens": count, "top_logprobs": top}
        if row.allowed and chance.random() < 0.5:
            bits = np.zeros(VOCABULARY, dtype=np.uint8)
            bits[row.allowed] = 1
            fields["mask"] = base64.b64encode(np.packbits(bits, bitorder="little").tobytes()).decode()
        elif row.allowed:
            fields["logit_bias"] = dict.fromkeys(row.allowed, 100)

        def judge(tokens: list[Any]) -> int:
            check_generated(row, count, top, tokens, tokens[-1].get("finish_reason"))
            return count

        return "GENERATE", fields, judge

    def _score(self, chance: random.Random) -> tuple[str, dict[str, Any], Callable[[list[Any]], int]]:
        row = chance.choice(self._free)
        known = row.ids + row.tokens
        start = chance.randrange(len(known) - 1)
        fields = {"prompt": known[:start], "scored": known[start:], "top_logprobs": chance.randint(0, 5)}

        def judge(tokens: list[Any]) -> int:
            check_scored(known[start:], row.scores[start:], tokens)
            expect(tokens[-1]["finish_reason"] == "stop", f"finish_reason {tokens[-1]['finish_reason']}")
            return len(tokens)

        return "SCORE", fields, judge

    def _info(self, _: random.Random) -> tuple[str, dict[str, Any], Callable[[list[Any]], int]]:
        def judge(replies: list[Any]) -> int:
            (reply,) = replies
            info = reply["model_info"]
            expect((info["vocabulary"], info["context"]) == (VOCABULARY, CONTEXT), str(info))
            return 0

        return "MODEL_INFO", {}, judge

    def _invalid(self, chance: random.Random) -> tuple[str, dict[str, Any], Callable[[list[Any]], int]]:
        name, fields, word = chance.choice(INVALID)

        def judge(replies: list[Any]) -> int:
            expect(len(replies) == 1 and word in replies[0].get("error", ""), f"no error of {word!r} in {replies}")
            return 0

        return name, fields, judge

    # Samples: equal to their first answer. Constraints: kept.

    def _sampled(self, chance: random.Random) -> Call:
        row = self._free[chance.randrange(4)]
        seed, n = chance.randrange(6), chance.randint(1, 3)
        settings = chance.choice(
            ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 2, "top_k": 20})
        )
        inputs = self._prompt(row, max_tokens=LONGEST, output="json", seed=seed, n=n, **settings)

        def check(answer: Answer) -> int:
            succeeded(answer)
            document = json.loads("".join(answer.output))
            expect(len(document["choices"]) == n, "number of choices")
            for i, choice in enumerate(document["choices"]):
                key = f"{self.rows.index(row)}, seed {seed + i}, {settings}"
                self._equals_first(key, [token["token"] for token in choice["tokens"]])
            return sum(len(choice["tokens"]) for choice in document["choices"])

        return Call("sampled", inputs, check)

    def _equals_first(self, key: str, answer: Any) -> None:
        first = self.first.setdefault(key, answer)
        expect(answer == first, f"{key}: {answer}, not {first} as the first time")

    def _constrained(self, chance: random.Random) -> Call:
        row = self._free[chance.randrange(4)]
        constraint = chance.choice(("choices", "regex", "json_schema", "grammar"))
        source: dict[str, str] = {
            "choices": json.dumps(CHOICES),
            "regex": REGEX,
            "json_schema": json.dumps(SCHEMA),
            "grammar": GRAMMAR,
        }
        temperature, seed = chance.choice((0.0, 1.0)), chance.randrange(6)
        inputs = self._prompt(row, max_tokens=200, temperature=temperature, seed=seed)
        inputs[constraint] = source[constraint]

        def check(answer: Answer) -> int:
            succeeded(answer)
            text = "".join(answer.output)
            expect(keeps(constraint, text), f"{constraint}: {text!r}")
            key = f"{self.rows.index(row)}, {constraint}, temperature {temperature}, seed {seed}"
            self._equals_first(key, text)
            return int(answer.document["metrics"]["output_token_count"])

        return Call("constrained", inputs, check)

    def _compared_choices(self, chance: random.Random) -> Call:
        row = chance.choice([row for row in self._free if row.options])
        options = chance.sample(list(row.options), chance.randint(1, len(row.options)))
        inputs = {"choices": json.dumps(options), "output": "json"}

        def check(answer: Answer) -> int:
            succeeded(answer)
            document = json.loads("".join(answer.output))
            got = {entry["choice"]: entry["logprob"] for entry in document["distribution"]}
            expect(got.keys() == set(options), f"options {got.keys()}")
            for option, logprob in got.items():
                known = row.options[option]
                expect(abs(logprob - known) < 10 * TOLERANCE, f"{option!r}: {logprob}, not {known}")
            best = max(options, key=lambda option: row.options[option])
            expect(document["choices"][0]["text"] == best, f"{document['choices'][0]['text']!r}, not {best!r}")
            return len(document["choices"][0]["tokens"])

        return Call("compared choices", self._prompt(row, **inputs), check)

    # What is cancelled or left, and what is refused.

    def _endless(self, chance: random.Random) -> Call:
        row = chance.choice(self._free)
        fields = {"prompt": row.ids, "max_tokens": ENDLESS_TOKENS, "logit_bias": NO_END}
        batch = [["GENERATE", {"stream_id": i, **fields}] for i in range(chance.choice((1, 1, 4)))]

        def check(answer: Answer) -> int:
            if answer.status == "succeeded":  # the cancel came after the end
                return sum(map(len, read_lines(answer).values()))
            if (answer.code, answer.status) != (200, "canceled"):
                raise StateError(f"{answer.code}, {answer.status}: {answer.document.get('error') or answer.document}")
            return 0

        return Call("endless", {"ops_batch_json": json.dumps(batch)}, check)

    def _refused(self, chance: random.Random) -> Call:
        inputs, words = chance.choice(REFUSED)

        def check(answer: Answer) -> int:
            if answer.code == 422:
                expect(words in json.dumps(answer.document), f"{words!r} is not in {answer.document}")
            elif (answer.code, answer.status) != (200, "failed"):
                raise StateError(f"{answer.code}, {answer.status}")
            else:
                error = str(answer.document["error"])
                expect(words in error and error.isprintable() and len(error) < 2000, f"the error is {error[:2000]!r}")
            return 0

        return Call("refused", inputs, check)


def read_lines(answer: Answer) -> dict[int | str, list[dict[str, Any]]]:
    """The replies of each stream. Raises WrongError unless each has exactly one terminal reply, its last."""
    succeeded(answer)
    streams: dict[int | str, list[dict[str, Any]]] = {}
    for chunk in answer.output:
        expect(chunk.endswith("\n"), "a chunk ends inside a line")
        for line in chunk.removesuffix("\n").split("\n"):
            word, _, content = line.partition(" ")
            expect(word in ("TOKEN", "MSG"), f"the line {line!r}")
            reply = json.loads(content)
            streams.setdefault(reply["stream_id"], []).append(reply)
    for id, replies in streams.items():
        terminal = ["error" in r or "model_info" in r or r.get("finish_reason") is not None for r in replies]
        expect(terminal.index(True) == len(terminal) - 1 if True in terminal else False, f"stream {id}: {terminal}")
    return streams


def check_generated(row: Row, count: int, top: int, tokens: Sequence[dict[str, Any]], finish: str | None) -> None:
    """Compare a greedy stream's tokens with the table."""
    expect("error" not in tokens[0], str(tokens[0].get("error")))
    got = [token["token"] for token in tokens]
    expect(got == row.tokens[:count], f"tokens {got}, not {row.tokens[:count]}")
    expect(finish == row.finish(count), f"finish_reason {finish}, not {row.finish(count)}")
    for i, token in enumerate(tokens):
        known, given = row.top[i], token["top_logprobs"]
        expect(
            abs(token["logprob"] - row.logprobs[i]) < TOLERANCE, f"logprob {token['logprob']}, not {row.logprobs[i]}"
        )
        expect(len(given) == max(min(top, len(row.allowed) or top), 1), f"{len(given)} top_logprobs of {top}")
        expect(list(given.values()) == sorted(given.values(), reverse=True), "top_logprobs are not sorted")
        least = min(known.values())
        for id, value in given.items():
            expect(abs(value - known.get(int(id), least)) < TOLERANCE, f"top_logprobs {given}, not {known}")


def check_scored(known: list[int], scores: list[float], tokens: Sequence[dict[str, Any]]) -> None:
    """Compare scored tokens with the table."""
    expect("error" not in tokens[0], str(tokens[0].get("error")))
    expect([token["token"] for token in tokens] == known, "other tokens than those to score")
    for token, score in zip(tokens, scores, strict=True):
        expect(abs(token["logprob"] - score) < TOLERANCE, f"logprob {token['logprob']}, not {score}")


def keeps(constraint: str, text: str) -> bool:
    """Whether the text is valid, by another judge than the one that made it."""
    if constraint == "choices":
        return text in CHOICES
    if constraint == "json_schema":
        return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(text)))
    return bool(re.fullmatch(REGEX if constraint == "regex" else GRAMMAR_AS_REGEX, text))


INVALID: list[tuple[str, dict[str, Any], str]] = [
    ("GENERATE", {"prompt": []}, "empty"),
    ("GENERATE", {"prompt": [1, VOCABULARY]}, "prompt[1]"),
    ("GENERATE", {"prompt": [1, -1]}, "prompt[1]"),
    ("GENERATE", {"prompt": [1] * CONTEXT}, "prompt"),
    ("GENERATE", {"prompt": [1], "max_token": 1}, "max_token"),
    ("GENERATE", {"prompt": [1], "max_tokens": "many"}, "max_tokens"),
    ("GENERATE", {"prompt": [1], "temperature": -1}, "temperature"),
    ("GENERATE", {"prompt": [1], "top_p": 0}, "top_p"),
    ("GENERATE", {"prompt": [1], "logit_bias": {str(VOCABULARY): 1}}, "logit_bias"),
    ("GENERATE", {"prompt": [1], "mask": "AAAA"}, "mask"),
    ("GENERATE", {"prompt": [1], "regex": "("}, "regex"),
    ("GENERATE", {"prompt": [1], "regex": "a", "choices": ["a"]}, "one constraint"),
    ("GENERATE", {"prompt": [1], "json_schema": {"type": "nothing"}}, "json_schema"),
    ("GENERATE", {"prompt": [1], "grammar": "root ::= ("}, "grammar"),
    ("GENERATE", {}, "prompt"),
    ("SCORE", {"prompt": [1], "scored": []}, "scored"),
    ("SCORE", {"prompt": [1], "scored": [VOCABULARY]}, "scored[0]"),
    ("SCORE", {"prompt": [1]}, "scored"),
    ("GENERAT", {"prompt": [1]}, "GENERAT"),
]
"""Operations that get an error reply: name, fields, and a word of the error."""

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "Give prompt, messages or ops_batch_json"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": 1}, "prompt"),
    ({"prompt": "x", "ops_batch_json": "[]"}, "give one of them"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "output": "xml"}, "output"),
    ({"prompt": "x", "n": 2}, "n is 2"),
    ({"prompt": "x", "prompt_template": "Q:"}, "prompt_template"),
    ({"prompt": "x", "logit_bias": "{"}, "logit_bias"),
    ({"prompt": "x", "logit_bias": f'{{"{VOCABULARY}": 1}}'}, "logit_bias"),
    ({"prompt": "x", "stop_sequences": "[1]"}, "stop_sequences"),
    ({"prompt": "x", "choices": "[1]"}, "choices"),
    ({"prompt": "x", "regex": "a(b"}, "regex"),
    ({"prompt": "x", "json_schema": "{"}, "json_schema"),
    ({"prompt": "x", "grammar": "start: missing"}, "grammar"),
    ({"prompt": "x", "normalize": "median"}, "normalize"),
    ({"prompt": "word " * CONTEXT}, "prompt"),
    ({"ops_batch_json": "["}, "ops_batch_json"),
    ({"ops_batch_json": "{}"}, "ops_batch_json"),
    ({"ops_batch_json": "[]"}, "ops_batch_json"),
    ({"ops_batch_json": json.dumps([["MODEL_INFO", {"stream_id": n}] for n in range(257)])}, "257"),
]
"""Inputs of a prediction that fails or that the runtime refuses, and words of the reason."""
