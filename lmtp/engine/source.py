"""A constraint's source: its field and text, as llguidance's grammar, and llguidance's errors in one sentence.

The worker process of vetting.py imports this: nothing here may import torch.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from lmtp.engine import schema
from lmtp.engine.pattern import check_pattern
from lmtp.protocol import Generate, RequestError, constraint_of

MAX_SOURCE = {"choices": 2**22, "regex": 2**20, "json_schema": 2**20, "grammar": 2**16}
"""Characters of one constraint. The rules of a ``grammar`` can be chained."""

MAX_QUOTED = 400
"""Characters of an error message."""

MAX_STATES = 150_000
"""States of one constraint's lexer, which grows while streams follow it: 150,000 were measured to take 36 to 66 MB. A
string with a large ``maxLength`` takes about 20 states a token."""

PREDICTION_STATES = 1_200_000
"""States of the lexers of all constraints of one prediction; `MAX_STATES` if several have so many already."""

MAX_ITEMS = 20_000
"""llguidance's items of a row. An optional property takes four."""

CHOICES_LIMITS = LLParserLimits(verbose_errors=False, initial_lexer_fuel=40_000_000)
"""100,000 choices take a twentieth of the fuel."""


class Source(NamedTuple):
    """A constraint's field and its text."""

    field: str
    text: str
    space: str = ""
    """What may come before a text that ``choices`` or ``regex`` constrain; see `leading_space`."""
    states: int = MAX_STATES
    """The most states of its lexer. It does not apply to ``choices``: few of theirs are ever reached."""


def states_of(constraints: int, total: int) -> int:
    """The most states for each of a prediction's constraints: equal shares of ``total``, in steps so that predictions
    with about as many constraints can use the same compiled ones."""
    share = MAX_STATES
    while share * constraints > total:
        share //= 2
    return share


def leading_space(tokenizer: str) -> str:
    """The space that this fast tokenizer, given as JSON, puts before a text's first word and drops when it decodes, or
    nothing. Without it a text that begins with a constraint would have to begin in the middle of a word."""
    decoder = msgspec.json.decode(tokenizer).get("decoder") or {}
    return " " if decoder.get("type") == "Metaspace" and decoder.get("prepend_scheme") != "never" else ""


def source_of(operation: Generate, space: str = "") -> Source | None:
    """The operation's constraint. Raises RequestError for an empty or too long one, and for more than one."""
    field = constraint_of(operation)
    if field is None:
        return None
    value = getattr(operation, field)
    if value == []:
        raise RequestError("choices is empty; give at least one text.")
    if value is False:
        raise RequestError("json_schema: false allows nothing; give an object, or true for any JSON.")
    try:
        text = value if isinstance(value, str) else msgspec.json.encode({} if value is True else value).decode()
    except RecursionError:
        raise RequestError(f"{field}: nested too deeply.") from None
    if len(text) > MAX_SOURCE[field]:
        raise RequestError(f"{field} has {len(text)} characters; {MAX_SOURCE[field]} is the most.")
    return Source(field, text, space)


def compile_source(source: Source, tokenizer: LLTokenizer) -> LLMatcher:
    """Compile a constraint. Raises RequestError for one that cannot be used."""
    field = source.field
    try:
        limits = CHOICES_LIMITS
        if field != "choices":
            limits = LLParserLimits(verbose_errors=False, max_items_in_row=MAX_ITEMS, max_lexer_states=source.states)
        matcher = LLMatcher(tokenizer, _grammar(source), log_level=0, limits=limits)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{field}: {explain(str(error))}.") from error
    allowed = b"" if matcher.is_error() else matcher.compute_bitmask()  # an expensive grammar shows in its first mask
    if matcher.is_error():
        raise RequestError(f"{field}: {explain(matcher.get_error())}.")
    if not any(allowed):
        raise RequestError(f"{field}: no text can satisfy it.")
    return matcher


def _grammar(source: Source) -> str:
    """The constraint in llguidance's own form."""
    field, text, space, _ = source
    if field == "choices":
        return LLMatcher.grammar_from_lark(_one_of(json.loads(text), space))
    if field == "regex":
        check_pattern(text, field)
        return LLMatcher.grammar_from_regex(f"{space}?(?:{text})" if space else text)
    if field == "json_schema":
        prepared, style = schema.prepare(text)
        return LLMatcher.grammar_from_json_schema(prepared, defaults=style)
    return LLMatcher.grammar_from_lark(_checked(text if is_lark_syntax(text) else _lark(text)))


