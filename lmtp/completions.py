"""One prompt's completions: the operations they need, and the answer read from the replies.

A prompt is answered as text, as protocol lines, or as one JSON document. The operations are the same for all three: a
GENERATE for each completion, and a SCORE over the prompt for ``prompt_logprobs``. A few ``choices`` are compared as
whole texts: then each of them is a SCORE, and the completions are chosen when all are known.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import replace
from transformers import PreTrainedTokenizerBase

from lmtp import protocol
from lmtp.engine.sampling import random_of
from lmtp.engine.source import MAX_SOURCE
from lmtp.protocol import Encode, Failure, Generate, Operation, Reply, RequestError, Score, Token
from lmtp.runners.model import Defaults
from lmtp.text import Tokenizers

PROMPT = "prompt"
"""The id of the stream that scores the prompt. Completions and options are numbered from 0."""

MAX_COMPARED = 64
"""More ``choices`` than this are generated token by token."""

MAX_KEPT = 2**20
"""Log-probabilities of one JSON document: about 100 MB while it is put together."""

Check = Callable[[Generate, Sequence[str]], Sequence[bool | None]]
"""Tells whether finished texts satisfy an operation's constraint; None where that cannot be told."""


def generate_of(
    kind: type[Generate],
    prompt: list[int],
    defaults: Defaults,
    *,
    max_tokens: float,
    min_tokens: float | None,
    temperature: float | None,
    top_p: float | None,
    top_k: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    presence_penalty: float,
    frequency_penalty: float,
    seed: float | None,
    stop_sequences: str,
    logit_bias: str,
    choices: str,
    regex: str,
    json_schema: str,
    grammar: str,
    top_logprobs: float,
    adapter: str,
    cache_salt: str,
) -> Generate:
    """The operation that answers a prompt, from the inputs of a prediction: None or empty where the model's defaults
    hold. The runtime lets 3.0 pass for an integer. Raises RequestError, naming the input."""
    bias = {**defaults.logit_bias, **(protocol.parse_logit_bias(logit_bias) or {})}
    return protocol.generate(
        kind,
        stream_id=0,
        prompt=prompt,
        max_tokens=int(max_tokens),
        min_tokens=min(defaults.min_tokens if min_tokens is None else int(min_tokens), int(max_tokens)),
        temperature=defaults.temperature if temperature is None else temperature,
        top_p=defaults.top_p if top_p is None else max(top_p, 1e-9),  # 0 keeps the most likely token alone
        top_k=defaults.top_k if top_k is None else int(top_k),
        min_p=defaults.min_p if min_p is None else min_p,
        repetition_penalty=defaults.repetition_penalty if repetition_penalty is None else repetition_penalty,
        presence_penalty=presence_penalty or None,
        frequency_penalty=frequency_penalty or None,
        seed=None if seed is None else int(seed),
        stop=protocol.parse_stop_sequences(stop_sequences),
        logit_bias=bias or None,
        choices=protocol.parse_choices(choices),
        regex=regex or None,
        json_schema=protocol.parse_json_schema(json_schema),
        grammar=grammar or None,
        top_logprobs=int(top_logprobs),
        text=True,
        adapter=adapter,
        cache_salt=cache_salt,
    )


