"""Attention over packed tokens and one flat pool of keys and values.

It is a function of Transformers' AttentionInterface
(https://huggingface.co/docs/transformers/attention_interface), so the model's own code calls it. On CUDA it is
FlashAttention (Dao 2023) as PyTorch ships it: the operation under `torch.nn.attention.varlen.varlen_attn`, without that
function's extra kernel. Elsewhere it is a reference of the operation's meaning.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lmtp.runners.model import UnsupportedModel
from lmtp.runners.slots import Layer

NAME = "lmtp_packed"
"""The function's name among Transformers' attention functions. None of its mask functions has this name, so the model
makes no masks."""

MAX_HEAD = 256
HEAD_MULTIPLE = 8
DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)
"""What FlashAttention takes: head sizes, dtypes and the least compute capability."""

FEW_ROWS, LONG = 4, 1024
"""Up to how many single queries of more columns pay for groups of two equal heads, where a model has no groups. On an
H100, with 32 heads, 4,000 columns take 36 µs instead of 122 with one row, 105 instead of 133 with four."""

HARMLESS = {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "deterministic", "cache_position"}
"""Arguments of attention functions that change nothing for a decoder that infers."""


class Rows(NamedTuple):
    """Where attention finds the queries and the columns of each row. A row is some tokens in succession of a stream."""

    queries: Tensor
    """int32 ``[rows + 1]``: row i has the queries ``queries[i]`` to ``queries[i + 1]`` of the step."""
    first: Tensor
    """int32 ``[rows + 1]``: the place in the pool where row i's stream begins; the last number means nothing."""
    lengths: Tensor
    """int32 ``[rows]``: how many tokens of the stream a row's last query sees, itself included."""
    max_queries: int
    max_length: int

    def within(self, window: int) -> "Rows":
        """The rows of one query each, that begin with the first token that a window shows to it."""
        hidden = (self.lengths - window).clamp(min=0)
        first = self.first + functional.pad(hidden, (0, 1))
        return self._replace(first=first, lengths=self.lengths - hidden, max_length=min(self.max_length, window))


@dataclass
class Pass:
    """One forward pass: where its rows are, and what its attention may be asked for."""

    rows: Rows
    windows: Mapping[int, int]
    """How many tokens each layer sees, by its index; 0: all of them."""
    pool: Sequence[Tensor]
    """Each layer's keys in the pool."""
    calls: int = 0
    places: set[int] = field(init=False)
    _within: dict[int, Rows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = {keys.data_ptr() for keys in self.pool}

    def rows_within(self, window: int) -> tuple[Rows, int]:
        """The rows for the layers of a window, and the window that is left to the kernel.

        A window that hides nothing is none. A single query's window only moves the beginning of its row. With a window
        the kernel reads keys and values once for each query head instead of once for each group.
        """
        if not window or self.rows.max_length <= window:
            return self.rows, 0
        if self.rows.max_queries > 1:
            return self.rows, window
        if window not in self._within:
            self._within[window] = self.rows.within(window)
        return self._within[window], 0


_PASS: ContextVar[Pass] = ContextVar("_PASS")


class Attention:
    """A model's attention, exchanged for the one over the pool while a step runs."""

    def __init__(self, model: PreTrainedModel, kinds: Sequence[str], layers: Sequence[Layer]) -> None:
        """``kinds`` are the model's kinds of attention layers, ``layers`` what each keeps. Raises UnsupportedModel
        where they, or the device, are not what FlashAttention takes."""
        _check(model, kinds, layers)
        found = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
        config = model.config.get_text_config(decoder=True)
        self._configs = list({**found, id(model.config): model.config, id(config): config}.values())
        self._windows = _windows(config)
        self._layers = len(layers)

    @contextlib.contextmanager
    def over(self, rows: Rows, pool: Sequence[Tensor]) -> Iterator[None]:
        """Let the model's code attend over the pool. Raises UnsupportedModel if it never asked for attention."""
        # Not by set_attn_implementation, which walks through all modules.
        before = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = NAME
        one = Pass(rows, self._windows, pool)
        token = _PASS.set(one)
        try:
            yield
        finally:
            _PASS.reset(token)
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name
        if one.calls < self._layers:
            raise UnsupportedModel("its attention does not go through Transformers' AttentionInterface")


def _check(model: PreTrainedModel, kinds: Sequence[str], layers: Sequence[Layer]) -> None:
    if not model._can_set_attn_implementation():
        raise UnsupportedModel("its attention does not go through Transformers' AttentionInterface")
    if others := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"FlashAttention has no {', '.join(sorted(others))}")
    if len({layer.device for layer in layers}) != 1:
        raise UnsupportedModel("its layers are on several devices")
    for layer in layers:
        if layer.key_dim != layer.value_dim:
            raise UnsupportedModel("its keys and values differ in size")
        size = layer.key_dim
        if size > MAX_HEAD or size % HEAD_MULTIPLE:
            raise UnsupportedModel(
                f"its heads are {size} numbers; FlashAttention takes multiples of {HEAD_MULTIPLE} to {MAX_HEAD}"
            )
    device = layers[0].device
    if device.type != "cuda":
        return
    if model.dtype not in DTYPES:
        raise UnsupportedModel(f"FlashAttention does not compute in {str(model.dtype).removeprefix('torch.')}")
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UnsupportedModel("FlashAttention needs a GPU of compute capability 8.0 or newer")
    if not torch.backends.cuda.is_flash_attention_available():
        raise UnsupportedModel("this PyTorch was built without FlashAttention")


