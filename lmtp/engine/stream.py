"""One stream: its tokens, how many of them are computed, what it still needs, when it ends.

A stream is a list of tokens of which the first ``computed`` have their keys and values in a slot. A step computes some
more; where the model's output at a position is wanted, the stream receives a Choice and answers with a reply.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UNSET
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lmtp import text
from lmtp.engine.drafts import Drafter
from lmtp.engine.grammar import Grammar, bias_of
from lmtp.engine.sampling import Choice, needs_own_logits
from lmtp.protocol import FinishReason, Generate, Prompt, RequestError, Score, Token

MOST_GUESSED_TOP = 32
"""A stream with more top_logprobs makes no drafts."""


@dataclass(frozen=True)
class Limits:
    """What a model can take: its vocabulary and context in tokens, and the ids that end a sequence."""

    vocabulary: int
    context: int
    end_of_sequence: tuple[int, ...]


class Stream:
    """What the scheduler and the runner need to know of any stream."""

    operation: Generate | Score

    def __init__(self, tokens: list[int], prompt_length: int, most_tokens: int) -> None:
        self.tokens = tokens
        self.prompt_length = prompt_length
        self.most_tokens = most_tokens
        """Tokens it can come to hold, prompt included: what its slot must have room for."""
        self.computed = 0
        """How many tokens, from the first, have their keys and values in its slot."""
        self.reused = 0
        """How many of those were computed for another stream."""
        self.draft: list[int] = []
        """Tokens guessed to follow, to be computed along in the next step."""
        self.slot = -1
        self.finished = False

    @property
    def goal(self) -> int:
        """How many tokens have to be computed before the stream can go on or end."""
        raise NotImplementedError

    @property
    def first_wanted(self) -> int:
        """The first position whose logits are wanted; those before it are never computed twice."""
        raise NotImplementedError

    @property
    def pending(self) -> int:
        """How many tokens it still needs computed."""
        return self.goal - self.computed

    @property
    def decoding(self) -> bool:
        """Whether what it needs computed are tokens that it generated: one, or more where a grammar forced them."""
        return False

    def upcoming(self, count: int) -> list[int]:
        """The next tokens to compute; past the known ones, those of the draft."""
        known = self.tokens[self.computed : self.computed + count]
        return known + self.draft[: count - len(known)]

    def guess(self, most: int) -> None:
        """Make a draft of up to so many tokens for the next step, where the stream is one that can use it."""

    def begin(self) -> list[Token]:
        """The replies that are certain before anything is computed."""
        return []

    def receive(self, choices: Sequence[Choice]) -> list[Token]:
        """Take the model's word at the wanted positions computed in this step; the replies to send, in order."""
        raise NotImplementedError


class Generation(Stream):
    """A GENERATE operation being answered."""

    operation: Generate

    def __init__(
        self,
        operation: Generate,
        prompt: list[int],
        limits: Limits,
        bias: Tensor | None,
        decoder: text.TextDecoder | None,
        grammar: Grammar | None = None,
    ) -> None:
        super().__init__(list(prompt), len(prompt), min(len(prompt) + operation.max_tokens, limits.context))
        self.operation = operation
        self.bias = bias
        self.grammar = grammar
        self._end_of_sequence = limits.end_of_sequence
        self._decoder = decoder
        # A guess can only be compared with a choice that depends on nothing but the tokens before it. And many likely
        # tokens would have to be looked up for every guess.
        guessable = not grammar and not needs_own_logits(operation) and operation.top_logprobs <= MOST_GUESSED_TOP
        self._drafter = Drafter() if guessable else None
        # Random takes a number without its sign, and a string whole; None is a seed of the system's.
        self._random = random.Random(None if operation.seed is None else str(operation.seed))

    @property
    @override
    def goal(self) -> int:
        return len(self.tokens)

    @property
    @override
    def first_wanted(self) -> int:
        return len(self.tokens) - 1

    @property
    def generated(self) -> int:
        """How many tokens were generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    @override
    def decoding(self) -> bool:
        return self.computed >= self.prompt_length

    @property
    def forbidden_now(self) -> Sequence[int]:
        """The ids impossible for the next token only: the end of the sequence before min_tokens."""
        return self._end_of_sequence if self.generated < self.operation.min_tokens else ()

    @property
    def inside_grammar(self) -> bool:
        """Whether the text so far is not one that its grammar knows."""
        return self.grammar is not None and not self.grammar.accepting

    def draw(self) -> float:
        """The stream's next uniform number in [0, 1)."""
        return self._random.random()

    @override
    def begin(self) -> list[Token]:
        return self._take_forced()

    @override
    def guess(self, most: int) -> None:
        self.draft = []
        if self._drafter and self.pending == 1 and not self.forbidden_now:
            room = self.most_tokens - len(self.tokens) - 1  # the model's own word after a draft wants a place, too
            self.draft = self._drafter.draft(self.tokens, min(most, room))

    @override
    def receive(self, choices: Sequence[Choice]) -> list[Token]:
        """The first choice follows the tokens, each further one a token of the draft: it counts if that was right.

        Raises RequestError where there is no such token, or the grammar cannot be followed any further.
        """
        if choices[0].error:
            raise RequestError(choices[0].error)
        draft, self.draft = self.draft, []
        replies = [self._take(choices[0])]
        for guess, choice in zip(draft, choices[1:], strict=False):  # no more of it than was computed
            if self.finished or guess != self.tokens[-1] or choice.error:
                break
            self.computed += 1
            replies.append(self._take(choice))
        if self._drafter and draft:
            self._drafter.learn(right=len(replies) - 1)
        return [*replies, *self._take_forced()]

    def _take_forced(self) -> list[Token]:
        """Append what the grammar forces: nothing has to be computed to know it."""
        replies: list[Token] = []
        for token in [] if self.finished or self.grammar is None else self.grammar.forced():
            if self.finished or self._is_forbidden(token):  # a forbidden one is found impossible by the next step
                break
            replies.append(self._take(Choice(token, 0.0, {token: 0.0})))
        return replies

    def _is_forbidden(self, token: int) -> bool:
        return token in self.forbidden_now or (self.bias is not None and bool(self.bias[token].isneginf()))

    def _take(self, choice: Choice) -> Token:
        self.tokens.append(choice.token)
        if self.grammar:
            self.grammar.advance(choice.token)
        reason: FinishReason | None = None
        piece = ""
        if self._decoder:
            added = self._decoder.add(choice.token)
            piece = added.text
            reason = "stop" if added.stopped else None
        if choice.token in self._end_of_sequence or (self.grammar and self.grammar.complete):
            reason = "stop"
        elif reason is None and len(self.tokens) >= self.most_tokens:
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


