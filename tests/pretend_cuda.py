"""A stand-in for a CUDA device: its tensors lie on the CPU and say that they are on cuda:0.

It finds without a GPU what a GPU would object to: operations that mix devices, operations that wait for the device
(`Device.log`), what a CUDA graph's capture forbids, and memory that a graph reads after it was freed. It says nothing of
kernels: operations run as the CPU's.
"""

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import PreTrainedModel

from lmtp.runners import flash

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
MEMORY = 2**24
"""Bytes that the device says it has."""

VALUES = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
"""Operations whose result, or its size, the host needs: it waits for the device."""

INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Operations that take indices from the host, and copy them."""

NO_LAUNCH = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten._unsafe_view.default, aten.lift_fresh.default,
}  # fmt: skip


class Event(NamedTuple):
    """What the device was asked for: a launch, a replay, a copy that nobody waits for, or a sync."""

    kind: str
    operation: str


class CudaTensor(torch.Tensor):
    """A tensor on the device. For PyTorch's native code it is a wrapper on the CPU; for Python it is on cuda:0."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls: type["CudaTensor"], inner: Tensor) -> "CudaTensor":
        # A view of a tensor that is none of inference mode has to be none either. The guard ends with its last name.
        guard = torch._C._InferenceMode(False)
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        del guard
        made.wrapped = inner
        DEVICE.remember(made)
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.wrapped})"

    def data_ptr(self) -> int:
        return self.wrapped.data_ptr()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return DEVICE.run(func, args, kwargs or {})


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors_in(values: Any) -> list[Tensor]:
    """The tensors among an operation's arguments or results."""
    found: list[Tensor] = []
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | type({}.values())):
            left += reversed(value)
    return found


