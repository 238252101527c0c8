"""One prompt's completions: the operations they need, and the answer read from the replies.

A prompt is answered as text, as protocol lines, or as one JSON document. The operations are the same for all three: a
GENERATE for each completion, a SCORE over the prompt for ``prompt_logprobs``, and a SCORE for each option for
``best_of_choices``.
"""

import math
from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import replace
from transformers import PreTrainedTokenizerBase

from lmtp import protocol, text
from lmtp.protocol import Failure, Generate, Operation, Reply, RequestError, Score, Token

PROMPT = "prompt"
"""The id of the stream that scores the prompt. Completions and options are numbered from 0."""

MAX_KEPT = 2**20
"""Log-probabilities of one JSON document: about 100 MB while it is put together."""


class Completions:
    """The completions of one prompt. Run `operations`, then pass every reply to `add`."""

    def __init__(
        self,
        generate: Generate,
        tokenizer: PreTrainedTokenizerBase,
        output: str,
        n: int = 1,
        prompt_logprobs: bool = False,
        best_of_choices: bool = False,
    ) -> None:
        """``generate`` holds the prompt's tokens and the settings of every completion. ``output`` is ``text``, ``lmtp``
        or ``json``. Raises RequestError for settings that contradict each other."""
        if output == "text" and n > 1:
            raise RequestError(f"n is {n}: choose output json or lmtp; output text holds one completion.")
        if output == "text" and prompt_logprobs:
            raise RequestError("prompt_logprobs: choose output json or lmtp; output text holds no numbers.")
        if best_of_choices and not generate.choices:
            raise RequestError("best_of_choices needs choices: give the texts to compare.")
        if best_of_choices and len(generate.choices or []) > protocol.BATCH_LIMIT:
            raise RequestError(f"best_of_choices compares at most {protocol.BATCH_LIMIT} choices.")
        if best_of_choices and n > 1:
            raise RequestError(f"n is {n}: best_of_choices has one answer, so leave n at 1.")
        self.constraint = protocol.constraint_of(generate)
        self._output = output
        self._prompt = list(generate.prompt)
        self._options = list(dict.fromkeys(generate.choices or [])) if best_of_choices else []
        self._streams: dict[protocol.StreamId, list[Token]] = {}
        self._kept = 0
        self.operations: list[Operation] = []
        if prompt_logprobs:  # first: the other streams reuse its keys and values
            top = generate.top_logprobs
            salt = generate.cache_salt
            self._add(
                Score(stream_id=PROMPT, prompt=[], scored=generate.prompt, top_logprobs=top, text=True, cache_salt=salt)
            )
        for i, option in enumerate(self._options):
            ids = text.encode(tokenizer, option, begins_sequence=False)
            if not ids:
                raise RequestError("best_of_choices: choices holds an empty text, which has no probability; remove it.")
            top = generate.top_logprobs
            score = Score(stream_id=i, prompt=generate.prompt, scored=ids, top_logprobs=top, text=True)
            self._add(replace(score, cache_salt=generate.cache_salt))
        for i in range(0 if best_of_choices else n):
            seed = None if generate.seed is None else generate.seed + i
            self._add(replace(generate, stream_id=i, seed=seed))

    def _add(self, operation: Operation) -> None:
        self.operations.append(operation)
        self._streams[operation.stream_id] = []

    def add(self, replies: list[Reply]) -> str:
        """Take one step's replies and return the output to send now.

        Raises RequestError if a stream failed: one failed stream fails the whole answer.
        """
        tokens = []
        for reply in replies:
            if isinstance(reply, Failure):
                raise RequestError(reply.error)
            if isinstance(reply, Token):
                if self._output == "json" or self._options:  # nothing else is read in the end
                    self._streams[reply.stream_id].append(reply)
                    self._kept += len(reply.top_logprobs) if isinstance(reply.top_logprobs, dict) else 1
                tokens.append(reply)
        if self._kept > MAX_KEPT:
            raise RequestError(
                f"more than {MAX_KEPT} log-probabilities for one document; lower n or top_logprobs, or use output lmtp."
            )
        if self._output == "lmtp":
            return protocol.encode(replies)
        return _text(tokens) if self._output == "text" and not self._options else ""

    def end(self, reused: int, computed: int) -> str:
        """Return the output to send after the last reply. The arguments are the prediction's token counts."""
        if self._output == "json":
            usage = {"reused_token_count": reused, "computed_token_count": computed}
            return msgspec.json.encode(self._document(usage)).decode()
        return self._distribution()[0]["choice"] if self._options and self._output == "text" else ""

    def _document(self, usage: dict[str, int]) -> dict[str, Any]:
        scored = self._streams.pop(PROMPT, None)
        document: dict[str, Any] = {}
        if self._options:
            distribution = self._distribution()
            best = self._options.index(distribution[0]["choice"])
            document["choices"] = [_completion(0, self._streams[best])]
            document["distribution"] = distribution
        else:
            document["choices"] = [_completion(i, tokens) for i, tokens in enumerate(self._streams.values())]
        if scored is not None:
            document["prompt_logprobs"] = [_token(token) for token in scored]
        generated = sum(len(completion["tokens"]) for completion in document["choices"])
        document["usage"] = {"input_token_count": len(self._prompt), "output_token_count": generated, **usage}
        return document

    def _distribution(self) -> list[dict[str, Any]]:
        """Every option with its log-probability after the prompt and its share of all options' probability, most likely
        first."""
        logprobs = [math.fsum(token.logprob for token in self._streams[i]) for i in range(len(self._options))]
        highest = max(logprobs)
        total = math.fsum(math.exp(logprob - highest) for logprob in logprobs)
        rows = [
            {
                "choice": option,
                "logprob": protocol.finite(logprob),
                "probability": round(math.exp(logprob - highest) / total, 6),
            }
            for option, logprob in zip(self._options, logprobs, strict=True)
        ]
        return sorted(rows, key=lambda row: -row["logprob"])


def _completion(index: int, tokens: list[Token]) -> dict[str, Any]:
    return {
        "index": index,
        "text": _text(tokens),
        "finish_reason": tokens[-1].finish_reason,
        "tokens": [_token(token) for token in tokens],
    }


def _token(token: Token) -> dict[str, Any]:
    fields = {"token": token.token, "text": token.text, "logprob": token.logprob, "top_logprobs": token.top_logprobs}
    return {name: value for name, value in fields.items() if value is not UNSET}


def _text(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens if isinstance(token.text, str))