class Scoring(Stream):
    """A SCORE operation being answered: its tokens are the prompt's and then the scored ones."""

    operation: Score

    def __init__(
        self, operation: Score, prompt: list[int], scored: list[int], decoder: text.TextDecoder | None
    ) -> None:
        super().__init__(prompt + scored, len(prompt), len(prompt) + len(scored))
        self.operation = operation
        self._decoder = decoder
        self._answered = len(prompt)

    @property
    @override
    def goal(self) -> int:
        return len(self.tokens) - 1

    @property
    @override
    def first_wanted(self) -> int:
        return max(self.prompt_length - 1, 0)

    def targets(self, first: int, last: int) -> list[int]:
        """The tokens that follow the wanted positions among ``first`` to ``last`` (exclusive)."""
        return self.tokens[max(first, self.first_wanted) + 1 : last + 1]

    @override
    def receive(self, choices: Sequence[Choice]) -> list[Token]:
        replies = []
        if self._answered == 0:  # an empty prompt: nothing comes before the first scored token, so it costs nothing
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
    operation: Generate | Score, limits: Limits, tokenizer: PreTrainedTokenizerBase, grammar: Grammar | None
) -> Stream:
    """A stream that answers the operation, whose texts are tokenized already.

    Raises RequestError where this model cannot serve it.
    """
    prompt = _ids(operation.prompt, "prompt", limits)
    wants_text = operation.text or (isinstance(operation, Generate) and bool(operation.stop))
    stop = (operation.stop or []) if isinstance(operation, Generate) else []
    decoder = text.TextDecoder(tokenizer, prompt, stop) if wants_text else None
    if isinstance(operation, Score):
        scored = _ids(operation.scored, "scored", limits)
        if not scored:
            raise RequestError("scored is empty; give at least one token.")
        if len(prompt) + len(scored) > limits.context:
            raise RequestError(
                f"prompt and scored are {len(prompt) + len(scored)} tokens; the model's context is {limits.context}."
            )
        return Scoring(operation, prompt, scored, decoder)
    if not prompt:
        raise RequestError("prompt is empty; give at least one token.")
    if len(prompt) >= limits.context:
        raise RequestError(
            f"prompt is {len(prompt)} tokens; the model's context of {limits.context} leaves no room for a new one."
        )
    bias = bias_of(operation, limits.vocabulary)
    if operation.min_tokens and bias is not None:
        without_end = bias.clone()
        without_end[list(limits.end_of_sequence)] = -float("inf")
        if bool(without_end.isneginf().all()):
            raise RequestError("min_tokens: the mask allows nothing but the end of the sequence.")
    return Generation(operation, prompt, limits, bias, decoder, grammar)


def _ids(prompt: Prompt, field: str, limits: Limits) -> list[int]:
    if isinstance(prompt, str):
        raise TypeError(f"{field} has to be tokenized before a stream is opened")
    if prompt and max(prompt) >= limits.vocabulary:
        index = next(i for i, token in enumerate(prompt) if token >= limits.vocabulary)
        raise RequestError(
            f"{field}[{index}]: token id {prompt[index]} is outside the vocabulary of {limits.vocabulary}."
        )
    return prompt
