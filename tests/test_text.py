"""Templates, decoding and stop sequences with the demo model's tokenizer."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lmtp.protocol import RequestError
from lmtp.text import TextDecoder, encode, parse_stop_sequences, render_prompt


@pytest.fixture(scope="module")
def tokenizer(demo_weights: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(demo_weights)
    return loaded


def pieces(tokenizer: PreTrainedTokenizerBase, text: str, stop: list[str], context: str = "") -> tuple[list[str], bool]:
    """The text that each token adds up to the stop, then the flushed rest; and whether a stop sequence was found."""
    decoder = TextDecoder(tokenizer, encode(tokenizer, context), stop)
    added = []
    for token in encode(tokenizer, text):
        piece = decoder.add(token)
        added.append(piece.text)
        if piece.stopped:
            return added, True
    return [*added, decoder.flush()], False


TEXTS = [
    "The capital of France is Paris.",
    "naïve café — “quotes”, 日本語のテキスト, Привет",
    "emoji: 👩‍👩‍👧‍👦 🏳️‍🌈 🧑🏽‍🚀 end",
    "def f(x):\n    return x\t# tab\r\n\n\n",
    "   leading and trailing   ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_joined_pieces_are_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    for stop in ([], ["never seen"], ["x" * 50]):
        joined, stopped = pieces(tokenizer, text, stop, context="Say it: ")
        assert "".join(joined) == text
        assert not stopped


def test_a_character_is_held_back_until_its_bytes_are_complete(tokenizer: PreTrainedTokenizerBase) -> None:
    added, _ = pieces(tokenizer, "🧑🏽‍🚀", [])
    assert not any("\ufffd" in piece for piece in added)
    assert "".join(added) == "🧑🏽‍🚀"


def test_incomplete_bytes_are_flushed_as_a_replacement_character(tokenizer: PreTrainedTokenizerBase) -> None:
    decoder = TextDecoder(tokenizer, [], [])
    first, *_ = encode(tokenizer, "🧑")
    assert decoder.add(first).text == ""
    assert decoder.flush() == "\ufffd"


def test_the_text_ends_before_the_first_stop_sequence_at_any_token_boundary(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    generator = random.Random(0)
    for _ in range(200):
        text = generator.choice(TEXTS)
        start = generator.randrange(len(text))
        stop = text[start : start + generator.randint(1, 6)]
        added, stopped = pieces(tokenizer, text, ["never seen", stop])
        assert "".join(added) == text[: text.index(stop)]
        assert stopped


def test_the_start_of_a_stop_sequence_is_held_back_and_released(tokenizer: PreTrainedTokenizerBase) -> None:
    decoder = TextDecoder(tokenizer, [], ["\n\nEND"])
    shown = "".join(decoder.add(token).text for token in encode(tokenizer, "one\n\n"))
    assert shown == "one"
    assert "".join(decoder.add(token).text for token in encode(tokenizer, "two")) == "\n\ntwo"


def test_special_tokens_add_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    decoder = TextDecoder(tokenizer, [], [])
    assert tokenizer.eos_token_id is not None
    assert decoder.add(tokenizer.eos_token_id).text + decoder.flush() == ""


def test_a_prompt_is_rendered_with_the_models_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.decode(render_prompt(tokenizer, "Hello {you}", "Be kind."))
    assert (
        text
        == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello {you}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_prompt_is_rendered_with_a_given_template(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = render_prompt(tokenizer, "Hello {system_prompt}", "Be kind.", "[{system_prompt}] {json} {prompt}!")
    assert tokenizer.decode(ids) == "[Be kind.] {json} Hello {system_prompt}!"
    with pytest.raises(RequestError, match=r"no \{prompt\}"):
        render_prompt(tokenizer, "Hello", "", "Hello")


def test_an_empty_prompt_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        render_prompt(tokenizer, "")


def test_stop_sequences_are_one_text_or_a_json_list() -> None:
    assert parse_stop_sequences("") is None
    assert parse_stop_sequences("\n") == ["\n"]
    assert parse_stop_sequences('["a", "b"]') == ["a", "b"]
    with pytest.raises(RequestError, match="stop_sequences must be one text or a JSON list"):
        parse_stop_sequences("[1]")
