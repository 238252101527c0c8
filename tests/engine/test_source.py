"""Special tokens of any tokenizer are out of the reach of text, and llguidance's errors are one sentence."""

import json

import pytest
from llguidance import LLTokenizer
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, Unigram, WordLevel

from lmtp.engine.source import explain, hide_special_tokens

LETTERS = ["<unk>", "</s>", *"</unks>"]
PIECES = {piece: i for i, piece in enumerate(dict.fromkeys(LETTERS))}


@pytest.mark.parametrize(
    "model",
    [
        WordLevel(PIECES, unk_token="<unk>"),
        BPE(PIECES, [], unk_token="<unk>"),
        Unigram([(piece, -1.0) for piece in PIECES], unk_id=0),
    ],
)
def test_special_tokens_keep_their_ids_and_no_text_spells_them(model: WordLevel | BPE | Unigram) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "</s>", "<added>"])
    assert tokenizer.encode("</s>").ids == [1]
    hidden = hide_special_tokens(tokenizer.to_str())
    read = Tokenizer.from_str(hidden)
    assert {token.content[:-2] for token in read.get_added_tokens_decoder().values()} == {"<unk", "</s", "<added"}
    assert sorted(read.get_added_tokens_decoder()) == sorted(tokenizer.get_added_tokens_decoder())
    assert read.get_vocab_size() == tokenizer.get_vocab_size()
    assert 1 not in read.encode("</s>").ids
    assert LLTokenizer(hidden, eos_token=1).is_special_token(1)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("panic: assertion failed at /build/x.rs <backtrace> 0: ...", "too large or complex to compile"),
        ('Unimplemented keys: ["if", "then"]', 'unsupported keywords: "if", "then"'),
        ("Failed <non-verbose/>\n  at   two lines.", "Failed at two lines"),
        ("x " * 250, "x " * 200 + " …"),
        ("unknown name: " + "x" * 500 + " here", "unknown name: " + "x" * 60 + "… here"),
        (json.dumps("NoExtension"), "no text can satisfy it"),
    ],
)
def test_an_error_is_one_sentence(error: str, sentence: str) -> None:
    assert explain(error) == sentence
