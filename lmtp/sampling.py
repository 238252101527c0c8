"""Logits into tokens: one batched pass gives the chosen token, its log-probability and the most likely ones.

Log-probabilities are natural logarithms of the softmax over the biased logits in float32, before temperature, penalties
and filters, so they mean the same for every sampling setting. Only these few numbers leave the device.

A draw is an inverse-CDF lookup with one uniform number from the stream's own generator, over the tokens in id order:
it depends on nothing else in the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lmtp.protocol import Generate, finite

GREEDY_BELOW = 1e-5
"""A temperature under this is greedy: dividing by it would overflow float32."""

BLOCK = 256
"""Vocabulary ids summed together in the first of the two levels of a draw."""

NUCLEUS = 1024
"""How many of the most likely tokens are sorted to find a top-p nucleus before the whole vocabulary is."""


@dataclass(frozen=True)
class Choice:
    """One token with its log-probability, and the most likely tokens with theirs, most likely first."""

    token: int
    logprob: float
    top: dict[int, float]


class Row(Protocol):
    """What sampling reads of a stream."""

    @property
    def operation(self) -> Generate:
        """The settings."""

    @property
    def bias(self) -> Tensor | None:
        """What is added to its logits, float32 ``[vocabulary]``; see constraints.py."""

    @property
    def forbidden_now(self) -> Sequence[int]:
        """The ids impossible for this token only."""

    @property
    def tokens(self) -> list[int]:
        """Prompt and output so far."""

    @property
    def prompt_length(self) -> int:
        """How many of the tokens are the prompt's."""

    def draw(self) -> float:
        """The stream's next uniform number in [0, 1)."""


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """The next token of each row from its logits ``[rows, vocabulary]``, of any float dtype.

    Raises FloatingPointError where the logits of a row are not numbers.
    """
    logits = _biased(logits.float(), rows)
    chosen = logits.argmax(-1)
    normalizer = torch.logsumexp(logits, -1)
    if not torch.isfinite(normalizer).all():
        raise FloatingPointError("the model produced logits that are not finite numbers")
    drawn = [i for i, row in enumerate(rows) if _needs_own_logits(row.operation)]
    if drawn:
        some = [rows[i] for i in drawn]
        index = torch.tensor(drawn, device=logits.device)
        chosen[index] = _draw(_penalized(logits[index], some), some)
    return _report(logits, normalizer, chosen, [row.operation.top_logprobs for row in rows])


def score(logits: Tensor, targets: Sequence[int], top: Sequence[int]) -> list[Choice]:
    """Each row's target with its log-probability under the logits ``[rows, vocabulary]``, and ``top[row]`` more."""
    logits = logits.float()
    chosen = torch.tensor(targets, device=logits.device)
    return _report(logits, torch.logsumexp(logits, -1), chosen, top)


def _report(logits: Tensor, normalizer: Tensor, chosen: Tensor, top: Sequence[int]) -> list[Choice]:
    logprobs = (logits.gather(-1, chosen[:, None])[:, 0] - normalizer).tolist()
    tokens = chosen.tolist()
    most = min(max(top), logits.shape[-1])
    if most == 0:
        return [Choice(t, finite(p), {t: finite(p)}) for t, p in zip(tokens, logprobs, strict=True)]
    if most == 1:
        values, ids = logits.max(-1, keepdim=True)
    else:
        values, ids = logits.topk(most, -1)
    top_logprobs, top_ids = (values - normalizer[:, None]).tolist(), ids.tolist()
    choices = []
    for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        likely = zip(top_ids[i][: top[i]], top_logprobs[i], strict=False)
        entries = {t: finite(p) for t, p in likely if p != -math.inf}
        entries.setdefault(token, finite(logprob))
        choices.append(Choice(token, finite(logprob), entries))
    return choices


