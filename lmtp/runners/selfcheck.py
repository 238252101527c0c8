"""The self-check: a runner proves itself on the model before it serves.

In slots and in packed steps uneven texts go through chunks, single tokens, padding, reuse and moves. In the model's own
caches two texts take turns, and a third continues the first. Every position's logits are compared with the model's own
forward pass.

The texts are short, since they cost time at every start. Windows and other lengths that they do not reach are left to
rules (slot_runner.SlotStep), which tests/probe.py proves with texts that reach them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmtp.runners.adapters import Adapters
from lmtp.runners.cache_runner import CacheRunner
from lmtp.runners.model import UnsupportedModel, accepts_positions, input_device, token_types, why_refused
from lmtp.runners.packed import PackedRunner, Shape
from lmtp.runners.slot_runner import FastStep, SlotRunner, SlotStep
from lmtp.runners.slots import Layer
from lmtp.runners.step import Step, Stream
from lmtp.weights.kinds import PREFIX_LM

AGREEMENT = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
"""How far a position's logits may be from the model's own, relative to their spread. After random tokens a bfloat16
model is this far from its float32 self at one position of ten; a wrong mask or a lost cache moves nearly all of them
further."""

FORGIVEN = {torch.float32: 0.0, torch.float16: 0.25, torch.bfloat16: 0.25}
"""The share of positions that may be further off: rounding decides which expert a mixture asks."""

SHARED = 8
"""How many tokens the last text takes over from another one."""

ROW = 4
"""How many tokens of each text a recorded step is checked with."""

GIVEN = (6, 1)
"""How many tokens of two texts are the prompts of a prefix LM."""

TOKENS, SLOTS, CONTEXT = 512, 8, 64
"""The size of the memory in which the check runs."""


@dataclass(frozen=True)
class Reference:
    """Some uneven texts, and for each the logits ``[tokens - 1, vocabulary]`` of the model's own forward pass."""

    texts: list[list[int]]
    logits: list[Tensor]
    precision: torch.dtype
    """Whose tolerance holds."""
    adapters: Sequence[str] = ("", "", "", "")
    """The adapter of each text."""

    @classmethod
    @torch.inference_mode()
    def of(
        cls, model: PreTrainedModel, adapters: Adapters | None = None, names: tuple[str, str, str] = ("", "", "")
    ) -> "Reference":
        """Random texts; the last begins as the longest does, and has its adapter. ``names`` are those of the others."""
        texts = _random_texts(model, 5, 14, 9)
        texts.append(texts[1][:SHARED] + texts[2][:5])
        longest = max(map(len, texts))
        # Padded at the end, where no token of a text sees it.
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=input_device(model))
        adapters, of_texts = adapters or Adapters(model), (*names, names[1])
        logits = {}
        for name in set(of_texts):
            with adapters.alone(name):
                logits[name] = model(input_ids=ids, use_cache=False).logits
        own = [logits[of_texts[i]][i, : len(text) - 1].float() for i, text in enumerate(texts)]
        return cls(texts, own, precision_of(model), of_texts)


def precision_of(model: PreTrainedModel) -> torch.dtype:
    """The dtype whose tolerance the check has. The 8-bit kernels of bitsandbytes compute in 16 bits and treat the
    outliers of a batch together."""
    return torch.bfloat16 if getattr(model, "is_loaded_in_8bit", False) else model.dtype


def with_tolerance(model: PreTrainedModel, reason: str = "") -> str:
    """A runner's ``reason``, which also says where the check had another dtype's tolerance than the model's own."""
    precision = precision_of(model)
    if precision == model.dtype:
        return reason
    name = str(precision).removeprefix("torch.")
    note = f"its 8-bit kernels depend on the batch, so the self-check has the tolerance of {name}"
    return f"{reason}; {note}" if reason else note


def _random_texts(model: PreTrainedModel, *sizes: int) -> list[list[int]]:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    generator = np.random.default_rng(0)
    return [generator.integers(vocabulary, size=size).tolist() for size in sizes]


