"""Penalties: logits changed by the tokens that a stream has so far.

``repetition_penalty`` counts prompt and output, as in Transformers (Keskar et al. 2019); ``presence_penalty`` and
``frequency_penalty`` count the output, as in the OpenAI API. Only the tokens that occur reach the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmtp.engine.masks import upload
from lmtp.protocol import Generate


class Counts(NamedTuple):
    """Distinct tokens, and how often each is in the output; 0 where it is in the prompt only."""

    ids: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]


class Seen:
    """The tokens of one stream, counted as they come."""

    def __init__(self, operation: Generate, prompt: Sequence[int]) -> None:
        ids = np.unique(np.array(prompt if _repetition(operation) != 1.0 else [], np.int64))
        self._places = dict(zip(ids.tolist(), range(len(ids)), strict=True))
        self._ids = ids
        self._numbers = np.zeros(len(ids), np.int64)
        self._length = len(prompt)

    def counts(self, tokens: Sequence[int], ahead: Sequence[int] = ()) -> Counts:
        """The counts after ``tokens`` and then those ``ahead``, which may still change.

        ``tokens`` must be those of the previous call, possibly more. Each is looked at once.
        """
        for place in range(self._length, len(tokens)):
            self._add(tokens[place])
        self._length = len(tokens)
        size = len(self._places)
        if not ahead:
            return Counts(self._ids[:size], self._numbers[:size])
        later = np.array([token for token in ahead if token not in self._places], np.int64)
        ids = np.concatenate([self._ids[:size], np.unique(later)])
        numbers = np.concatenate([self._numbers[:size], np.zeros(len(ids) - size, np.int64)])
        new = dict(zip(ids[size:].tolist(), range(size, len(ids)), strict=True))
        for token in ahead:
            numbers[self._places.get(token, new.get(token, 0))] += 1
        return Counts(ids, numbers)

    def _add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            room = max(place, 64)
            self._ids = np.concatenate([self._ids, np.zeros(room, np.int64)])
            self._numbers = np.concatenate([self._numbers, np.zeros(room, np.int64)])
        self._ids[place] = token
        self._numbers[place] += 1


def is_penalized(operation: Generate) -> bool:
    """Whether the operation's logits depend on its tokens."""
    return bool(operation.presence_penalty or operation.frequency_penalty or _repetition(operation) != 1.0)


def _repetition(operation: Generate) -> float:
    return 1.0 if operation.repetition_penalty is None else operation.repetition_penalty


def penalize(logits: Tensor, operations: Sequence[Generate], counts: Sequence[Counts | None]) -> Tensor:
    """The logits ``[rows, vocabulary]`` after the penalties of the rows that have counts, as a new tensor."""
    penalized = [(row, operations[row], each) for row, each in enumerate(counts) if each is not None]
    sizes = [len(each.ids) for _, _, each in penalized]
    places = np.concatenate([each.ids + row * logits.shape[-1] for row, _, each in penalized])
    numbers = np.concatenate([each.numbers for _, _, each in penalized])
    settings = np.array(
        [[_repetition(o), o.presence_penalty or 0.0, o.frequency_penalty or 0.0] for _, o, _ in penalized], np.float32
    )
    repetition, presence, frequency = np.repeat(settings, sizes, axis=0).T
    factor, less = upload(
        torch.from_numpy(np.stack([repetition, presence * (numbers > 0) + frequency * numbers]).astype(np.float32)),
        logits.device,
    )
    index = upload(torch.from_numpy(places), logits.device)
    changed = logits.flatten().clone() if logits.is_contiguous() else logits.flatten()
    values = changed[index]
    changed[index] = torch.where(values < 0, values * factor, values / factor) - less
    return changed.view(logits.shape)
