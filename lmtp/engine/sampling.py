"""Sampling: logits to tokens. One batched pass gives every row's token, its log-probability and the most likely ones.

A row either chooses its token or, for scoring, names it. Log-probabilities are natural logarithms of the softmax over
the biased logits in float32, before temperature, penalties and filters, so they mean the same for every sampling
setting. Only these few numbers leave the device.

A draw is an inverse-CDF lookup with one uniform number from the stream's own generator, over the tokens in id order:
it depends on nothing else in the batch.
"""

import functools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lmtp.engine.masks import Allowed, Bias, stack
from lmtp.protocol import Generate, finite

GREEDY_BELOW = 1e-5
"""A temperature under this is greedy: dividing by it would overflow float32."""

NO_TOKEN = "logit_bias, mask or min_tokens forbid every token that the constraint allows here."
NOT_NUMBERS = "the model produced logits that are not finite numbers."

LOG2_E = math.log2(math.e)

BLOCK = 256
"""Vocabulary ids that are searched together; see `_blocks`."""

MAX_CACHED = 2**24
"""Numbers of biases that are kept unpacked from step to step: 64 MB."""

LEAST_WEIGHT = 2.0**-100
"""The least weight assumed for a drawn token, so that no weight divided by it is infinite."""


@dataclass(frozen=True)
class Choice:
    """One token with its log-probability, and the most likely tokens with theirs, most likely first."""

    token: int
    logprob: float
    top: dict[int, float]

    error: str = ""
    """Why no token could be chosen; the other fields then mean nothing."""


@dataclass(frozen=True)
class Target:
    """A row whose token is given: the token that SCORE asks for, and how many likely tokens to report with it."""

    token: int
    top_logprobs: int


def random_of(seed: int | None) -> random.Random:
    """The generator of a seed. None is a seed from the system."""
    # Random ignores the sign of a number, but not of a string.
    return random.Random(None if seed is None else str(seed))


class Draw(Protocol):
    """A row whose token is chosen: what sampling reads of a stream."""

    @property
    def operation(self) -> Generate:
        """The settings."""

    @property
    def bias(self) -> Bias | None:
        """What is added to its logits; see masks.py."""

    @property
    def forbidden_now(self) -> Sequence[int]:
        """The ids that are impossible for this token only."""

    @property
    def tokens(self) -> list[int]:
        """Prompt and output so far."""

    @property
    def prompt_length(self) -> int:
        """How many of the tokens belong to the prompt."""

    def draw(self) -> float:
        """The stream's next uniform number in [0, 1)."""


Row = Draw | Target


def sample(logits: Tensor, rows: Sequence[Row], allowed: Allowed | None = None) -> list[Choice]:
    """The token of each row from its logits ``[rows, vocabulary]``, of any float dtype, which stay as they are.

    ``allowed`` is what the grammars of some rows allow. A row that must choose but has no possible token, or whose
    logits are not numbers, gets a Choice with an error.
    """
    draws = {i: row for i, row in enumerate(rows) if not isinstance(row, Target)}
    own = logits.float()
    changed = _changed_in_place(draws, allowed, len(rows)) if own is logits else []
    if not changed:
        return _sample(own, rows, draws, allowed)
    index = torch.tensor(changed, device=logits.device)
    kept = logits[index]
    try:
        return _sample(logits, rows, draws, allowed)
    finally:
        logits[index] = kept


def _changed_in_place(draws: Mapping[int, Draw], allowed: Allowed | None, count: int) -> list[int]:
    """The rows of ``count`` whose masks are added in place. Masks of all rows make a new tensor."""
    masked = {i for i, row in draws.items() if row.bias is not None}
    if len(masked) == count:
        return []
    masked |= {i for i, row in draws.items() if row.forbidden_now}
    return sorted(masked.union(allowed.rows) if allowed and len(allowed.rows) < count else masked)


def _sample(logits: Tensor, rows: Sequence[Row], draws: Mapping[int, Draw], allowed: Allowed | None) -> list[Choice]:
    logits = _biased(logits, draws)
    if allowed:
        logits = allowed.apply(logits)
    logprobs = torch.log_softmax(logits, -1)
    # One logit that is not a number makes its whole row NaN.
    wrong = logprobs[:, 0].isnan().nonzero()[:, 0].tolist()
    errors = {i: NO_TOKEN if i in draws and logits[i].amax() == -math.inf else NOT_NUMBERS for i in wrong}
    if wrong:  # placeholder logits: their draws are discarded
        index = torch.tensor(wrong, device=logits.device)
        logits, logprobs = logits.index_fill(0, index, 0.0), logprobs.index_fill(0, index, 0.0)
    searched = [i for i, row in enumerate(rows) if i in draws or _top(row)]
    likely = _most_likely(_select(logits, searched), max(1, *map(_top, rows))) if searched else None
    chosen = torch.tensor([row.token if isinstance(row, Target) else 0 for row in rows], device=logits.device)
    if likely and draws:
        best = [place for place, i in enumerate(searched) if i in draws]
        chosen[list(draws)] = _select(likely.indices[:, 0], best)
        if drawn := [i for i, row in draws.items() if needs_own_logits(row.operation)]:
            own = [draws[i] for i in drawn]
            chosen[drawn] = _draw(_penalized(_select(logits, drawn), own), own)
    choices = _report(logprobs, chosen, likely, searched, [_top(row) for row in rows])
    for i, error in errors.items():
        choices[i] = replace(choices[i], error=error)
    return choices


