"""The compiled step answers as the model's own code does."""

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lmtp.engine.engine import Engine
from lmtp.protocol import Generate, Score
from lmtp.runners import compiled
from lmtp.runners.encoder_decoder import EncoderDecoder
from lmtp.runners.linear import own_linear, panels_of
from lmtp.runners.model import UnsupportedModel, limits_of
from lmtp.runners.runner import open_runner
from lmtp.runners.selfcheck import Reference, check_slots
from lmtp.runners.slot_runner import SlotStep, layers_of
from lmtp.runners.slots import Memory
from lmtp.runners.step import StepInputs
from lmtp.weights.load import load
from tests.runners.test_encoder_decoder import build as build_encoder_decoder
from tests.server import ROOT, serving
from tests.tiny import answers, build, random_prompts, start

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="steps are compiled for CPUs"),
]


nightly = pytest.mark.skipif("NIGHTLY" not in os.environ, reason="compiles for a minute: NIGHTLY=1")


@pytest.fixture(
    scope="module", params=["llama", "gemma2", pytest.param("llama --load-in int8", marks=nightly, id="int8")]
)
def environment(
    request: pytest.FixtureRequest, demo_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The settings of a server of a model. Its tokenizer is the demo's: only token ids are sent."""
    directory = tmp_path_factory.mktemp("compiled")
    source, weights = directory / "source", directory / "weights"
    architecture, *options = request.param.split()
    build(architecture).save_pretrained(source)
    AutoTokenizer.from_pretrained(demo_weights).save_pretrained(source)
    fetch = [sys.executable, str(ROOT / "script/download_weights"), str(source), "--to", str(weights), *options]
    subprocess.run(fetch, check=True, capture_output=True)
    return {"WEIGHTS_DIR": str(weights), "COMPILED_DIR": str(directory / "steps"), "DTYPE": "float32"}


@pytest.fixture(scope="module")
def model(environment: dict[str, str]) -> PreTrainedModel:
    return load(Path(environment["WEIGHTS_DIR"]), environment["DTYPE"]).model


@pytest.fixture(scope="module")
def library(environment: dict[str, str]) -> Path:
    """The step that script/build makes."""
    subprocess.run(
        [sys.executable, str(ROOT / "script/build")], check=True, capture_output=True, env={**os.environ, **environment}
    )
    (path,) = Path(environment["COMPILED_DIR"]).iterdir()
    return path


@pytest.fixture(scope="module")
def engines(model: PreTrainedModel, library: Path) -> Iterator[tuple[Engine, Engine]]:
    """One with the compiled step, one without."""
    both = start(model, compiled=library), start(model)
    assert [engine.runner.description for engine in both] == ["slots, compiled step", "slots"]
    yield both
    for engine in both:
        engine.stop()


def test_its_answers_are_those_of_the_models_own_code(engines: tuple[Engine, Engine]) -> None:
    """Alone and together, from prompts of one token to prompts of several chunks, reused or not."""
    prompts = random_prompts(1, 3, 300, 41, 9, 260)
    generate = [Generate(stream_id=i, prompt=prompt, max_tokens=30) for i, prompt in enumerate(prompts)]
    longer = [Generate(stream_id=i, prompt=[*prompt, 7, 8, 9], max_tokens=5) for i, prompt in enumerate(prompts)]
    score = [Score(stream_id=9, prompt=prompts[3], scored=prompts[4])]
    batches: list[list[Generate | Score]] = [[generate[2]], [*generate], [*longer, *score]]
    for operations in batches:
        fast, slow = (answers(engine, *operations) for engine in engines)
        for stream in [operation.stream_id for operation in operations]:
            assert fast.ids(stream) == slow.ids(stream)
            assert [token.logprob for token in fast.tokens(stream)] == pytest.approx(
                [token.logprob for token in slow.tokens(stream)], abs=1e-4
            )


HIDDEN = torch.finfo(torch.bfloat16).min


def causal(rows: int, heads: int, q: int, columns: int) -> Tensor:
    """The last query of each row sees another number of columns, or at least as many as there are queries."""
    position = torch.randint(q - 1, columns, (rows, 1, 1, 1)) - torch.arange(q - 1, -1, -1)[:, None]
    return torch.where(torch.arange(columns) <= position, 0, HIDDEN)


def window(rows: int, heads: int, q: int, columns: int) -> Tensor:
    mask = causal(rows, heads, q, columns)
    ends = (mask == 0).sum(3, keepdim=True)
    return torch.where(torch.arange(columns) < ends - 7, HIDDEN, mask)


def bias_of_each_head(rows: int, heads: int, q: int, columns: int) -> Tensor:
    """As T5 adds it to the mask; it can be large and still hides nothing."""
    return causal(rows, heads, q, columns) + torch.randn(rows, heads, q, columns) * 100


def large_but_not_hidden(rows: int, heads: int, q: int, columns: int) -> Tensor:
    return torch.full((rows, 1, q, columns), -1e30)


def of_sources(rows: int, heads: int, q: int, columns: int) -> Tensor:
    return causal(rows, heads, 1, columns).expand(rows, 1, q, columns)


def infinite(rows: int, heads: int, q: int, columns: int) -> Tensor:
    """The first query of each row sees nothing."""
    mask = torch.where(torch.rand(rows, 1, q, columns) < 0.5, 0.0, -torch.inf)
    mask[:, :, 0] = -torch.inf
    return mask


def hidden_from_all(rows: int, heads: int, q: int, columns: int) -> Tensor:
    return torch.full((1, 1, 1, columns), HIDDEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "masks", [causal, window, bias_of_each_head, large_but_not_hidden, of_sources, infinite, hidden_from_all]
)
def test_attention_is_that_of_pytorch(library: Path, masks: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Groups, queries and head sizes of its own loops and of those that it leaves to PyTorch's."""
    torch.manual_seed(0)
    for group, q, dim, out_dim in [
        *((group, 1, 16, 16) for group in range(1, 9)),
        *((1, q, 64, 32) for q in range(2, 17)),
        *((3, q, 128, 128) for q in (2, 5, 6)),
        *((2, 4, dim, dim) for dim in (20, 24, 80, 256)),
    ]:
        columns = 48
        shown = masks(3, 2 * group, q, columns).to(dtype)
        query = torch.randn(3, q, 2 * group, dim).transpose(1, 2).to(dtype)
        key, value = (torch.randn(4, 2, columns + 1, size).to(dtype)[:3, :, :columns] for size in (dim, out_dim))
        expected = functional.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), shown.double(), scale=0.3, enable_gqa=True
        )
        output = attention(library, query, key, value, shown, scale=0.3)
        assert output.is_contiguous()
        torch.testing.assert_close(
            output.transpose(1, 2).double(), expected, atol=1e-4 if dtype == torch.float32 else 3e-2, rtol=0
        )


