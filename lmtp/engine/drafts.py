"""Drafts: a stream's next tokens guessed from its own text, so that one step can compute several of them.

Where the last tokens occurred before, what followed them there is likely to follow again: in code, in lists, in answers
that quote their prompt. A step computes the guesses along with the last token. Each guess that is the token the model
chooses anyway saves a step. Apart from rounding, the output does not depend on it. The method is prompt lookup decoding
(Apoorv Saxena, 2023), a kind of speculative decoding (Leviathan et al., 2023).
"""

MATCHED = 2
"""How many tokens have to match. A match of one is right too seldom; matches of three are rare."""

FIRST = 8
"""Length of the first draft in tokens. The next one has 2 * accepted + 2: repetitive text soon fills its steps, and
text that only seems repetitive costs little."""

REMEMBERED = 8192
"""How many tokens of a prompt, from its end, are searched, so that a long one does not hold up other streams."""


class Drafter:
    """Guesses what follows a growing list of tokens."""

    def __init__(self) -> None:
        self._followed: dict[tuple[int, ...], int] = {}
        """Where each run of MATCHED tokens last ended, the run at the end of the list excepted."""
        self._seen = MATCHED
        self._length = FIRST

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
        length = min(most, self._length)
        repeated = tokens[place : place + length]  # continued periodically where the list ends
        return [repeated[i % len(repeated)] for i in range(length)]

    def learn(self, accepted: int) -> None:
        """How many tokens of the last draft were accepted."""
        self._length = 2 * accepted + 2
