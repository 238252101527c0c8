"""Sampling: logits to tokens. One batched pass gives every row's token, its log-probability and the most likely ones.

A row either chooses its token or, for scoring, names it. Log-probabilities are natural logarithms of the softmax over
the biased logits in float32, before temperature, penalties and filters, so they mean the same for every sampling
setting. Only these few numbers leave the device, all in one copy, which is the only thing that the host waits for.

A draw is an inverse-CDF lookup with uniform numbers that belong to the stream's seed and the token's position, over
the tokens in id order: it depends on nothing else in the batch, nor on how many positions of the stream are in it.
"""

import functools
import hashlib
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lmtp.engine.masks import Allowed, Bias, add_numbers, stack, upload
from lmtp.engine.penalties import Counts, is_penalized, penalize
from lmtp.protocol import Generate

GREEDY_BELOW = 1e-5
"""A temperature under this is greedy: dividing by it would overflow float32."""

NO_TOKEN = "logit_bias, mask or min_tokens forbid every token that the constraint allows here."
NOT_NUMBERS = "the model produced logits that are not finite numbers."

LOG2_E = math.log2(math.e)

BLOCK = 256
"""Vocabulary ids that are searched together; see `_blocks`."""

FEW = 16
"""Rows with at most this many likely tokens to report are searched together, so that one with many costs the others
nothing."""

FEW_ROWS = 16
"""At most so many rows NumPy searches on one thread before PyTorch's threads are awake."""

HEAD = 1024
"""A top-k of at most this is found without sorting the vocabulary."""

MAX_CACHED = 2**24
"""Numbers of biases that are kept unpacked from step to step: 64 MB."""

LEAST_WEIGHT = 2.0**-100
"""The least weight assumed for a drawn token, so that no weight divided by it is infinite."""

LOWEST = float(np.finfo(np.float32).min)
"""Reported for an impossible token, since JSON has no infinity."""

Uniforms = tuple[float, float]
"""Two numbers in [0, 1) for one token."""


class Choice(NamedTuple):
    """One token with its log-probability, and the most likely tokens with theirs, most likely first."""

    token: int
    logprob: float
    top: dict[int, float]

    error: str = ""
    """Why no token could be chosen; the other fields then mean nothing."""


class Target(NamedTuple):
    """A row whose token is given: the token that SCORE asks for, and how many likely tokens to report with it."""

    token: int
    top_logprobs: int


class Draw(NamedTuple):
    """A row whose token is chosen."""

    operation: Generate
    """The settings."""
    bias: Bias | None = None
    """What is added to its logits; see masks.py."""
    forbidden: Sequence[int] = ()
    """The ids that are impossible for this token only."""
    counts: Counts | None = None
    """The tokens before it, where penalties count them."""
    uniforms: Uniforms = (0.0, 0.0)
    """What decides a draw."""


Row = Draw | Target


def random_of(seed: int | None) -> random.Random:
    """The generator of a seed. None is a seed from the system."""
    # Random ignores the sign of a number, but not of a string.
    return random.Random(None if seed is None else str(seed))


def uniforms_of(seed: int | None) -> Callable[[int], Uniforms]:
    """The uniform numbers of a seed for the token at a position. None is a seed from the system."""
    key = os.urandom(16) if seed is None else str(seed).encode()

    def at(position: int) -> Uniforms:
        digest = hashlib.blake2b(position.to_bytes(8, "little"), digest_size=16, key=key).digest()
        number = int.from_bytes(digest, "little")
        return (number >> 75) * 2.0**-53, (number % 2**53) * 2.0**-53

    return at