def _windows(config: Any) -> dict[int, int]:
    """How many tokens each layer sees, by its index; 0: all of them. As slot_runner's masks have it."""
    window: int = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return dict.fromkeys(range(config.num_hidden_layers), window)
    return {i: window if kind == "sliding_attention" else 0 for i, kind in enumerate(kinds)}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: ``query`` is ``[1, heads, tokens, dim]``, ``key`` and ``value`` are a layer's
    pool ``[1, kv_heads, pool, dim]``. Returns ``[1, tokens, heads, dim]``.

    ``s_aux`` are attention sinks, one a head: a column that takes a share of the softmax and adds nothing.
    Raises UnsupportedModel for what FlashAttention does not compute.
    """
    one = _PASS.get()
    one.calls += 1
    unknown = [name for name, given in others.items() if name not in HARMLESS and given not in (None, False)]
    if attention_mask is not None:
        unknown.append("a mask of its own")
    if unknown:
        raise UnsupportedModel(f"its attention takes {', '.join(unknown)}")
    if others.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise UnsupportedModel("its attention sees the tokens that follow")
    if key.data_ptr() not in one.places:
        raise UnsupportedModel("its attention changes keys after they are stored")
    window = one.windows.get(getattr(module, "layer_idx", -1))
    if window is None or window != (sliding_window or 0):
        raise UnsupportedModel("its attention does not say which tokens a layer sees")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    output, logsumexp = flash(q, k, v, *one.rows_within(window), scale)
    if s_aux is not None:
        output = output * torch.sigmoid(logsumexp.t() - s_aux)[..., None].to(output.dtype)
    return output[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


def flash(query: Tensor, key: Tensor, value: Tensor, rows: Rows, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of packed queries ``[tokens, heads, dim]`` over a pool ``[pool, kv_heads, dim]``.

    Returns ``[tokens, heads, dim]`` and the natural log-sum-exp of the scores, float32 ``[heads, tokens]``.
    ``window``: how many tokens a query sees, itself included; 0: all of them.
    """
    # A single query sees all columns. Without causal and window the kernel groups the heads that share keys.
    single = rows.max_queries == 1
    if (
        single
        and not window
        and len(rows.lengths) <= FEW_ROWS
        and rows.max_length > LONG
        and query.shape[1] == key.shape[1]
    ):
        # Only for groups does the kernel divide a long row among the processors of a GPU.
        output, logsumexp = flash(query.repeat_interleave(2, 1), key, value, rows, window, scale)
        return output[:, ::2], logsumexp[::2]
    operation = torch.ops.aten._flash_attention_forward if query.device.type == "cuda" else reference
    output, logsumexp, *_ = operation(
        query,
        key,
        value,
        rows.queries,
        rows.first,
        rows.max_queries,
        rows.max_length,
        0.0,  # dropout
        not single and not window,
        False,
        scale=scale,
        window_size_left=window - 1 if window else -1,
        window_size_right=-1 if single and not window else 0,
        seqused_k=rows.lengths,
    )
    return output, logsumexp


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
    seqused_k: Tensor,
) -> tuple[Tensor, Tensor]:
    """What ``aten::_flash_attention_forward`` computes, by plain operations: its output and its log-sum-exp."""
    counts = cum_seq_q.diff()
    if int(counts.max()) > max_q or int(seqused_k.max()) > max_k:
        raise ValueError("a row is longer than max_q or max_k")
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    # Queries are aligned to the end of what their row sees.
    place = (seqused_k[row] - (cum_seq_q[1:][row] - torch.arange(len(query))))[:, None]
    column = torch.arange(int(seqused_k.max()))
    seen = (column < seqused_k[row][:, None]).clone()
    if is_causal or window_size_right >= 0:
        seen &= column <= place + max(window_size_right, 0)
    if window_size_left >= 0:
        seen &= column >= place - window_size_left
    index = torch.where(seen, cum_seq_k[row][:, None] + column, 0)
    queries = query.float().unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("tkgd,tckd->tkgc", queries, key[index].float()) * scale
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    # Unseen columns hold anything, even numbers that are none.
    values = torch.where(seen[..., None, None], value[index].float(), 0.0)
    output = torch.einsum("tkgc,tckd->tkgd", scores.softmax(-1), values)
    return output.flatten(1, 2).to(query.dtype), scores.logsumexp(-1).flatten(1).t()
