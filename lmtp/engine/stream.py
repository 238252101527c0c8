"""One stream: the operation it answers, what it still needs, when it ends.

Where the model's logits are wanted, the stream says so with one row for each position. It receives a Choice for each of
them and answers with replies.
"""

from collections.abc import Sequence

from msgspec import UNSET
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lmtp import text
from lmtp.engine.drafts import Drafter
from lmtp.engine.grammar import Grammar
from lmtp.engine.masks import Bias
from lmtp.engine.penalties import Seen, is_penalized
from lmtp.engine.sampling import GREEDY_BELOW, Choice, Draw, Row, Target, uniforms_of
from lmtp.prediction import Prediction
from lmtp.protocol import FinishReason, Generate, Prompt, RequestError, Score, Token
from lmtp.runners.model import Limits, SourceLimits
from lmtp.runners.step import Stream

MAX_DRAFTED_TOP = 32
"""A stream with more top_logprobs makes no drafts: they would have to be looked up for every guess."""


class OperationStream(Stream):
    """A stream that answers an operation."""

    operation: Generate | Score

    def __init__(self, prediction: Prediction, tokens: list[int], prompt_length: int, max_length: int) -> None:
        super().__init__(tokens, max_length)
        self.prompt_length = prompt_length
        self.prediction = prediction
        self.finished = False
        self.admitted = -1
        """The step before which it was last given memory; -1: not yet."""
        self.refused = -1
        """The step before which it was first refused memory since then; -1: it was not."""
        self.full = self.compared = -1
        """The scheduler's changes of memory after which it last found no room, and was last compared with the slots."""
        self.awaits = 0
        """The scheduler's progress before which a prefix that it waits for cannot be there; 0: it waits for none."""
        self.decoded = -1
        """The step that last decoded it, while there are too many streams for one step."""

    @property
    def least_length(self) -> int:
        """The fewest tokens that its memory must have room for."""
        return self.prompt_length + 1

    @property
    def decoding(self) -> bool:
        """Whether its pending tokens are generated ones: the last one, or several that a grammar forced."""
        return False

    def guess(self, most: int) -> None:
        """Draft up to ``most`` tokens for the next step, if the stream can use a draft."""

    @property
    def chance(self) -> float:
        """How likely the next guess of its draft is right."""
        return 0.0

    def begin(self) -> list[Token]:
        """The replies that are certain before anything is computed."""
        return []

    def rows(self, count: int) -> Sequence[Row]:
        """What is wanted of the logits, row by row, if the next ``count`` tokens are computed."""
        raise NotImplementedError

    def advance(self, count: int) -> None:
        """The next ``count`` tokens are computed. Those of a draft count only once they are accepted."""
        self.computed += min(count, self.pending)

    def receive(self, choices: Sequence[Choice]) -> list[Token]:
        """Take the choices at the rows of this step; returns the replies to send, in order.

        Raises RequestError where the stream cannot go on.
        """
        raise NotImplementedError


