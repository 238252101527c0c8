"""Encoder-decoder models: in batches what Transformers' own generate and forward pass say, or refused by name."""

import asyncio
import json
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerFast

from lmtp.completions import Completions
from lmtp.engine.engine import Engine
from lmtp.protocol import Generate, ModelInfo, RequestError, Score
from lmtp.runners.encoder_decoder import EncoderDecoderRunner
from lmtp.runners.model import UnsupportedModel
from lmtp.runners.runner import open_runner
from lmtp.runners.selfcheck import Text
from lmtp.runners.sources import Encoded, Encoder
from lmtp.runners.step import Step
from lmtp.settings import Bounds, SettingsError
from tests.tiny import VOCABULARY, answers, begin, collect, random_prompts, randomize, start

END = 2
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": END, "relative_attention_max_distance": 16, "relative_attention_num_buckets": 8,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": END, "decoder_start_token_id": END, "forced_eos_token_id": None,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8,
    "max_position_embeddings": 128, "eos_token_id": END, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5Config", T5),
    "flan_t5": ("T5Config", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5Config", T5),
    "umt5": ("UMT5Config", T5),
    "longt5": ("LongT5Config", {**T5, "encoder_attention_type": "local", "local_radius": 4}),
    "longt5_global": ("LongT5Config", {**T5, "encoder_attention_type": "transient-global", "local_radius": 4, "global_block_size": 4}),
    "switch": ("SwitchTransformersConfig", {**T5, "num_experts": 4, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    "t5gemma": ("T5GemmaConfig", {}),
    "bart": ("BartConfig", BART),
    "mbart": ("MBartConfig", BART),
    "pegasus": ("PegasusConfig", {**BART, "decoder_start_token_id": 1}),
    "marian": ("MarianConfig", {**BART, "decoder_start_token_id": 1}),
    "m2m_100": ("M2M100Config", BART),
    "blenderbot": ("BlenderbotConfig", BART),
    "plbart": ("PLBartConfig", BART),
    "mvp": ("MvpConfig", BART),
    "bigbird_pegasus": ("BigBirdPegasusConfig", {**BART, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}),
    "led": ("LEDConfig", {**BART, "attention_window": 8, "max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128}),
    "pegasus_x": ("PegasusXConfig", {**BART, "num_global_tokens": 2, "block_size": 8}),
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "nllb_moe": ("NllbMoeConfig", {**BART, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}),
    "fsmt": ("FSMTConfig", {"langs": ["a", "b"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, **{k: v for k, v in BART.items() if k != "vocab_size"}}),
    "prophetnet": ("ProphetNetConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "encoder_ffn_dim": 64, "num_encoder_layers": 2, "num_encoder_attention_heads": 4, "decoder_ffn_dim": 64, "num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_start_token_id": 0}),
}  # fmt: skip
LENGTHS = (1, 23, 40, 7, 31, 12)
Pair = tuple[PreTrainedModel, Engine]


def build(name: str, **changes: Any) -> PreTrainedModel:
    kind, arguments = (SERVED | REFUSED)[name]
    if name == "t5gemma":
        side = transformers.T5GemmaModuleConfig(**GEMMA)
        config = transformers.T5GemmaConfig(encoder=side, decoder=side, vocab_size=VOCABULARY)
        config.decoder_start_token_id = 1
    else:
        config = getattr(transformers, kind)(**arguments | changes)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config).eval()
    if name == "mbart":  # as a translation model does that writes one language
        model.generation_config.forced_bos_token_id = 5
    return randomize(model)


@pytest.fixture(scope="module", params=SERVED)
def any_model(request: pytest.FixtureRequest) -> Iterator[Pair]:
    model = build(request.param)
    engine = start(model)
    assert isinstance(engine.runner, EncoderDecoderRunner)
    yield model, engine
    engine.stop()


@pytest.fixture(scope="module")
def t5() -> Iterator[Pair]:
    model = build("t5")
    engine = start(model)
    yield model, engine
    engine.stop()


def start_of(model: PreTrainedModel) -> list[int]:
    """What a target begins with."""
    forced = model.generation_config.forced_bos_token_id
    start: int = model.generation_config.decoder_start_token_id
    return [start] if forced is None else [start, forced]


def fresh(model: PreTrainedModel) -> Any:
    """The model as it was loaded: BigBird-Pegasus's encoder remembers that it once read a short text."""
    encoder: Any = model.get_encoder()
    if hasattr(encoder, "attention_type"):
        encoder.set_attention_type(model.config.attention_type)
    return model


def own_greedy(
    model: PreTrainedModel, source: list[int], max_tokens: int, target: list[int] | None = None
) -> list[int]:
    """What Transformers' own greedy generate adds to the start of the target."""
    begin = start_of(model) + (target or [])
    with torch.inference_mode():
        output = fresh(model).generate(
            torch.tensor([source]),
            attention_mask=torch.ones(1, len(source), dtype=torch.long),
            decoder_input_ids=torch.tensor([begin]) if target else None,
            max_new_tokens=max_tokens + (0 if target else len(begin) - 1),
            do_sample=False,
        )
    ids: list[int] = output[0, len(begin) :].tolist()
    return ids


def own_logprobs(model: PreTrainedModel, source: list[int], target: list[int]) -> torch.Tensor:
    """The log-probabilities ``[target, vocabulary]`` of the target's tokens by one plain forward pass."""
    begin = start_of(model)
    with torch.inference_mode():
        logits = fresh(model)(
            input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([begin + target[:-1]]), use_cache=False
        ).logits[0]
    return torch.log_softmax(logits.float(), -1)[len(begin) - 1 :]


def test_greedy_streams_of_uneven_sources_equal_generate_together_and_when_they_join_late(any_model: Pair) -> None:
    model, engine = any_model
    sources = random_prompts(*LENGTHS)
    expected = [own_greedy(model, source, 24) for source in sources]
    operations = [Generate(stream_id=i, prompt=s, max_tokens=24) for i, s in enumerate(sources)]
    early = begin(engine, *operations[:3])
    next(iter(early))
    late = collect(begin(engine, *operations[3:]))
    collect(early)
    assert [late.ids(i) for i in range(3, 6)] == expected[3:]
    together = answers(engine, *operations)
    assert [together.ids(i) for i in range(6)] == expected
    assert engine.runner.active == []


def test_scores_are_those_of_one_plain_forward_pass(any_model: Pair) -> None:
    model, engine = any_model
    sources, targets = random_prompts(9, 33, 9, seed=1), random_prompts(1, 8, 30, seed=2)
    batch = answers(
        engine,
        *(
            Score(stream_id=i, prompt=s, scored=t, top_logprobs=2)
            for i, (s, t) in enumerate(zip(sources, targets, strict=True))
        ),
    )
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        logprobs = own_logprobs(model, source, target)
        expected = [logprobs[j, token].item() for j, token in enumerate(target)]
        assert [token.logprob for token in batch.tokens(i)] == pytest.approx(expected, abs=1e-4)
        top = batch.tokens(i)[-1].top_logprobs
        assert isinstance(top, dict)
        assert max(top.values()) == pytest.approx(logprobs[-1].max().item(), abs=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_served_exactly_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"^\w+ForConditionalGeneration cannot be served exactly: .*choose"):
        open_runner(build(name))


def test_a_model_whose_rows_see_other_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lmtp.runners.encoder_decoder._bias", lambda compute, positions, *sizes, **more: compute(*sizes, **more)
    )
    with pytest.raises(UnsupportedModel, match=r"^T5ForConditionalGeneration .* positions differ"):
        open_runner(build("t5"))


def test_generation_goes_on_from_a_target_so_far(t5: Pair) -> None:
    model, engine = t5
    source, target = random_prompts(11, 6, seed=3)
    answer = answers(engine, Generate(stream_id=0, prompt=source, target=target, max_tokens=12))
    assert answer.ids() == own_greedy(model, source, 12, target)
    assert answer.counters.input_tokens == 11 + 6


def test_padding_inside_a_target_has_the_position_that_a_whole_text_gives_it() -> None:
    """M2M100 gives it none. With its cache Transformers counts it nevertheless, so its generate runs without one."""
    model = build("m2m_100")
    padding: int = model.config.pad_token_id
    source, target, more = random_prompts(9, 6, 4, seed=6)
    targets = [target, [*target[:2], padding, *target[2:]], [padding, padding, *target], [*target, padding]]
    targets.append([*targets[1], *more])  # the second one is reused
    engine = start(model)
    try:
        for several in (targets[:4], targets[4:]):
            batch = answers(
                engine, *(Generate(stream_id=i, prompt=source, target=t, max_tokens=8) for i, t in enumerate(several))
            )
            for i, each in enumerate(several):
                with torch.inference_mode():
                    generate: Any = model.generate  # typed as a tensor
                    output = generate(
                        torch.tensor([source]),
                        decoder_input_ids=torch.tensor([start_of(model) + each]),
                        max_new_tokens=8,
                        do_sample=False,
                        use_cache=False,
                    )
                assert batch.ids(i) == output[0, 1 + len(each) :].tolist()
                logprobs = own_logprobs(model, source, each + batch.ids(i))[len(each) :]
                expected = [logprobs[j, token].item() for j, token in enumerate(batch.ids(i))]
                assert [token.logprob for token in batch.tokens(i)] == pytest.approx(expected, abs=1e-4)
    finally:
        engine.stop()
    assert batch.counters.reused_tokens > len(source)


def test_a_target_is_reused_under_its_own_source_only(t5: Pair) -> None:
    _, engine = t5
    one, other, target = random_prompts(11, 11, 20, seed=4)

    def reused(source: list[int]) -> tuple[int, int]:
        counters = answers(engine, Generate(stream_id=0, prompt=source, target=target, max_tokens=1)).counters
        return counters.reused_tokens, counters.computed_tokens

    assert reused(one) == (0, 11 + 21)
    assert reused(one) == (11 + 20, 1)
    assert reused(other) == (0, 11 + 21)


def test_a_source_is_encoded_once_for_all_that_is_asked_of_it(t5: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = t5
    encoded: list[int] = []
    handle = model.get_encoder().register_forward_hook(lambda *_: encoded.append(1))
    (source, *targets) = random_prompts(19, 3, 4, 5, seed=5)
    scores = [Score(stream_id=f"s{i}", prompt=source, scored=t) for i, t in enumerate(targets)]
    several = [Generate(stream_id=i, prompt=source, max_tokens=8, temperature=1.0, seed=i) for i in range(4)]
    counters = answers(engine, *scores, *several).counters
    answers(engine, *several)
    assert sum(encoded) == 1
    assert counters.reused_tokens == 19 * 6
    answers(engine, Generate(stream_id=0, prompt=source, max_tokens=1, cache_salt="another"))
    handle.remove()
    assert sum(encoded) == 2


def encoded_at_once(model: PreTrainedModel) -> tuple[list[int], Any]:
    """How many sources each run of the encoder takes from now on, and the hook's handle."""
    counts: list[int] = []

    def count(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        counts.append(len(inputs["input_ids"]))

    return counts, model.get_encoder().register_forward_pre_hook(count, with_kwargs=True)


def test_new_sources_of_equal_length_are_encoded_together(t5: Pair) -> None:
    model, engine = t5
    sources = random_prompts(9, 6, 9, 9, 6, 4, seed=21)
    counts, handle = encoded_at_once(model)
    got = answers(engine, *(Generate(stream_id=i, prompt=source, max_tokens=5) for i, source in enumerate(sources)))
    handle.remove()
    assert sorted(counts) == [1, 2, 3]
    assert got.counters.reused_tokens == 0
    assert [got.ids(i) for i in range(6)] == [own_greedy(model, source, 5) for source in sources]


def test_where_one_of_several_fails_the_others_are_encoded_alone(t5: Pair) -> None:
    model, engine = t5
    sources = random_prompts(9, 9, 9, seed=22)

    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no memory is left.")

    counts, handle = encoded_at_once(model)
    spoiled = spoil(model, sources[1], fail)
    got = answers(engine, *(Generate(stream_id=i, prompt=source, max_tokens=5) for i, source in enumerate(sources)))
    handle.remove()
    spoiled.remove()
    assert counts == [3, 1, 1, 1]
    assert got.error(1) == "the model failed: no memory is left."
    assert [got.ids(i) for i in (0, 2)] == [own_greedy(model, sources[i], 5) for i in (0, 2)]


def test_sources_that_depend_on_those_beside_them_are_encoded_one_by_one() -> None:
    model = build("t5")

    def mix(_: Any, args: Any, output: Any) -> None:
        output.last_hidden_state += output.last_hidden_state.flip(0) * (len(output.last_hidden_state) > 1)

    model.get_encoder().register_forward_hook(mix)
    engine = start(model)
    sources = random_prompts(9, 9, seed=23)
    counts, _ = encoded_at_once(model)
    try:
        got = answers(engine, *(Generate(stream_id=i, prompt=s, max_tokens=5) for i, s in enumerate(sources)))
    finally:
        engine.stop()
    assert counts == [1, 1]
    assert [got.ids(i) for i in range(2)] == [own_greedy(model, source, 5) for source in sources]


def test_nothing_is_shared_where_reuse_is_off() -> None:
    engine = start(build("t5"), bounds=Bounds(prefix_reuse="off"))
    (source,) = random_prompts(9)
    both = answers(engine, *(Generate(stream_id=i, prompt=source, max_tokens=3) for i in range(2)))
    engine.stop()
    assert both.counters.reused_tokens == 0
    assert both.ids(0) == both.ids(1)


def test_with_little_memory_streams_wait_for_rows_and_sources_are_encoded_again() -> None:
    model = build("bart")
    per_token = 2 * 2 * 32 * 4  # keys and values of two layers
    engine = start(model, kv_budget=2 * 100 * per_token)
    sources = random_prompts(40, 30, 35, 1, 39, 25, seed=6)
    operations = [Generate(stream_id=i, prompt=s, max_tokens=20) for i, s in enumerate(sources)]
    for _ in range(2):
        batch = answers(engine, *operations)
        assert [batch.ids(i) for i in range(6)] == [own_greedy(model, source, 20) for source in sources]
    longest = engine.runner.longest_source
    error = answers(engine, Generate(stream_id=0, prompt=[5] * (longest + 1))).error()
    scored = answers(engine, Score(stream_id=0, prompt=[5], scored=[5] * 110)).error()
    engine.stop()
    assert scored == (
        f"target and scored are 111 tokens; memory for keys and values (KV_CACHE_GB) holds {engine.runner.longest}."
    )
    assert error == f"prompt is {longest + 1} tokens; memory for encoding a prompt (KV_CACHE_GB) holds {longest}."


def spoil(model: PreTrainedModel, source: list[int], how: Callable[[torch.Tensor], Any]) -> Any:
    """Let the encoder return something else for one source. Returns the hook's handle."""

    def change(_: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
        for row, states in zip(inputs["input_ids"].tolist(), output.last_hidden_state, strict=True):
            if row == source:
                how(states)

    return model.get_encoder().register_forward_hook(change, with_kwargs=True)


def running_text(runner: Any, source: list[int], tokens: list[int]) -> Text:
    """A text that the runner has admitted."""
    text = Text([0, *tokens])
    text.source = tuple(source)
    assert runner.admit(text)
    return text


def step(runner: Any, *texts: Text) -> torch.Tensor:
    """The logits of the first token of each text."""
    logits: torch.Tensor = runner.prepare(Step(texts, [1] * len(texts)))()
    for text in texts:
        text.computed += 1
    return logits


def test_a_source_that_is_not_finite_spoils_no_later_one_in_its_row() -> None:
    model = build("t5")
    runner = open_runner(model)
    bad, good, target = random_prompts(40, 9, 5, seed=8)
    handle = spoil(model, bad, lambda states: states.fill_(torch.nan))
    text = running_text(runner, bad, target)
    assert step(runner, text).isnan().all()
    handle.remove()
    runner.release(text)  # as a cancelled stream, of which nothing is known
    logits = step(runner, running_text(runner, good, target))
    torch.testing.assert_close(
        torch.log_softmax(logits, -1), own_logprobs(model, good, target[:1]), atol=1e-4, rtol=1e-4
    )


def test_what_a_failed_stream_read_is_forgotten_in_every_row() -> None:
    model = build("t5")
    runner: Any = open_runner(model)
    source, target, other = random_prompts(20, 5, 5, seed=9)
    handle = spoil(model, source, lambda states: states.fill_(torch.nan))
    one, two = running_text(runner, source, target), running_text(runner, source, other)
    step(runner, one, two)
    handle.remove()
    runner.release(two)
    runner.release(one, keep=False)
    assert not any(tensor.isnan().any() for tensor in runner._sources._rows.keys)
    logits = step(runner, running_text(runner, source, target))
    torch.testing.assert_close(
        torch.log_softmax(logits, -1), own_logprobs(model, source, target[:1]), atol=1e-4, rtol=1e-4
    )


def test_a_source_that_fails_fails_its_own_streams_only(t5: Pair) -> None:
    model, engine = t5
    sources = random_prompts(12, 17, 5, seed=10)

    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no memory is left.\nA stack")

    handle = spoil(model, sources[1], fail)
    operations = [Generate(stream_id=i, prompt=sources[i % 3], max_tokens=6) for i in range(4)]
    batch = answers(engine, *operations, Generate(stream_id=4, prompt=sources[1], max_tokens=6))
    handle.remove()
    assert batch.error(1) == batch.error(4) == "the model failed: no memory is left."
    expected = [own_greedy(model, source, 6) for source in sources]
    assert [batch.ids(i) for i in (0, 2, 3)] == [expected[0], expected[2], expected[0]]
    assert answers(engine, operations[1]).ids(1) == expected[1]


def test_few_sources_are_encoded_beside_streams_that_decode() -> None:
    model = build("t5")
    runner: Any = open_runner(model)
    runner.step_limits = replace(runner.step_limits, chunk=60, busy_chunk=30)
    first, *sources = random_prompts(9, 20, 20, 20, 40, seed=11)
    target = [5, 6, 7]

    def admitted() -> list[Text]:
        texts: list[Text] = []
        for source in sources:
            text = Text([0, *target])
            text.source = tuple(source)
            if not runner.admit(text):
                assert runner.refusal == "other prompts are encoded first"
                break
            texts.append(text)
        return texts

    early = admitted()
    assert len(early) == 3  # nobody decodes
    for text in early:
        runner.release(text)
    decoding = running_text(runner, first, target)
    step(runner, decoding)
    (late,) = admitted()
    step(runner, decoding, late)
    runner.release(late)
    assert len(admitted()) == 2  # the first of them is encoded by now


def test_the_new_sources_of_a_step_are_projected_in_one_pass() -> None:
    model = build("t5")
    runner: Any = open_runner(model)
    sources = random_prompts(20, 3, 31, 20, seed=12)
    target = [5, 6, 7]
    texts = [running_text(runner, source, target) for source in [*sources, sources[2]]]
    passes: list[int] = []
    handle = model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    logits = step(runner, *texts)
    assert sum(passes) == 2  # and that of the step
    step(runner, *texts)
    handle.remove()
    assert sum(passes) == 3
    for row, source in zip(logits, [*sources, sources[2]], strict=True):
        expected = own_logprobs(model, source, target)[0]
        torch.testing.assert_close(torch.log_softmax(row, -1), expected, atol=1e-4, rtol=1e-4)


def test_sources_that_cannot_be_projected_together_are_projected_alone() -> None:
    model = build("t5")
    runner: Any = open_runner(model)
    sources = random_prompts(20, 3, 31, seed=13)
    texts = [running_text(runner, source, [5, 6]) for source in sources]
    project = runner._sources._encoder.project
    refused = [20 + 3 + 31, 31]

    def scarce(several: Sequence[Encoded]) -> Any:
        if sum(one.length for one in several) in refused:
            raise torch.OutOfMemoryError("no memory is left.")
        return project(several)

    runner._sources._encoder.project = scarce
    logits = step(runner, *texts)
    assert [text.problem for text in texts] == ["", "", "no memory is left."]
    for row, source in zip(logits[:2], sources, strict=False):
        expected = own_logprobs(model, source, [5, 6])[0]
        torch.testing.assert_close(torch.log_softmax(row, -1), expected, atol=1e-4, rtol=1e-4)


def test_what_is_kept_of_sources_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: weakref.WeakSet[Encoded] = weakref.WeakSet()
    encode = Encoder.__call__

    def counted(self: Encoder, sources: Sequence[Sequence[int]]) -> list[Encoded]:
        several = encode(self, sources)
        encoded.update(several)
        return several

    monkeypatch.setattr(Encoder, "__call__", counted)
    budget = 100_000
    engine = start(build("t5"), kv_budget=budget)
    runner: Any = engine.runner
    operations = [Generate(stream_id=i, prompt=p, max_tokens=2) for i, p in enumerate(random_prompts(*[9, 30] * 15))]
    answers(engine, *operations)
    rows = runner._sources._rows
    states = sum(one.states.nbytes for one in encoded)
    engine.stop()
    assert 0 < states <= budget // 2 // 8 + 128  # that of failed sources
    assert rows.slots * rows.capacity * rows.bytes_per_token + states <= budget // 2


def test_a_budget_that_holds_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="KV_CACHE_GB"):
        open_runner(build("t5"), kv_budget=1000)


def test_what_the_model_cannot_take_is_refused_in_a_sentence() -> None:
    engine = start(build("bart"))
    assert (engine.limits.context, engine.limits.source and engine.limits.source.context) == (128, 128)
    batch = answers(
        engine,
        Generate(stream_id=0, prompt=[5] * 129),
        Generate(stream_id=1, prompt=[]),
        Score(stream_id=2, prompt=[], scored=[5]),
        Generate(stream_id=3, prompt=[5], target=[6] * 127),
        Score(stream_id=4, prompt=[5], scored=[6] * 128),
        Generate(stream_id=5, prompt=[VOCABULARY]),
        Generate(stream_id=6, prompt=[5], target=[VOCABULARY]),
        Generate(stream_id=7, prompt=[5] * 128, target=[6] * 120, max_tokens=50),
        ModelInfo(stream_id=8),
    )
    engine.stop()
    assert batch.error(0) == "prompt is 129 tokens; the model's encoder reads at most 128."
    assert batch.error(1) == batch.error(2) == "prompt is empty; give at least one token."
    assert batch.error(3) == "target is 128 tokens; the model's context of 128 leaves no room for a new one."
    assert batch.error(4) == "target and scored are 129 tokens; the model's context is 128."
    assert batch.error(5).startswith("prompt[0]: token id 128 is outside the vocabulary")
    assert batch.error(6).startswith("target[0]: token id 128 is outside the vocabulary")
    assert len(batch.ids(7)) <= 7


def test_a_target_that_begins_with_the_forced_token_gets_no_second_one() -> None:
    model = build("mbart")
    engine = start(model)
    source, target = random_prompts(9, 4, seed=7)
    batch = answers(
        engine,
        Generate(stream_id=0, prompt=source, target=[5, *target], max_tokens=9),
        Generate(stream_id=1, prompt=source, target=target, max_tokens=9),
        Score(stream_id=2, prompt=source, scored=[5, *target]),
        Score(stream_id=3, prompt=source, scored=target),
    )
    engine.stop()
    assert batch.ids(0) == batch.ids(1) == own_greedy(model, source, 9, target)
    scores = [token.logprob for token in batch.tokens(3)]
    assert [token.logprob for token in batch.tokens(2)[1:]] == pytest.approx(scores, abs=1e-4)


WORDS = ("▁", "▁yes", "▁no", "▁may", "be", "yes", "no", *"abcdefghijklmnopqrstuvwxyz", *"0123456789", *'{}[]":,.?- ')


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """A tokenizer as T5's: words begin with a space that decoding drops at the start, and texts end with an end."""
    special: list[tuple[str, float]] = [("<pad>", 0.0), ("<unk>", 0.0), ("</s>", 0.0)]
    vocabulary = special + [(word, -1.0 - 10 * (len(word) < 2)) for word in WORDS]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    backend.add_special_tokens(["<pad>", "<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def talking() -> Iterator[Pair]:
    model = build("flan_t5", vocab_size=3 + len(WORDS))
    engine = start(model, tokenizer_of_words())
    yield model, engine
    engine.stop()


def complete(engine: Engine, prompt: str, output: str = "json", n: int = 1, **settings: Any) -> Any:
    """What the input ``prompt`` answers."""
    ids = asyncio.run(engine.tokenizers.render(prompt))
    generate = Generate(stream_id=0, prompt=ids, text=True, **settings)
    completions = Completions(generate, engine.tokenizer, output, n, encoded=True)
    asyncio.run(completions.tokenize(engine.tokenizers, engine.limits.context))
    prediction = begin(engine, *completions.operations)
    text = "".join(completions.add(replies) for replies in prediction)
    text += completions.end(
        prediction.counters.reused_tokens, prediction.counters.computed_tokens, engine.compiler.check
    )
    return json.loads(text) if output == "json" else text


def test_a_prompt_is_the_source_and_its_answer_the_decoded_target(talking: Pair) -> None:
    model, engine = talking
    prompt = "can a dog drive a car?"
    ids = engine.tokenizer(prompt).input_ids
    assert ids[-1] == END
    expected = own_greedy(model, ids, 20)
    document = complete(engine, prompt, max_tokens=20)
    assert [token["token"] for token in document["choices"][0]["tokens"]] == expected
    assert document["choices"][0]["text"] == engine.tokenizer.decode(expected, skip_special_tokens=True)
    assert document["usage"]["input_token_count"] == len(ids)
    assert complete(engine, prompt, "text", max_tokens=20) == document["choices"][0]["text"]
    assert complete(engine, prompt, "lmtp", max_tokens=20).count("TOKEN") == len(expected)


def test_several_completions_are_each_what_it_is_alone(talking: Pair) -> None:
    _, engine = talking
    several = complete(engine, "a dog?", n=3, max_tokens=8, temperature=1.0, seed=4)["choices"]
    alone = [complete(engine, "a dog?", max_tokens=8, temperature=1.0, seed=4 + i)["choices"][0] for i in range(3)]
    assert [choice["text"] for choice in several] == [choice["text"] for choice in alone]
    assert len({choice["text"] for choice in several}) > 1


def test_choices_are_compared_as_the_target_would_spell_them(talking: Pair) -> None:
    model, engine = talking
    prompt, options = "a dog?", ["yes", "no", "maybe"]
    source = engine.tokenizer(prompt).input_ids
    document = complete(engine, prompt, choices=options)
    for row in document["distribution"]:
        target = engine.tokenizer(row["choice"]).input_ids[:-1]
        logprobs = own_logprobs(model, source, target)
        expected = sum(logprobs[i, token].item() for i, token in enumerate(target))
        assert row["logprob"] == pytest.approx(expected, abs=1e-4)
    assert document["choices"][0]["text"] == document["distribution"][0]["choice"]


def test_a_constraint_holds_for_the_target(talking: Pair) -> None:
    _, engine = talking
    text = complete(engine, "a dog?", "text", regex="(yes|no), [0-9]{3}", max_tokens=20)
    assert re.fullmatch("(yes|no), [0-9]{3}", text)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    document = complete(engine, "a dog?", json_schema=schema, max_tokens=40)
    assert document["choices"][0]["constraint_valid"]


def test_a_constrained_text_may_begin_with_a_whole_word(talking: Pair) -> None:
    _, engine = talking
    yes = int(engine.tokenizer.encode("yes")[0])
    settings: list[dict[str, Any]] = [{"regex": "yes|nope"}, {"choices": ["yes", "nope"]}]
    for constraint in settings:
        likely = Generate(stream_id=0, prompt="a dog?", logit_bias={yes: 50.0}, text=True, **constraint)
        tokens = answers(engine, likely).tokens()
        assert tokens[0].token == yes
        assert "".join(str(token.text) for token in tokens) == "yes"


def test_a_target_given_as_text_goes_on(talking: Pair) -> None:
    model, engine = talking
    source, target = engine.tokenizer("a dog?").input_ids, engine.tokenizer("maybe").input_ids[:-1]
    both = answers(
        engine,
        Generate(stream_id=0, prompt="a dog?", target="maybe", max_tokens=9, text=True),
        Generate(stream_id=1, prompt=source, target=target, max_tokens=9, text=True),
        Score(stream_id=2, prompt="a dog?", scored="maybe"),
    )
    assert both.ids(0) == both.ids(1) == own_greedy(model, source, 9, target)
    assert both.ids(2) == target


def test_log_probabilities_of_a_prompt_that_is_encoded_are_refused(talking: Pair) -> None:
    _, engine = talking
    with pytest.raises(RequestError, match=r"^prompt_logprobs: this model encodes the prompt"):
        Completions(Generate(stream_id=0, prompt=[5]), engine.tokenizer, "json", prompt_logprobs=True, encoded=True)


def test_a_decoder_has_no_target() -> None:
    from tests.tiny import build as build_decoder

    engine = start(build_decoder("llama"))
    error = answers(engine, Generate(stream_id=0, prompt=[5], target=[6])).error()
    engine.stop()
    assert error == "target: this model has no encoder; put the text so far at the end of prompt."