def _biased(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    biased = [i for i, row in enumerate(rows) if row.bias is not None]
    if biased:
        bias = torch.stack([row.bias for row in rows if row.bias is not None]).to(logits.device)
        if len(biased) == len(rows):
            logits = logits + bias
        else:
            logits = logits.index_add(0, torch.tensor(biased, device=logits.device), bias)
    for i, row in enumerate(rows):
        if row.forbidden_now:
            logits[i, list(row.forbidden_now)] = -math.inf
    return logits


def _needs_own_logits(operation: Generate) -> bool:
    """Whether the token is not simply the most likely one."""
    return operation.temperature >= GREEDY_BELOW or _is_penalized(operation)


def _is_penalized(operation: Generate) -> bool:
    return bool(
        operation.presence_penalty or operation.frequency_penalty or operation.repetition_penalty not in (None, 1.0)
    )


def _penalized(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Repetition penalty over prompt and output as in Transformers (Keskar et al. 2019); presence and frequency
    penalties over the output as in the OpenAI API."""
    for i, row in enumerate(rows):
        operation = row.operation
        if not _is_penalized(operation):
            continue
        penalty = operation.repetition_penalty or 1.0
        if penalty != 1.0:
            seen = torch.tensor(row.tokens, device=logits.device).unique()
            values = logits[i, seen]
            logits[i, seen] = torch.where(values < 0, values * penalty, values / penalty)
        output = row.tokens[row.prompt_length :]
        if output and (operation.presence_penalty or operation.frequency_penalty):
            seen, counts = torch.tensor(output, device=logits.device).unique(return_counts=True)
            logits[i, seen] -= (operation.presence_penalty or 0.0) + (operation.frequency_penalty or 0.0) * counts
    return logits


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The token of each row: drawn at its temperature among those its filters keep, or the best where it is greedy."""
    temperatures = [row.operation.temperature for row in rows]
    greedy = [t < GREEDY_BELOW for t in temperatures]
    if all(greedy):
        return logits.argmax(-1)
    scale = torch.tensor([1.0 if g else t for g, t in zip(greedy, temperatures, strict=True)], device=logits.device)
    logits = logits / scale[:, None]
    logits = logits - logits.amax(-1, keepdim=True)
    weights = logits.exp()
    filtered = [i for i, row in enumerate(rows) if not greedy[i] and _is_filtered(row.operation)]
    if filtered:
        index = torch.tensor(filtered, device=logits.device)
        some = logits[index]
        threshold = _threshold(some, [rows[i].operation for i in filtered])
        weights[index] = torch.where(some >= threshold[:, None], weights[index], 0.0)
    uniform = torch.tensor([0.0 if g else row.draw() for g, row in zip(greedy, rows, strict=True)], dtype=torch.float64)
    drawn = _inverse_cdf(weights, uniform.to(logits.device))
    if any(greedy):
        drawn = torch.where(torch.tensor(greedy, device=logits.device), logits.argmax(-1), drawn)
    return drawn


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """For each row the first token id at which the running sum of weights ``[rows, vocabulary]`` passes
    ``uniform`` times their total. Summed in float64 and in two levels, so that a token of weight 0 is never drawn."""
    rows, vocabulary = weights.shape
    blocks = functional.pad(weights, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    running = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = _below(uniform * running[:, -1], running[:, -1])[:, None]
    block = torch.searchsorted(running, target, right=True)
    before = torch.where(block > 0, running.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inner = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    offset = torch.searchsorted(inner, _below((target - before)[:, 0], inner[:, -1])[:, None], right=True)
    return (block * BLOCK + offset)[:, 0]


def _below(value: Tensor, limit: Tensor) -> Tensor:
    """value, but less than limit whatever the rounding."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def _is_filtered(operation: Generate) -> bool:
    return bool(operation.top_k or operation.min_p or (operation.top_p or 1.0) < 1.0)


def _threshold(logits: Tensor, operations: Sequence[Generate]) -> Tensor:
    """The lowest logit ``[rows]`` that top-k, top-p and min-p keep, applied in this order as Transformers does.

    The logits ``[rows, vocabulary]`` are at temperature already, each row's best at 0.
    """
    vocabulary = logits.shape[-1]
    device = logits.device
    k = torch.tensor([min(o.top_k or vocabulary, vocabulary) for o in operations], device=device)
    p = torch.tensor([o.top_p or 1.0 for o in operations], dtype=torch.float64, device=device)
    min_p = torch.tensor([o.min_p or 0.0 for o in operations], dtype=torch.float32, device=device)
    threshold = min_p.log()
    limited = [o.top_k for o in operations if o.top_k]
    nucleus = any((o.top_p or 1.0) < 1.0 for o in operations)
    if not limited and not nucleus:
        return threshold
    width = min(vocabulary, max(limited + ([NUCLEUS] if nucleus else [])))
    while True:
        values = logits.topk(width, -1).values
        kept = torch.arange(width, device=device) < k[:, None]
        total = torch.where(k <= width, _sum_exp(values, kept), logits.double().exp().sum(-1))
        before = (torch.where(kept, values.double().exp(), 0.0) / total[:, None]).cumsum(-1)
        before = functional.pad(before[:, :-1], (1, 0))
        kept &= (before < p[:, None]) | (p[:, None] >= 1.0)
        unfinished = kept[:, -1] & (p < 1.0) & (k > width)
        if width == vocabulary or not bool(unfinished.any()):
            break
        width = vocabulary
    lowest = values.gather(-1, (kept.sum(-1, keepdim=True) - 1).clamp(min=0))[:, 0]
    unlimited = (p >= 1.0) & (k > width)
    return torch.maximum(threshold, torch.where(unlimited, -math.inf, lowest))


def _sum_exp(values: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, values.double().exp(), 0.0).sum(-1)