class Generation(OperationStream):
    """A GENERATE operation being answered."""

    operation: Generate

    def __init__(
        self,
        prediction: Prediction,
        operation: Generate,
        prompt: list[int],
        limits: Limits,
        bias: Bias | None,
        decoder: text.TextDecoder | None,
        grammar: Grammar | None = None,
    ) -> None:
        max_length = min(len(prompt) + operation.max_tokens, limits.context)
        super().__init__(prediction, list(prompt), len(prompt), max_length)
        self.operation = operation
        self.bias = bias
        self.grammar = grammar
        self._end_of_sequence = limits.end_of_sequence
        self._decoder = decoder
        self._drafter = Drafter() if operation.top_logprobs <= MAX_DRAFTED_TOP else None
        self._seen = Seen(operation, prompt) if is_penalized(operation) else None
        self._uniforms = uniforms_of(operation.seed) if operation.temperature >= GREEDY_BELOW else None

    @property
    def generated(self) -> int:
        """How many tokens it has generated."""
        return len(self.tokens) - self.prompt_length

    @property
    @override
    def decoding(self) -> bool:
        return self.computed >= self.prompt_length

    @property
    def inside_grammar(self) -> bool:
        """Whether the grammar does not allow the text to end here."""
        return self.grammar is not None and not self.grammar.accepting

    @override
    def rows(self, count: int) -> Sequence[Row]:
        return [self._row(self.draft[:ahead]) for ahead in range(self.wanted(count))]

    def _row(self, ahead: Sequence[int]) -> Draw:
        """What is wanted after the tokens and those of a draft ahead of them.

        Nothing else decides the choice, so that it is the same with and without a draft."""
        place = self.generated + len(ahead)
        return Draw(
            self.operation,
            self.bias,
            self._forbidden(place),
            self._seen.counts(self.tokens, ahead) if self._seen else None,
            self._uniforms(place) if self._uniforms else (0.0, 0.0),
        )

    def _forbidden(self, place: int) -> Sequence[int]:
        """The ids that are impossible for this generated token only: the end of the sequence before min_tokens."""
        return self._end_of_sequence if place < self.operation.min_tokens else ()

    @override
    def begin(self) -> list[Token]:
        return self._take_forced()

    @override
    def guess(self, most: int) -> None:
        self.draft = []
        if self._drafter and self.pending == 1 and not self._forbidden(self.generated):
            room = self.max_length - len(self.tokens) - 1  # one position is for the bonus token
            self.draft = self._drafter.draft(self.tokens, min(most, room))

    @property
    @override
    def chance(self) -> float:
        return self._drafter.chance if self._drafter else 0.0

    @override
    def receive(self, choices: Sequence[Choice]) -> list[Token]:
        """Take the choice that follows the known tokens, and those that follow accepted tokens of the draft.

        Raises RequestError where no token is possible, or the grammar cannot be followed any further.
        """
        if choices[0].error:
            raise RequestError(choices[0].error)
        draft, self.draft = self.draft, []
        known, accepted = len(self.tokens), 0
        replies = self._take_with_forced(choices[0])
        computed = min(len(draft), len(choices) - 1)  # a step may compute part of a draft
        while accepted < computed and not self.finished:
            if draft[accepted] != self.tokens[known + accepted]:
                break
            accepted += 1
            self.computed += 1
            if known + accepted == len(self.tokens):
                if choices[accepted].error:
                    break
                replies += self._take_with_forced(choices[accepted])
        if self._drafter and draft:
            self._drafter.learn(computed, accepted)
        return replies

    def _take_with_forced(self, choice: Choice) -> list[Token]:
        return [self._take(choice), *self._take_forced()]

    def _take_forced(self) -> list[Token]:
        """Append what the grammar forces; nothing has to be computed for it."""
        replies: list[Token] = []
        for token in [] if self.finished or self.grammar is None else self.grammar.forced():
            if self.finished or self._is_forbidden(token):  # the next step finds a forbidden one impossible
                break
            replies.append(self._take(Choice(token, 0.0, {token: 0.0})))
        return replies

    def _is_forbidden(self, token: int) -> bool:
        return token in self._forbidden(self.generated) or (self.bias is not None and self.bias.forbids(token))

    def _take(self, choice: Choice) -> Token:
        self.tokens.append(choice.token)
        if self.grammar:
            self.grammar.advance(choice.token)
        reason: FinishReason | None = None
        piece = ""
        if self._decoder:
            added = self._decoder.add(choice.token, may_stop=self.generated >= self.operation.min_tokens)
            piece = added.text
            reason = "stop" if added.stopped else None
        if choice.token in self._end_of_sequence or (self.grammar and self.grammar.complete):
            reason = "stop"
        elif reason is None and len(self.tokens) >= self.max_length:
            reason = "length"
        if reason is not None:
            self.finished = True
            if self._decoder:
                piece += self._decoder.flush()
        return Token(
            token=choice.token,
            stream_id=self.operation.stream_id,
            logprob=choice.logprob,
            finish_reason=reason,
            top_logprobs=choice.top,
            text=piece if self.operation.text else UNSET,
        )


class Scoring(OperationStream):
    """A SCORE operation being answered. Its tokens are the prompt and then the scored ones."""

    operation: Score

    def __init__(
        self,
        prediction: Prediction,
        operation: Score,
        prompt: list[int],
        scored: list[int],
        decoder: text.TextDecoder | None,
    ) -> None:
        super().__init__(prediction, prompt + scored, len(prompt), len(prompt) + len(scored))
        self.operation = operation
        self._decoder = decoder
        self._answered = len(prompt)

    @property
    @override
    def least_length(self) -> int:
        return self.max_length

    @property
    @override
    def goal(self) -> int:
        return len(self.tokens) - 1

    @property
    @override
    def first_wanted(self) -> int:
        return max(self._answered - 1, 0)  # past the prompt once some are answered, should it be preempted

    @override
    def rows(self, count: int) -> Sequence[Row]:
        last = self.computed + count
        targets = self.tokens[last - self.wanted(count) + 1 : last + 1]
        return [Target(token, self.operation.top_logprobs) for token in targets]

    @override
    def receive(self, choices: Sequence[Choice]) -> list[Token]:
        if error := next((choice.error for choice in choices if choice.error), ""):
            raise RequestError(error)
        replies = []
        if self._answered == 0:  # an empty prompt: nothing predicts the first scored token, so it scores 0
            replies.append(self._reply(Choice(self.tokens[0], 0.0, {self.tokens[0]: 0.0})))
        replies += [self._reply(choice) for choice in choices]
        return replies

    def _reply(self, choice: Choice) -> Token:
        self._answered += 1
        self.finished = self._answered == len(self.tokens)
        piece = ""
        if self._decoder:
            piece = self._decoder.add(choice.token).text + (self._decoder.flush() if self.finished else "")
        return Token(
            token=choice.token,
            stream_id=self.operation.stream_id,
            logprob=choice.logprob,
            finish_reason="stop" if self.finished else None,
            top_logprobs=choice.top if self.operation.top_logprobs else UNSET,
            text=piece if self.operation.text else UNSET,
        )


