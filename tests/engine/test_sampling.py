"""Sampling against Transformers' own logits processors, and draws that no neighbour changes."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lmtp.engine.masks import Allowed, Bias, stack
from lmtp.engine.penalties import Seen, is_penalized, penalize
from lmtp.engine.sampling import LOWEST, Draw, Row, Target, sample, uniforms_of
from lmtp.protocol import Generate

VOCABULARY = 3000


def drawing(operation: Generate, seed: int = 0, place: int = 0, tokens: Sequence[int] = (), **fields: Any) -> Draw:
    """A row that draws. Its prompt is 1, 2, 3; ``tokens`` are its output."""
    counts = Seen(operation, [1, 2, 3]).counts([1, 2, 3, *tokens]) if is_penalized(operation) else None
    return Draw(operation, counts=counts, uniforms=uniforms_of(seed)(place), **fields)


def settings(**values: Any) -> Generate:
    return Generate(stream_id=0, prompt=[1], **values)


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 2.5, "top_p": 0.99},
        {"temperature": 0.7, "min_p": 0.1},
        {"temperature": 1.2, "top_p": 0.7, "min_p": 0.02},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.0, "top_k": 2000, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5000},
        {"temperature": 0.6, "top_k": 2500, "min_p": 0.01},
        {"temperature": 4.0, "top_p": 0.9, "min_p": 0.2},
        {"temperature": 4.0, "top_p": 0.3},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "repetition_penalty": 1.7, "top_k": 20},
    ],
)
def test_draws_come_from_the_distribution_that_transformers_would_draw_from(values: dict[str, float]) -> None:
    logits = logits_of(1)
    processors = LogitsProcessorList()
    if penalty := values.get("repetition_penalty"):
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(TemperatureLogitsWarper(float(values["temperature"])))
    if top_k := values.get("top_k"):
        processors.append(TopKLogitsWarper(min(int(top_k), VOCABULARY)))
    if top_p := values.get("top_p"):
        processors.append(TopPLogitsWarper(top_p))
    if min_p := values.get("min_p"):
        processors.append(MinPLogitsWarper(min_p))
    prompt: Any = torch.tensor([[1, 2, 3]])
    expected = processors(prompt, logits.clone())[0].softmax(-1)
    operation = settings(**values)
    draws = 4000
    rows = [drawing(operation, place=place) for place in range(draws)]
    counts = Counter(
        choice.token for i in range(0, draws, 50) for choice in sample(logits.expand(50, -1), rows[i : i + 50])
    )
    assert all(expected[token] > 0 for token in counts)
    got = torch.zeros(VOCABULARY)
    got[list(counts)] = torch.tensor([counts[token] / draws for token in counts])
    noise = (expected * (1 - expected) / draws).sqrt()
    assert ((got - expected).abs() <= 6 * noise + 1e-3).all()


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6, "presence_penalty": 2.0},
        {"frequency_penalty": 1.5, "presence_penalty": -1.0},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.7, "min_tokens": 30, "logit_bias": {7: 4.0, 8: -6.0}},
        {"min_tokens": 30, "logit_bias": {9: 30.0}},
    ],
    ids=lambda values: "-".join(values),
)
def test_the_best_token_is_that_of_transformers_processors(values: dict[str, Any]) -> None:
    generator = random.Random(0)
    logits = logits_of(24, seed=3)
    output = [[generator.randrange(40) for _ in range(20)] for _ in range(len(logits))]
    logits[:, :40] += 8
    operation = settings(**values)
    bias = torch.zeros(VOCABULARY)
    processors = LogitsProcessorList()
    if sequence_bias := values.get("logit_bias"):
        bias[list(sequence_bias)] = torch.tensor(list(sequence_bias.values()))
        processors.append(SequenceBiasLogitsProcessor([[[token], value] for token, value in sequence_bias.items()]))
    if penalty := values.get("repetition_penalty"):
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if least := values.get("min_tokens"):
        processors.append(MinNewTokensLengthLogitsProcessor(3, least, [9], "cpu"))
    before: Any = torch.tensor([[1, 2, 3, *tokens] for tokens in output])
    expected = processors(before, logits.clone())
    for row, tokens in enumerate(output):  # as OpenAI's documentation has it
        for token, count in Counter(tokens).items():
            less = count * values.get("frequency_penalty", 0.0) + values.get("presence_penalty", 0.0)
            expected[row, token] -= less
    forbidden = [9] if values.get("min_tokens") else []
    rows = [drawing(operation, tokens=tokens, bias=Bias.of(bias), forbidden=forbidden) for tokens in output]
    assert [choice.token for choice in sample(logits, rows)] == expected.argmax(-1).tolist()


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.1}, {"presence_penalty": 1.0}])
def test_tokens_counted_one_by_one_are_those_counted_together(penalty: dict[str, float]) -> None:
    operation = settings(**penalty)
    generator = random.Random(1)
    tokens = [generator.randrange(90) for _ in range(300)]
    growing = Seen(operation, tokens[:20])
    for end in (20, 21, 40, 300):
        ids, numbers = growing.counts(tokens[:end])
        assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == expected_counts(operation, tokens, end)
        ahead = [generator.randrange(120) for _ in range(15)]
        ids, numbers = growing.counts(tokens[:end], ahead)
        whole = [*tokens[:end], *ahead]
        assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == expected_counts(operation, whole, len(whole))


def expected_counts(operation: Generate, tokens: Sequence[int], end: int) -> dict[int, int]:
    counted = Counter(tokens[20:end])
    prompt = tokens[:20] if operation.repetition_penalty else []
    return dict.fromkeys(prompt, 0) | counted


def test_of_equally_likely_tokens_the_first_is_chosen_as_argmax_does() -> None:
    logits = torch.zeros(4, VOCABULARY)
    logits[0, [700, 2900]] = logits[1, [255, 256]] = logits[2, [3, 4, 5]] = 1.0
    for values in ({}, {"top_logprobs": 5}, {"presence_penalty": 0.5}):
        rows = [drawing(settings(**values)) for _ in range(4)]
        assert [choice.token for choice in sample(logits, rows)] == logits.argmax(-1).tolist() == [700, 255, 3, 0]


def test_many_likely_tokens_for_one_row_are_not_looked_up_for_its_neighbours() -> None:
    logits = logits_of(40)
    searched = Sizes()
    with searched:
        choices = sample(logits, [Target(4, 100), *(Target(4, 5) for _ in range(39))])
    assert [len(choice.top.keys() - {4}) for choice in choices] == [100, *[5] * 39]
    assert sum(searched.of("topk")) < 1000


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_logprobs": {"top_logprobs": 20},
    "sampled": {"temperature": 0.8},
    "top_p": {"temperature": 1.0, "top_p": 0.5},
    "top_k": {"temperature": 1.0, "top_k": 40, "top_p": 0.9},
    "large top_k": {"temperature": 1.0, "top_k": 2000},
    "min_p": {"temperature": 1.0, "top_p": 0.9, "min_p": 0.1},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.1, "temperature": 1.0, "top_p": 0.2},
}


@pytest.mark.parametrize("masks", ["none", "biases", "masks", "min_tokens", "grammar"])
@pytest.mark.parametrize("mode", [*MODES, "all at once"])
def test_a_gpu_is_waited_for_once_and_chooses_the_same(mode: str, masks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(8, seed=2)
    chosen = list(MODES.values()) if mode == "all at once" else [MODES[mode]] * 8
    numbers = torch.zeros(VOCABULARY)
    numbers[5] = 3.0 if masks == "biases" else -torch.inf
    bias = Bias.of(numbers) if masks in ("biases", "masks") else None
    rows: list[Row] = [
        drawing(settings(**values), place=i, tokens=[4, 5], bias=bias, forbidden=[9] if masks == "min_tokens" else [])
        for i, values in enumerate(chosen[:7])
    ]
    rows.append(Target(3, 2))
    bits = torch.full((4, VOCABULARY // 8), 170, dtype=torch.uint8)
    allowed = Allowed([0, 2, 4, 6], bits) if masks == "grammar" else None
    expected = sample(logits.clone(), rows, allowed)
    stand_in = Waits()
    monkeypatch.setattr("lmtp.engine.sampling.on_host", lambda tensor: False)
    monkeypatch.setattr("lmtp.engine.sampling._fetch", stand_in.fetch)
    with stand_in:
        assert sample(logits.clone(), rows, allowed) == expected
    assert stand_in.noted == ["fetch"]


class Waits(TorchDispatchMode):
    """Notes what a GPU would be waited for: copies to the host and results whose size or value the host needs."""

    KINDS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "_unique2",
        "unique_dim",
        "bincount",
        "is_nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def fetch(self, tensor: Tensor, meanwhile: Callable[[], None]) -> Any:
        self.noted.append("fetch")
        meanwhile()
        assert tensor.numel() < 1000
        return tensor.numpy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in self.KINDS or by_mask:
            self.noted.append(name)
        return func(*args, **(kwargs or {}))


def test_a_draw_does_not_depend_on_the_neighbours() -> None:
    logits = logits_of(6)
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 2.0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 3},
    ]
    operations = [settings(**kinds[i % 4], presence_penalty=0.5 * (i % 2)) for i in range(6)]
    together = sample(logits, [drawing(o, seed=i) for i, o in enumerate(operations)])
    alone = [sample(logits[i : i + 1], [drawing(o, seed=i)])[0] for i, o in enumerate(operations)]
    assert [choice.token for choice in together] == [choice.token for choice in alone]


def test_an_impossible_token_is_never_drawn_whatever_its_logit() -> None:
    logits = logits_of(1)
    logits[0, 10] = 1e4
    bias = torch.zeros(VOCABULARY)
    bias[10] = -torch.inf
    operation = settings(temperature=5.0, top_logprobs=3)
    rows = [drawing(operation, place=i, bias=Bias.of(bias), forbidden=[11]) for i in range(2000)]
    choices = [c for i in range(0, 2000, 50) for c in sample(logits.expand(50, -1).clone(), rows[i : i + 50])]
    assert not {10, 11} & {choice.token for choice in choices}
    assert not any({10, 11} & set(choice.top) for choice in choices)


def test_reported_logprobs_are_before_temperature_filters_and_penalties() -> None:
    logits = logits_of(1)
    row = drawing(settings(temperature=3.0, top_k=2, repetition_penalty=2.0, frequency_penalty=1.0, top_logprobs=5))
    (choice,) = sample(logits, [row])
    logprobs = logits[0].log_softmax(-1)
    assert choice.logprob == pytest.approx(logprobs[choice.token].item(), abs=1e-5)
    assert list(choice.top.values())[:5] == pytest.approx(logprobs.topk(5).values.tolist(), abs=1e-5)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 5], logits[0, 6], logits[0, 7] = 3.0, 2.5, 2.0
    operation = settings(presence_penalty=0.4, frequency_penalty=0.2)
    row = Draw(operation, counts=Seen(operation, [6, 6]).counts([6, 6, 5, 5, 6]))
    assert sample(logits.clone(), [row])[0].token == 5  # 3.0 - 0.4 - 2 * 0.2 is over 2.5 - 0.4 - 0.2
    operation = settings(presence_penalty=1.0, frequency_penalty=0.2)
    row = Draw(operation, counts=Seen(operation, [6, 6]).counts([6, 6, 5, 5, 6]))
    assert sample(logits.clone(), [row])[0].token == 7


def test_the_lowest_temperatures_are_greedy_and_do_not_overflow() -> None:
    logits = logits_of(1) * 1000
    for temperature in (0.0, 1e-30, 1e-5, 1e-3):
        assert sample(logits, [drawing(settings(temperature=temperature))])[0].token == logits.argmax().item()


@pytest.mark.parametrize("vocabulary", [300, VOCABULARY, 49152])
def test_a_row_without_numbers_is_an_error_of_that_row_alone(vocabulary: int) -> None:
    logits = torch.randn(3, vocabulary)
    logits[1, 5] = torch.nan
    rows = [drawing(settings(temperature=1.0, top_logprobs=20), seed=i) for i in range(3)]
    neighbours = sample(logits[[0, 2]].clone(), [rows[0], rows[2]])
    first, broken, last = sample(logits, rows)
    assert "not finite numbers" in broken.error
    assert [first, last] == neighbours


def test_scores_are_log_softmax_at_the_targets() -> None:
    logits = logits_of(3)
    choices = sample(logits.bfloat16(), [Target(4, 0), Target(5, 2), Target(6, 0)])
    expected = logits.bfloat16().float().log_softmax(-1)
    assert [c.logprob for c in choices] == pytest.approx(
        [expected[i, t].item() for i, t in enumerate((4, 5, 6))], abs=1e-5
    )
    assert len(choices[1].top) == 3


def test_scores_and_draws_share_a_batch_and_change_nothing_for_each_other() -> None:
    logits = logits_of(5)
    rows: list[Row] = [
        drawing(settings(temperature=1.5, top_logprobs=3), seed=0),
        Target(7, 0),
        drawing(settings(), seed=1),
        Target(8, 4),
        drawing(settings(temperature=0.9, presence_penalty=1.0), seed=2),
    ]
    assert sample(logits, rows) == [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]


def test_a_score_without_numbers_reports_none() -> None:
    logits = logits_of(2)
    logits[1, 7] = torch.nan
    fine, broken = sample(logits, [Target(4, 2), Target(5, 2)])
    assert "not finite numbers" in broken.error
    assert fine == sample(logits[:1], [Target(4, 2)])[0]
    assert all(math.isfinite(value) for value in (broken.logprob, *broken.top.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bias", "forbidden", "grammar", "all"])
def test_a_mask_touches_its_own_rows_and_leaves_the_logits_as_they_were(dtype: torch.dtype, kind: str) -> None:
    logits = logits_of(40).to(dtype)
    before = logits.clone()
    numbers = torch.zeros(VOCABULARY)
    numbers[5], numbers[6] = 50.0, -torch.inf
    bias = Bias.of(numbers) if kind in ("bias", "all") else None
    row = Draw(settings(), bias, [7] if kind in ("forbidden", "all") else [])
    bits = torch.full((1, VOCABULARY // 8), 255, dtype=torch.uint8)
    rows: list[Row] = [*(Target(4, 0) for _ in range(39)), row]
    for allowed in (None, Allowed([39], bits))[kind == "grammar" :]:
        copied = Sizes()
        with copied:
            together = sample(logits, rows, allowed)
        assert torch.equal(logits, before)
        alone = sample(logits[39:].clone(), [row], allowed and Allowed([0], bits))
        assert together == [*sample(logits[:39].clone(), rows[:39]), *alone]
        masks = copied.of("index_add", "add", "clone")
        assert not masks or max(masks) <= VOCABULARY


class Sizes(TorchDispatchMode):
    """Notes how many numbers each operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.noted.append((func.__name__.split(".")[0], result.numel()))
        return result

    def of(self, *names: str) -> list[int]:
        return [size for name, size in self.noted if name in names]


