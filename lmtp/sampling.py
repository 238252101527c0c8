"""Logits into tokens: one batched pass gives the chosen token, its log-probability and the most likely ones.

Log-probabilities are natural logarithms of the softmax over the biased logits in float32, before temperature, penalties
and filters, so they mean the same for every sampling setting. Only these few numbers leave the device.

A draw is an inverse-CDF lookup with one uniform number from the stream's own generator, over the tokens in id order:
it depends on nothing else in the batch.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lmtp.protocol import Generate, finite

GREEDY_BELOW = 1e-5
"""A temperature under this is greedy: dividing by it would overflow float32."""

BLOCK = 256
"""Vocabulary ids that are searched together; see _blocks."""

NUCLEUS = 64
"""How many of the most likely tokens are looked at first to find a top-p nucleus; then 16 times as many, and so on."""


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
    blocks = _blocks(logits, -math.inf)
    peaks = blocks.amax(-1)
    normalizer = torch.logsumexp(logits, -1)
    if not torch.isfinite(normalizer).all():
        raise FloatingPointError("the model produced logits that are not finite numbers")
    likely = _most_likely(blocks, peaks, max(1, *(row.operation.top_logprobs for row in rows)))
    chosen = likely.indices[:, 0].clone()
    drawn = [i for i, row in enumerate(rows) if _needs_own_logits(row.operation)]
    if drawn:
        some = [rows[i] for i in drawn]
        index = torch.tensor(drawn, device=logits.device)
        chosen[index] = _draw(_penalized(logits[index], some), some)
    return _report(logits, normalizer, chosen, likely, [row.operation.top_logprobs for row in rows])


def score(logits: Tensor, targets: Sequence[int], top: Sequence[int]) -> list[Choice]:
    """Each row's target with its log-probability under the logits ``[rows, vocabulary]``, and ``top[row]`` more."""
    logits = logits.float()
    blocks = _blocks(logits, -math.inf)
    likely = _most_likely(blocks, blocks.amax(-1), max(top)) if max(top) else None
    chosen = torch.tensor(targets, device=logits.device)
    return _report(logits, torch.logsumexp(logits, -1), chosen, likely, top)


class Likely(NamedTuple):
    """Each row's largest logits, largest first: ``[rows, k]`` values and their token ids."""

    values: Tensor
    indices: Tensor


def _blocks(values: Tensor, padding: float) -> Tensor:
    """``[rows, vocabulary]`` as ``[rows, blocks, BLOCK]``. One number a block narrows a search down to a few of them,
    where a reduction over the whole vocabulary that also looks for places is many times slower on a CPU."""
    missing = -values.shape[-1] % BLOCK
    if missing:
        values = functional.pad(values, (0, missing), value=padding)
    return values.view(len(values), -1, BLOCK)