def open_stream(
    prediction: Prediction,
    operation: Generate | Score,
    limits: Limits,
    tokenizer: PreTrainedTokenizerBase,
    bias: Bias | None,
    grammar: Grammar | None,
) -> OperationStream:
    """A stream that answers the operation, whose texts are already tokenized and whose masks are the bias.

    Raises RequestError where this model cannot serve it.
    """
    prompt = checked_ids(operation.prompt, "prompt", limits.source or limits)
    source: tuple[int, ...] = ()
    if limits.source:
        source, prompt = _source(prompt, limits.source), _target_start(operation, limits)
    elif isinstance(operation, Generate) and operation.target is not None:
        raise RequestError("target: this model has no encoder; put the text so far at the end of prompt.")
    stream = _open(prediction, operation, prompt, limits, tokenizer, bias, grammar)
    stream.source = source
    return stream


def _source(prompt: list[int], limits: SourceLimits) -> tuple[int, ...]:
    """What the encoder reads."""
    if not prompt:
        raise RequestError("prompt is empty; give at least one token.")
    if len(prompt) > limits.context:
        raise RequestError(f"prompt is {len(prompt)} tokens; the model's encoder reads at most {limits.context}.")
    return tuple(prompt)


def _target_start(operation: Generate | Score, limits: Limits) -> list[int]:
    """What an encoder-decoder model's target begins with: its start tokens, and the target so far. A target that is
    given with its first token, such as the language's, gets no other one."""
    so_far = checked_ids((operation.target or []) if isinstance(operation, Generate) else [], "target", limits)
    given = so_far or (operation.scored if isinstance(operation, Score) else [])
    start, forced = limits.target_start[:1], limits.target_start[1:]
    return [*start, *(() if tuple(given[:1]) == forced else forced), *so_far]


def _open(
    prediction: Prediction,
    operation: Generate | Score,
    prompt: list[int],
    limits: Limits,
    tokenizer: PreTrainedTokenizerBase,
    bias: Bias | None,
    grammar: Grammar | None,
) -> OperationStream:
    """A stream that goes on after ``prompt``: the operation's, or what the target begins with."""
    wants_text = operation.text or (isinstance(operation, Generate) and bool(operation.stop))
    stop = (operation.stop or []) if isinstance(operation, Generate) else []
    decoder = text.TextDecoder(tokenizer, prompt, stop) if wants_text else None
    name = "target" if limits.source else "prompt"
    if isinstance(operation, Score):
        scored = checked_ids(operation.scored, "scored", limits)
        if not scored:
            raise RequestError("scored is empty; give at least one token.")
        if len(prompt) + len(scored) > limits.context:
            raise RequestError(
                f"{name} and scored are {len(prompt) + len(scored)} tokens; the model's context is {limits.context}."
            )
        return Scoring(prediction, operation, prompt, scored, decoder)
    if not prompt:
        raise RequestError("prompt is empty; give at least one token.")
    if len(prompt) >= limits.context:
        raise RequestError(
            f"{name} is {len(prompt)} tokens; the model's context of {limits.context} leaves no room for a new one."
        )
    return Generation(prediction, operation, prompt, limits, bias, decoder, grammar)


def checked_ids(prompt: Prompt, field: str, limits: Limits | SourceLimits) -> list[int]:
    """The tokens of a field that has been tokenized. Raises RequestError for an id outside the vocabulary."""
    if isinstance(prompt, str):
        raise TypeError(f"{field} has to be tokenized before a stream is opened")
    if len(prompt) <= limits.context and max(prompt, default=0) >= limits.vocabulary:  # a longer one is refused below
        index = next(i for i, token in enumerate(prompt) if token >= limits.vocabulary)
        raise RequestError(
            f"{field}[{index}]: token id {prompt[index]} is outside the vocabulary of {limits.vocabulary}."
        )
    return prompt