def _inner(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.wrapped
    return type(value)(map(_inner, value)) if type(value) in (list, tuple) else value


def _outer(value: Any, same: dict[int, CudaTensor]) -> Any:
    """The results of an operation, as tensors of the device; those that it was given, as they were given."""
    if isinstance(value, Tensor):
        return same[id(value)] if id(value) in same else CudaTensor(value)
    return type(value)(_outer(each, same) for each in value) if type(value) in (list, tuple) else value


@functools.cache
def _is_composite(func: OpOverload) -> bool:
    return func not in ATOMIC and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def _on_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Device:
    """What was asked of the device, and whether a capture is on."""

    def __init__(self) -> None:
        self.alive: Counter[int] = Counter()
        """How many tensors of each storage the program holds."""
        self._references: dict[weakref.ref[CudaTensor], int] = {}
        self.reset()

    def reset(self) -> None:
        """Begin with an empty log, and nothing recorded."""
        self.log: list[Event] = []
        self.failed = False
        """Whether every call fails from now on, as after an assertion in a kernel."""
        self.recording: CUDAGraph | None = None
        self.recorded: list[CUDAGraph] = []
        self.stream = Stream()
        self.freed = 0
        """How often the caching allocator was emptied."""
        self.allocating: object = None
        """The pool that memory is taken from while, or after, a capture."""

    def remember(self, made: CudaTensor) -> None:
        """The program holds another tensor."""
        key = _storage(made.wrapped)
        self.alive[key] += 1
        self._references[weakref.ref(made, self._forget)] = key

    def _forget(self, reference: "weakref.ref[CudaTensor]") -> None:
        key = self._references.pop(reference)
        self.alive[key] -= 1
        if not self.alive[key]:
            del self.alive[key]

    def of_kind(self, kind: str) -> list[str]:
        """The operations of a kind, in order."""
        return [event.operation for event in self.log if event.kind == kind]

    def note(self, kind: str, operation: object) -> None:
        """Log an event. Raises once the device has failed, and in a capture, which allows no sync."""
        if self.failed:
            raise RuntimeError("CUDA error: device-side assert triggered")
        self.log.append(Event(kind, str(operation)))
        if kind == "sync" and self.recording:
            self.recording.failed = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {operation}")

    def copy(self, host: Tensor, non_blocking: bool, operation: object) -> None:
        """Log a copy between the host's tensor and the device. Only that of pinned memory can go on by itself."""
        pinned = non_blocking and getattr(host, "pretends_pinned", False)
        self.note("copy" if pinned else "sync", operation)

    def run(self, func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the wrapped tensors."""
        tensors = _tensors_in((args, kwargs.values()))
        ours = [each for each in tensors if isinstance(each, CudaTensor)]
        others = [each for each in tensors if not isinstance(each, CudaTensor)]
        to_cuda = _on_cuda(kwargs.get("device"))
        inner_args = [_inner(each) for each in args]
        inner_kwargs = {name: _inner(each) for name, each in kwargs.items()}
        if to_cuda:
            inner_kwargs["device"] = torch.device("cpu")
        if not ours and not to_cuda:
            return func(*inner_args, **inner_kwargs)
        to_host = bool(ours) and kwargs.get("device") is not None and not to_cuda
        if to_host:
            self.note("sync", func)
            return func(*inner_args, **inner_kwargs)
        self._check(func, args, kwargs, ours, others)
        if not func.is_view and func not in NO_LAUNCH:
            self.note("launch", func)
        run = INSTEAD.get(func, func)
        out = run(*inner_args, **inner_kwargs)
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            return out
        if func is aten.copy_.default and not isinstance(args[0], CudaTensor):
            return args[0]
        if self.recording:
            self.recording.add(run, inner_args, inner_kwargs, out, ours)
        return _outer(out, {id(tensor.wrapped): tensor for tensor in ours})

    def _check(
        self, func: OpOverload, args: Any, kwargs: dict[str, Any], ours: list[CudaTensor], others: list[Tensor]
    ) -> None:
        if func in VALUES:
            self.note("sync", func)
        elif func is aten.copy_.default and others:
            if isinstance(args[0], CudaTensor):
                self.copy(args[1], len(args) > 2 and bool(args[2]), func)
            else:
                self.copy(args[0], len(args) > 2 and bool(args[2]), func)
        elif func is aten._to_copy.default and others:
            self.copy(args[0], bool(kwargs.get("non_blocking")), func)
        elif func in INDEXING:
            indices = [each for each in args[1] if each is not None]
            if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
                self.note("sync", f"{func} by a mask")
            if any(not isinstance(each, CudaTensor) for each in indices):
                self.note("sync", f"{func} by indices of the host")
        elif ours and any(other.dim() for other in others):
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} got one on cpu and one on cuda:0"
            )


def _flash(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    nothing = torch.empty(0)
    return (*flash.reference(*args, **kwargs), nothing, nothing, nothing)


def _histogram(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.histc(values.float(), *args, **kwargs).to(values.dtype)


INSTEAD: dict[Any, Callable[..., Any]] = {
    aten._flash_attention_forward.default: _flash,
    aten.histc.default: _histogram,
}
"""What the CPU has no kernel for, at all or for the dtype."""

ATOMIC = {aten.scaled_dot_product_attention.default, aten.rms_norm.default}
"""Composite operations that are one kernel on CUDA."""


class Dispatch(TorchDispatchMode):
    """Brings every operation of this thread to the device."""

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return DEVICE.run(func, args, kwargs)


class Functions(TorchFunctionMode):
    """Does for the device what PyTorch's bindings do before an operation is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _on_cuda(kwargs.get("device")):
            return _move(func(*args, **{**kwargs, "device": "cpu"}), CUDA, None, False)
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func is torch.Tensor.type_as:
            return self._to(*args)
        if func is torch.Tensor.cpu:
            return _move(args[0], torch.device("cpu"), None, False)
        if func is torch.Tensor.cuda:
            return _move(args[0], CUDA, None, bool(kwargs.get("non_blocking")))
        if func is torch.Tensor.tolist and isinstance(args[0], CudaTensor):
            return _move(args[0], torch.device("cpu"), None, False).tolist()
        if func is torch.Tensor.numpy and isinstance(args[0], CudaTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy.")
        if func is torch.empty and kwargs.pop("pin_memory", False):
            made: Any = torch.empty(*args, **kwargs)
            made.pretends_pinned = True
            return made
        if func is torch.Tensor.pin_memory:
            with _disable_current_modes():
                pinned = args[0].clone()
            pinned.pretends_pinned = True
            return pinned
        return func(*args, **kwargs)

    @staticmethod
    def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        as_dtype: list[Any] = [each.dtype if isinstance(each, CudaTensor) else each for each in args]
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*as_dtype, **kwargs)
        if args and isinstance(args[0], Tensor):  # another tensor's device
            device = CUDA if isinstance(args[0], CudaTensor) else torch.device("cpu")
        return _move(tensor, device, dtype, non_blocking)


def _move(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool) -> Tensor:
    """``Tensor.to``."""
    dtype = dtype or tensor.dtype
    on_cuda = isinstance(tensor, CudaTensor)
    to_cuda = on_cuda if device is None else _on_cuda(device)
    if on_cuda == to_cuda:
        return tensor if dtype is tensor.dtype else aten._to_copy.default(tensor, dtype=dtype)
    if to_cuda:
        DEVICE.copy(tensor, non_blocking, "to")
        with _disable_current_modes():
            return CudaTensor(tensor.detach().to(dtype, copy=True))
    DEVICE.note("sync", "to")
    assert isinstance(tensor, CudaTensor)
    with _disable_current_modes():
        return tensor.wrapped.to(dtype, copy=True)


class CUDAGraph:
    """In place of torch.cuda.CUDAGraph: the operations of a capture, which a replay repeats on the same memory."""

    def __init__(self) -> None:
        self.failed = False
        self._steps: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        self._own: set[int] = set()
        self._outside: set[int] = set()
        self._kept: list[Any] = []
        self.replays = 0

    def add(self, run: Callable[..., Any], args: Any, kwargs: dict[str, Any], out: Any, ours: list[CudaTensor]) -> None:
        """Record one operation."""
        self._outside |= {_storage(tensor.wrapped) for tensor in ours} - self._own
        given = {_storage(each) for each in _tensors_in((args, kwargs.values()))}
        made = _tensors_in(out)
        fresh = [each for each in made if _storage(each) not in given]
        self._own |= {_storage(each) for each in fresh}
        self._kept.append((args, kwargs, out))
        if fresh or not made or getattr(run, "is_view", False) is False:
            self._steps.append((run, args, kwargs, fresh))

    def end(self) -> None:
        """End the capture. On a GPU nothing has been computed yet."""
        for *_, fresh in self._steps:
            for tensor in fresh:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def replay(self) -> None:
        """Repeat the operations. Raises for memory that the program has freed since."""
        if freed := [storage for storage in self._outside if not DEVICE.alive[storage]]:
            raise RuntimeError(f"CUDA error: an illegal memory access: the graph reads {len(freed)} freed tensors")
        self.replays += 1
        DEVICE.note("replay", f"{len(self._steps)} operations")
        with _disable_current_modes(), torch.inference_mode():
            for run, args, kwargs, fresh in self._steps:
                made = _tensors_in(run(*args, **kwargs))
                if fresh:
                    for old, new in zip(fresh, made, strict=True):
                        old.copy_(new)


class Stream:
    """In place of torch.cuda.Stream."""

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass

    def synchronize(self) -> None:
        DEVICE.note("sync", "stream")


@contextlib.contextmanager
def _graph(recorded: CUDAGraph, pool: Any = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
    """In place of torch.cuda.graph. As there, a capture that has failed leaves stream and allocator as they are in it."""
    before, DEVICE.stream = DEVICE.stream, stream or Stream()
    DEVICE.recording, DEVICE.allocating = recorded, pool
    try:
        yield
    finally:
        DEVICE.recording = None
        if recorded.failed:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        DEVICE.stream, DEVICE.allocating = before, None
    recorded.end()
    DEVICE.recorded.append(recorded)


@contextlib.contextmanager
def _in_stream(stream: Stream) -> Iterator[None]:
    before, DEVICE.stream = DEVICE.stream, stream
    yield
    DEVICE.stream = before


def _end_allocating(device: int, pool: Any) -> None:
    if DEVICE.allocating is None:
        raise RuntimeError("not allocating to a pool")
    DEVICE.allocating = None


DEVICE = Device()


def install(patch: pytest.MonkeyPatch) -> Device:
    """Put the stand-in in torch.cuda's place, until the patch is undone. Threads that use it enter `pretending`."""
    DEVICE.reset()
    instead: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "CUDAGraph": CUDAGraph,
        "graph": _graph,
        "Stream": Stream,
        "stream": _in_stream,
        "current_stream": lambda device=None: DEVICE.stream,
        "set_stream": lambda stream: setattr(DEVICE, "stream", stream),
        "graph_pool_handle": object,
        "synchronize": lambda device=None: DEVICE.note("sync", "synchronize"),
        "empty_cache": lambda: setattr(DEVICE, "freed", DEVICE.freed + 1),
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    }
    for name, value in instead.items():
        patch.setattr(f"torch.cuda.{name}", value)
    patch.setattr("torch._C._cuda_endAllocateToPool", _end_allocating, raising=False)
    patch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    return DEVICE


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """In this thread, cuda is the stand-in."""
    with Dispatch(), Functions():
        yield


def pretend_from_now_on() -> None:
    """The same until the thread ends. Its small operations are faster without helping threads."""
    torch.set_num_threads(1)
    Dispatch().__enter__()
    Functions().__enter__()


@torch.inference_mode()
def to_cuda(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to the device."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = CudaTensor(tensor.detach().clone())  # type: ignore[assignment]
    return model
