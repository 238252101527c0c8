"""The runner of encoder-decoder models: slots for the targets, and each stream's source beside its slot.

The model's own code runs unchanged. It gets an EncoderDecoderCache whose cross-attention part is marked as filled, so
it computes the new tokens only. Two kinds of models count positions by the length of the cache, the same for all
rows: T5 and its relatives for the bias that they add to attention, BART and its relatives for the embedding of
positions. Both are looked up by each row's own positions instead.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from lmtp.runners import selfcheck
from lmtp.runners.compiled import CompiledStep
from lmtp.runners.model import Limits, UnsupportedModel, input_device, only_wanted, why_refused
from lmtp.runners.selfcheck import Reference
from lmtp.runners.slot_runner import SlotCache, SlotRunner, SlotStep
from lmtp.runners.slots import MIN_TOKENS, Memory, check_budget
from lmtp.runners.sources import GIVEN_BACK, Encoder, EncoderOutput, Sources
from lmtp.runners.step import SourceInputs, Step, StepInputs, Stream

STATES_SHARE = 8
"""One part in this many of the memory for sources is for encoded ones that no stream uses."""


class SourceCache(Cache):
    """The cross-attention part of the Transformers cache of one step: keys and values that nothing is added to."""

    def __init__(self, sources: SourceInputs) -> None:
        super().__init__(layers=[])
        rows, _, _, columns = sources.mask.shape
        for keys, values in zip(sources.keys, sources.values, strict=True):
            layer = DynamicLayer()
            layer.keys, layer.values = (each.narrow(0, 0, rows).narrow(2, 0, columns) for each in (keys, values))
            layer.is_initialized = True
            self.layers.append(layer)


class EncoderDecoderStep(SlotStep):
    """The decoder's forward pass over slots."""

    def __init__(self, model: PreTrainedModel, limits: Limits, width: int) -> None:
        """``width``: numbers of the encoder's output for a token.

        Raises UnsupportedModel for a model whose layers or positions cannot work over slots."""
        super().__init__(model)
        self._accepts_positions = "decoder_position_ids" in inspect.signature(model.forward).parameters
        decoder: nn.Module = model.get_decoder()
        self._width = width
        self._masks_single_tokens = model.config.model_type != "led"
        self._biased: list[Any] = [
            module for module in decoder.modules() if getattr(module, "has_relative_attention_bias", False)
        ]
        self._embedding = getattr(decoder, "embed_positions", None)
        self._table: Tensor | None = None
        self._uncounted: int | None = None
        if self._embedding is not None:
            self._read_positions(decoder, limits)

    def _read_positions(self, decoder: nn.Module, limits: Limits) -> None:
        """Read the table of positions ``[context, width]``. M2M100 and its relatives give padding no position: the
        table then ends with what they add to it."""
        padding = getattr(self.model.config, "pad_token_id", None)
        other = 1 if padding == 0 else 0
        self._table = self._added(decoder, [other] * limits.context)
        if padding is not None and limits.context > 1:
            behind = self._added(decoder, [padding, other])
            if torch.equal(behind[1], self._table[0]):
                self._uncounted = padding
                self._table = torch.cat([self._table, behind[:1]])

    @torch.inference_mode()
    def _added(self, decoder: nn.Module, tokens: list[int]) -> Tensor:
        """What the decoder adds to the input ``[tokens, width]`` for its positions: it runs as far as that."""
        assert self._embedding is not None
        device = input_device(self.model)
        ids = torch.tensor([tokens], device=device)
        nothing = torch.zeros(1, 1, 1, 1, dtype=self.model.dtype, device=device)

        def seize(_: nn.Module, __: object, output: Tensor) -> None:
            raise _Seized(output)

        handle = self._embedding.register_forward_hook(seize)
        try:
            decoder(
                input_ids=ids,
                attention_mask=nothing,
                encoder_hidden_states=nothing[0].expand(1, 1, self._width),
                encoder_attention_mask=nothing,
                use_cache=False,
            )
        except _Seized as seized:
            return seized.output.reshape(len(tokens), -1)
        finally:
            handle.remove()
        raise UnsupportedModel("its decoder does not use its embedding of positions")

    def place(self, inputs: StepInputs, streams: Sequence[Stream]) -> StepInputs:
        """The inputs with each token's place in the table of positions, where padding is not counted.

        Transformers counts it after all once a text is cached, so that its results depend on how a text is cut: this
        is what it computes of a whole text.
        """
        if self._table is None or self._uncounted is None:
            return inputs
        device = inputs.ids.device
        padding = inputs.ids == self._uncounted
        before = torch.tensor([stream.tokens[: stream.computed].count(self._uncounted) for stream in streams])
        counted = inputs.positions - before.to(device)[:, None] - padding.cumsum(1)
        return inputs._replace(positions=torch.where(padding, self._table.shape[0] - 1, counted.clamp(min=0)))

    def run(self, inputs: StepInputs, sources: SourceInputs) -> Tensor:
        """The logits ``[wanted, vocabulary]`` at the wanted positions of the targets."""
        if not self._masks_single_tokens and inputs.ids.shape[1] == 1:
            inputs = _widened(inputs)
        rows, q = inputs.ids.shape
        columns = inputs.masks[0].shape[3]
        torch._check(rows <= inputs.keys[0].shape[0])
        torch._check(columns < inputs.keys[0].shape[2])
        torch._check(rows <= sources.keys[0].shape[0])
        torch._check(sources.mask.shape[3] < sources.keys[0].shape[2])
        device = inputs.ids.device
        more = {"decoder_position_ids": inputs.positions} if self._accepts_positions else {}
        unread = torch.zeros(1, 1, 1, dtype=self.model.dtype, device=device)
        mask = dict(zip(self.rules, inputs.masks, strict=True)) if len(inputs.masks) > 1 else inputs.masks[0]
        with only_wanted(self.model, inputs.wanted), self._own_positions(inputs.positions):
            output = self.model(
                encoder_outputs=EncoderOutput(unread.expand(rows, sources.mask.shape[3], self._width)),
                attention_mask=sources.mask.expand(rows, 1, q, -1),
                decoder_input_ids=inputs.ids,
                decoder_attention_mask=mask,
                past_key_values=EncoderDecoderCache(SlotCache(inputs, columns), SourceCache(sources)),
                use_cache=True,
                **more,
            )
        logits: Tensor = output.logits
        return logits[0]

    @contextlib.contextmanager
    def _own_positions(self, positions: Tensor) -> Iterator[None]:
        """Let every row count its own positions ``[rows, q]``."""
        with contextlib.ExitStack() as stack:
            if self._embedding is not None and self._table is not None:
                added = self._table[positions.to(self._table.device)]
                stack.callback(self._embedding.register_forward_hook(lambda *_: added).remove)
            for module in self._biased:
                module.compute_bias = functools.partial(_bias, module.compute_bias, positions)
                stack.callback(delattr, module, "compute_bias")  # the class's own is seen again
            yield


