"""Streams of encoders. The model reads a whole text once; what is wanted of it comes in one step.

A masked LM fills the masks of a prompt, or scores given tokens in their places. A sequence classifier names a label.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lmtp.engine.masks import Bias
from lmtp.engine.penalties import Seen, is_penalized
from lmtp.engine.sampling import NOT_NUMBERS, Choice, Draw, Row, Target, uniforms_of
from lmtp.engine.stream import OperationStream, checked_ids
from lmtp.prediction import Prediction
from lmtp.protocol import Encode, Generate, RequestError, Score, Token, finite
from lmtp.runners.model import Head, Limits, UnsupportedModel

IMPOSSIBLE = finite(-math.inf)


class Encoding(OperationStream):
    """An operation on a whole text."""

    def __init__(
        self,
        prediction: Prediction,
        operation: Encode | Score,
        tokens: list[int],
        places: Sequence[int],
        rows: Sequence[Row],
    ) -> None:
        """``rows``: what is wanted of the model. ``places``: the positions that the rows belong to, in order."""
        super().__init__(prediction, tokens, len(tokens), len(tokens))
        self.operation = operation
        self._places = places
        self._rows = rows
        self._answered = 0
        """How many rows it has received: a step need not take all of the text."""

    @property
    @override
    def first_wanted(self) -> int:
        return 0

    @property
    @override
    def least_length(self) -> int:
        return len(self.tokens)

    @override
    def places(self, count: int) -> Sequence[int]:
        end = self.computed + count
        return [place for place in self._places[self._answered :] if place < end]

    @override
    def wanted(self, count: int) -> int:
        return len(self.places(count))

    @override
    def rows(self, count: int) -> Sequence[Row]:
        return self._rows[self._answered : self._answered + self.wanted(count)]

    @override
    def receive(self, choices: Sequence[Choice]) -> list[Token]:
        if error := next((choice.error for choice in choices if choice.error), ""):
            raise RequestError(error)
        if any(choice.logprob == IMPOSSIBLE for choice in choices):  # no bias applies to tokens that are given
            raise RequestError(NOT_NUMBERS)
        self._answered += len(choices)
        self.finished = self._answered == len(self._rows)
        return self._replies(choices)

    def _replies(self, choices: Sequence[Choice]) -> list[Token]:
        raise NotImplementedError


def _drawn(operation: Encode, bias: Bias | None, tokens: list[int], places: int) -> list[Row]:
    """The rows of tokens that are chosen, each by itself."""
    counts = Seen(operation, tokens).counts(tokens) if is_penalized(operation) else None
    uniforms = uniforms_of(operation.seed)
    return [Draw(operation, bias, counts=counts, uniforms=uniforms(place)) for place in range(places)]


class Filling(Encoding):
    """A masked LM's answer: a token for each mask, chosen or, for SCORE, given."""

    def __init__(
        self,
        prediction: Prediction,
        operation: Encode | Score,
        tokens: list[int],
        masks: Sequence[int],
        rows: Sequence[Row],
        decode: Callable[[int], str],
    ) -> None:
        super().__init__(prediction, operation, tokens, masks, rows)
        self._decode = decode

    @override
    def _replies(self, choices: Sequence[Choice]) -> list[Token]:
        reported = isinstance(self.operation, Encode) or self.operation.top_logprobs
        last = len(choices) - 1 if self.finished else -1
        return [
            Token(
                token=choice.token,
                stream_id=self.operation.stream_id,
                logprob=choice.logprob,
                finish_reason="stop" if i == last else None,
                top_logprobs=choice.top if reported else UNSET,
                text=self._decode(choice.token) if self.operation.text else UNSET,
            )
            for i, choice in enumerate(choices)
        ]


class Classification(Encoding):
    """A classifier's answer: one label, and the log-probabilities of all."""

    def __init__(
        self, prediction: Prediction, operation: Encode, tokens: list[int], head: Head, bias: Bias | None
    ) -> None:
        rows = _drawn(replace(operation, top_logprobs=len(head.labels)), bias, tokens, 1)
        if head.independent:  # each label has a row of its own, with the classes false and true
            rows = [Target(token=1, top_logprobs=0) for _ in head.labels]
        super().__init__(prediction, operation, tokens, [len(tokens) - 1] * len(rows), rows)
        self._head = head

    @override
    def _replies(self, choices: Sequence[Choice]) -> list[Token]:
        (choice,) = [_likeliest(choices)] if self._head.independent else choices
        return [
            Token(
                token=choice.token,
                stream_id=self.operation.stream_id,
                logprob=choice.logprob,
                finish_reason="stop",
                top_logprobs=choice.top,
                text=self._head.labels[choice.token],
            )
        ]