def _checked(lark: str) -> str:
    """The Lark grammar with checked patterns, and special tokens by the names that `hide_special_tokens` gives them."""

    def written(part: re.Match[str]) -> str:
        if part["pattern"]:
            check_pattern(part["pattern"], "grammar")
        return f"{part[0][:-1]}{_MARK}>" if part["special"] else part[0]

    return _LARK_PART.sub(written, lark)


def hide_special_tokens(tokenizer: str) -> str:
    """The JSON of a fast tokenizer, with names for its special tokens that no text spells.

    llguidance tokenizes forced text as a prompt, with special tokens, which its grammars then refuse.
    """
    read = msgspec.json.decode(tokenizer)
    names = {
        token["content"]: f"{token['content'][:-1]}{_MARK}{token['content'][-1:]}"
        for token in read["added_tokens"]
        if token["special"]
    }
    for token in read["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = read["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): token for name, token in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    decoder = read.get("decoder") or {}
    if decoder.get("type") == "Metaspace":  # T5's way; llguidance knows Llama's way to say the same
        space = {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
        read["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return msgspec.json.encode(read).decode()


def _one_of(options: list[str], space: str) -> str:
    """Lark that matches one of the options, or one after the space. As one terminal there can be any number of them."""
    # DEL is the one character that JSON leaves unescaped and the grammar's lexer does not accept.
    given = [json.dumps(option, ensure_ascii=False).replace("\x7f", "\\u007f") for option in dict.fromkeys(options)]
    before = f"{json.dumps(space)}? " if space else ""
    return f"start: CHOICE\nCHOICE: {before}({' | '.join(given)})"


_MARK = "\ue000"
_LARK_PART = re.compile(
    r""""(?:\\.|[^"\\])*"|//[^\n]*|#[^\n]*|/(?P<pattern>(?:\\.|[^/\\\n])+)/|(?P<special><[^<>\s\[\]"/]+>)"""
)
_GBNF_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def _lark(gbnf: str) -> str:
    try:
        return gbnf_to_lark(_GBNF_ESCAPE.sub(_written_out, gbnf))
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(
            f"grammar: Failed to convert the grammar from GBNF to Lark: {one_line(str(error))}."
        ) from error


def _written_out(escape: re.Match[str]) -> str:
    """A character in place of its GBNF escape, which gbnf_to_lark translates wrongly."""
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise RequestError(f"grammar: {escape[0]} is not a character.")
    return f"\\x{code:02x}" if code < 0x80 else chr(code)


_REGEX_ERROR = re.compile(r"regex parse error:\n    (.*)\n    ( *)(\^+)\s*\nerror: (.*)")
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)")
_STATES = re.compile(r"too many states: (\d+)")
_LONG_NAME = re.compile(r"(\w{60})\w+")
_KEYWORDS = re.compile(r"Unimplemented keys: \[(.*)\]")


def explain(error: str) -> str:
    """llguidance's message as one line that quotes what is wrong."""
    if "panic" in error:  # with paths of the machine that built llguidance
        return "too large or complex to compile"
    if found := _REGEX_ERROR.search(error):
        pattern, before, carets, reason = found.groups()
        start = len(before)
        part, around = pattern[start : start + len(carets)], pattern[max(start - 40, 0) : start + len(carets) + 40]
        return _cut(f"{reason}: {part!r} in {around!r}")
    if found := _STATES.search(error):
        more = ", and more where a prediction has fewer constraints or fewer predictions run"
        return f"its lexer has too many states; {found[1]} are the most{more if int(found[1]) < MAX_STATES else ''}"
    if found := _KEYWORDS.search(error):
        return one_line(f"unsupported keywords: {found[1]}")
    if found := _PLACE.match(error):
        line, column, reason = found.groups()
        written = re.search(rf"^ *{line} \| (.*)$", error, re.MULTILINE)
        return one_line(
            f"{reason} at line {line}, column {column}" + (f" of {written[1].strip()!r}" if written else "")
        )
    return "no text can satisfy it" if "NoExtension" in error else one_line(error)


def one_line(error: str) -> str:
    """The message on one line, cut if it is long, and so are names in it."""
    return _cut(_LONG_NAME.sub(r"\1…", error))


def _cut(error: str) -> str:
    line = " ".join(error.replace("<non-verbose/>", "").split()).rstrip(".")
    return line if len(line) <= MAX_QUOTED else f"{line[:MAX_QUOTED]} …"
