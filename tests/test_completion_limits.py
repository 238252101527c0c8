"""What the completions of a prompt keep, and how much of it."""

from typing import Any

import pytest

from lmtp import completions
from lmtp.completions import Completions
from lmtp.protocol import Generate, RequestError, Score, Token

PROMPT = Generate(stream_id=0, prompt=[1, 2], text=True, cache_salt="s")
UNUSED: Any = None
"""A tokenizer that nothing here needs."""


def token(stream_id: int) -> Token:
    return Token(
        token=3, stream_id=stream_id, logprob=-0.5, finish_reason=None, top_logprobs={3: -0.5, 4: -0.9}, text="x"
    )


@pytest.mark.parametrize(("output", "kept"), [("text", 0), ("lmtp", 0), ("json", 3)])
def test_only_a_document_keeps_replies_until_the_end(output: str, kept: int) -> None:
    asked = Completions(PROMPT, UNUSED, output)
    assert [bool(asked.add([token(0)])) for _ in range(3)] == [output != "json"] * 3
    assert sum(map(len, asked._completed.values())) == kept


def test_a_document_with_too_many_log_probabilities_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "MAX_KEPT", 9)
    asked = Completions(PROMPT, UNUSED, "json", n=2)
    asked.add([token(0), token(1)] * 2)
    with pytest.raises(RequestError, match="more than 9 log-probabilities for one document; lower n or top_logprobs"):
        asked.add([token(0), token(1)])


def test_more_choices_than_are_compared_make_one_constrained_stream() -> None:
    several = [f"{i}" for i in range(completions.MAX_COMPARED + 1)]
    for choices, kind, count in ((several, Generate, 1), (several[1:], Score, completions.MAX_COMPARED)):
        asked = Completions(Generate(stream_id=0, prompt=[1], choices=choices), UNUSED, "json")
        assert [type(operation) for operation in asked.operations] == [kind] * count


def test_every_operation_of_a_prompt_has_its_salt() -> None:
    asked = Completions(PROMPT, UNUSED, "json", n=2, prompt_logprobs=True)
    assert [operation.cache_salt for operation in asked.operations if isinstance(operation, Generate | Score)] == [
        "s"
    ] * 3