class Completions:
    """The completions of one prompt. Run `operations`, then pass every reply to `add`."""

    def __init__(
        self,
        generate: Generate,
        tokenizer: PreTrainedTokenizerBase,
        output: str,
        n: int = 1,
        prompt_logprobs: bool = False,
        normalize: str = "sum",
        labels: Sequence[str] = (),
        encoded: bool = False,
    ) -> None:
        """``generate`` holds the prompt's tokens and the settings of every completion. ``output`` is ``text``, ``lmtp``
        or ``json``. ``normalize`` says which log-probability of a compared choice counts: ``sum``, that of the text, or
        ``mean``, per token. ``labels`` are a classifier's. ``encoded``: the prompt is the source of an encoder and a
        decoder. Raises RequestError for settings that contradict each other."""
        if output == "text" and n > 1:
            raise RequestError(f"n is {n}: choose output json or lmtp; output text holds one completion.")
        if output == "text" and prompt_logprobs:
            raise RequestError("prompt_logprobs: choose output json or lmtp; output text holds no numbers.")
        if encoded and prompt_logprobs:
            raise RequestError("prompt_logprobs: this model encodes the prompt and has no log-probabilities for it.")
        self.constraint = protocol.constraint_of(generate)
        self.finished = True
        """Whether every compared choice was sent whole. GENERATE streams are counted by the engine."""
        self.valid: Sequence[bool | None] = []
        """For each completion, whether its text satisfies the constraint; None where that could not be told."""
        self._encodes = isinstance(generate, Encode)
        """Whether an encoder answers: the prompt itself is the text, filled in, or its label is."""
        if self._encodes:
            generate = replace(generate, max_tokens=protocol.MAX_COUNT)  # each mask gets a token
        self._generate = generate
        self._begins = encoded
        self._tokenizer = tokenizer
        self._labels = labels
        self._output = output
        self._n = n
        self._normalize = normalize
        options = list(dict.fromkeys(generate.choices or []))
        whole = len(options) <= MAX_COMPARED and not generate.logit_bias and not generate.stop
        self._options = options if whole else []
        if (length := sum(map(len, self._options))) > MAX_SOURCE["choices"]:
            raise RequestError(f"choices has {length} characters; {MAX_SOURCE['choices']} is the most.")
        if self._encodes:
            self._check_encoding(prompt_logprobs)
        self._scored: dict[protocol.StreamId, list[Token]] = {}
        """The tokens of the prompt and of the options."""
        self._completed: dict[protocol.StreamId, list[Token]] = {}
        """The tokens of the completions."""
        self._texts: dict[protocol.StreamId, str] = {}
        """The texts of the completions."""
        self._kept = 0
        self.operations: list[Operation] = []
        if prompt_logprobs:  # first: the other streams reuse its keys and values
            self._score(PROMPT, [], generate.prompt)
        for i, option in enumerate(self._options):
            if not option and tokenizer.eos_token_id is None:
                raise RequestError("choices holds an empty text, but this model has no token that ends a text.")
            self._score(i, generate.prompt, option or [tokenizer.eos_token_id])
        for i in range(0 if self._options else n):
            self.operations.append(replace(generate, stream_id=i, seed=self._seed(i)))
            self._completed[i], self._texts[i] = [], ""

    def _check_encoding(self, prompt_logprobs: bool) -> None:
        """Raise RequestError for what an encoder has no answer to. The engine refuses other fields."""
        if prompt_logprobs:
            raise RequestError("prompt_logprobs: this model reads the whole prompt at once, and predicts none of it.")
        if self._generate.choices and self._labels:
            raise RequestError("choices: this model chooses among its labels; use logit_bias to allow only some.")
        if self._generate.choices and not self._options:
            raise RequestError(
                f"choices: this model compares at most {MAX_COMPARED}, without logit_bias and stop_sequences; "
                "use logit_bias alone to allow only some tokens."
            )

    async def tokenize(self, tokenizers: Tokenizers, context: int) -> None:
        """Put token ids in place of the options' texts. Raises RequestError for one that cannot be scored."""
        prompt = 0 if self._begins else len(self._generate.prompt)
        listed = reversed(list(enumerate(self._generate.choices or []))) if self._options else ()
        names = {text: f"choices[{i}]" for i, text in listed}
        for place, operation in enumerate(self.operations):
            if not isinstance(operation, Score) or not isinstance(operation.scored, str):
                continue
            field = names.get(operation.scored, "choices")
            ids = await tokenizers.encode(field, operation.scored, self._begins, add_special_tokens=not self._begins)
            if not ids:
                raise RequestError(f"{field} is no token of this model: {protocol.quoted(operation.scored)}.")
            if self._encodes:
                self._check_masks(field, ids)
            elif prompt + len(ids) > context:
                raise RequestError(
                    f"prompt and {field} are {prompt + len(ids)} tokens; the model's context is {context}."
                )
            self.operations[place] = replace(operation, scored=ids)

    def _check_masks(self, field: str, ids: Sequence[int]) -> None:
        """Raise RequestError if a choice cannot fill the prompt's masks."""
        tokenizer = self._tokenizer
        masks = list(self._generate.prompt).count(tokenizer.mask_token_id)
        if masks and len(ids) != masks:
            raise RequestError(f"{field} is {len(ids)} tokens; give {masks}, one for each {tokenizer.mask_token}.")

    @property
    def input_tokens(self) -> int:
        """Tokens of the prompt. It counts once, however many streams begin with it."""
        return len(self._generate.prompt)

    def _score(self, stream_id: protocol.StreamId, prompt: protocol.Prompt, scored: protocol.Prompt) -> None:
        top = self._generate.top_logprobs
        score = Score(stream_id=stream_id, prompt=prompt, scored=scored, top_logprobs=top, text=True)
        self.operations.append(replace(score, cache_salt=self._generate.cache_salt, adapter=self._generate.adapter))
        self._scored[stream_id] = []

    def _seed(self, index: int) -> int | None:
        return None if self._generate.seed is None else self._generate.seed + index

    def add(self, replies: list[Reply]) -> str:
        """Take one step's replies and return the output to send now.

        Raises RequestError if a stream failed: one failed stream fails the whole answer.
        """
        sent: list[Token] = []
        for reply in replies:
            if isinstance(reply, Failure):
                raise RequestError(reply.error)
            if not isinstance(reply, Token):
                continue
            if reply.stream_id in self._scored:
                if self._output == "json" or reply.stream_id != PROMPT:
                    self._keep(self._scored[reply.stream_id], reply)
                if reply.stream_id != PROMPT:
                    continue
            else:
                self._texts[reply.stream_id] += _text([reply])
                if self._output == "json" or self._encodes:
                    self._keep(self._completed[reply.stream_id], reply)
            sent.append(reply)
        if self._output == "lmtp":
            return protocol.encode(sent)
        return _text(sent) if self._output == "text" and not self._encodes else ""

    def _keep(self, tokens: list[Token], token: Token) -> None:
        """Keep what the end of the output needs."""
        tokens.append(token)
        self._kept += len(token.top_logprobs) if isinstance(token.top_logprobs, dict) else 1
        if self._kept > MAX_KEPT:
            raise RequestError(
                f"more than {MAX_KEPT} log-probabilities for one document; lower n or top_logprobs, or use output lmtp."
            )

    def end(self, reused: int, computed: int, check: Check) -> str:
        """Return the output to send after the last reply.

        ``reused`` and ``computed`` are the prediction's token counts. ``check`` may take a second.
        """
        distribution: list[dict[str, Any]] = []
        if self._options:
            distribution = self._choose()
            self.valid = [text in self._options for text in self._texts.values()]
        elif self.constraint:
            self.valid = check(self._generate, list(self._texts.values()))
        if self._encodes:
            self._texts = {i: self._encoded(tokens) for i, tokens in self._completed.items()}
        if self._labels:
            distribution = self._of_labels(self._completed[0][0])
        if self._output == "json":
            usage = {"reused_token_count": reused, "computed_token_count": computed}
            return msgspec.json.encode(self._document(distribution, usage)).decode()
        if self._output == "text":
            return self._texts[0] if self._options or self._encodes else ""
        return "".join(map(protocol.encode, self._completed.values())) if self._options else ""

    def _encoded(self, tokens: Sequence[Token]) -> str:
        """An encoder's answer: the prompt with its masks filled, as the tokenizer writes it, or the label."""
        if self._labels:
            return _text(list(tokens))
        prompt = self._generate.prompt
        assert isinstance(prompt, list)
        fillings, mask = iter(tokens), self._tokenizer.mask_token_id
        filled: list[int] = [next(fillings).token if token == mask else token for token in prompt]
        return str(self._tokenizer.decode(filled, skip_special_tokens=True))

    def _of_labels(self, token: Token) -> list[dict[str, Any]]:
        """Each possible label with its log-probability, most likely first."""
        assert isinstance(token.top_logprobs, dict)
        return [
            {"choice": self._labels[i], "logprob": logprob, "probability": round(math.exp(logprob), 6)}
            for i, logprob in token.top_logprobs.items()
        ]

    def _choose(self) -> list[dict[str, Any]]:
        """Choose among the options. Returns each with its log-probability after the prompt and its probability among
        all of them, most likely first."""
        logprobs = [self._logprob(self._scored[i]) for i in range(len(self._options))]
        highest = max(logprobs)
        temperature = self._generate.temperature
        weights = [math.exp((logprob - highest) / (temperature or 1.0)) for logprob in logprobs]
        total = math.fsum(weights)
        for i in range(self._n):
            best = logprobs.index(highest)
            if temperature:
                (best,) = random_of(self._seed(i)).choices(range(len(weights)), weights)
            self._completed[i], self._texts[i] = self._answer(i, best)
        rows = zip(self._options, logprobs, weights, strict=True)
        return sorted(
            (
                {"choice": option, "logprob": protocol.finite(logprob), "probability": round(weight / total, 6)}
                for option, logprob, weight in rows
            ),
            key=lambda row: -row["logprob"],
        )

    def _logprob(self, tokens: list[Token]) -> float:
        total = math.fsum(token.logprob for token in tokens)
        return total / len(tokens) if self._normalize == "mean" else total

    def _answer(self, index: int, option: int) -> tuple[list[Token], str]:
        """An option as a completion of at most ``max_tokens``."""
        whole = self._scored[option]
        tokens = [replace(token, stream_id=index) for token in whole[: self._generate.max_tokens]]
        if len(tokens) == len(whole):
            return tokens, self._options[option]
        self.finished = False
        return [*tokens[:-1], replace(tokens[-1], finish_reason="length")], _text(tokens)

    def _document(self, distribution: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        completions = [
            {
                "index": i,
                "text": self._texts[i],
                "finish_reason": tokens[-1].finish_reason,
                "tokens": [_token(token) for token in tokens],
            }
            for i, tokens in self._completed.items()
        ]
        for completion, valid in zip(completions, self.valid, strict=False):
            completion["constraint_valid"] = valid
        document: dict[str, Any] = {"choices": completions}
        if distribution:
            document["distribution"] = distribution
        if PROMPT in self._scored:
            document["prompt_logprobs"] = [_token(token) for token in self._scored[PROMPT]]
        generated = sum(map(len, self._completed.values()))
        document["usage"] = {"input_token_count": self.input_tokens, "output_token_count": generated, **usage}
        return document


def _token(token: Token) -> dict[str, Any]:
    fields = {"token": token.token, "text": token.text, "logprob": token.logprob, "top_logprobs": token.top_logprobs}
    return {name: value for name, value in fields.items() if value is not UNSET}


def _text(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens if isinstance(token.text, str))