def _widened(inputs: StepInputs) -> StepInputs:
    """The same step of one token a row, with padding behind each."""
    ids, positions, masks = (
        inputs.ids.expand(-1, 2),
        inputs.positions.expand(-1, 2),
        [mask.expand(-1, -1, 2, -1) for mask in inputs.masks],
    )
    unread = torch.full_like(inputs.writes, inputs.keys[0].shape[2] - 1)
    writes = torch.cat([inputs.writes, unread], dim=1)
    return inputs._replace(ids=ids, positions=positions, masks=masks, writes=writes, wanted=inputs.wanted * 2)


class _Seized(Exception):
    """Ends a forward pass that has done what it was for."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


def _bias(
    compute_bias: Callable[..., Tensor], positions: Tensor, query_length: int, key_length: int, **_: Any
) -> Tensor:
    """T5's relative bias ``[rows, heads, q, columns]`` for queries at these positions ``[rows, q]``."""
    # The last of key_length positions looks back at all of them: index i is the bias at distance key_length - 1 - i.
    by_distance = compute_bias(1, key_length, past_seen_tokens=key_length - 1)[0, :, 0].flip(-1)
    columns = torch.arange(key_length, device=by_distance.device)
    distance = (positions.to(by_distance.device)[:, :, None] - columns).clamp_(0, key_length - 1)
    return by_distance[:, distance].transpose(0, 1)


