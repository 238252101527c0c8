"""Packed steps on a CPU, by the reference of FlashAttention's meaning: equal to Transformers and to the runner over slots."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmtp.engine.engine import Engine
from lmtp.protocol import Generate, Operation, Score, Token
from lmtp.runners import flash as flash_module
from lmtp.runners.extents import Extent
from lmtp.runners.flash import Pass, Rows, flash
from lmtp.runners.model import UnsupportedModel
from lmtp.runners.packed import PackedRunner
from lmtp.runners.runner import open_runner
from lmtp.runners.selfcheck import Reference, check_packed
from lmtp.runners.slot_runner import SlotRunner
from tests import models, tiny
from tests.probe import differences
from tests.runners.gpu import packed, start
from tests.tiny import answers, begin, build, collect, own_greedy, random_prompts


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small operations are faster without helping threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "mistral", "gpt_oss", "gemma3_text", "mixtral", "gpt2"]
)
def test_an_architecture_is_served_as_transformers_computes_it(model_type: str) -> None:
    """Alone, in a batch, continued and scored, with texts longer than the windows."""
    model = models.build(model_type)
    engine = start(packed(model, 250))
    try:
        assert differences(model, engine) == []
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def slots(llama: PreTrainedModel) -> Iterator[Engine]:
    engine = tiny.start(llama)
    assert isinstance(engine.runner, SlotRunner)
    yield engine
    engine.stop()


@pytest.fixture
def runner(llama: PreTrainedModel) -> PackedRunner:
    return packed(llama, 700)


@pytest.fixture
def engine(runner: PackedRunner) -> Iterator[Engine]:
    engine = start(runner)
    yield engine
    engine.stop()


def random_operations(generator: random.Random, count: int) -> list[Operation]:
    """Prompts of few beginnings, so that prefixes are shared; every kind of sampling, and scores."""
    operations: list[Operation] = []
    texts = random_prompts(200, 200, 200)
    for i in range(count):
        prompt = generator.choice(texts)[: generator.choice([1, 3, 17, 60, 130])] + random_prompts(2, seed=i)[0]
        if generator.random() < 0.2:
            operations.append(Score(stream_id=i, prompt=prompt, scored=prompt[: generator.choice([1, 5])]))
            continue
        sampled: dict[str, Any] = {"temperature": 0.9, "top_p": 0.8, "seed": i} if generator.random() < 0.4 else {}
        length = generator.choice([2, 9, 30])
        operations.append(Generate(stream_id=i, prompt=prompt, max_tokens=length, top_logprobs=3, **sampled))
    return operations


def test_streams_that_come_and_go_get_the_tokens_of_the_runner_over_slots(
    slots: Engine, engine: Engine, runner: PackedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pool so small that texts are evicted and moved, with several predictions at once."""
    shifted: list[int] = []
    shift = runner._shift

    def counted(extent: Extent, start: int) -> None:
        shifted.append(extent.start - start)
        shift(extent, start)

    monkeypatch.setattr(runner, "_shift", counted)
    groups = [random_operations(random.Random(seed), count) for seed, count in enumerate((1, 24, 5, 40, 64))]
    expected = [answers(slots, *group) for group in groups]
    got = [collect(prediction) for prediction in [begin(engine, *group) for group in groups]]
    for ours, theirs, group in zip(got, expected, groups, strict=True):
        for operation in group:
            assert ours.ids(operation.stream_id) == theirs.ids(operation.stream_id)
            for token, other in zip(ours.tokens(operation.stream_id), theirs.tokens(operation.stream_id), strict=True):
                assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert any(shifted)
    assert sum(each.counters.reused_tokens for each in got) > 1000
    assert (runner.owned, runner.active) == (0, [])