def test_attention_does_not_read_columns_that_a_row_does_not_show(library: Path) -> None:
    mask = torch.full((2, 1, 2, 32), HIDDEN)
    mask[0, :, :, 5:9] = mask[1, :, 0, :3] = mask[1, :, 1, :4] = 0
    query, key, value = (torch.randn(2, heads, length, 32) for heads, length in ((6, 2), (2, 32), (2, 32)))
    expected = attention(library, query, key, value, mask, scale=1)
    for row, hidden in ((0, slice(0, 5)), (0, slice(9, 32)), (1, slice(4, 32))):
        key[row, :, hidden] = value[row, :, hidden] = torch.nan
    assert attention(library, query, key, value, mask, scale=1).equal(expected)


STORED = [torch.float32, torch.bfloat16, torch.float16]


def stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as a checkpoint in this dtype has it."""
    return weight.to(dtype).float() if dtype != torch.float32 else weight + 1e-6


@pytest.mark.parametrize("dtype", STORED)
def test_linear_layers_are_those_of_pytorch(library: Path, dtype: torch.dtype) -> None:
    """Every height of a tile, blocks of rows, and sizes that fill no panel."""
    torch.manual_seed(0)
    for inputs, outputs in [(64, 48), (63, 17), (1, 1), (5, 100)]:
        weight = stored(torch.randn(outputs, inputs), dtype)
        for rows in (*range(1, 20), 48, 49, 55, 113):
            input = torch.randn(rows, inputs)
            torch.testing.assert_close(
                linear(library, input, weight).double(), input.double() @ weight.double().T, atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("dtype", STORED)
def test_weights_lie_in_the_dtype_of_the_checkpoint(dtype: torch.dtype) -> None:
    panels = panels_of(stored(torch.randn(33, 8), dtype))
    assert (panels.dtype, panels.shape) == (dtype, (3, 8, 16))


def test_weights_beyond_the_range_of_16_bits_lose_nothing(library: Path) -> None:
    weight = torch.tensor([[2.0**-140, 2.0**100], [65504.0, torch.inf], [torch.nan, 1 + 2.0**-12]])
    assert panels_of(weight[:1]).dtype == torch.float32
    assert panels_of(weight[1:2]).dtype == torch.float16
    expected = functional.linear(torch.ones(1, 2), weight)
    torch.testing.assert_close(linear(library, torch.ones(1, 2), weight), expected, equal_nan=True, rtol=0, atol=0)


def test_int8_weights_stay_the_numbers_that_they_are(library: Path) -> None:
    torch.manual_seed(0)
    for inputs, outputs in [(64, 48), (63, 17), (1, 1), (5, 100)]:
        weight = Int8Tensor.from_hp(torch.randn(outputs, inputs), PerRow())
        assert panels_of(weight).dtype == torch.int8
        for rows in (1, 2, 3, 7, 55):
            input = torch.randn(rows, inputs)
            torch.testing.assert_close(
                linear(library, input, weight) * weight.scale.flatten(),
                functional.linear(input, weight.dequantize()),
                atol=1e-4,
                rtol=0,
            )
    every = torch.arange(-128, 128, dtype=torch.int8)[:, None]
    weight = Int8Tensor(every, torch.ones(256, 1), [1, 1], torch.float32)
    assert linear(library, torch.ones(1, 1), weight).equal(every.T.float())


@contextlib.contextmanager
def layers_computed() -> Iterator[list[torch.dtype]]:
    """What the operation is called with where no compiled step has it: the dtype of each layer's panels."""
    seen = []

    def plainly(input: Tensor, panels: Tensor, outputs: int) -> Tensor:
        seen.append(panels.dtype)
        return functional.linear(input, panels.transpose(1, 2).flatten(0, 1)[:outputs].float())

    with torch.library._scoped_library("lmtp", "IMPL") as library:
        library.impl("linear", plainly, "CPU")
        yield seen


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_int8_weights_are_those_of_torchao(bias: bool) -> None:
    torch.manual_seed(0)
    plain, quantized = nn.Linear(24, 20, bias), nn.Linear(20, 40, bias)
    both = nn.Sequential(plain, quantized).eval()
    quantize_(quantized, Int8WeightOnlyConfig())
    input = torch.randn(3, 2, 24)
    expected = both(input)
    with layers_computed() as seen, own_linear(both):
        torch.testing.assert_close(both(input), expected, atol=1e-6, rtol=0)
    assert seen == [torch.float32, torch.int8]
    assert both(input).equal(expected)
    assert not list(both.buffers())


