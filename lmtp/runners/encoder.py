"""The runner of encoders, which read a whole text at once: masked LMs and sequence classifiers.

It keeps nothing: a step runs the whole texts of its streams as one padded batch. Padding changes what some models
compute: FNet mixes all positions, and BigBird's blocks depend on the length. So the self-check decides whether texts
are padded, share a pass only with others of their length, or run alone.
"""

import bisect
import contextlib
import functools
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lmtp.runners.model import Limits, UnsupportedModel, in_words, input_device, only_wanted
from lmtp.runners.selfcheck import AGREEMENT, FORGIVEN, precision_of, with_tolerance
from lmtp.runners.step import Step, StepLimits, Stream

log = logging.getLogger(__name__)

MAX_STREAMS = 256
"""Streams that run at once. They hold no memory between steps."""

MAX_TOKENS = {"cpu": 2**10, "cuda": 2**14}
"""Tokens of a step with more than one text, padding included. On two cores more than 512 are no faster, as measured
with layers of BERT-base's size, and others wait longer."""

MAX_LOGITS = 2**26
"""Logits of one step with more than one text: 256 MB in float32."""

UNTOUCHED = 1e-5
"""How far logits may be from those beside other padding, relative to their spread: the same kernels compute them."""

CHECKED_PLACES = 16
"""About how many positions of each text the self-check compares."""

LONGEST_CHECKED = 1024
"""Tokens. The longest text of the self-check exceeds the window of local attention, if that is no longer."""

WINDOWS = ("attention_window", "local_attention", "sliding_window", "attention_chunk_size")
"""What configurations call the window of local attention, in tokens."""


class Text(NamedTuple):
    """A text to run, and the position of each row of logits that is wanted. Texts of different salts are run apart."""

    tokens: tuple[int, ...]
    places: tuple[int, ...]
    salt: object = Stream.SHARED


def _together(texts: Iterable[Text]) -> list[list[Text]]:
    return [list(texts)]


def _by_length(texts: Iterable[Text]) -> list[list[Text]]:
    def length(text: Text) -> int:
        return len(text.tokens)

    return [list(group) for _, group in itertools.groupby(sorted(texts, key=length), length)]


def _alone(texts: Iterable[Text]) -> list[list[Text]]:
    return [[text] for text in texts]


Batches = Callable[[Iterable[Text]], list[list[Text]]]
"""Which texts share a pass."""

WAYS: dict[str, Batches] = {
    "all texts of a step in one padded pass": _together,
    "texts of equal length in one pass": _by_length,
    "one text at a time": _alone,
}
"""The fastest comes first."""


class Forward:
    """The model's forward pass over whole texts."""

    def __init__(self, model: PreTrainedModel, limits: Limits) -> None:
        assert limits.head is not None
        self._model: Any = model
        self._head = limits.head
        self._device = input_device(model)
        self._pad = next(iter(_known_ids(model, "pad_token_id")), 0)
        accepted = inspect.signature(model.forward).parameters
        self._masks = "attention_mask" in accepted
        self._fixed = {"use_cache": False} if "use_cache" in accepted else {}
        self._mask = torch.empty(0)
        """That of the latest pass."""
        self._attention_type = getattr(model.base_model, "attention_type", None)

    def own(self, text: Text) -> Tensor:
        """The logits of one text as Transformers' pipelines compute them, in the form of `__call__`."""
        logits = self._run(torch.tensor([text.tokens]), torch.ones(1, len(text.tokens), dtype=torch.long))
        return self._classes(logits)[0] if self._head.labels else logits[0, list(text.places)]

    def __call__(self, texts: Sequence[Text]) -> list[Tensor]:
        """Run the texts in one pass. Returns the wanted logits ``[places, vocabulary]`` of each.

        A classifier's vocabulary is its labels, and one row is wanted. If its labels are independent, each has a row of
        its own: 0 for false, the logit for true.
        """
        lengths = [len(text.tokens) for text in texts]
        ids = np.full((len(texts), max(lengths)), self._pad, dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, : lengths[row]] = text.tokens
        mask = torch.from_numpy((np.arange(ids.shape[1]) < np.array(lengths)[:, None]).astype(np.int64))
        if self._head.labels:
            return list(self._classes(self._run(torch.from_numpy(ids), mask)))
        index = torch.tensor([row * ids.shape[1] + place for row, text in enumerate(texts) for place in text.places])
        with only_wanted(self._model, index):
            logits = self._run(torch.from_numpy(ids), mask)
        if logits.shape[:2] != (1, len(index)):  # MobileBERT reads its output layer's weights without calling it
            logits = logits.flatten(0, 1)[index.to(logits.device)][None]
        return list(logits[0].split([len(text.places) for text in texts]))

    @contextlib.contextmanager
    def other_padding(self) -> Iterator[None]:
        """Let the padding have other embeddings. Its ids stay, since some models find a text's end by them."""

        def change(_: nn.Module, args: Any, embedded: Any) -> Any:
            if not isinstance(embedded, Tensor):  # I-BERT's come with the scale of their integers
                return embedded
            mask = self._mask.to(embedded.device)
            if embedded.shape[:-1] != mask.shape:  # Longformer pads on
                mask = functional.pad(mask, (0, embedded.shape[1] - mask.shape[1]))
            return torch.where(mask[..., None] > 0, embedded, 1.0 - 3.0 * embedded)

        handle = self._model.get_input_embeddings().register_forward_hook(change)
        try:
            yield
        finally:
            handle.remove()

    @torch.inference_mode()
    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self._attention_type:  # a short text makes BigBird compute later ones by full attention, too
            self._model.base_model.set_attention_type(self._attention_type)
        self._mask = mask
        masks = {"attention_mask": mask.to(self._device)} if self._masks else {}
        logits: Tensor = self._model(input_ids=ids.to(self._device), **masks, **self._fixed).logits
        return logits

    def _classes(self, logits: Tensor) -> Tensor:
        """The logits ``[texts, labels]`` as rows ``[texts, rows, classes]``."""
        if self._head.independent:
            return torch.stack([torch.zeros_like(logits), logits], -1)
        return logits[:, None]