def test_a_failure_while_sampling_leaves_no_mask_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(2)
    before = logits.clone()
    bias = torch.zeros(VOCABULARY)
    bias[5] = 3.0

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("lmtp.engine.sampling._report", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            sample(logits, [Target(4, 0), Draw(settings(), Bias.of(bias))])
    assert torch.equal(logits, before)


def odd_logits(generator: random.Random, rows: int, vocabulary: int) -> Tensor:
    """Flat and peaked ones, ties, impossible tokens, no possible one, and what is no number; of any float dtype."""
    seed = torch.Generator().manual_seed(generator.randrange(2**31))
    logits = torch.randn(rows, vocabulary, generator=seed) * generator.choice([0.0, 1.0, 30.0])
    if generator.random() < 0.3:
        logits = logits.round()
    for row in logits:
        place, kind = generator.randrange(vocabulary), generator.random()
        if kind < 0.1:
            row[place] = generator.choice([math.nan, math.inf])
        elif kind < 0.2:
            row.fill_(-math.inf)
        elif kind < 0.3:
            row[:place] = -math.inf
        elif kind < 0.4:
            row.fill_(-math.inf)[place] = 60_000.0
    return logits.to(generator.choice([torch.float32, torch.bfloat16, torch.float16]))


def odd_row(generator: random.Random, vocabulary: int) -> Row:
    """A score, or any sampling settings, at their limits too."""
    if generator.random() < 0.15:
        return Target(generator.randrange(vocabulary), generator.choice([0, 1, 5]))
    choices: dict[str, list[Any]] = {
        "temperature": [0.0, 1e-4, 0.8, 1.0, 1.0, 50.0],
        "top_p": [None, None, 1e-9, 0.5, 0.9, 0.999999, 1.0],
        "top_k": [None, None, None, 1, 5, 10**6],
        "min_p": [None, None, None, 0.01, 1.0],
        "repetition_penalty": [None, None, None, 0.5, 2.0],
        "frequency_penalty": [None, None, None, -2.0, 1.0],
        "top_logprobs": [0, 1, 5, 20],
    }
    operation = settings(**{name: generator.choice(values) for name, values in choices.items()})
    numbers = torch.zeros(vocabulary)
    if generator.random() < 0.3:
        numbers.fill_(-math.inf)
        numbers[generator.randrange(vocabulary)] = 0.0
    bias = Bias.of(numbers) if generator.random() < 0.5 else None
    forbidden = [generator.randrange(vocabulary)] if generator.random() < 0.1 else []
    tokens = [generator.randrange(vocabulary) for _ in range(5)]
    counts = Seen(operation, tokens[:2]).counts(tokens) if is_penalized(operation) else None
    first = generator.choice([0.0, 1 - 2.0**-53, generator.random(), generator.random()])
    return Draw(operation, bias, forbidden, counts, (first, generator.random()))


def masked(logits: Tensor, row: Row) -> Tensor:
    """A row's logits after its own masks."""
    logits = logits.double().clone()
    if isinstance(row, Draw):
        logits[list(row.forbidden)] = -math.inf
        if row.bias is not None:
            logits += stack([row.bias], len(logits), torch.device("cpu"))[0]
    return logits


@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_logits_a_row_gets_what_it_gets_alone_and_on_a_gpu(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error, if it has no possible token or no numbers; else a token that its filters keep."""
    generator = random.Random(seed)
    errors = 0
    for _ in range(12):
        vocabulary = generator.choice([1, 2, 255, 256, 257, 3000])
        rows = [odd_row(generator, vocabulary) for _ in range(generator.choice([1, 3, 17]))]
        logits = odd_logits(generator, len(rows), vocabulary)
        together = sample(logits, rows)
        alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
        with monkeypatch.context() as patched:
            patched.setattr("lmtp.engine.sampling.on_host", lambda tensor: False)
            patched.setattr("lmtp.engine.sampling._fetch", Waits().fetch)
            on_gpu = sample(logits, rows)
        for i, (row, choice) in enumerate(zip(rows, together, strict=True)):
            for other in (alone[i], on_gpu[i]):  # of tokens that are equally likely, any may be reported
                assert choice[:2] + choice[3:] == other[:2] + other[3:]
            own = masked(logits[i], row)
            logprobs = own.log_softmax(-1)
            if logprobs.isnan().any():
                assert choice.error
                errors += 1
                continue
            assert not choice.error
            assert choice.logprob == pytest.approx(max(logprobs[choice.token].item(), LOWEST), rel=1e-5, abs=2e-5)
            if isinstance(row, Draw):
                check_kept(own, row, choice.token)
    assert errors > 5


def check_kept(logits: Tensor, row: Draw, token: int) -> None:
    """That the token is possible, and that temperature, penalties, top-k, top-p and min-p keep it."""
    operation, vocabulary = row.operation, len(logits)
    assert logits[token] > -math.inf
    if row.counts is not None:
        logits = penalize(logits[None], [operation], [row.counts])[0]
    logits = (logits - logits.max()) / max(operation.temperature, 1e-9)
    if operation.temperature < 1e-5:
        assert logits[token] == 0
        return
    k = min(operation.top_k or vocabulary, vocabulary)
    likely = logits >= logits.topk(k).values[-1]
    assert likely[token]
    probabilities = torch.where(likely, logits, -math.inf).softmax(-1)
    if operation.min_p:
        assert probabilities[token] >= probabilities.max() * operation.min_p * 0.999
    if operation.top_p:
        assert probabilities[logits > logits[token] + 1e-4].sum() < operation.top_p + 1e-6