@pytest.mark.parametrize(
    "config",
    [
        Int8WeightOnlyConfig(granularity=PerGroup(8)),
        Int8WeightOnlyConfig(granularity=PerTensor()),
        Int8DynamicActivationInt8WeightConfig(),
        Int8DynamicActivationIntxWeightConfig(),
    ],
    ids=["groups", "one scale", "quantized activations", "4 bits"],
)
def test_other_weights_of_torchao_stay_in_its_hands(config: Any) -> None:
    layer = nn.Linear(32, 32)
    quantize_(layer, config)
    assert type(layer.weight) is not nn.Parameter
    with own_linear(layer):
        assert not list(layer.buffers())


def test_int8_weights_with_zero_points_or_in_bfloat16_stay_in_the_hands_of_torchao() -> None:
    shifted = Int8Tensor.from_hp(torch.rand(32, 32), PerRow(), MappingType.ASYMMETRIC)
    narrow = Int8Tensor.from_hp(torch.rand(32, 32).bfloat16(), PerRow())
    for weight in (shifted, narrow):
        layer = nn.Linear(32, 32)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        with own_linear(layer):
            assert not list(layer.buffers())


def test_long_sums_are_as_exact_as_pytorchs(library: Path) -> None:
    torch.manual_seed(0)
    for rows in (1, 2, 6):
        input, weight = torch.randn(rows, 28_672), torch.randn(32, 28_672)
        exact = input.double() @ weight.double().T
        own, usual = ((output - exact).abs().max() for output in (linear(library, input, weight), input @ weight.T))
        assert own < 4 * usual