def test_a_step_computes_no_token_but_the_streams_own(
    engine: Engine, runner: PackedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []
    prepare = runner.prepare

    def counted(step: Any) -> Any:
        run: Any = prepare(step)
        steps.append((sum(step.counts), run.args[0].ids.numel()))
        return run

    monkeypatch.setattr(runner, "prepare", counted)
    group = random_operations(random.Random(7), 64)
    found = answers(engine, *group)
    assert len(steps) > 50
    assert all(tokens == computed for tokens, computed in steps)
    assert sum(tokens for tokens, _ in steps) == found.counters.computed_tokens


def test_streams_go_on_in_the_steps_that_compute_a_prompt(
    runner: PackedRunner, engine: Engine, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "step_limits", replace(runner.step_limits, busy_chunk=16))
    steps: list[list[int]] = []
    prepare = runner.prepare

    def counted(step: Any) -> Any:
        steps.append(list(step.counts))
        return prepare(step)

    monkeypatch.setattr(runner, "prepare", counted)
    short, long, other = random_prompts(4, 90, 40)
    expected = [own_greedy(llama, prompt, length) for prompt, length in ((short, 60), (long, 3), (other, 3))]
    first = begin(engine, Generate(stream_id=0, prompt=short, max_tokens=60))
    replies = iter(first)
    begun = next(replies)  # it decodes
    second = begin(engine, *(Generate(stream_id=i, prompt=p, max_tokens=3) for i, p in enumerate((long, other))))
    got = collect(second)
    assert [got.ids(i) for i in range(2)] == expected[1:]
    ids = [token.token for each in (begun, *replies) for token in each if isinstance(token, Token)]
    assert ids == expected[0]
    beside = [counts for counts in steps[1:] if sum(counts) > len(counts)]
    assert len(beside) == -(-130 // 16)
    assert all(counts[0] == 1 and sum(count for count in counts if count > 1) <= 16 for counts in beside)


def test_a_text_that_continues_another_computes_only_what_is_new(engine: Engine, llama: PreTrainedModel) -> None:
    (prompt,) = random_prompts(100)
    first = answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=20)).ids()
    more = prompt + first + [5, 6, 7]
    second = answers(engine, Generate(stream_id=0, prompt=more, max_tokens=5))
    assert second.counters.reused_tokens == len(prompt + first) - 1  # the last token was never an input
    assert second.ids() == own_greedy(llama, more, 5)


def test_a_stream_longer_than_the_pool_is_refused_with_what_it_holds(engine: Engine) -> None:
    (prompt,) = random_prompts(511)
    small = start(packed(engine._model, 64))
    try:
        assert small.runner.longest == 64
        error = answers(small, Score(stream_id=0, prompt=prompt[:60], scored=prompt[:9])).error()
        assert error == "prompt and scored are 69 tokens; memory for keys and values (KV_CACHE_GB) holds 64."
    finally:
        small.stop()


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma2", "its attention takes softcap"),
        ("mpt", "it takes no positions"),
        ("gpt_neo", "its configuration bounds attention by window_size, which masks do not"),
        ("gemma4_text", "its heads are 512 numbers; FlashAttention takes multiples of 8 to 256"),
        ("gptj", "its attention does not go through Transformers' AttentionInterface"),
        ("deepseek_v3", "its attention changes keys after they are stored"),
    ],
)
def test_a_model_that_is_not_served_exactly_is_refused_with_the_reason(model_type: str, reason: str) -> None:
    model = models.build(model_type)
    with pytest.raises(UnsupportedModel) as refused:
        check_packed(packed(model), Reference.of(model))
    assert str(refused.value) == reason


def test_chunked_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="FlashAttention has no chunked_attention"):
        packed(build("llama4"))


def test_attention_that_does_not_name_its_window_is_refused() -> None:
    """A mask would show it; the self-check's texts are shorter than real windows."""
    model = build("gpt_oss", sliding_window=64)
    layer: Any = model.model.layers[0].self_attn
    assert layer.sliding_window == 64
    check_packed(packed(model), Reference.of(model))
    layer.sliding_window = None
    with pytest.raises(UnsupportedModel, match="its attention does not say which tokens a layer sees"):
        check_packed(packed(model), Reference.of(model))


def test_a_packed_step_leaves_the_models_own_attention_as_it_was(llama: PreTrainedModel, engine: Engine) -> None:
    prompt = random_prompts(9)[0]
    expected = own_greedy(llama, prompt, 9)
    assert answers(engine, Generate(stream_id=0, prompt=prompt, max_tokens=9)).ids() == expected
    assert llama.config._attn_implementation == "sdpa"
    assert own_greedy(llama, prompt, 9) == expected


