"""The stand-in for CUDA finds what it is there to find."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretend_cuda import CUDA, CUDAGraph, CudaTensor, Device, install, pretending


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = install(monkeypatch)
    with torch.inference_mode(), pretending():
        yield made


def test_tensors_say_that_they_are_on_the_device_and_compute_there(device: Device) -> None:
    made = torch.arange(6, device="cuda").view(2, 3)
    assert (made.device, made.is_cuda, (made + 1).device) == (CUDA, True, CUDA)
    assert (made[1] * 2).tolist() == [6, 8, 10]
    assert isinstance(torch.tensor([1.0], device="cuda"), CudaTensor)
    assert isinstance(torch.ones(2).to(made.device), CudaTensor)
    assert isinstance(torch.ones(2).type_as(made), CudaTensor)
    assert type(made.type_as(torch.ones(2))) is Tensor
    assert (made.type_as(made * 0.5) * made.float()).device == CUDA
    assert type(made.cpu()) is Tensor


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(2, 3),
        lambda x: torch.cat([x, torch.ones(2, 3)]),
        lambda x: torch.where(torch.ones(2, 3) > 0, x, 0.0),
        lambda x: x.index_copy_(0, torch.arange(2), x.clone()),
    ],
)
def test_an_operation_that_mixes_devices_is_an_error(device: Device, mixed: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mixed(torch.ones(2, 3, device="cuda"))


def test_a_number_of_the_host_is_no_other_device(device: Device) -> None:
    assert (torch.ones(2, device="cuda") * torch.tensor(3.0)).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[[1, 0]],
        lambda x: x[torch.tensor([1, 0])],
        lambda x: torch.zeros(2, 3).copy_(x),
        lambda x: torch.zeros(2, 3).copy_(x, non_blocking=True),  # into pageable memory
        lambda x: torch.empty(2, 3, pin_memory=True).copy_(x),
        lambda x: x.copy_(torch.zeros(2, 3)),
        lambda x: torch.tensor([1, 2], device="cuda"),
        lambda x: torch.ones(2).to("cuda", non_blocking=True),  # from pageable memory
        lambda x: torch.unique(x),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(),
    ],
)
def test_what_waits_for_the_device_is_logged_as_one_sync(device: Device, waiting: Callable[[Tensor], Any]) -> None:
    tensor = torch.ones(2, 3, device="cuda")
    device.log.clear()
    waiting(tensor)
    assert len(device.of_kind("sync")) == 1


def test_what_does_not_wait_is_no_sync(device: Device) -> None:
    tensor = torch.ones(2, 3, device="cuda")
    device.log.clear()
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    torch.empty(2, 3, pin_memory=True).copy_(tensor, non_blocking=True)
    tensor[0, 1:].t()
    tensor[:, torch.zeros(1, dtype=torch.long, device="cuda")].half()
    assert device.of_kind("sync") == []
    assert len(device.of_kind("copy")) == 2
    assert device.of_kind("launch") == [
        "aten.copy_.default",
        "aten.zeros.default",
        "aten.index.Tensor",
        "aten._to_copy.default",
    ]


def record(compute: Callable[[], Tensor]) -> tuple[CUDAGraph, Tensor]:
    recorded = torch.cuda.CUDAGraph()
    assert isinstance(recorded, CUDAGraph)
    with torch.cuda.graph(recorded):
        out = compute()
    return recorded, out


def test_a_graph_computes_nothing_before_it_is_replayed(device: Device) -> None:
    tensor = torch.ones(2, device="cuda")
    recorded, out = record(lambda: tensor * 2)
    assert out.isnan().all()
    recorded.replay()
    assert out.tolist() == [2.0, 2.0]


def test_a_graph_repeats_its_operations_on_the_same_memory(device: Device) -> None:
    tensor, sums = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    index = torch.tensor([2, 1, 0], device="cuda")

    def compute() -> Tensor:
        doubled = tensor.view(3, 1) * 2
        sums.add_(doubled[:, 0])
        return sums[index]

    recorded, out = record(compute)
    tensor.copy_(torch.tensor([1.0, 2.0, 3.0], device="cuda"))
    sums.fill_(10.0)
    recorded.replay()
    assert out.tolist() == [16.0, 14.0, 12.0]
    recorded.replay()
    assert out.tolist() == [22.0, 18.0, 14.0]


def test_a_graph_that_reads_freed_memory_is_an_error(device: Device) -> None:
    tensor, held = torch.ones(3, device="cuda"), [torch.tensor([2, 1, 0], device="cuda")]
    recorded, _ = record(lambda: tensor[held[0]])
    recorded.replay()
    held.clear()
    with pytest.raises(RuntimeError, match="the graph reads 1 freed tensors"):
        recorded.replay()


def test_memory_that_is_kept_by_a_view_is_not_freed(device: Device) -> None:
    index = torch.tensor([2, 1, 0, 0], device="cuda")
    view = index[:3]
    tensor = torch.ones(3, device="cuda")
    recorded, _ = record(lambda: tensor[view])
    del index
    recorded.replay()
    assert view.tolist() == [2, 1, 0]


def test_a_capture_forbids_to_wait_and_leaves_its_stream_and_allocator_behind(device: Device) -> None:
    tensor, before = torch.ones(3, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="due to a previous error during capture"):
        record(lambda: tensor * tensor.sum().item())
    assert device.recording is None
    assert torch.cuda.current_stream() is not before
    assert device.recorded == []
