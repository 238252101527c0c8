"""Text to tokens through a template, tokens back to text, and stop sequences."""

from dataclasses import dataclass

import msgspec
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmtp import protocol
from lmtp.protocol import RequestError

CONTEXT_TOKENS = 8
"""How many of the prompt's last tokens the decoder reads first. They decide about a leading space and complete
characters whose bytes are spread over tokens."""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, system_prompt: str = "", template: str = ""
) -> list[int]:
    """Render and tokenize one prompt.

    A template is plain text with ``{prompt}`` and optionally ``{system_prompt}``; other braces are kept. An empty
    template selects the tokenizer's chat template. Without a chat template the system prompt and the prompt are joined
    unchanged. Raises RequestError for an empty prompt and for a template without ``{prompt}``.
    """
    if not prompt:
        raise RequestError("prompt is empty; give at least one character.")
    if template:
        if "{prompt}" not in template:
            raise RequestError("prompt_template has no {prompt}; put {prompt} where the prompt belongs.")
        parts = template.split("{prompt}")
        text = prompt.join(part.replace("{system_prompt}", system_prompt) for part in parts)
        return encode(tokenizer, text)
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages.append({"role": "user", "content": prompt})
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program and can raise anything
            raise RequestError(f"the model's chat template refused the prompt: {error}") from error
        return tokenizer.encode(str(rendered), add_special_tokens=False)
    return encode(tokenizer, f"{system_prompt}\n\n{prompt}" if system_prompt else prompt)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, begins_sequence: bool = True) -> list[int]:
    """Tokenize text. At the start of a sequence the tokenizer adds special tokens, unless the text has them already."""
    written = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    return tokenizer.encode(text, add_special_tokens=begins_sequence and not written)


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

    def add(self, token: int) -> Piece:
        """Decode one token and return the text that it completed."""
        text = self._decoder.step(self._tokenizer, token)
        if text is None:
            self._undecoded.append(token)
            return Piece("", stopped=False)
        self._undecoded.clear()
        self._held += text
        ends = [end for stop in self._stop if (end := self._held.find(stop)) >= 0]
        if ends:
            self._held = self._held[: min(ends)]
            return Piece(self._take(len(self._held)), stopped=True)
        return Piece(self._take(len(self._held) - self._possible_stop()), stopped=False)

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


def parse_stop_sequences(value: str) -> list[str] | None:
    """Parse stop sequences given as one text or as a JSON list of strings. Raises RequestError."""
    try:
        if not value.startswith("["):
            return msgspec.convert([value], protocol.Stops) if value else None
        return msgspec.json.decode(value, type=protocol.Stops) or None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        reason = str(error).replace("`", "")
        raise RequestError(f'stop_sequences must be one text or a JSON list like ["\\n", "END"]: {reason}.') from None