class Text(Stream):
    """A text whose next-token distributions are wanted, except those inside its first ``given`` tokens."""

    def __init__(self, tokens: list[int], given: int = 1, adapter: str = "") -> None:
        super().__init__(tokens, len(tokens))
        self.prompt_length = given
        self.adapter = adapter

    @property
    def goal(self) -> int:
        """All but the last token."""
        return len(self.tokens) - 1

    @property
    def first_wanted(self) -> int:
        """The last given token."""
        return self.prompt_length - 1


@torch.inference_mode()
def check_slots(step: SlotStep, layers: Sequence[Layer], reference: Reference, fast: FastStep | None = None) -> None:
    """Prove slots, and ``fast`` where it is given, against the reference.

    ``fast`` runs the texts twice, the second time in other rows: it may have recorded what it did first.
    Raises UnsupportedModel where they disagree.
    """
    memory = step.new_memory(layers)
    runner = SlotRunner(step, memory, memory.bytes_per_token * TOKENS, SLOTS, CONTEXT, fast)
    _check_texts(runner, reference, (1, -1) if fast else (1,))


@torch.inference_mode()
def check_packed(runner: PackedRunner, reference: Reference) -> None:
    """Prove packed steps against the reference, and each recorded step against the one that it was recorded from.

    Recorded steps run twice on different tokens. Raises UnsupportedModel where they disagree.
    """
    _check_texts(runner, reference, (1, -1))
    recorded = runner.recorded
    for shape in recorded.shapes if recorded else ():
        rows, rest = divmod(shape.tokens, ROW)
        texts = _random_texts(runner.step.model, *[ROW + 1] * rows, *[rest + 1][:rest])
        by_graph, plainly = [], []
        for order in (1, -1):
            by_graph += [_logits_of(runner, texts[::order], shape)]
            runner.recorded = None
            plainly += [_logits_of(runner, texts[::order])]
            runner.recorded = recorded
        compare(Reference([], plainly, reference.precision), by_graph)


def _logits_of(runner: PackedRunner, texts: Sequence[list[int]], shape: Shape | None = None) -> Tensor:
    """The logits at every position of the texts, computed in one step, as far as there is room. ``shape``: that of the
    recorded step to take."""
    streams = [text for tokens in texts if runner.admit(text := Text(tokens))]
    step = Step(streams, [text.pending for text in streams])
    try:
        run = runner.prepare_recorded(step, shape) if shape else runner.prepare(step)
        return run().float().clone()  # since the next step may reuse the tensor
    finally:
        for text in streams:
            runner.release(text, keep=False)


def _check_texts(runner: SlotRunner | PackedRunner, reference: Reference, orders: Sequence[int]) -> None:
    *early, last = reference.texts
    for order in orders:
        late = Text(last, SHARED, reference.adapters[-1])
        texts: list[Stream] = [*(Text(text, 1, reference.adapters[i]) for i, text in enumerate(early)), late]
        got = run(runner, texts[:-1][::order], late)
        compare(reference, [got[text] for text in texts])