def test_a_traced_model_is_left_as_it_was() -> None:
    model = build("gpt2")
    layers = [layer for layer in model.modules() if type(layer) in (nn.Linear, Conv1D)]
    before = [(set(vars(layer)), layer.state_dict().keys()) for layer in layers]
    layers[0].forward = replaced = nn.Identity().forward
    with own_linear(model):
        assert layers[0].forward is replaced
        assert all("forward" in vars(layer) for layer in layers)
    assert layers[0].forward is replaced
    del layers[0].forward
    layers[-1].to("meta")
    with pytest.raises(NotImplementedError), own_linear(model):
        pass
    assert [(set(vars(layer)), layer.state_dict().keys()) for layer in layers] == before


def test_a_linear_layer_takes_any_strides_and_dimensions(library: Path) -> None:
    weight, input = torch.randn(20, 32), torch.randn(3, 32, 5).transpose(1, 2)
    torch.testing.assert_close(linear(library, input, weight), functional.linear(input, weight), atol=1e-5, rtol=0)
    assert linear(library, input[:0], weight).shape == (0, 5, 20)


def linear(library: Path, input: Tensor, weight: Tensor) -> Tensor:
    """linear.cpp, as the compiled step calls it."""
    return call(library, "linear", input, panels_of(weight), argument=ctypes.c_int64(len(weight)))


def attention(library: Path, *tensors: Tensor, scale: float) -> Tensor:
    """attention.cpp, as the compiled step calls it."""
    return call(library, "attend", *tensors, argument=ctypes.c_double(scale))


def call(library: Path, operation: str, *tensors: Tensor, argument: ctypes.c_int64 | ctypes.c_double) -> Tensor:
    handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    output = ctypes.c_void_p()
    pointers = [ctypes.c_void_p(compiled._pointer_in(handle, None)) for handle in handles]
    function = getattr(ctypes.CDLL(str(library)), f"aoti_torch_cpu_{operation}")
    assert not function(*pointers, argument, ctypes.byref(output))
    _, (result,) = (
        torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(each)
        for each in (handles, [compiled._capsule_of(output, None, None)])
    )
    return result


def test_a_server_uses_the_step_that_script_build_made_unless_it_is_told_not_to(
    environment: dict[str, str], library: Path
) -> None:
    operations = [["GENERATE", {"stream_id": 0, "prompt": [5, 6, 7], "max_tokens": 12}]]
    outputs = []
    for mode, runner in (("auto", "slots, compiled step"), ("off", "slots")):
        with serving(ROOT, **environment, COMPILE=mode) as server:
            assert any(f"runner: {runner};" in line for line in server.log), server.log
            body = {"input": {"ops_batch_json": json.dumps(operations)}}
            outputs.append([line["token"] for line in lines(httpx.post(f"{server.url}/predictions", json=body))])
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 0


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line.partition(" ")[2]) for line in "".join(response.json()["output"]).splitlines()]


