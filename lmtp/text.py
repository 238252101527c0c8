"""Text to tokens through a template, tokens back to text, and stop sequences.

A caller's text is text: where it spells a special token, such as ``<|im_end|>``, it is cut inside that spelling, and
the parts are tokenized one after the other. The special tokens of a template stay what they are.
"""

import asyncio
import copy
import functools
import itertools
import queue
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import msgspec
from tokenizers import Encoding
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmtp import protocol
from lmtp.protocol import MANY_BYTES, RequestError

CONTEXT_TOKENS = 8
"""How many of the prompt's last tokens the decoder reads first. They decide about a leading space and complete
characters whose bytes are spread over tokens."""

BYTES_PER_TOKEN = 16
"""A longer text, for each token of the context, is refused before it is tokenized."""

SHORT = 2**12
"""Characters of a text that does not wait for longer ones."""

AGE = 2**10
"""Characters for which a text lets one later text go first."""

P = ParamSpec("P")
T = TypeVar("T")


class CallQueue:
    """Threads that run calls in order of arrival, but for their lengths: a call lets one later call go first for each
    ``AGE`` characters that it reads."""

    def __init__(self, name: str, threads: int) -> None:
        self._arrivals = itertools.count()
        self._calls = queue.PriorityQueue[tuple[int, int, Callable[[], None]]]()
        for _ in range(threads):
            threading.Thread(target=self._serve, name=name, daemon=True).start()

    async def run(self, length: int, call: Callable[[], T]) -> T:
        """Wait for what the call returns. ``length``: characters of what it reads.

        A native panic, which is no Exception, is raised as RuntimeError.
        """
        future: Future[T] = Future()
        calls = [call]  # emptied when nobody waits any more: what it reads would stay in memory until its turn
        del call

        def answer() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(calls.pop()())
                except Exception as error:
                    future.set_exception(error)
                except BaseException as error:
                    future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))

        arrival = next(self._arrivals)
        self._calls.put((arrival + length // AGE, arrival, answer))
        try:
            return await asyncio.wrap_future(future)
        finally:
            calls.clear()

    def _serve(self) -> None:
        while True:
            self._calls.get()[2]()


class Tokenizers:
    """The tokenizer, on threads of its own: a long text takes a second, and no other prediction may wait for it.

    One thread is for short texts alone. A tokenizer is not thread-safe, so every thread but the first has a copy.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, threads: int, max_bytes: int, mask: str | None = None
    ) -> None:
        """``max_bytes``: the UTF-8 bytes of the longest text, a prompt's parts counted together; 0 is no limit.
        ``mask``: the special token that is itself wherever a prompt spells it."""
        self._mask = mask
        self._max_bytes = max_bytes
        self._original = tokenizer
        self._unused = queue.SimpleQueue[PreTrainedTokenizerBase]()
        self._unused.put(tokenizer)
        self._local = threading.local()
        self._long = CallQueue("tokenize", max(threads - 1, 1))
        self._short = CallQueue("tokenize-short", 1) if threads > 1 else self._long

    @property
    def _own(self) -> PreTrainedTokenizerBase:
        """The tokenizer of this thread."""
        if not hasattr(self._local, "tokenizer"):
            try:
                self._local.tokenizer = self._unused.get_nowait()
            except queue.Empty:
                self._local.tokenizer = copy.deepcopy(self._original)
        own: PreTrainedTokenizerBase = self._local.tokenizer
        return own

    async def render(
        self, prompt: str, system_prompt: str = "", template: str = "", allow_special_tokens: bool = False
    ) -> list[int]:
        """`render_prompt` for a prompt of any size. Raises RequestError."""
        prompts, system_prompts = template.count("{prompt}"), template.count("{system_prompt}")
        self.check("prompt", template, *[prompt] * max(prompts, 1), *[system_prompt] * max(system_prompts, 1))
        length = max(prompts, 1) * len(prompt) + max(system_prompts, 1) * len(system_prompt) + len(template)
        return await self._run(length, render_prompt, prompt, system_prompt, template, allow_special_tokens, self._mask)

    async def converse(
        self, messages: str, system_prompt: str = "", template: str = "", allow_special_tokens: bool = False
    ) -> list[int]:
        """`render_messages` for the JSON of messages of any size. Raises RequestError."""
        if system_prompt or template:
            raise RequestError(
                "messages: system_prompt and prompt_template go with prompt; make the system prompt the first message."
            )
        most = self._max_bytes * 6  # what JSON makes of a character at most
        if most and len(messages) > most:
            raise RequestError(f"messages is {len(messages)} bytes of JSON; {most} is the limit of this model.")
        conversation = await self.parse(len(messages), parse_messages, messages)
        self.check("messages", *(text for message in conversation for text in message.values()))
        return await self._run(len(messages), render_messages, conversation, allow_special_tokens, self._mask)

    async def encode(
        self,
        field: str,
        text: str,
        begins_sequence: bool = True,
        allow_special_tokens: bool = False,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """`encode` for a text of any size. Raises RequestError, naming the field."""
        self.check(field, text)
        mask = self._mask if begins_sequence else None
        return await self._run(len(text), encode, text, begins_sequence, allow_special_tokens, mask, add_special_tokens)

    async def parse(self, length: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that reads ``length`` characters, here or on one of the threads."""
        if length <= MANY_BYTES:
            return function(*args, **kwargs)
        return await self._long.run(length, functools.partial(function, *args, **kwargs))

    def check(self, field: str, *texts: str) -> None:
        """Raise RequestError if the texts together are too long to tokenize, or no text."""
        size, most = sum(map(len, texts)), self._max_bytes or sys.maxsize
        if size <= most:
            try:
                size = sum(len(text.encode()) for text in texts)
            except UnicodeEncodeError as error:
                raise RequestError(f"{field}: character {error.start} is a lone surrogate, no character.") from None
        if size > most:
            raise RequestError(f"{field} is {size} bytes of text; {most} is the limit of this model.")

    async def _run(
        self,
        length: int,
        function: Callable[Concatenate[PreTrainedTokenizerBase, P], list[int]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[int]:
        def call() -> list[int]:
            return function(self._own, *args, **kwargs)

        return await (self._short if length <= SHORT else self._long).run(length, call)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    system_prompt: str = "",
    template: str = "",
    allow_special_tokens: bool = False,
    mask: str | None = None,
) -> list[int]:
    """Render and tokenize one prompt.

    A template is plain text with ``{prompt}`` and optionally ``{system_prompt}``; other braces are kept. An empty
    template selects the tokenizer's chat template. Without a chat template the system prompt and the prompt are joined
    unchanged. Special tokens in the prompts are text unless allowed, except for ``mask``. Raises RequestError for an
    empty prompt and for a template without ``{prompt}``.
    """
    if not prompt:
        raise RequestError("prompt is empty; give at least one character.")
    cut = _unused(prompt, system_prompt, template)
    if not allow_special_tokens:
        prompt, system_prompt = (_cut(tokenizer, text, cut, mask) for text in (prompt, system_prompt))
    if template:
        if "{prompt}" not in template:
            raise RequestError("prompt_template has no {prompt}; put {prompt} where the prompt belongs.")
        parts = template.split("{prompt}")
        return _encode(tokenizer, prompt.join(part.replace("{system_prompt}", system_prompt) for part in parts), cut)
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return _apply_chat_template(tokenizer, [*messages, {"role": "user", "content": prompt}], cut, "prompt")
    return _encode(tokenizer, f"{system_prompt}\n\n{prompt}" if system_prompt else prompt, cut)


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    content: str | list[_Part]
    name: str | None = None


_MESSAGES = Annotated[list[_Message], msgspec.Meta(min_length=1, max_length=10_000)]


def parse_messages(value: str) -> list[dict[str, str]]:
    """Parse a conversation given as a JSON list of objects with role and content, as OpenAI's clients write it. The
    content is text, or a list of parts that are text. Raises RequestError."""
    expected = 'messages must be a JSON list like [{"role": "user", "content": "Hello"}]'
    messages: list[_Message] = protocol.parse_json(value, _MESSAGES, expected)
    conversation = []
    for message in messages:
        parts = message.content if isinstance(message.content, list) else [message]
        content = "".join(part.text if isinstance(part, _Part) else str(part.content) for part in parts)
        name = {"name": message.name} if message.name else {}
        conversation.append({"role": message.role, "content": content, **name})
    return conversation


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    allow_special_tokens: bool = False,
    mask: str | None = None,
) -> list[int]:
    """Render and tokenize a conversation with the chat template, up to where the answer begins.

    Special tokens in the messages are text unless allowed, except for ``mask``. Raises RequestError for a model without
    a chat template, and for what its template refuses.
    """
    if not tokenizer.chat_template:
        raise RequestError("messages: this model has no chat template; give prompt.")
    cut = _unused(*(text for message in messages for text in message.values()))
    if not allow_special_tokens:
        messages = [
            {field: _cut(tokenizer, text, cut, mask) for field, text in message.items()} for message in messages
        ]
    return _apply_chat_template(tokenizer, messages, cut, "messages")


def _apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], cut: str, field: str
) -> list[int]:
    try:
        rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program and can raise anything
        raise RequestError(f"the model's chat template refused the {field}: {error}") from error
    return _encode(tokenizer, str(rendered), cut, begins_sequence=False)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    begins_sequence: bool = True,
    allow_special_tokens: bool = False,
    mask: str | None = None,
    add_special_tokens: bool = True,
) -> list[int]:
    """Tokenize text, either as the start of a sequence or as what goes on with one.

    At the start the tokenizer adds special tokens, unless the text has them already or ``add_special_tokens`` is false.
    Special tokens in the text itself are text unless allowed, except for ``mask``.
    """
    cut = _unused(text)
    if not allow_special_tokens:
        text = _cut(tokenizer, text, cut, mask)
    if begins_sequence:
        return _encode(tokenizer, text, cut, add_special_tokens)
    return list(itertools.chain.from_iterable(_continue(tokenizer, text.split(cut))))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, cut: str, begins_sequence: bool = True) -> list[int]:
    """Tokenize text, the parts between cuts by themselves."""
    first, *others = text.split(cut)
    written = bool(tokenizer.bos_token) and first.startswith(str(tokenizer.bos_token))
    ids: list[int] = tokenizer.encode(first, add_special_tokens=begins_sequence and not written)
    if not others:
        return ids
    plain = tokenizer.encode(first, add_special_tokens=False)
    begin = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0)
    following = itertools.chain.from_iterable(_continue(tokenizer, others))
    return [*ids[: begin + len(plain)], *following, *ids[begin + len(plain) :]]