def test_a_cpu_is_served_by_slots(llama: PreTrainedModel) -> None:
    assert isinstance(open_runner(llama), SlotRunner)


POOL, HEADS, KV_HEADS, DIM = 40, 4, 2, 8


def attention(
    window: int, rows: list[tuple[int, int, int]], heads: int = HEADS
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Attention of rows of (place of the stream, tokens it holds, queries): output, log-sum-exp, and both from plain
    operations, row by row."""
    generator = torch.Generator().manual_seed(0)
    counts = [queries for *_, queries in rows]
    query = torch.randn(sum(counts), heads, DIM, generator=generator)
    key, value = torch.randn(2, POOL, KV_HEADS, DIM, generator=generator)
    packed_rows = Rows(
        torch.tensor([0, *counts]).cumsum(0).int(),
        torch.tensor([*(first for first, *_ in rows), 0]).int(),
        torch.tensor([held for _, held, _ in rows]).int(),
        max(counts),
        max(held for _, held, _ in rows),
    )
    outputs, sums = [], []
    for (first, held, queries), q in zip(rows, query.split(counts), strict=True):
        k, v = (each[first : first + held].repeat_interleave(heads // KV_HEADS, 1) for each in (key, value))
        place, column = torch.arange(held - queries, held)[:, None], torch.arange(held)
        hidden = (column > place) | ((column <= place - window) if window else False)
        scores = (torch.einsum("qhd,chd->hqc", q, k) * 0.5).masked_fill(hidden, -torch.inf)
        outputs.append(torch.einsum("hqc,chd->qhd", scores.softmax(-1), v))
        sums.append(scores.logsumexp(-1))
    rows_and_window = Pass(packed_rows, {}, ()).rows_within(window)
    return *flash(query, key, value, *rows_and_window, 0.5), outputs, sums


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize(
    "rows",
    [
        [(0, 9, 9)],
        [(20, 9, 3), (0, 20, 1), (29, 11, 11)],
        [(20, 9, 1), (0, 20, 1), (29, 1, 1)],
    ],
    ids=["a prompt", "prompts beside single tokens", "single tokens"],
)
def test_each_row_attends_to_its_own_stream_up_to_itself(window: int, rows: list[tuple[int, int, int]]) -> None:
    output, logsumexp, outputs, sums = attention(window, rows)
    torch.testing.assert_close(output, torch.cat(outputs))
    torch.testing.assert_close(logsumexp, torch.cat(sums, 1))


@pytest.mark.parametrize("window", [0, 4])
def test_few_long_rows_of_a_model_without_groups_attend_as_groups_of_equal_heads(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the kernel divides them among the processors of a GPU."""
    heads: list[int] = []
    reference = flash_module.reference

    def noted(query: Tensor, *arguments: Any, **named: Any) -> Any:
        heads.append(query.shape[1])
        return reference(query, *arguments, **named)

    monkeypatch.setattr(flash_module, "LONG", 3)
    monkeypatch.setattr(flash_module, "reference", noted)
    for rows in ([(20, 9, 1), (0, 20, 1)], [(i, 9, 1) for i in range(flash_module.FEW_ROWS + 1)], [(0, 3, 1)]):
        output, logsumexp, outputs, sums = attention(window, rows, KV_HEADS)
        torch.testing.assert_close(output, torch.cat(outputs))
        torch.testing.assert_close(logsumexp, torch.cat(sums, 1))
    assert heads == [2 * KV_HEADS, KV_HEADS, KV_HEADS]


@pytest.mark.parametrize("window", [0, 4])
def test_a_token_that_is_a_row_of_its_own_sees_what_it_sees_in_a_longer_row(window: int) -> None:
    """Recorded steps take each token so."""
    together, *_ = attention(window, [(20, 9, 3), (0, 20, 2)])
    apart, *_ = attention(window, [(20, 7, 1), (20, 8, 1), (20, 9, 1), (0, 19, 1), (0, 20, 1)])
    torch.testing.assert_close(together, apart)