def test_a_steps_memory_is_free_once_its_tensors_are(model: PreTrainedModel, library: Path) -> None:
    step, memory = compiled.CompiledStep(library), Memory(layers_of(model), model.dtype)
    memory.resize(4, 64)
    addresses: dict[str, set[int]] = {"given": set(), "taken": set()}
    for _ in range(32):
        ids, mask = torch.ones(4, 32, dtype=torch.long), torch.zeros(4, 1, 32, 16)
        wanted = torch.arange(4 * 32)
        masks = [mask] * len(SlotStep(model).rules)
        logits = step(StepInputs(ids, ids, ids, wanted, masks, memory.keys, memory.values))
        addresses["given"].add(mask.data_ptr())
        addresses["taken"].add(logits.data_ptr())
        del ids, mask, masks, wanted, logits
    assert all(len(seen) < 32 for seen in addresses.values())


def test_a_step_for_another_model_is_not_used(library: Path, model: PreTrainedModel) -> None:
    other = build(model.config.model_type, seed=1)
    with pytest.raises(UnsupportedModel, match="positions differ from the model's own forward pass"):
        check_slots(SlotStep(other), layers_of(other), Reference.of(other), compiled.CompiledStep(library))
    engine = start(other, compiled=library)
    assert engine.runner.description == "slots"
    assert engine.runner.reason.startswith("no faster step: UnsupportedModel: ")
    engine.stop()


def test_a_file_that_is_no_compiled_step_is_not_used(model: PreTrainedModel, tmp_path: Path) -> None:
    damaged = tmp_path / "step.so"
    damaged.write_bytes(b"nothing")
    engine = start(model, compiled=damaged)
    assert engine.runner.description == "slots"
    assert engine.runner.reason.startswith("no faster step: OSError: ")
    engine.stop()


def test_a_model_with_operations_that_compiled_code_cannot_call_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the complex numbers of Llama 4's rotary embedding."""

    def compile_with_a_call_of_python(_: object, __: object, options: dict[str, Any]) -> None:
        Path(options["aot_inductor.output_path"]).write_bytes(compiled.PROXY)

    monkeypatch.setattr("torch._inductor.aot_compile", compile_with_a_call_of_python)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: SimpleNamespace(module=lambda: None))
    model, path = build("llama"), tmp_path / "step.so"
    with pytest.raises(UnsupportedModel, match="an operation that compiled code cannot call"):
        compiled.build(SlotStep(model), layers_of(model), path, lambda _: None)
    assert not path.exists()


@nightly
def test_an_encoder_decoder_models_step_is_compiled_too(tmp_path: Path) -> None:
    model = build_encoder_decoder("flan_t5")
    proved = EncoderDecoder(model, limits_of(model))
    path = tmp_path / "step.so"
    compiled.build(proved.step, proved.own, path, proved.check, proved.cross)
    engines = start(model, compiled=path), start(model)
    assert [engine.runner.description for engine in engines] == [
        "slots, encoder and decoder, compiled step",
        "slots, encoder and decoder",
    ]
    operations = [Generate(stream_id=i, prompt=p, max_tokens=30) for i, p in enumerate(random_prompts(1, 40, 9, 23))]
    fast, slow = (answers(engine, *operations) for engine in engines)
    assert [fast.ids(i) for i in range(4)] == [slow.ids(i) for i in range(4)]
    for engine in engines:
        engine.stop()


def test_an_encoder_decoder_model_falls_back_to_its_own_code(tmp_path: Path) -> None:
    damaged = tmp_path / "step.so"
    damaged.write_bytes(b"nothing")
    runner = open_runner(build_encoder_decoder("t5"), compiled=damaged)
    assert runner.description == "slots, encoder and decoder"
    assert runner.reason.startswith("no faster step: OSError: ")