class EncoderDecoderRunner(SlotRunner):
    """Slots for targets, which also encode the sources of their streams."""

    step: EncoderDecoderStep

    def __init__(
        self,
        step: EncoderDecoderStep,
        memory: Memory,
        sources: Sources,
        budget: int,
        max_slots: int,
        context: int,
        fast: CompiledStep | None = None,
        reason: str = "",
    ) -> None:
        """``budget`` is that of the targets. The other arguments are those of SlotRunner."""
        super().__init__(step, memory, budget, max_slots, context, fast, reason)
        self.description = "slots, encoder and decoder" + (f", {fast.description}" if fast else "")
        self._compiled = fast
        self.longest_source = sources.longest
        self._sources = sources

    @override
    def admit(self, stream: Stream) -> bool:
        """See Runner.admit."""
        self.refusal = ""
        try:
            lengths = [len(other.source) for other in self.active]
            if len(lengths) >= self._max_slots or not self._sources.make_room([*lengths, len(stream.source)]):
                return False
            if self._reads_much(stream):
                self.refusal = "other prompts are encoded first"
                return False
        except torch.OutOfMemoryError as error:
            self.refusal = str(error).splitlines()[0]
            return False
        return super().admit(stream)

    def _reads_much(self, stream: Stream) -> bool:
        """Whether the next steps encode enough without this stream's source. Each is encoded at once."""
        before = self._sources.unread(self.active)
        after = self._sources.unread([*self.active, stream])
        limits = self.step_limits
        decoding = any(other.computed > other.reused for other in self.active)
        return 0 < before < after > (limits.busy_chunk if decoding else limits.chunk)

    @override
    def release(self, stream: Stream, keep: bool = True) -> None:
        """See Runner.release."""
        if not keep:
            self._sources.forget(stream)
        if stream.encoded is not None:
            stream.encoded = GIVEN_BACK
        super().release(stream, keep)

    @override
    def prepare(self, step: Step[Stream]) -> Callable[[], Tensor]:
        """See Runner.prepare."""
        inputs = self.step.place(self._inputs(step, masked=True), step.streams)
        return functools.partial(self._run, step.streams, inputs)

    @torch.inference_mode()
    def _run(self, streams: Sequence[Stream], inputs: StepInputs) -> Tensor:
        return (self._compiled or self.step.run)(inputs, self._sources.inputs(streams))