def _likeliest(labels: Sequence[Choice]) -> Choice:
    """The likeliest of independent labels, each with the log-probability that it is true."""
    top = dict(sorted(enumerate(label.logprob for label in labels), key=lambda entry: -entry[1]))
    best = next(iter(top))
    return Choice(best, top[best], top)


def refuse(operation: Generate | Score, head: Head) -> None:
    """Raise RequestError, saying what to do, for what an encoder has no answer to."""
    model = f"this model is a {head.kind}"
    if head.labels and not isinstance(operation, Encode):
        name = "SCORE" if isinstance(operation, Score) else "GENERATE"
        raise RequestError(f"{name}: {model}, which labels a text and has no tokens to add: send the input prompt.")
    if isinstance(operation, Score):
        return
    if not isinstance(operation, Encode):
        raise RequestError(
            f"GENERATE: {model}, which fills masks and does not continue a text: send the input prompt, or SCORE."
        )
    for field in ("choices", "regex", "json_schema", "grammar", "stop"):
        if getattr(operation, field) is not None:
            chosen = "labels" if head.labels else "tokens for its masks, each by itself"
            raise RequestError(f"{field}: {model}, which chooses {chosen}: use logit_bias to allow only some.")
    if head.independent and (operation.logit_bias or operation.mask):
        raise RequestError(f"logit_bias: {model} whose labels exclude none of the others: choose among them yourself.")


def open_encoding(
    prediction: Prediction,
    operation: Generate | Score,
    limits: Limits,
    tokenizer: PreTrainedTokenizerBase,
    bias: Bias | None,
) -> Encoding:
    """A stream that answers the operation, whose texts are already tokenized and whose masks are the bias. `refuse` has
    let it pass.

    Raises RequestError where this model cannot serve it.
    """
    assert limits.head is not None
    assert isinstance(operation, Encode | Score)
    head = limits.head
    tokens = checked_ids(operation.prompt, "prompt", limits)
    if not tokens:
        raise RequestError("prompt is empty; give at least one token.")
    if len(tokens) > limits.context:
        raise RequestError(f"prompt is {len(tokens)} tokens; the model's context is {limits.context}.")
    if head.labels:
        assert isinstance(operation, Encode)
        return Classification(prediction, operation, tokens, head, bias)
    masks = [place for place, token in enumerate(tokens) if token == tokenizer.mask_token_id]
    if not masks:
        raise RequestError(f"prompt has no {tokenizer.mask_token}; put it where a token is to be filled in.")
    rows: Sequence[Row]
    if isinstance(operation, Encode):
        rows = _drawn(operation, bias, tokens, len(masks))
    else:
        scored = checked_ids(operation.scored, "scored", limits)
        if len(scored) != len(masks):
            raise RequestError(
                f"scored is {len(scored)} tokens; give {len(masks)}, one for each {tokenizer.mask_token} of prompt."
            )
        rows = [Target(token, operation.top_logprobs) for token in scored]
    return Filling(prediction, operation, tokens, masks, rows, lambda token: str(tokenizer.decode([token])))


def describe(head: Head, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What MODEL_INFO says of an encoder."""
    chosen = {"labels": list(head.labels)} if head.labels else {"mask_token": tokenizer.mask_token_id}
    return {"kind": head.kind, **chosen}


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, head: Head) -> None:
    """Check that the tokenizer gives all that an encoder is given here: token ids, and a mask token to a masked LM.

    A chat template is forgotten, since an encoder reads the prompt as it is. Raises UnsupportedModel.
    """
    tokenizer.chat_template = None
    if not head.labels and tokenizer.mask_token_id is None:
        raise UnsupportedModel("it is a masked language model, but its tokenizer has no mask token; add one to it.")
    given = {name for name, ids in tokenizer("a").items() if any(ids)} - {"input_ids", "attention_mask"}
    if given:
        names = " and ".join(sorted(given))
        raise UnsupportedModel(f"its tokenizer gives it {names}, which are not passed on here; choose another model.")
