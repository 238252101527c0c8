"""One model over several processes: equal to one process, and nothing of it is left when one of them fails.

The processes compute on a CPU, with one thread each, and are connected by gloo. One group of two serves the models of all
architectures one after the other.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmtp.engine.engine import Engine, LoadedModel
from lmtp.protocol import Generate, ModelInfo, Score
from lmtp.runners import parallel
from lmtp.runners.group import GroupError, Leader
from lmtp.runners.slot_runner import SlotRunner
from lmtp.settings import ROOT
from lmtp.weights.manifest import WeightsError
from tests.tiny import BASE, EXPERTS, answers, begin, collect, own_greedy, own_logits, randomize
from tests.tiny import random_prompts as prompts
from tests.weights.helpers import seal

Config = tuple[str, dict[str, Any]]
MODELS: dict[str, Config] = {
    "llama": ("LlamaConfig", {**BASE, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**BASE, "sliding_window": 8}),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 8}),
    "gemma3_text": ("Gemma3TextConfig", {**BASE, "head_dim": 8, "sliding_window": 8}),
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
NINE_HEADS: Config = ("LlamaConfig", {**BASE, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3})


@dataclass
class Served:
    """A model served by several processes, and the whole of it in this one."""

    model: PreTrainedModel
    engine: Engine
    group: Leader


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> Callable[[Config], Path]:
    """Makes a weights directory of a random model."""

    def save(config: Config) -> Path:
        directory = tmp_path_factory.mktemp("weights")
        kind, arguments = config
        torch.manual_seed(0)
        randomize(AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments))).save_pretrained(directory)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer_files / name, directory)
        seal(directory)
        return directory

    return save


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = sorted(ByteLevel.alphabet())[:120]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    directory = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def two() -> Iterator[Leader]:
    group = Leader(2, parallel.__name__)
    yield group
    group.close()


def serve(group: Leader, directory: Path, kv_budget: int | None = None) -> Served:
    def open_model() -> LoadedModel:
        loaded = parallel.load(group, directory, "float32")
        runner = parallel.open_parallel(group, loaded.model, kv_budget)
        return LoadedModel(loaded.model, loaded.tokenizer, runner, check=group.check)

    engine = Engine(open_model)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return Served(whole, engine, group)


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, two: Leader, saved: Callable[[Config], Path]) -> Iterator[Served]:
    opened = serve(two, saved(MODELS[request.param]))
    yield opened
    opened.engine.stop()


def test_each_process_keeps_only_its_own_heads_and_runs_the_same_runner(served: Served) -> None:
    runner = served.engine.runner
    assert type(runner) is SlotRunner
    assert (runner.description, runner.reason) == ("slots over 2 processes", "")
    answers(served.engine, Generate(stream_id=0, prompt=[5], max_tokens=1))
    assert {keys.shape[1] for keys in runner._memory.keys} == {1}  # of two


def test_greedy_streams_equal_generate_of_one_process_alone_and_in_a_batch(served: Served) -> None:
    several = prompts(3, 17, 41, 9)
    several.append(several[2][:30] + several[0])
    batch = answers(served.engine, *(Generate(stream_id=i, prompt=p, max_tokens=16) for i, p in enumerate(several)))
    for i, prompt in enumerate(several):
        assert batch.ids(i) == own_greedy(served.model, prompt, 16)
    again = answers(served.engine, Generate(stream_id=0, prompt=several[2] + batch.ids(2), max_tokens=8))
    assert again.ids() == own_greedy(served.model, several[2] + batch.ids(2), 8)
    assert again.counters.reused_tokens >= len(several[2])


def test_logprobs_and_scores_are_those_of_one_forward_pass_of_one_process(served: Served) -> None:
    prompt, scored = prompts(30, 9, seed=1)
    batch = answers(
        served.engine,
        Generate(stream_id=0, prompt=prompt, max_tokens=10, temperature=0.9, seed=3),
        Score(stream_id=1, prompt=prompt, scored=scored),
    )
    for stream in (0, 1):
        logprobs = torch.log_softmax(own_logits(served.model, prompt + batch.ids(stream)), -1)
        expected = [logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(batch.ids(stream))]
        assert [token.logprob for token in batch.tokens(stream)] == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def llama(two: Leader, saved: Callable[[Config], Path]) -> Iterator[Served]:
    opened = serve(two, saved(MODELS["llama"]), kv_budget=2 * 2 * 8 * 4 * 1500)
    yield opened
    opened.engine.stop()


def test_accepted_drafts_change_nothing_but_the_number_of_steps(llama: Served) -> None:
    prompt = prompts(6)[0] * 6
    result = answers(llama.engine, Generate(stream_id=0, prompt=prompt, max_tokens=60, min_tokens=60))
    assert result.counters.drafted_tokens > 0
    logits = own_logits(llama.model, prompt + result.ids())
    logits[:, 2] = -torch.inf  # min_tokens forbids the end
    assert result.ids() == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_a_grammar_allows_only_what_it_describes(llama: Served) -> None:
    result = answers(
        llama.engine, Generate(stream_id=0, prompt=prompts(8)[0], regex="(ab|cd){3}", max_tokens=20, text=True)
    )
    assert set(llama.engine.tokenizer.decode(result.ids()[:6])) <= set("abcd")
    assert len(result.ids()) >= 6


def test_two_hundred_mixed_predictions_with_cancels_each_end_as_one_process_would_end_them(llama: Served) -> None:
    several = prompts(*[3, 40, 7, 64, 12, 33, 90, 21] * 25, seed=10)
    expected: dict[int, list[int]] = {}
    running = []
    for i, prompt in enumerate(several):
        if i % 5 == 0:
            begin(llama.engine, Generate(stream_id=0, prompt=prompt, max_tokens=300, min_tokens=300)).cancel()
        elif i % 5 == 1:
            running.append((i, begin(llama.engine, Score(stream_id=0, prompt=prompt[:2], scored=prompt[2:]))))
        elif i % 5 == 2:
            sampled = Generate(stream_id=0, prompt=prompt, max_tokens=6, temperature=1.0, seed=i)
            running.append((i, begin(llama.engine, sampled)))
        else:
            running.append((i, begin(llama.engine, Generate(stream_id=0, prompt=prompt, max_tokens=8))))
    for i, prediction in running:
        result, prompt = collect(prediction), several[i]
        ids = prompt[2:] if i % 5 == 1 else result.ids()
        given = prompt[:2] if i % 5 == 1 else prompt
        logits = own_logits(llama.model, given + ids)
        logprobs = torch.log_softmax(logits, -1)[len(given) - 1 : -1]
        expected[i] = logprobs.argmax(-1).tolist() if i % 5 > 2 else ids
        assert result.ids() == expected[i]
        own = [logprobs[j, token].item() for j, token in enumerate(ids)]
        assert [token.logprob for token in result.tokens()] == pytest.approx(own, abs=1e-4)
    answers(llama.engine, ModelInfo(stream_id=0))
    assert len(expected) == 160
    assert llama.engine.runner.active == []


def test_a_process_without_memory_for_more_leaves_all_as_they_were(
    llama: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = llama.engine.runner
    assert isinstance(runner, SlotRunner)
    before = (runner._memory.slots, runner._memory.capacity)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory here")

    with monkeypatch.context() as patch:
        patch.setattr("lmtp.runners.slots._zeros", full)
        long = prompts(200, seed=3)[0]
        error = answers(llama.engine, Generate(stream_id=0, prompt=long, max_tokens=250)).error()
    assert "there is no memory for its keys and values: no memory here" in error
    assert (runner._memory.slots, runner._memory.capacity) == before
    short = prompts(12, seed=4)[0]
    assert answers(llama.engine, Generate(stream_id=0, prompt=short, max_tokens=8)).ids() == own_greedy(
        llama.model, short, 8
    )


def test_numbers_of_heads_that_do_not_divide_are_refused_with_those_that_do(saved: Callable[[Config], Path]) -> None:
    nine = saved(NINE_HEADS)
    with pytest.raises(
        WeightsError,
        match="has 9 attention heads and 3 key value heads, which 2 processes cannot share equally: set PARALLEL to 3 or off",
    ):
        parallel.processes_for(2, nine, "auto")
    assert parallel.processes_for(3, nine, "auto") == 3
    assert parallel.processes_for(1, nine, "auto") == parallel.processes_for(None, nine, "auto") == 1
