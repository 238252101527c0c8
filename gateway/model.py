"""What the gateway knows about the served model: its names, its limits, and what its tokens spell."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Struct

from gateway import replies
from gateway.target import Target, TargetError, failed

log = logging.getLogger(__name__)


class _Info(Struct):
    """The fields of MODEL_INFO that are used here."""

    model: str
    context: int
    end_of_sequence: list[int]
    adapters: list[str] = []
    generation_defaults: dict[str, Any] = {}
    tokens: list[str | list[int]] | None = None
    kind: str = ""
    longest_source: int = 0


@dataclass(frozen=True)
class Model:
    """The answer to MODEL_INFO."""

    name: str
    adapters: tuple[str, ...]
    context: int
    end_of_sequence: frozenset[int]
    defaults: dict[str, Any]
    """What its generation_config.json sets for prompts."""
    spellings: list[str | list[int]] | None
    """Each token's text, or its bytes if they are no whole characters. None if the container does not tell."""
    scores_prompts: bool
    """Whether it has log-probabilities for a prompt: it does not encode the prompt."""

    def text(self, token: int) -> str:
        """A token's text; bytes that are no characters are escaped, as OpenAI does."""
        spelt = self._spelt(token)
        return spelt if isinstance(spelt, str) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)

    def bytes(self, token: int) -> list[int] | None:
        """A token's UTF-8 bytes, if they are known."""
        if self.spellings is None:
            return None
        spelt = self._spelt(token)
        return list(spelt.encode()) if isinstance(spelt, str) else spelt

    def _spelt(self, token: int) -> str | list[int]:
        known = self.spellings is not None and 0 <= token < len(self.spellings)
        return self.spellings[token] if known and self.spellings else f"token_id:{token}"


class Models:
    """The target's model, asked for once, when it is first needed."""

    def __init__(self, target: Target, name: str = "") -> None:
        """``name``: what clients call the model; by default what the target calls it."""
        self._target = target
        self._name = name
        self._asking = asyncio.Lock()
        self._model: Model | None = None

    async def get(self) -> Model:
        """The model. Raises TargetError."""
        async with self._asking:
            if self._model is None:
                self._model = await self._ask()
            return self._model

    async def _ask(self) -> Model:
        try:
            info = await self._info('"tokens":true')
        except TargetError as error:
            if error.status != 400:
                raise
            # An older container, or a tokenizer that cannot be spelt.
            log.warning("The target does not spell its tokens, so clients see token_id:N for some: %s", error)
            info = await self._info('"data":null')
        return Model(
            name=self._name or _name(info.model),
            adapters=tuple(info.adapters),
            context=info.context,
            end_of_sequence=frozenset(info.end_of_sequence),
            defaults=info.generation_defaults,
            spellings=info.tokens,
            scores_prompts=not info.kind and not info.longest_source,
        )

    async def _info(self, field: str) -> _Info:
        batch = f'[["MODEL_INFO",{{"stream_id":0,{field}}}]]'
        async with self._target.predict({"ops_batch_json": batch}) as running:
            async for lines in replies.lines(running.chunks):
                for reply in replies.parse(lines):
                    if reply.error is not None:
                        raise failed(reply.error)
                    if reply.model_info is not None:
                        return self._read(reply.model_info)
        raise TargetError(502, f"The target {self._target.name} does not describe its model.")

    def _read(self, info: dict[str, Any]) -> _Info:
        try:
            return msgspec.convert(info, _Info)
        except msgspec.ValidationError as error:
            reason = str(error).replace("`", "")
            raise TargetError(502, f"The target {self._target.name} describes its model wrongly: {reason}.") from None


def _name(model: str) -> str:
    """A repository's name, or the last part of a directory's."""
    return model.rstrip("/").rpartition("/")[2] if model.startswith("/") else model
