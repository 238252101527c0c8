"""Drafts: a stream's next tokens guessed from its own text, so that one step can compute several of them.

Where the last tokens occurred before, what followed them there is likely to follow again: in code, in lists, in answers
that quote their prompt. A step computes the guesses along with the last token. Each guess that is the token the model
chooses anyway saves a step. Apart from rounding, the output does not depend on it. The method is prompt lookup decoding
(Apoorv Saxena, 2023), a kind of speculative decoding (Leviathan et al., 2023).

Guesses cost time, too. Each stream keeps an estimate of how likely its next guess is right, and a step takes as many
guesses as promise the most tokens in a time.
"""

from collections.abc import Sequence

MATCHED = 2
"""How many tokens have to match. A match of one is right too seldom; matches of three are rare."""

CHANCE = 0.4
"""How likely the first guess of a stream is right."""

KEPT = 0.9
"""How much of that estimate each guess leaves as it was; the rest is whether the guess was right."""

REMEMBERED = 8192
"""How many tokens of a prompt, from its end, are searched, so that a long one does not hold up other streams."""


class Drafter:
    """Guesses what follows a growing list of tokens."""

    def __init__(self) -> None:
        self._followed: dict[tuple[int, ...], int] = {}
        """Where each run of MATCHED tokens last ended, the run at the end of the list excepted."""
        self._seen = MATCHED
        self.chance = CHANCE
        """How likely the next guess is right."""

    def draft(self, tokens: list[int], most: int) -> list[int]:
        """Up to ``most`` tokens; none where the end of the list did not occur before.

        The list must be that of the previous call, possibly longer. Each of its tokens is looked at once.
        """
        for end in range(max(self._seen, len(tokens) - REMEMBERED), len(tokens)):
            self._followed[tuple(tokens[end - MATCHED : end])] = end
        self._seen = max(self._seen, len(tokens))
        place = self._followed.get(tuple(tokens[-MATCHED:])) if len(tokens) >= MATCHED else None
        if place is None or most < 1:
            return []
        repeated = tokens[place : place + most]  # continued periodically where the list ends
        return [repeated[i % len(repeated)] for i in range(most)]

    def learn(self, draft: Sequence[int], tokens: Sequence[int]) -> None:
        """What followed in place of the last draft, so far, whether its guesses were computed or not."""
        for guess, token in zip(draft, tokens, strict=False):
            self.chance = KEPT * self.chance + (1 - KEPT) * (guess == token)
            if guess != token:  # what follows a wrong guess says nothing
                break


def width(drafts: Sequence[tuple[int, float]], reading: int, packed: bool) -> int:
    """How many tokens of each stream a step should take, its last known one included.

    ``drafts`` has the length of each stream's draft and the chance of its guesses. A step takes as long as computing
    ``reading`` tokens, in which it reads the weights, and its own tokens: unless it is ``packed``, as many of each
    stream.
    """
    expected, best, most = 0.0, 0.0, 1
    for tokens in range(1, max(length for length, _ in drafts) + 2):
        expected += sum(chance ** (tokens - 1) for length, chance in drafts if length >= tokens - 1)
        computed = sum(min(length + 1, tokens) for length, _ in drafts) if packed else len(drafts) * tokens
        if (rate := expected / (reading + computed)) > best:
            best, most = rate, tokens
    return most