@torch.inference_mode()
def check_caches(runner: CacheRunner, model: PreTrainedModel, adapter: str = "") -> None:
    """Prove the model's own caches, with an adapter or without. Where streams run alone, the texts follow each other.

    Raises UnsupportedModel where they disagree with the model's own forward pass, or where that sees later tokens.
    """
    if "lsh" in getattr(model.config, "attn_layers", ()):
        raise UnsupportedModel("its attention chooses at random what it sees")
    first, second = _random_texts(model, 9, 5)
    prefixed = model.config.model_type in PREFIX_LM
    given = GIVEN if prefixed else (1, 1)
    texts: list[Stream] = [
        Text(first, given[0], adapter),
        Text(second, given[1], adapter),
        Text(first + second, len(first), adapter),
    ]
    try:
        with runner.adapters.alone(adapter):
            own = [_own_logits(model, text) for text in texts]
    except Exception as error:  # the model's code can raise anything
        raise UnsupportedModel(why_refused(error, "its own code does not run on text alone")) from error
    precision = precision_of(model)
    unlike = 0 if prefixed else _differing(own[2][: len(own[0])], own[0], precision)
    if unlike > FORGIVEN[precision] * len(own[0]):
        raise UnsupportedModel("its attention sees the tokens that follow, so it cannot continue a text")
    got: dict[Stream, list[Tensor]] = {text: [] for text in texts}
    waiting, counts = list(texts), itertools.chain((5, 1), itertools.repeat(1))
    while waiting or runner.active:
        # The last text waits for the cache of the first.
        while waiting and (waiting != texts[2:] or not runner.active) and runner.admit(waiting[0]):
            del waiting[0]
        for text in list(runner.active):
            count = min(text.pending, next(counts))
            logits = runner.prepare(Step([text], [count]))().float()
            got[text] += logits[: text.wanted(count)].unbind()
            text.computed += count
            if text.pending == 0:
                runner.release(text)
    compare(Reference([text.tokens for text in texts], own, precision), list(got.values()))


def _own_logits(model: PreTrainedModel, text: Stream) -> Tensor:
    """The logits ``[tokens - 1, vocabulary]`` of one forward pass, with the positions that generate gives: RoBERTa's
    own begin elsewhere. A prefix LM's own positions are right."""
    ids = torch.tensor([text.tokens[:-1]], device=input_device(model))
    more = {}
    if model.config.model_type in PREFIX_LM:
        more["token_type_ids"] = token_types(ids, text.prompt_length)
    elif accepts_positions(model):
        more["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
    logits: Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return logits[0].float()


def run(runner: SlotRunner | PackedRunner, texts: Sequence[Stream], late: Stream) -> dict[Stream, list[Tensor]]:
    """Run the texts, and ``late`` once another row has computed what it shares. Returns each one's logits."""
    got: dict[Stream, list[Tensor]] = {text: [] for text in (*texts, late)}
    for text in texts:
        runner.admit(text)
    schedule = itertools.cycle(((0, 7), (0, 1), (1, 4)))
    while runner.active:
        if late.computed == 0 and runner.shared_prefix(late)[0] == SHARED - 1:
            runner.admit(late)
        first, most = next(schedule)
        rows = runner.active[min(first, len(runner.active) - 1) :]
        counts = [min(text.pending, most) for text in rows]
        # Copied, since a step may reuse the tensor it returns.
        logits = runner.prepare(Step(rows, counts))().float().clone()
        for text, count in zip(rows, counts, strict=True):
            wanted = text.wanted(count)
            got[text] += logits[:wanted].unbind()
            logits = logits[wanted:]
            text.computed += count
        for text in rows:
            if text.pending == 0:
                runner.release(text, keep=False)  # nothing of it is left for a second run
    return got


def compare(reference: Reference, got: Sequence[Sequence[Tensor] | Tensor]) -> None:
    """Raise UnsupportedModel where the logits of the texts are not the reference's."""
    wrong = total = 0
    for theirs, ours in zip(reference.logits, got, strict=True):
        wrong += _differing(
            theirs[-len(ours) :], torch.stack(list(ours)), reference.precision
        )  # reused tokens have no logits
        total += len(ours)
    if wrong > total * FORGIVEN[reference.precision]:
        raise UnsupportedModel(f"{wrong} of {total} positions differ from the model's own forward pass")


def _differing(own: Tensor, ours: Tensor, dtype: torch.dtype) -> int:
    """At how many positions logits ``[positions, vocabulary]`` are too far from the model's own."""
    spread = (own - own.mean(-1, keepdim=True)).norm(dim=-1)
    distance = (own - ours).norm(dim=-1) / spread.clamp(min=1e-9)
    return int((~(distance < AGREEMENT[dtype])).sum())