def sample(
    logits: Tensor,
    rows: Sequence[Row],
    allowed: Allowed | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Choice]:
    """The token of each row from its logits ``[rows, vocabulary]``, of any float dtype, which stay as they are.

    ``allowed`` is what the grammars of some rows allow. A row that must choose but has no possible token, or whose
    logits are not numbers, gets a Choice with an error. ``meanwhile`` is called when a GPU has all of its work and the
    host is about to wait for it.
    """
    draws = {i: row for i, row in enumerate(rows) if isinstance(row, Draw)}
    masked = {i for i, row in draws.items() if row.bias is not None or row.forbidden}.union(
        allowed.rows if allowed else ()
    )
    own = _whole_blocks(logits)
    if not masked:
        return _sample(own, logits.shape[-1], rows, draws, meanwhile)
    if own is logits and 2 * len(masked) > len(rows):
        own = logits.clone()
    kept = None
    if own is logits:
        index = _index(sorted(masked), logits.device)
        kept = logits[index]
    try:
        _add_masks(own, logits.shape[-1], draws, allowed)
        return _sample(own, logits.shape[-1], rows, draws, meanwhile)
    finally:
        if kept is not None:
            logits[index] = kept


def _whole_blocks(logits: Tensor) -> Tensor:
    """The logits in float32, padded with impossible tokens to a multiple of BLOCK; itself where it is that."""
    vocabulary = logits.shape[-1]
    missing = -vocabulary % BLOCK
    if not missing:
        return logits.float().contiguous()
    whole = torch.empty(len(logits), vocabulary + missing, device=logits.device)
    whole[:, :vocabulary] = logits
    whole[:, vocabulary:] = -math.inf
    return whole


def _sample(
    logits: Tensor,
    vocabulary: int,
    rows: Sequence[Row],
    draws: Mapping[int, Draw],
    meanwhile: Callable[[], None],
) -> list[Choice]:
    """`sample`, of float32 logits in whole blocks, with the masks added."""
    counts = [_top(row) for row in rows]
    drawn = [i for i, row in draws.items() if needs_own_logits(row.operation)]
    searched = drawn or max(counts) > 1 or len(rows) > FEW_ROWS or not on_host(logits)
    peaks = _blocks(logits).amax(-1) if searched else None
    best = Best.of(logits, peaks)
    probabilities = torch.softmax(logits, -1)
    parts = [best.indices, best.values, probabilities.gather(-1, best.indices)]
    chosen = best.indices
    if len(draws) < len(rows):
        given = upload(torch.tensor([[row.token if isinstance(row, Target) else -1] for row in rows]), logits.device)
        chosen = torch.where(given < 0, chosen, given)
    if peaks is not None and drawn:
        own = [draws[i] for i in drawn]
        tokens = _draw(_select(logits, drawn), _select(peaks, drawn), _select(probabilities, drawn), own, vocabulary)
        every = len(drawn) == len(rows)
        chosen = tokens[:, None] if every else chosen.index_copy(0, _index(drawn, logits.device), tokens[:, None])
    if chosen is not best.indices:
        parts += [chosen, logits.gather(-1, chosen)]
    groups = []
    if peaks is not None:
        few = [i for i, count in enumerate(counts) if 1 < count <= FEW]
        many = [i for i, count in enumerate(counts) if count > FEW]
        groups = [group for group in (few, many) if group]
        for group in groups:
            most = min(max(counts[i] for i in group), vocabulary)
            parts += _most_likely(_select(logits, group), _select(peaks, group), most)
    return _report(_to_host(parts, meanwhile), rows, counts, groups)


def _add_masks(logits: Tensor, vocabulary: int, draws: Mapping[int, Draw], allowed: Allowed | None) -> None:
    """Add the biases, what is forbidden now and what grammars allow, in place."""
    real = logits[:, :vocabulary]
    biases = {i: row.bias for i, row in draws.items() if row.bias is not None}
    if dense := {i: bias for i, bias in biases.items() if bias.forbids_some}:
        make = stacked_biases if len(dense) * vocabulary <= MAX_CACHED else stack
        stacked = make(tuple(dense.values()), vocabulary, logits.device)
        if len(dense) == len(logits):
            real += stacked
        else:
            real.index_add_(0, _index(list(dense), logits.device), stacked)
    if sparse := {i: bias for i, bias in biases.items() if not bias.forbids_some}:
        add_numbers(logits, sparse, list(sparse.values()))
    if forbidden := [i * logits.shape[-1] + token for i, row in draws.items() for token in row.forbidden]:
        logits.view(-1).index_fill_(0, _index(forbidden, logits.device), -math.inf)
    if allowed:
        allowed.apply(real)


