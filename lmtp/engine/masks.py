"""Masks: which tokens a stream may produce, as an additive bias over the vocabulary.

A bias is added to the logits in float32: 0 for an allowed token, a finite number for one made more or less likely,
negative infinity for an impossible one. Adding it is exact: an impossible token has probability 0 whatever its logit.
A stream keeps it as one bit a token and the finite numbers, since there can be thousands of streams.

``logit_bias`` and ``mask`` give a stream one bias for all its tokens. A grammar (grammar.py) allows other tokens after
each one; `Allowed` holds what the grammars of one step allow.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lmtp.protocol import FORCE, Generate, RequestError
from lmtp.runners.model import Limits

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Bias:
    """One stream's bias, packed."""

    bits: Tensor
    """uint8 ``[bytes]`` on the CPU: a bit for each token id, least significant first; 1 is possible."""
    ids: Tensor
    """The ids with a number other than 0."""
    numbers: Tensor
    """Their numbers."""
    forbids_some: bool
    """Whether any token is impossible."""

    @staticmethod
    def of(dense: Tensor) -> Bias:
        """Pack a bias ``[vocabulary]``."""
        values = dense.numpy()
        possible = ~np.isneginf(values)
        ids = np.flatnonzero(possible & (values != 0))
        bits = np.packbits(possible, bitorder="little")
        return Bias(
            torch.from_numpy(bits), torch.from_numpy(ids), torch.from_numpy(values[ids]), not bool(possible.all())
        )

    def forbids(self, token: int) -> bool:
        """Whether the token is impossible."""
        return not int(self.bits[token // 8]) >> token % 8 & 1


def stack(biases: Sequence[Bias], vocabulary: int, device: torch.device) -> Tensor:
    """The biases as float32 ``[rows, vocabulary]``."""
    stacked = _unpack(torch.stack([bias.bits for bias in biases]), vocabulary, device)
    return add_numbers(stacked, range(len(biases)), biases)


def add_numbers(logits: Tensor, rows: Iterable[int], biases: Sequence[Bias]) -> Tensor:
    """Add the biases' finite numbers to these rows of the contiguous ``logits``, in place."""
    places = torch.cat([bias.ids + row * logits.shape[-1] for row, bias in zip(rows, biases, strict=True)])
    if len(places):
        numbers = upload(torch.cat([bias.numbers for bias in biases]), logits.device)
        logits.view(-1).index_add_(0, upload(places, logits.device), numbers)
    return logits


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. The host does not wait for a GPU: the copy is from pinned memory, which
    PyTorch keeps until it is done."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def packed_bias(operation: Generate, limits: Limits) -> Bias | None:
    """`bias_of`, packed, for any thread. Raises RequestError also where ``min_tokens`` leaves nothing possible."""
    bias = bias_of(operation, limits.classes)
    if bias is None:
        return None
    packed = Bias.of(bias)
    if operation.min_tokens:
        bias[list(limits.end_of_sequence)] = -math.inf
        if np.isneginf(bias.numpy()).all():
            raise RequestError("min_tokens: the mask allows nothing but the end of the sequence.")
    return packed


def bias_of(operation: Generate, vocabulary: int) -> Tensor | None:
    """The operation's ``logit_bias`` and ``mask`` as one bias ``[vocabulary]`` on the CPU; None if it has neither.

    Raises RequestError for an id outside the vocabulary, a malformed mask, and a combination that allows nothing.
    """
    if not operation.logit_bias and operation.mask is None:
        return None
    # With numpy: PyTorch would start OpenMP threads beside those that run the model.
    bias = np.zeros(vocabulary, np.float32)
    if operation.logit_bias:
        bias += _logit_bias(operation.logit_bias, vocabulary)
    if operation.mask is not None:
        bias[~_bitset(operation.mask, vocabulary)] = -math.inf
    if np.isneginf(bias).all():
        raise RequestError("logit_bias and mask leave no token that may be generated.")
    return torch.from_numpy(bias)


def _logit_bias(logit_bias: dict[int, float], vocabulary: int) -> FloatArray:
    """LMQL's dense-or-sparse mask (see docs/protocol.md, Masks) as a bias ``[vocabulary]``."""
    ids = np.fromiter(logit_bias.keys(), dtype=np.int64, count=len(logit_bias))
    values = np.fromiter(logit_bias.values(), dtype=np.float32, count=len(logit_bias))
    if int(ids.max()) >= vocabulary:
        raise RequestError(f"logit_bias: token id {int(ids.max())} is outside the vocabulary of {vocabulary}.")
    only_forced = bool((values >= FORCE).any())
    bias = np.full(vocabulary, -math.inf if only_forced else 0.0, np.float32)
    if only_forced:
        bias[ids[values >= FORCE]] = 0.0
    else:
        bias[ids] = np.where(values <= -FORCE, -math.inf, values)
    return bias


def _bitset(mask: str, vocabulary: int) -> npt.NDArray[np.bool_]:
    """A base64 bitset, least significant bit first, as ``[vocabulary]``: true is allowed."""
    try:
        packed = np.frombuffer(base64.b64decode(mask, validate=True), dtype=np.uint8)
    except (binascii.Error, ValueError):
        raise RequestError("mask: not valid base64.") from None
    size = (vocabulary + 7) // 8
    if len(packed) != size:
        raise RequestError(f"mask: {len(packed)} bytes; a vocabulary of {vocabulary} takes {size}, a bit per token id.")
    return np.unpackbits(packed, bitorder="little")[:vocabulary].astype(bool)


@dataclass(frozen=True)
class Allowed:
    """What the grammars of a step allow.

    ``bits`` is uint8 ``[len(rows), bytes]``: a bit for each token id, least significant first. ``rows`` are the rows of
    the step's logits that it applies to.
    """

    rows: list[int]
    bits: Tensor

    def part(self, part: slice) -> Allowed | None:
        """The same for some neighbouring rows alone; None if it applies to none of them."""
        places = [place for place, row in enumerate(self.rows) if part.start <= row < part.stop]
        return Allowed([self.rows[place] - part.start for place in places], self.bits[places]) if places else None

    def apply(self, logits: Tensor) -> None:
        """Put negative infinity where a token is not allowed into the float32 logits ``[all rows, vocabulary]``."""
        bias = _unpack(self.bits, logits.shape[-1], logits.device)
        if len(self.rows) == len(logits):
            logits += bias
        else:
            logits.index_add_(0, upload(torch.tensor(self.rows), logits.device), bias)


def _unpack(bits: Tensor, vocabulary: int, device: torch.device) -> Tensor:
    """Bitsets ``[rows, bytes]`` as biases ``[rows, vocabulary]``."""
    bits = upload(bits, device)
    return functional.embedding(bits.int(), _byte_biases(device)).flatten(1)[:, :vocabulary]


def _byte_biases(device: torch.device) -> Tensor:
    """``[256, 8]``: for every byte of a bitset, the bias of its eight tokens."""
    if device not in _BYTE_BIASES:
        bits = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"))
        _BYTE_BIASES[device] = upload(torch.where(bits.bool(), 0.0, -math.inf), device)
    return _BYTE_BIASES[device]


_BYTE_BIASES: dict[torch.device, Tensor] = {}