def _continue(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterable[list[int]]:
    """Tokenize what goes on in the middle of a text: many tokenizers put a space in front of the first word."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    once = list(dict.fromkeys(texts))
    encodings = tokenizer.backend_tokenizer.encode_batch([f"\n{text}" for text in once], add_special_tokens=False)
    ids = dict(zip(once, map(functools.partial(_after_line_end, tokenizer), once, encodings), strict=True))
    return [ids[text] for text in texts]


def _after_line_end(tokenizer: PreTrainedTokenizerFast, text: str, encoding: Encoding) -> list[int]:
    """The ids of a text, of its encoding after a line end; tokenized by itself if the line end is not a token."""
    after = [i for i, (start, end) in enumerate(encoding.offsets) if start >= 1 and end > start]
    if after and all(end <= 1 for _, end in encoding.offsets[: after[0]]):
        return list(encoding.ids[after[0] :])
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _unused(*texts: str) -> str:
    """A mark that none of the texts holds. It is random, so that no caller can know it."""
    mark = f"\ue000{secrets.token_hex(8)}\ue000"
    return mark if not any(mark in text for text in texts) else _unused(*texts)


class _Spellings(NamedTuple):
    """How a tokenizer's special tokens are spelt."""

    all: frozenset[str]
    lengths: dict[str, list[int]]
    """Their lengths by their first two characters."""
    begin: re.Pattern[str]
    """Finds two first characters."""
    normalized: bool
    """Whether the tokenizer finds any of them in normalized text, too."""


@functools.lru_cache(maxsize=16)
def _spellings(tokenizer: PreTrainedTokenizerBase) -> _Spellings | None:
    """The special tokens, and added tokens that may act as such: in brackets, or part of the chat template. Other added
    tokens are words and runs of spaces."""
    template = str(tokenizer.chat_template or "")
    tokens = [
        token
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content) > 1
        and (
            token.special
            or _BRACKETED.fullmatch(token.content)
            or (token.content.strip() and token.content in template)
        )
    ]
    if not tokens:
        return None
    lengths: dict[str, list[int]] = {}
    for token in sorted(tokens, key=lambda token: len(token.content)):
        known = lengths.setdefault(token.content[:2], [])
        if len(token.content) not in known:
            known.append(len(token.content))
    begin = re.compile(f"(?={'|'.join(map(re.escape, lengths))})")
    return _Spellings(frozenset(t.content for t in tokens), lengths, begin, any(t.normalized for t in tokens))