stacked_biases = functools.lru_cache(maxsize=2)(stack)
"""The rows of one step are mostly those of the previous one. The engine clears it when nothing runs."""


def needs_own_logits(operation: Generate) -> bool:
    """Whether the token is not simply the most likely one."""
    return operation.temperature >= GREEDY_BELOW or is_penalized(operation)


def _top(row: Row) -> int:
    return row.top_logprobs if isinstance(row, Target) else row.operation.top_logprobs


def _index(numbers: Sequence[int], device: torch.device) -> Tensor:
    return upload(torch.tensor(numbers, dtype=torch.long), device)


def _column(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """One number a row, ``[rows, 1]``."""
    return upload(torch.tensor(numbers, dtype=dtype)[:, None], device)


def _select(values: Tensor, index: Sequence[int]) -> Tensor:
    """The rows with these numbers, in increasing order; without a copy where that is all of them."""
    return values if len(index) == len(values) else values[_index(index, values.device)]


def _blocks(values: Tensor) -> Tensor:
    """``[rows, vocabulary]`` as ``[rows, blocks, BLOCK]``.

    One number a block narrows a search down to a few blocks. On a CPU, reducing the whole vocabulary with indices is
    many times slower.
    """
    return values.view(len(values), -1, BLOCK)


class Best(NamedTuple):
    """Each row's largest value and where it is, each ``[rows, 1]``; of equal ones the first, as torch.argmax has it."""

    values: Tensor
    indices: Tensor

    @staticmethod
    def of(values: Tensor, peaks: Tensor | None) -> "Best":
        """The best of ``[rows, vocabulary]``; ``peaks`` has the best of each block; on the host there may be none."""
        if peaks is None:
            indices = torch.from_numpy(values.numpy().argmax(-1, keepdims=True))
            return Best(values.gather(-1, indices), indices)
        largest, block = peaks.max(-1, keepdim=True)
        inside = _block(values, block).argmax(-1, keepdim=True)
        return Best(largest, torch.add(inside, block, alpha=BLOCK))


def _block(values: Tensor, block: Tensor) -> Tensor:
    """The blocks ``[rows, k]`` of each row ``[rows, vocabulary]``, one after the other: ``[rows, k * BLOCK]``."""
    each = values.shape[-1] // BLOCK
    first = _first_blocks(len(values), each, values.device)
    return values.view(-1, BLOCK).index_select(0, (block + first).view(-1)).view(len(values), -1)


@functools.lru_cache(maxsize=64)
def _first_blocks(rows: int, each: int, device: torch.device) -> Tensor:
    """The number of each row's first block, ``[rows, 1]``."""
    return torch.arange(0, rows * each, each, device=device)[:, None]


def _most_likely(values: Tensor, peaks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row ``[rows, vocabulary]``, largest first, and their token ids.

    They lie in the ``k`` blocks with the largest peaks.
    """
    some = peaks.topk(min(k, peaks.shape[-1]), -1).indices
    found, places = _block(values, some).topk(k, -1)
    nth = places // BLOCK
    return found, torch.add(places, some.gather(-1, nth) - nth, alpha=BLOCK)


def on_host(tensor: Tensor) -> bool:
    """Whether looking at the tensor's values makes nobody wait."""
    return tensor.device.type == "cpu"


def _fetch(tensor: Tensor, meanwhile: Callable[[], None]) -> npt.NDArray[np.float64]:
    """The tensor of a GPU on the host, which waits for it. It comes into pinned memory, without another copy."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    meanwhile()
    torch.cuda.current_stream(tensor.device).synchronize()
    return host.numpy()


def _to_host(parts: Sequence[Tensor], meanwhile: Callable[[], None]) -> list[npt.NDArray[Any]]:
    """The numbers of the parts on the host. A GPU's come by one copy; token ids are exact in float64."""
    if on_host(parts[0]):
        return [part.numpy() for part in parts]
    packed = _fetch(torch.cat([part.double().flatten() for part in parts]), meanwhile)
    ends = np.cumsum([part.numel() for part in parts])[:-1]
    return [flat.reshape(part.shape) for flat, part in zip(np.split(packed, ends), parts, strict=True)]


def _report(
    parts: Sequence[npt.NDArray[Any]],
    rows: Sequence[Row],
    counts: Sequence[int],
    groups: Sequence[Sequence[int]],
) -> list[Choice]:
    """The choices.

    ``parts`` are the numbers of each row: its best token, that one's logit and probability; then the chosen token and
    its logit, unless every row chooses its best; then the likely tokens' logits and ids, group by group.
    """
    ids, peaks, probabilities, *found = parts
    chosen, logits, *found = found if len(found) > 2 * len(groups) else (ids, peaks, *found)
    norms, choices = [], []
    # Row by row: for a few rows, an operation of NumPy takes longer than all of them.
    for best, peak, probability, token, logit, count, row in zip(
        *(part.ravel().tolist() for part in (ids, peaks, probabilities, chosen, logits)), counts, rows, strict=True
    ):
        if not math.isfinite(probability):
            impossible = isinstance(row, Draw) and peak == -math.inf
            choices.append(Choice(0, 0.0, {}, error=NO_TOKEN if impossible else NOT_NUMBERS))
            norms.append(math.nan)
            continue
        norms.append(peak - math.log(probability))
        logprob = _rounded(logit - norms[-1])
        top = {int(best): _rounded(peak - norms[-1])} if count == 1 else {}
        top[int(token)] = logprob
        choices.append(Choice(int(token), logprob, top))
    for group, values, tokens in zip(groups, found[::2], found[1::2], strict=True):
        likely = values - np.array([norms[i] for i in group])[:, None]
        likely = np.where(np.isfinite(likely), likely.round(6) + 0.0, LOWEST)
        for i, own, likely_ones, possible in zip(
            group, tokens.astype(int).tolist(), likely.tolist(), np.isfinite(values).sum(-1).tolist(), strict=True
        ):
            if not choices[i].error:
                most = min(counts[i], possible)
                entries = dict(zip(own[:most], likely_ones[:most], strict=True))
                entries.setdefault(choices[i].token, choices[i].logprob)
                choices[i] = Choice(choices[i].token, choices[i].logprob, entries)
    return choices


def _rounded(logprob: float) -> float:
    """Rounded to a millionth, without a negative zero, and finite: JSON has no infinity."""
    return round(logprob * 1e6) / 1e6 + 0.0 if math.isfinite(logprob) else LOWEST


def _draw(logits: Tensor, peaks: Tensor, weights: Tensor, rows: Sequence[Draw], vocabulary: int) -> Tensor:
    """The token of each row: drawn at its temperature among those its filters keep, or the best where it is greedy.

    ``peaks`` has the best of each block; ``weights`` are the probabilities at temperature 1, and may be changed. A draw
    has two stages, so that few vocabularies have to be sorted: a token drawn from all of them is accepted if it is in
    the top-p nucleus; otherwise one is drawn from the nucleus. Together that is the nucleus's own distribution.
    """
    device = logits.device
    operations = [row.operation for row in rows]
    greedy = [operation.temperature < GREEDY_BELOW for operation in operations]
    if any(row.counts is not None for row in rows):
        logits = penalize(logits, operations, [row.counts for row in rows])
        peaks = _blocks(logits).amax(-1)
    best = peaks.amax(-1)
    scale = _column([1.0 if g else LOG2_E / o.temperature for o, g in zip(operations, greedy, strict=True)], device)
    if scaled := [i for i, row in enumerate(rows) if row.counts is not None or row.operation.temperature != 1.0]:
        # In the same memory: fresh one would push the logits out of the processor's cache. exp2 takes half the time of
        # exp.
        fresh = _select(weights, scaled)
        torch.sub(_select(logits, scaled), _select(best, scaled)[:, None], out=fresh)
        fresh.mul_(_select(scale, scaled)).exp2_()
        weights = fresh if len(scaled) == len(rows) else weights.index_copy_(0, _index(scaled, device), fresh)
    weights = _blocks(weights)
    nucleus = [
        i for i, o in enumerate(operations) if (o.top_p or 1.0) < 1.0 and not _top_k(o, vocabulary) and not greedy[i]
    ]
    lowest = _lowest(logits, best, scale, operations, greedy, vocabulary)
    candidates = weights if lowest is None else _kept(logits, lowest).mul_(weights)
    uniforms = [(0.0, 0.0) if g else row.uniforms for g, row in zip(greedy, rows, strict=True)]
    first, second = upload(torch.tensor(uniforms, dtype=torch.float64), device).T
    sums = weights.sum(-1).double()
    chosen = _inverse_cdf(candidates, sums if lowest is None else candidates.sum(-1).double(), first)
    if nucleus and on_host(weights):
        nucleus = _outside(logits, peaks, weights, sums, chosen, operations, nucleus)
    if not nucleus:
        return chosen
    own = _select(logits, nucleus)
    own_weights, own_chosen = _select(weights, nucleus), _select(chosen, nucleus)
    picked = own.gather(-1, own_chosen[:, None])
    floor = _lowest_of(
        _likelier(own, picked),
        _select(best, nucleus),
        _select(scale, nucleus),
        [operations[i] for i in nucleus],
        vocabulary,
        _select(sums, nucleus).sum(-1, keepdim=True) / own_weights.flatten(1).amax(-1, keepdim=True),
    )
    if lowest is not None:
        floor = torch.maximum(floor, _select(lowest, nucleus))
    inside = _kept(own, floor).mul_(own_weights)
    again = _inverse_cdf(inside, inside.sum(-1).double(), _select(second, nucleus))
    return chosen.index_copy(0, _index(nucleus, device), torch.where(picked[:, 0] < floor, again, own_chosen))


def _kept(logits: Tensor, lowest: Tensor) -> Tensor:
    """1 for each logit that is not below its row's lowest, else 0. As a float: a bool would be converted slowly."""
    return _blocks(torch.ge(logits, lowest[:, None], out=torch.empty_like(logits)))


def _outside(
    logits: Tensor,
    peaks: Tensor,
    weights: Tensor,
    sums: Tensor,
    chosen: Tensor,
    operations: Sequence[Generate],
    nucleus: Sequence[int],
) -> list[int]:
    """Those of the nucleus rows whose chosen token seems to be outside. ``sums`` has the weights of each block.

    More likely tokens are in blocks with larger peaks. Mostly all of these blocks together weigh less than the nucleus,
    and no others have to be looked at."""
    most = sums.sum(-1) * torch.tensor([operation.top_p or 1.0 for operation in operations], dtype=torch.float64)
    around = torch.where(peaks > logits.gather(1, chosen[:, None]), sums, 0.0).sum(-1)
    # A thousandth more than rounding can hide.
    unsure = [i for i, out in enumerate((around * 1.001 >= most).tolist()) if out]
    if not (nucleus := sorted(set(nucleus).intersection(unsure))):
        return []
    weights = _select(weights, nucleus)
    weight = weights.flatten(1).gather(1, _select(chosen, nucleus)[:, None]).clamp_(min=LEAST_WEIGHT)[:, :, None]
    # The weights of more likely tokens, as multiples of the chosen one's. On a CPU this operation is many times
    # faster than comparing and selecting.
    likelier = functional.threshold(weights / weight, 1.0, 0.0, inplace=True).sum(-1).double().sum(-1)
    outside = likelier * weight[:, 0, 0] >= _select(most, nucleus)
    return [i for i, out in zip(nucleus, outside.tolist(), strict=True) if out]


def _inverse_cdf(weights: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """For each row the first token id at which the running sum of weights ``[rows, blocks, BLOCK]`` exceeds ``uniform``
    times their total. ``sums`` has the weights of each block, so that the search has two levels. A token of weight 0
    adds nothing, so it is never drawn."""
    running = sums.cumsum(-1)
    target = _below(uniform * running[:, -1], running[:, -1])[:, None]
    block = torch.searchsorted(running, target, right=True).clamp_(max=running.shape[-1] - 1)
    before = torch.where(block > 0, running.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inner = _block(weights.flatten(1), block).cumsum(-1, dtype=torch.float64)
    offset = torch.searchsorted(inner, _below((target - before)[:, 0], inner[:, -1])[:, None], right=True)
    return (block * BLOCK + offset.clamp_(max=BLOCK - 1))[:, 0]


def _below(value: Tensor, limit: Tensor) -> Tensor:
    """The value, but less than the limit however it was rounded."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def _top_k(operation: Generate, vocabulary: int) -> int:
    """How many tokens top-k keeps; 0 is all."""
    return operation.top_k if operation.top_k and operation.top_k < vocabulary else 0


def _lowest(
    logits: Tensor, best: Tensor, scale: Tensor, operations: Sequence[Generate], greedy: Sequence[bool], vocabulary: int
) -> Tensor | None:
    """The lowest logit ``[rows]`` that top-k (with top-p among those it keeps) and min-p keep, and the best one where
    the row is greedy; None if every token is kept."""
    limits = [0 if g else _top_k(o, vocabulary) for o, g in zip(operations, greedy, strict=True)]
    if not any(greedy) and not any(limits) and not any(operation.min_p for operation in operations):
        return None
    below = [
        0.0 if g else o.temperature * math.log(o.min_p) if o.min_p else -math.inf
        for o, g in zip(operations, greedy, strict=True)
    ]
    lowest = best + _column(below, logits.device)[:, 0]
    for group in ([i for i, k in enumerate(limits) if 0 < k <= HEAD], [i for i, k in enumerate(limits) if k > HEAD]):
        if group:
            values = _largest(_select(logits, group), max(limits[i] for i in group))
            some = [operations[i] for i in group]
            found = _lowest_of(values, _select(best, group), _select(scale, group), some, vocabulary)
            lowest = lowest.index_copy(0, _index(group, logits.device), torch.maximum(_select(lowest, group), found))
    return lowest


def _largest(logits: Tensor, k: int) -> Tensor:
    """The ``k`` largest values of each row, largest first."""
    if not on_host(logits):
        return logits.topk(k, -1).values
    values = logits.numpy()  # NumPy sorts values without indices, many times faster
    head = np.partition(values, -k)[:, -k:] if k < values.shape[-1] else values
    return torch.from_numpy(np.sort(head)).flip(-1)


def _likelier(logits: Tensor, picked: Tensor) -> Tensor:
    """The largest values of each row, largest first: at least those that are not below ``picked`` ``[rows, 1]``. A CPU
    sorts no others."""
    if not on_host(logits):
        return _largest(logits, logits.shape[-1])
    rows = [np.sort(row[row >= least])[::-1] for row, least in zip(logits.numpy(), picked.numpy(), strict=True)]
    values = np.full((len(rows), max(map(len, rows))), -np.inf, np.float32)
    for row, likelier in zip(values, rows, strict=True):
        row[: len(likelier)] = likelier
    return torch.from_numpy(values)


def _lowest_of(
    values: Tensor,
    best: Tensor,
    scale: Tensor,
    operations: Sequence[Generate],
    vocabulary: int,
    total: Tensor | None = None,
) -> Tensor:
    """The lowest logit ``[rows]`` that top-k, then top-p keep. ``values`` are the largest logits, largest first.

    ``total`` ``[rows, 1]`` is what all tokens weigh, as a multiple of the best, where top-k is off.
    """
    k = _column([_top_k(o, vocabulary) or vocabulary for o in operations], values.device, torch.long)
    p = _top_p(operations, values.device)
    kept = torch.arange(values.shape[-1], device=values.device) < k
    probabilities = _probabilities(values, best, scale).mul_(kept)
    running = probabilities.cumsum(-1)
    most = (running[:, -1:] if total is None else total) * p
    kept &= (running - probabilities < most) | (p >= 1.0)
    return values.gather(-1, (kept.sum(-1, keepdim=True) - 1).clamp_(min=0))[:, 0]


def _probabilities(values: Tensor, best: Tensor, scale: Tensor) -> Tensor:
    """As multiples of the best token's, in float64."""
    return ((values - best[:, None]) * scale).double().exp2()


def _top_p(operations: Sequence[Generate], device: torch.device) -> Tensor:
    return _column([operation.top_p or 1.0 for operation in operations], device, torch.float64)