def _most_likely(blocks: Tensor, peaks: Tensor, k: int) -> Likely:
    """The ``k`` largest of each row: they lie in the ``k`` blocks with the largest peaks."""
    some = peaks.topk(min(k, peaks.shape[-1]), -1).indices
    inside = blocks.gather(1, some[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    values, places = inside.topk(min(k, inside.shape[-1]), -1)
    return Likely(values, some.gather(-1, places // BLOCK) * BLOCK + places % BLOCK)


def _report(
    logits: Tensor, normalizer: Tensor, chosen: Tensor, likely: Likely | None, top: Sequence[int]
) -> list[Choice]:
    logprobs = _rounded(logits.gather(-1, chosen[:, None])[:, 0] - normalizer)
    tokens: list[int] = chosen.tolist()
    if likely is None:
        return [Choice(t, finite(p), {t: finite(p)}) for t, p in zip(tokens, logprobs.tolist(), strict=True)]
    top_logprobs, top_ids = _rounded(likely.values - normalizer[:, None]), likely.indices.tolist()
    possible = torch.isfinite(top_logprobs).sum(-1).tolist()  # impossible ones come last
    choices = []
    for token, logprob, ids, values, count, most in zip(
        tokens, logprobs.tolist(), top_ids, top_logprobs.tolist(), possible, top, strict=True
    ):
        most = min(most, count)
        entries = dict(zip(ids[:most], values[:most], strict=True))
        entries.setdefault(token, finite(logprob))
        choices.append(Choice(token, finite(logprob), entries))
    return choices


def _rounded(logprobs: Tensor) -> Tensor:
    """To a millionth, in float64, and without a negative zero."""
    return logprobs.double().round(decimals=6) + 0.0


def _biased(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    biased = [i for i, row in enumerate(rows) if row.bias is not None]
    if biased:
        bias = _stacked(tuple(row.bias for row in rows if row.bias is not None), logits.device)
        if len(biased) == len(rows):
            logits = logits + bias
        else:
            logits = logits.index_add(0, torch.tensor(biased, device=logits.device), bias)
    for i, row in enumerate(rows):
        if row.forbidden_now:
            logits[i, list(row.forbidden_now)] = -math.inf
    return logits


@functools.lru_cache(maxsize=2)
def _stacked(biases: tuple[Tensor, ...], device: torch.device) -> Tensor:
    """The biases as ``[rows, vocabulary]``; the rows of one step are mostly those of the step before."""
    return torch.stack(biases).to(device)


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
    scale = torch.tensor([1.0 if g else t for g, t in zip(greedy, temperatures, strict=True)], device=logits.device)
    blocks = _blocks(logits / scale[:, None], -math.inf)
    peaks = blocks.amax(-1)
    best = peaks.amax(-1)
    blocks -= best[:, None, None]
    peaks -= best[:, None]
    weights = blocks.exp()
    filtered = [i for i, row in enumerate(rows) if not greedy[i] and _is_filtered(row.operation)]
    if filtered:
        index = torch.tensor(filtered, device=logits.device)
        everything = len(filtered) == len(rows)
        some = blocks if everything else blocks[index]
        threshold = _threshold(some, peaks[index], weights[index].sum((1, 2)), [rows[i].operation for i in filtered])
        kept = some >= threshold[:, None, None]
        if everything:
            weights *= kept
        else:
            weights[index] *= kept
    uniform = torch.tensor([0.0 if g else row.draw() for g, row in zip(greedy, rows, strict=True)], dtype=torch.float64)
    drawn = _inverse_cdf(weights, uniform.to(logits.device))
    if any(greedy):
        most_likely = _most_likely(blocks, peaks, 1).indices[:, 0]
        drawn = torch.where(torch.tensor(greedy, device=logits.device), most_likely, drawn)
    return drawn


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """For each row the first token id at which the running sum of weights ``[rows, blocks, BLOCK]`` passes ``uniform``
    times their total, found in two levels. A token of weight 0 adds nothing, so it is never drawn."""
    running = weights.sum(-1).double().cumsum(-1)
    target = _below(uniform * running[:, -1], running[:, -1])[:, None]
    block = torch.searchsorted(running, target, right=True)
    before = torch.where(block > 0, running.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inner = weights.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    offset = torch.searchsorted(inner, _below((target - before)[:, 0], inner[:, -1])[:, None], right=True)
    return (block * BLOCK + offset)[:, 0]


def _below(value: Tensor, limit: Tensor) -> Tensor:
    """value, but less than limit whatever the rounding."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def _is_filtered(operation: Generate) -> bool:
    return bool(operation.top_k or operation.min_p or (operation.top_p or 1.0) < 1.0)


def _threshold(blocks: Tensor, peaks: Tensor, total: Tensor, operations: Sequence[Generate]) -> Tensor:
    """The lowest logit ``[rows]`` that top-k, top-p and min-p keep, applied in this order as Transformers does.

    The logits ``[rows, blocks, BLOCK]``, with the blocks' ``peaks``, are at temperature already, each row's best at 0;
    ``total`` is the sum of their exponentials.
    """
    vocabulary = blocks.shape[1] * BLOCK
    device = blocks.device
    k = torch.tensor([o.top_k or vocabulary for o in operations], device=device).clamp(max=vocabulary)
    p = torch.tensor([o.top_p or 1.0 for o in operations], dtype=torch.float64, device=device)
    threshold = torch.tensor([o.min_p or 0.0 for o in operations], device=device).log()
    search = [i for i, o in enumerate(operations) if o.top_k or (o.top_p or 1.0) < 1.0]
    width = max([NUCLEUS, *(o.top_k or 0 for o in operations)])
    while search:
        width = min(width, vocabulary)
        rows = torch.tensor(search, device=device)
        values = _most_likely(blocks[rows], peaks[rows], width).values.double()
        row_k, row_p = k[rows, None], p[rows, None]
        kept = torch.arange(width, device=device) < row_k
        weights = torch.where(kept, values.exp(), 0.0)
        of = torch.where(row_k[:, 0] <= width, weights.sum(-1), total[rows].double())
        before = functional.pad((weights / of[:, None]).cumsum(-1)[:, :-1], (1, 0))
        kept &= (before < row_p) | (row_p >= 1.0)
        lowest = values.gather(-1, kept.sum(-1, keepdim=True) - 1)[:, 0].float()
        # A nucleus that fills what was looked at may go on beyond it.
        unfinished = kept[:, -1] & (row_k[:, 0] > width) & (width < vocabulary)
        found = rows[~unfinished]
        threshold[found] = torch.maximum(threshold[found], lowest[~unfinished])
        search = rows[unfinished].tolist()
        width *= 16
    return threshold