def _top(row: Row) -> int:
    return row.top_logprobs if isinstance(row, Target) else row.operation.top_logprobs


def _select(values: Tensor, index: list[int]) -> Tensor:
    """The rows with these numbers, in increasing order; without a copy where that is all of them."""
    return values if len(index) == len(values) else values[torch.tensor(index, device=values.device)]


class Likely(NamedTuple):
    """Each row's largest values, largest first: ``[rows, k]`` of them and their token ids."""

    values: Tensor
    indices: Tensor


def _blocks(values: Tensor) -> Tensor:
    """``[rows, vocabulary]`` as ``[rows, blocks, BLOCK]``.

    One number a block narrows a search down to a few blocks. On a CPU, reducing the whole vocabulary with indices is
    many times slower.
    """
    missing = -values.shape[-1] % BLOCK
    if missing:
        values = functional.pad(values, (0, missing), value=-math.inf)
    return values.view(len(values), -1, BLOCK)


def _most_likely(values: Tensor, k: int) -> Likely:
    """The ``k`` largest of each row ``[rows, vocabulary]``: they lie in the ``k`` blocks with the largest peaks."""
    blocks = _blocks(values)
    peaks = blocks.amax(-1)
    some = peaks.topk(min(k, peaks.shape[-1]), -1).indices
    inside = blocks.gather(1, some[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    values, places = inside.topk(min(k, inside.shape[-1]), -1)
    return Likely(values, some.gather(-1, places // BLOCK) * BLOCK + places % BLOCK)


def _report(
    logprobs: Tensor, chosen: Tensor, likely: Likely | None, searched: list[int], top: Sequence[int]
) -> list[Choice]:
    """The choices; ``likely`` has the most likely tokens of the ``searched`` rows."""
    of_chosen = map(finite, _rounded(logprobs.gather(-1, chosen[:, None])[:, 0]).tolist())
    choices = [Choice(t, p, {t: p}) for t, p in zip(chosen.tolist(), of_chosen, strict=True)]
    if likely is None:
        return choices
    top_logprobs = _rounded(_select(logprobs, searched).gather(-1, likely.indices.clamp(max=logprobs.shape[-1] - 1)))
    # Impossible ones come last, ids of padding among them.
    possible = (torch.isfinite(likely.values) & torch.isfinite(top_logprobs)).sum(-1).tolist()
    for i, ids, values, count in zip(searched, likely.indices.tolist(), top_logprobs.tolist(), possible, strict=True):
        most = min(top[i], count)
        entries = dict(zip(ids[:most], values[:most], strict=True))
        entries.setdefault(choices[i].token, choices[i].logprob)
        choices[i] = Choice(choices[i].token, choices[i].logprob, entries)
    return choices


def _rounded(logprobs: Tensor) -> Tensor:
    """Rounded to a millionth, in float64, and without a negative zero."""
    return logprobs.double().round(decimals=6) + 0.0


def _biased(logits: Tensor, draws: Mapping[int, Draw]) -> Tensor:
    """The logits with the biases of the rows that have one. Where these are some of the rows, they change in place."""
    biases = {i: row.bias for i, row in draws.items() if row.bias is not None}
    if biases:
        rows = tuple(biases.values())
        make = stacked_biases if len(rows) * logits.shape[-1] <= MAX_CACHED else stack
        stacked = make(rows, logits.shape[-1], logits.device)
        if len(biases) == len(logits):
            logits = logits + stacked
        else:
            logits.index_add_(0, torch.tensor(list(biases), device=logits.device), stacked)
    for i, row in draws.items():
        if row.forbidden_now:
            logits[i, list(row.forbidden_now)] = -math.inf
    return logits


stacked_biases = functools.lru_cache(maxsize=2)(stack)
"""The rows of one step are mostly those of the previous one. The engine clears it when nothing runs."""


def needs_own_logits(operation: Generate) -> bool:
    """Whether the token is not simply the most likely one."""
    return operation.temperature >= GREEDY_BELOW or _is_penalized(operation)


def _is_penalized(operation: Generate) -> bool:
    return bool(
        operation.presence_penalty or operation.frequency_penalty or operation.repetition_penalty not in (None, 1.0)
    )


def _penalized(logits: Tensor, rows: Sequence[Draw]) -> Tensor:
    """Repetition penalty over prompt and output as in Transformers (Keskar et al. 2019); presence and frequency
    penalties over the output as in the OpenAI API."""
    if any(_is_penalized(row.operation) for row in rows):
        logits = logits.clone()  # reports are without penalties
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


def _draw(logits: Tensor, rows: Sequence[Draw]) -> Tensor:
    """The token of each row: drawn at its temperature among those its filters keep, or the best where it is greedy.

    A top-p nucleus is found without sorting. A drawn token is accepted if the tokens more likely than it have less than
    p of the probability together. Otherwise it and all tokens that are no more likely are excluded, and the row draws
    again. This gives the nucleus's own distribution (rejection sampling with a pivot, as in FlashInfer).
    """
    device = logits.device
    temperatures = [row.operation.temperature for row in rows]
    greedy = [t < GREEDY_BELOW for t in temperatures]
    scale = torch.tensor([1.0 if g else t for g, t in zip(greedy, temperatures, strict=True)], device=device)
    blocks = _blocks(logits)
    blocks = (blocks - logits.amax(-1)[:, None, None]).mul_((LOG2_E / scale)[:, None, None])
    weights = blocks.exp2()
    threshold = _threshold(blocks, [row.operation for row in rows], greedy)
    candidates = weights if threshold is None else weights * (blocks >= threshold[:, None, None])
    nucleus = [_nucleus(row.operation) for row in rows]
    most = weights.sum(-1).double().sum(-1) * torch.tensor(nucleus, dtype=torch.float64, device=device)
    chosen = torch.zeros(len(rows), dtype=torch.long, device=device)
    undrawn = list(range(len(rows)))
    while True:
        uniform = [rows[i].draw() if not greedy[i] else 0.0 for i in undrawn]
        drawn = _inverse_cdf(candidates, torch.tensor(uniform, dtype=torch.float64, device=device))
        chosen[undrawn] = drawn
        searching = [place for place, i in enumerate(undrawn) if nucleus[i] < 1.0 and not greedy[i]]
        if not searching:
            return chosen
        if len(searching) < len(undrawn):
            weights, most = weights[searching], most[searching]
        weight = weights.flatten(1).gather(1, drawn[searching][:, None]).clamp_(min=LEAST_WEIGHT)[:, :, None]
        # The weights of more likely tokens, as multiples of the drawn one's. On a CPU this operation is many times
        # faster than comparing and selecting.
        likelier = functional.threshold(weights / weight, 1.0, 0.0, inplace=True)
        outside = (likelier.sum(-1).double().sum(-1) * weight[:, 0, 0] >= most).nonzero()[:, 0]
        undrawn = [undrawn[searching[place]] for place in outside.tolist()]
        if not undrawn:
            return chosen
        weights, most, candidates = weights[outside], most[outside], likelier[outside]


def _nucleus(operation: Generate) -> float:
    """The top-p that drawing has to respect. Top-k sorts anyway, so with it top-p is part of the threshold."""
    return 1.0 if operation.top_k or not operation.top_p else operation.top_p


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """For each row the first token id at which the running sum of weights ``[rows, blocks, BLOCK]`` exceeds ``uniform``
    times their total. The search has two levels. A token of weight 0 adds nothing, so it is never drawn."""
    running = weights.sum(-1).double().cumsum(-1)
    target = _below(uniform * running[:, -1], running[:, -1])[:, None]
    block = torch.searchsorted(running, target, right=True)
    before = torch.where(block > 0, running.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inner = weights.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    offset = torch.searchsorted(inner, _below((target - before)[:, 0], inner[:, -1])[:, None], right=True)
    return (block * BLOCK + offset)[:, 0]


def _below(value: Tensor, limit: Tensor) -> Tensor:
    """The value, but less than the limit however it was rounded."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def _threshold(blocks: Tensor, operations: Sequence[Generate], greedy: Sequence[bool]) -> Tensor | None:
    """The lowest logit ``[rows]`` that top-k (with top-p among those it keeps) and min-p keep, and the best one where
    the row is greedy; None if every token is kept.

    The logits ``[rows, blocks, BLOCK]`` are scaled by temperature and to the base 2; each row's best is 0.
    """
    device = blocks.device
    limited = [i for i, operation in enumerate(operations) if operation.top_k]
    if not limited and not any(greedy) and not any(operation.min_p for operation in operations):
        return None
    threshold = torch.tensor(
        [1.0 if g else o.min_p or 0.0 for o, g in zip(operations, greedy, strict=True)], device=device
    ).log2()
    if limited:
        some = [operations[i] for i in limited]
        k = torch.tensor([o.top_k for o in some], device=device)[:, None]
        p = torch.tensor([o.top_p or 1.0 for o in some], dtype=torch.float64, device=device)[:, None]
        values = _most_likely(blocks[limited].flatten(1), max(o.top_k or 0 for o in some)).values.double()
        kept = torch.arange(values.shape[-1], device=device) < k
        probabilities = torch.where(kept, values.exp2(), 0.0)
        probabilities /= probabilities.sum(-1, keepdim=True)
        before = functional.pad(probabilities.cumsum(-1)[:, :-1], (1, 0))
        kept &= (before < p) | (p >= 1.0)
        lowest = values.gather(-1, kept.sum(-1, keepdim=True) - 1)[:, 0].float()
        threshold[limited] = torch.maximum(threshold[limited], lowest)
    return threshold
