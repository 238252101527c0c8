"""Drafts: the next tokens of a stream guessed from its own text, so that one step can compute several of them.

Where the last tokens stood before, what followed them there is likely to follow again: in code, in lists, in answers
that quote their prompt. A step computes such guesses along with the last token, and each that is the token the model
chooses anyway has saved a step. What the stream says does not depend on it, but for rounding. The method is prompt
lookup decoding (Apoorv Saxena, 2023), a kind of speculative decoding (Leviathan et al., 2023).
"""

MATCHED = 2
"""How many tokens have to be the same. One is right too seldom, and three find little."""

FIRST = 8
"""Tokens of the first draft. Each further one has room for twice what was right of the last, and two: a text that
repeats itself soon fills its steps, and one that only seems to costs little."""

REMEMBERED = 8192
"""Tokens of a prompt, from its end, that are looked at, so that a long one does not hold up other streams."""


class Drafter:
    """Guesses what follows a growing list of tokens."""

    def __init__(self) -> None:
        self._followed: dict[tuple[int, ...], int] = {}
        """Where in the list the last occurrence of some tokens ended, all but the last ones'."""
        self._seen = MATCHED
        self._length = FIRST

    def draft(self, tokens: list[int], most: int) -> list[int]:
        """Up to ``most`` tokens; none where nothing like the end of the list came before.

        The list must be that of the call before, or have grown. Each of its tokens is looked at once.
        """
        for end in range(max(self._seen, len(tokens) - REMEMBERED), len(tokens)):
            self._followed[tuple(tokens[end - MATCHED : end])] = end
        self._seen = max(self._seen, len(tokens))
        place = self._followed.get(tuple(tokens[-MATCHED:])) if len(tokens) >= MATCHED else None
        if place is None or most < 1:
            return []
        length = min(most, self._length)
        repeated = tokens[place : place + length]  # as far as it goes on, and then as if it went on repeating itself
        return [repeated[i % len(repeated)] for i in range(length)]

    def learn(self, right: int) -> None:
        """How many tokens of the last draft were right."""
        self._length = 2 * right + 2