class EncoderDecoder:
    """An encoder-decoder model's step, proved against its own forward pass."""

    def __init__(self, model: PreTrainedModel, limits: Limits) -> None:
        """Raises UnsupportedModel where it fails the self-check."""
        try:
            self.encoder = Encoder(model, limits)
            self.step = EncoderDecoderStep(model, limits, self.encoder.width)
            self.own, self.cross = self.encoder.layers()
            self._pairs = _pairs(model, limits)
            self._reference = Reference(
                [target for _, target in self._pairs],
                [_own_logits(model, self.encoder, *pair) for pair in self._pairs],
                selfcheck.precision_of(model),
            )
            try:
                self.check()
            except Exception:  # the same
                self.encoder.together = False
                self.check()
        except Exception as error:  # the model's code can raise anything
            why = why_refused(error, "its own code takes no text alone, or no keys and values that lie in slots")
            raise UnsupportedModel(
                f"{type(model).__name__} cannot be served exactly: {why}; choose another encoder-decoder model."
            ) from error

    @torch.inference_mode()
    def check(self, fast: CompiledStep | None = None) -> None:
        """The self-check: interleaved targets of different sources. The last one begins as another one of its source
        does; one more has the same tokens and another source. Raises UnsupportedModel."""
        dtype = self.step.model.dtype
        memory, rows = Memory(self.own, dtype), Memory(self.cross, dtype)
        bytes_per_token = rows.bytes_per_token + self.encoder.bytes_per_token
        sources = Sources(self.encoder, rows, bytes_per_token * selfcheck.TOKENS, 2**20)
        budget = memory.bytes_per_token * selfcheck.TOKENS
        runner = EncoderDecoderRunner(self.step, memory, sources, budget, selfcheck.SLOTS, selfcheck.CONTEXT, fast)
        texts = [selfcheck.Text(target) for target in self._reference.texts[:-1]]
        late = selfcheck.Text(self._reference.texts[-1], given=selfcheck.SHARED)
        for text, (source, _) in zip([*texts, late], self._pairs, strict=True):
            text.source = source
        got = selfcheck.run(runner, texts, late)
        selfcheck.compare(self._reference, [got[text] for text in [*texts, late]])


def open_encoder_decoder(
    model: PreTrainedModel, limits: Limits, budget: int, max_slots: int, compiled: Path | None = None
) -> EncoderDecoderRunner:
    """The runner for an encoder-decoder model, with ``budget`` bytes for keys and values, half of it for sources.
    ``compiled``: where its compiled step is, if it exists.

    Raises UnsupportedModel where it fails the self-check.
    """
    proved = EncoderDecoder(model, limits)
    fast, reason = None, ""
    try:
        if compiled and compiled.exists() and model.device.type == "cpu":
            fast = CompiledStep(compiled)
            proved.check(fast)
    except Exception as error:  # fall back to the model's own code
        fast, reason = None, f"no faster step: {type(error).__name__}: {error}"
    memory = Memory(proved.own, model.dtype)
    rows = Memory(proved.cross, model.dtype)
    check_budget(budget, 2 * MIN_TOKENS * max(memory.bytes_per_token, rows.bytes_per_token), memory.total)
    states = budget // 2 // STATES_SHARE
    sources = Sources(proved.encoder, rows, budget // 2 - states, states)
    reason = selfcheck.with_tolerance(model, reason)
    return EncoderDecoderRunner(
        proved.step, memory, sources, budget - budget // 2, max_slots, limits.context, fast, reason
    )


SOURCES = (40, 1, 40)
"""Tokens of the self-check's sources. Those of equal length are encoded together."""


def _pairs(model: PreTrainedModel, limits: Limits) -> list[tuple[tuple[int, ...], list[int]]]:
    """The self-check's sources and targets."""
    assert limits.source is not None
    generator = np.random.default_rng(0)

    def some(vocabulary: int, size: int) -> list[int]:
        ids = np.setdiff1d(np.arange(vocabulary), [model.config.pad_token_id or 0])  # a plain pass may mask padding
        chosen: list[int] = generator.choice(ids, size).tolist()
        return chosen

    few = [tuple(some(limits.source.vocabulary, size)) for size in SOURCES]
    targets = [[limits.target_start[0], *some(limits.vocabulary, size)] for size in (5, 14, 9)]
    return [
        *zip(few, targets, strict=True),
        (few[2], targets[1]),
        (few[1], targets[1][: selfcheck.SHARED] + targets[2]),
    ]


@torch.inference_mode()
def _own_logits(model: PreTrainedModel, encoder: Encoder, source: Sequence[int], target: Sequence[int]) -> Tensor:
    """What one plain forward pass returns."""
    encoder.reset()
    device = input_device(model)
    ids, decoder_ids = torch.tensor([source], device=device), torch.tensor([target[:-1]], device=device)
    logits: Tensor = model(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=False).logits
    return logits[0].float()