_BRACKETED = re.compile(r"<\S+>|\[[^\s\]]+\]", re.DOTALL)


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, cut: str, mask: str | None) -> str:
    """The text with a cut after the first character of every special token that it spells, ``mask`` excepted."""
    spellings = _spellings(tokenizer)
    if spellings is None:
        return text
    places = list(_places(text, spellings, mask))
    if (
        spellings.normalized
        and isinstance(tokenizer, PreTrainedTokenizerFast)
        and tokenizer.backend_tokenizer.normalizer
    ):
        normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        if len(normal_places := list(_places(normal, spellings, mask))) > len(places):
            text, places = normal, normal_places
    edges = [0, *(place + 1 for place in places), len(text)]
    return cut.join(text[start:end] for start, end in itertools.pairwise(edges))


def _places(text: str, spellings: _Spellings, mask: str | None) -> Iterable[int]:
    for found in spellings.begin.finditer(text):
        place = found.start()
        spelt = (text[place : place + n] for n in spellings.lengths[text[place : place + 2]])
        if any(token in spellings.all and token != mask for token in spelt):
            yield place


@dataclass(frozen=True)
class Piece:
    """The text that one token added to a stream; ``stopped`` if it completed a stop sequence."""

    text: str
    stopped: bool


class TextDecoder:
    """Decodes a stream's tokens incrementally and finds stop sequences.

    The joined pieces are the stream's text up to the stop sequence, which is not included. Characters are held back
    while their bytes are incomplete and while they may begin a stop sequence. Special tokens add nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: list[int], stop: list[str]) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise RequestError("text, stop and prompts need a fast tokenizer; this model has none.")
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(ids=context[-CONTEXT_TOKENS:], skip_special_tokens=True)
        self._undecoded: list[int] = []
        self._stop = stop
        self._held = ""

    def add(self, token: int, may_stop: bool = True) -> Piece:
        """Decode one token and return the text that it completed.

        Unless it ``may_stop``, a stop sequence that is complete by now is text like any other.
        """
        text = self._decoder.step(self._tokenizer, token)
        if text is None:
            self._undecoded.append(token)
            return Piece("", stopped=False)
        self._undecoded.clear()
        self._held += text
        found = [stop for stop in self._stop if stop in self._held]
        if found and may_stop:
            self._held = self._held[: min(map(self._held.find, found))]
            return Piece(self._take(len(self._held)), stopped=True)
        passed = self._take(max((self._held.rfind(stop) + len(stop) for stop in found), default=0))
        return Piece(passed + self._take(len(self._held) - self._possible_stop()), stopped=False)

    def flush(self) -> str:
        """Return the text still held back. Call it after the last token."""
        rest = self._tokenizer.decode(self._undecoded, skip_special_tokens=True) if self._undecoded else ""
        self._undecoded.clear()
        return self._take(len(self._held)) + rest

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _possible_stop(self) -> int:
        """How many of the last held characters may begin a stop sequence.

        What cannot is sent, so every character is compared with every sequence once, and not again.
        """
        for start in range(len(self._held)):
            rest = self._held[start:]
            if any(stop.startswith(rest) for stop in self._stop):
                return len(rest)
        return 0