class EncoderRunner:
    """Runs whole texts, however few of their tokens a step takes: all are known from the beginning."""

    longest_source = 0

    def __init__(
        self, forward: Forward, limits: Limits, device: torch.device, way: str, reason: str, shortest: int = 1
    ) -> None:
        """``way``: one of WAYS. ``shortest``: the fewest tokens of a text that the model's code can read."""
        self.description = f"encoder, {way}"
        self.reason = reason
        self.refusal = ""
        self.longest = limits.context
        self.active: list[Stream] = []
        chunk = MAX_TOKENS.get(device.type, MAX_TOKENS["cpu"])
        logits = max(MAX_LOGITS // limits.vocabulary, limits.context)
        self.step_limits = StepLimits(chunk=chunk, busy_chunk=chunk, logits=logits, drafts=0, whole=True)
        self._forward = forward
        self._batches = WAYS[way]
        self._classes = 2 if limits.head and limits.head.independent else limits.classes
        self._shortest = shortest

    def shared_prefix(self, stream: Stream) -> tuple[int, int]:
        """See Runner.shared_prefix. What an encoder computes of a token depends on those after it."""
        return 0, 0

    def admit(self, stream: Stream) -> bool:
        """Let the stream run; False where too many run. They are in order of length, since neighbours share a step."""
        if len(self.active) >= MAX_STREAMS:
            return False
        stream.computed = stream.reused = 0
        bisect.insort(self.active, stream, key=lambda running: len(running.tokens))
        self._number()
        return True

    def release(self, stream: Stream, keep: bool = True) -> None:
        """See Runner.release."""
        del self.active[stream.slot]
        stream.slot = -1
        self._number()

    def _number(self) -> None:
        for slot, stream in enumerate(self.active):
            stream.slot = slot

    def prepare(self, step: Step[Stream]) -> Callable[[], Tensor]:
        """See Runner.prepare. Equal texts are run once."""
        texts = [
            (stream, Text(tuple(stream.tokens), tuple(stream.places(count)), stream.salt))
            for stream, count in zip(step.streams, step.counts, strict=True)
        ]
        return functools.partial(self._run, [(stream, text) for stream, text in texts if text.places])

    def _run(self, wanted: Sequence[tuple[Stream, Text]]) -> Tensor:
        got: dict[Text, Tensor] = {}
        problems: dict[Text, str] = {}
        for batch in self._batches(dict.fromkeys(text for _, text in wanted)) if wanted else []:
            try:
                got.update(zip(batch, self._forward(batch), strict=True))
            except Exception:  # BART's classifiers refuse texts with different numbers of end tokens side by side
                for text in batch:
                    try:
                        (got[text],) = self._forward([text])
                    except Exception as error:  # of BART's, any text without an end token
                        problems[text] = self._problem(text, error)
        like = next(iter(got.values()), torch.empty(0))
        for stream, text in wanted:
            if text in problems:
                stream.problem = problems[text]
                got[text] = like.new_full((len(text.places), self._classes), math.nan)
        return torch.cat([got[text] for _, text in wanted]) if wanted else torch.empty(0)

    def _problem(self, text: Text, error: Exception) -> str:
        """Why a text could not be computed, in one sentence."""
        log.exception("a text failed")
        if len(text.tokens) < self._shortest:
            return f"its code cannot read a text of {len(text.tokens)} tokens; give at least {self._shortest}."
        return (str(error).splitlines() or [type(error).__name__])[0]


def open_encoder(model: PreTrainedModel, limits: Limits) -> EncoderRunner:
    """The runner with the fastest way that passes the self-check: uneven texts, and two of equal length, against each
    alone through the model. In half precision rounding could hide what padding changes; so it is changed, too.

    Raises UnsupportedModel if not even one text at a time does: then equal texts have different answers.
    """
    forward = Forward(model, limits)
    texts = _random_texts(model, limits)
    try:
        own = torch.cat([forward.own(text) for text in texts])
    except Exception as error:
        raise UnsupportedModel(f"its own code fails: {type(error).__name__}: {error}; choose another model.") from error
    reason, precision = "", precision_of(model)
    for way, batches in WAYS.items():
        try:
            got = _answers(forward, batches, texts)
            wrong = _differing(own, got, AGREEMENT[precision])
            if wrong > len(own) * FORGIVEN[precision]:
                raise UnsupportedModel(f"{wrong} of {len(own)} answers differ from the model's own forward pass")
            with forward.other_padding():
                if wrong := _differing(got, _answers(forward, batches, texts), UNTOUCHED):
                    raise UnsupportedModel(f"what stands in the padding changes {wrong} of {len(own)} answers")
        except Exception as error:  # whatever the model's code raises, try the next way
            reason = f"not {way}: {in_words(error)}"
        else:
            shortest = _shortest(forward, texts[0])
            return EncoderRunner(forward, limits, model.device, way, with_tolerance(model, reason), shortest)
    raise UnsupportedModel(f"its own code does not answer a text the same way twice ({reason}); choose another model.")


def _random_texts(model: PreTrainedModel, limits: Limits) -> list[Text]:
    """Random texts without padding, each with one end of sequence, which some classifiers look for."""
    config = model.config.get_text_config()
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    windows = [getattr(layer, name, None) or 0 for layer in layers for name in WINDOWS]
    local = max(max(window) if isinstance(window, list | tuple) else int(window) for window in windows)
    if getattr(config, "attention_type", None) == "block_sparse":
        local = (5 + 2 * config.num_random_blocks) * config.block_size
    ends = _known_ids(model, "eos_token_id")[:1]
    usual = np.setdiff1d(np.arange(_vocabulary(model)), [*ends, *_known_ids(model, "pad_token_id")])
    generator = np.random.default_rng(0)
    texts = []
    for length in (5, 14, 14, min(local + 90, LONGEST_CHECKED)):
        length = min(length, limits.context) - len(ends)
        tokens = (*generator.choice(usual, size=length).tolist(), *ends)
        texts.append(Text(tokens, tuple(range(0, len(tokens), -(-len(tokens) // CHECKED_PLACES)))))
    return texts


def _shortest(forward: Forward, text: Text) -> int:
    """The fewest of the last tokens of a text that can be read: Funnel's pooling needs several."""
    for length in range(1, len(text.tokens)):
        with contextlib.suppress(Exception):  # whatever the model's code raises
            forward.own(Text(text.tokens[-length:], (0,)))
            return length
    return len(text.tokens)


def _vocabulary(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(next(embeddings.parameters()).shape[0])


def _known_ids(model: PreTrainedModel, name: str) -> list[int]:
    """The token ids that the configuration has under a name, as far as the vocabulary has them."""
    ids = getattr(model.config.get_text_config(), name, None)
    ids = [ids] if isinstance(ids, int) else ids or []
    return [token for token in ids if 0 <= token < _vocabulary(model)]


def _answers(forward: Forward, batches: Batches, texts: Sequence[Text]) -> Tensor:
    got = {text: logits for batch in batches(texts) for text, logits in zip(batch, forward(batch), strict=True)}
    return torch.cat([got[text] for text in texts])


def _differing(own: Tensor, got: Tensor, most: float) -> int:
    """How many of the logits ``[rows, classes]`` differ by more than this part of their spread."""
    own, got = own.float(), got.float()
    spread = (own - own.mean(-1, keepdim=True)).norm(dim=-1).mean()
    return int((~((own - got).norm(dim=-1) <= most * spread)).sum())
