"""One model over several processes: equal to one process, and nothing of it is left when one of them fails.

The processes compute on a CPU, with one thread each, and are connected by gloo. One group of two serves the models of all
architectures one after the other.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lmtp.engine.engine import Engine, LoadedModel
from lmtp.protocol import Generate, ModelInfo, Score
from lmtp.runners import parallel
from lmtp.runners.group import GroupError, Leader
from lmtp.runners.model import UnsupportedModel
from lmtp.runners.selfcheck import Reference, _check_texts
from lmtp.runners.slot_runner import SlotRunner
from lmtp.settings import ROOT, SettingsError
from lmtp.weights.manifest import Adapter, WeightsError, read_manifest, write_manifest
from tests.models import config_of
from tests.runners import uneven
from tests.runners.test_encoder_decoder import T5
from tests.server import Server, serving
from tests.tiny import ARCHITECTURES, BASE, CACHE_MODELS, answers, begin, collect, own_greedy, own_logits, randomize
from tests.tiny import random_prompts as prompts
from tests.weights.helpers import saved as as_weights
from tests.weights.helpers import seal

Config = tuple[str, dict[str, Any]]
MODELS: dict[str, Config] = {
    "llama": ("LlamaConfig", {**BASE, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**BASE, "sliding_window": 8}),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 8}),
    "gemma3_text": ("Gemma3TextConfig", {**BASE, "head_dim": 8, "sliding_window": 8}),
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
SIX_HEADS = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
NINE: dict[str, Any] = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}
NINE_HEADS: Config = ("LlamaConfig", {**BASE, **NINE, "max_position_embeddings": 2**16})
DOGE: Config = ("DogeConfig", {**BASE, "head_dim": 8})
TIED: Config = ("GPTNeoXConfig", {**ARCHITECTURES["gpt_neox"][1], "tie_word_embeddings": True})


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
        autos = {"BertConfig": AutoModelForMaskedLM, "T5Config": AutoModelForSeq2SeqLM}
        auto: Any = autos.get(kind, AutoModelForCausalLM)
        torch.manual_seed(0)
        model = randomize(auto.from_config(getattr(transformers, kind)(**arguments)))
        return as_weights(model, directory, tokenizer_files)

    return save


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = sorted(ByteLevel.alphabet())[:120]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
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
    assert runner.description == "slots over 2 processes"
    assert runner.reason == "compiled steps and CUDA graphs run in one process only"
    assert runner.fast is None
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


def test_a_model_that_slots_do_not_serve_is_refused_and_the_group_goes_on(
    two: Leader, saved: Callable[[Config], Path]
) -> None:
    found = "do not serve Phi3ForCausalLM: its rotary embedding changes .* Set PARALLEL=off"
    with pytest.raises(UnsupportedModel, match=found):
        serve(two, saved(CACHE_MODELS["phi3_longrope"]))
    two.check()


def test_heads_that_the_plan_leaves_whole_need_not_divide(two: Leader, saved: Callable[[Config], Path]) -> None:
    heads = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
    directory = saved(("Phi3Config", {**BASE, **heads, "vocab_size": 129, "intermediate_size": 65}))
    assert parallel.processes_for(2, directory, "auto") == 2
    opened = serve(two, directory)
    equals_one_process(opened)
    opened.engine.stop()


@pytest.fixture(scope="module")
def llama(two: Leader, saved: Callable[[Config], Path]) -> Iterator[Served]:
    opened = serve(two, saved(MODELS["llama"]), kv_budget=2 * 2 * 8 * 4 * 1500)
    yield opened
    opened.engine.stop()


def test_accepted_drafts_change_nothing_but_the_number_of_steps(llama: Served) -> None:
    (prompt,) = prompts(20, seed=4)
    few = [20, 21, 22, 23]
    operation = Generate(stream_id=0, prompt=prompt, max_tokens=40, logit_bias=dict.fromkeys(few, 100.0))
    result = answers(llama.engine, operation)
    assert result.counters.accepted_tokens > 0
    assert result.counters.steps < len(result.ids()) == 40
    own = own_logits(llama.model, prompt + result.ids())[len(prompt) - 1 : -1, few].argmax(-1)
    assert result.ids() == [few[i] for i in own.tolist()]


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


def test_a_process_that_hangs_ends_the_group_and_every_prediction_gets_an_error(llama: Served) -> None:
    (process,) = llama.group.processes
    with begin(llama.engine, Generate(stream_id=0, prompt=[5], max_tokens=400, min_tokens=400)) as running:
        next(iter(running))
        process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        failed = collect(running)
    assert "2 that compute the model failed or did not answer" in str(failed.replies[0][-1])
    while not llama.engine.problem and time.monotonic() < stopped + 5:
        time.sleep(0.05)
    assert "the engine has stopped and must be restarted: GroupError: " in llama.engine.problem
    assert process.wait(5) == -signal.SIGKILL
    with pytest.raises(GroupError, match="did not answer"):
        llama.group.check()
    llama.group.close()


@pytest.fixture(scope="module")
def nine(saved: Callable[[Config], Path]) -> Path:
    return saved(NINE_HEADS)


@pytest.fixture(scope="module")
def three(two: Leader) -> Iterator[Leader]:
    two.close()
    group = Leader(3, uneven.__name__)
    yield group
    group.close()


def equals_one_process(served: Served) -> None:
    """Tokens and log-probabilities of several texts are those of the whole model."""
    several = prompts(3, 41, 9)
    batch = answers(served.engine, *(Generate(stream_id=i, prompt=p, max_tokens=16) for i, p in enumerate(several)))
    for i, prompt in enumerate(several):
        assert batch.ids(i) == own_greedy(served.model, prompt, 16)
        logprobs = torch.log_softmax(own_logits(served.model, prompt + batch.ids(i)), -1)[len(prompt) - 1 :]
        expected = [row[token].item() for row, token in zip(logprobs, batch.ids(i), strict=False)]
        assert [token.logprob for token in batch.tokens(i)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("architecture", [name for name in MODELS if name != "llama"])
def test_three_processes_equal_one_with_six_heads(
    three: Leader, saved: Callable[[Config], Path], architecture: str
) -> None:
    kind, arguments = MODELS[architecture]
    opened = serve(three, saved((kind, {**arguments, **SIX_HEADS})))
    equals_one_process(opened)
    opened.engine.stop()


def test_processes_with_different_memory_all_use_as_much_as_the_least_has(
    three: Leader, nine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parallel.load(three, nine, "float32").model
    bytes_per_token = model.config.num_hidden_layers * 2 * model.config.head_dim * 4  # of one head each
    second, third = uneven.memory_of(1), uneven.memory_of(2)
    for first, least in ((2 * second, third), (third // 2, third // 2)):
        monkeypatch.setattr(parallel, "default_budget", lambda _, first=first: 3 * first)
        assert parallel.open_parallel(three, model).longest == least // bytes_per_token


def test_three_processes_share_nine_heads_and_one_that_is_killed_is_reported_and_leaves_nothing(
    three: Leader, nine: Path
) -> None:
    group = three
    try:
        opened = serve(group, nine)
        equals_one_process(opened)

        group.processes[0].kill()
        killed = time.monotonic()
        while not opened.engine.problem and time.monotonic() < killed + 5:
            time.sleep(0.05)
        assert opened.engine.problem.endswith("GroupError: process 2 of 3 that compute the model was ended by SIGKILL")
        assert [process.wait(5) for process in group.processes] == [-signal.SIGKILL] * 2
        assert opened.engine.problem in answers(opened.engine, Generate(stream_id=0, prompt=[5])).error()
    finally:
        group.close()


def test_the_other_processes_end_with_the_first_however_it_ends() -> None:
    code = """
from lmtp.runners.group import Leader
group = Leader(2, "tests.runners.follower")
group.tell(0)
print(group.processes[0].pid, flush=True)
input()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        other = psutil.Process(int(first.stdout.readline()))
        first.kill()
        psutil.wait_procs([other], 5)
        assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_does_not_start_is_reported() -> None:
    with pytest.raises(GroupError, match="process 2 of 2 that compute the model ended with exit code 1; see its log"):
        Leader(2, "tests.runners.none")


def test_numbers_of_heads_that_do_not_divide_are_refused_with_those_that_do(nine: Path) -> None:
    found = "has 9 attention heads and 3 key value heads, which 2 processes cannot share equally"
    with pytest.raises(WeightsError, match=f"{found}: set PARALLEL to 3 or off"):
        parallel.processes_for(2, nine, "auto")
    assert parallel.processes_for(3, nine, "auto") == 3
    assert parallel.processes_for(1, nine, "auto") == parallel.processes_for(None, nine, "auto") == 1


def test_experts_that_do_not_divide_are_refused_with_the_numbers_of_processes_that_do(
    saved: Callable[[Config], Path],
) -> None:
    kind, arguments = MODELS["mixtral"]
    heads = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6}
    directory = saved((kind, {**arguments, **heads, "intermediate_size": 24}))
    found = r"has experts of width 24 \(shared in multiples of 8\), which 2 processes cannot share equally"
    with pytest.raises(WeightsError, match=f"{found}: set PARALLEL to 3 or off"):
        parallel.processes_for(2, directory, "auto")
    with pytest.raises(WeightsError, match=r"has experts of width 24 .*, which 6 processes cannot share equally"):
        parallel.processes_for(6, directory, "auto")
    assert parallel.processes_for(3, directory, "auto") == 3


def test_heads_that_differ_between_layers_all_have_to_divide(saved: Callable[[Config], Path]) -> None:
    directory = saved(("LagunaConfig", config_of("laguna").to_dict()))
    assert parallel.processes_for(2, directory, "auto") == 2
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["num_attention_heads_per_layer"] = [4, *[6] * (len(config["layer_types"]) - 1)]
    path.write_text(json.dumps(config))
    (directory / "manifest.json").unlink()
    seal(directory)
    assert parallel.processes_for(2, directory, "auto") == 2
    with pytest.raises(
        WeightsError, match=r"has 4 .* which 3 processes cannot share equally: set PARALLEL to 2 or off"
    ):
        parallel.processes_for(3, directory, "auto")


def test_auto_takes_as_many_gpus_as_can_share_a_model_that_one_has_no_room_for(
    nine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for fits, processes in ((True, 1), (False, 3)):
        monkeypatch.setattr("lmtp.weights.load.fits", lambda *_, fits=fits: fits)
        assert parallel.processes_for(None, nine, "auto") == processes
    with pytest.raises(SettingsError, match="PARALLEL is 6, and there are 4 GPUs"):
        parallel.processes_for(6, nine, "auto")


@pytest.mark.parametrize(
    ("config", "model_args", "message"),
    [
        (ARCHITECTURES["gpt2"], {}, "Transformers has no plan to share gpt2 among processes: set PARALLEL=off"),
        (("BertConfig", {**BASE, "num_key_value_heads": None}), {}, "is no decoder"),
        (("T5Config", {**T5, "vocab_size": 128}), {}, "is no decoder, and only decoders run in several processes"),
        (MODELS["llama"], {"load_in": "int8"}, "is quantized, which several processes do not compute"),
        (CACHE_MODELS["phi3_longrope"], {}, "do not serve org/old: its rotary embedding changes .* Set PARALLEL=off"),
        (DOGE, {}, "Transformers' plan to share doge among processes does not run: set PARALLEL=off"),
        (TIED, {}, "plan for gpt_neox shares one of lm_head.weight and gpt_neox.embed_in.weight, which are one: set "),
    ],
    ids=["without a plan", "encoder", "encoder-decoder", "quantized", "not by slots", "does not run", "tied"],
)
def test_what_several_processes_do_not_serve_is_refused_before_they_start(
    saved: Callable[[Config], Path], config: Config, model_args: dict[str, Any], message: str
) -> None:
    directory = saved(config)
    (directory / "manifest.json").unlink()
    seal(directory, model_args=model_args)
    with pytest.raises(WeightsError, match=message):
        parallel.processes_for(2, directory, "auto")


@pytest.mark.parametrize("how", ["merged", "beside the model"])
def test_adapters_are_refused(nine: Path, how: str) -> None:
    manifest = read_manifest(nine)
    adapter = Adapter("org/adapter", None)
    with_one = {"adapter": adapter} if how == "merged" else {"adapters": {"own": adapter}}
    try:
        write_manifest(nine, msgspec.structs.replace(manifest, **with_one))
        with pytest.raises(WeightsError, match="has an adapter, which several processes do not compute: set PARALLEL="):
            parallel.processes_for(3, nine, "auto")
    finally:
        write_manifest(nine, manifest)


def test_types_whose_weights_are_loaded_wrongly_are_refused(saved: Callable[[Config], Path]) -> None:
    directory = saved(("YoutuConfig", config_of("youtu").to_dict()))
    with pytest.raises(WeightsError, match="loads youtu otherwise in several processes than in one: set PARALLEL=off"):
        parallel.processes_for(2, directory, "auto")


@pytest.mark.skipif("NIGHTLY" not in os.environ, reason="takes minutes: NIGHTLY=1")
def test_every_type_with_a_plan_is_refused_before_it_is_loaded_or_equal_to_one_process(
    two: Leader, tmp_path: Path, tokenizer_files: Path
) -> None:
    two.close()
    group, exact, wrong, late = Leader(2, parallel.__name__), [], [], []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if model_type not in CONFIG_MAPPING or not CONFIG_MAPPING[model_type].base_model_tp_plan:
            continue
        torch.manual_seed(0)
        directory = tmp_path / model_type
        try:
            as_weights(randomize(AutoModelForCausalLM.from_config(config_of(model_type))), directory, tokenizer_files)
            reference = Reference.of(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())
        except Exception:  # Transformers makes no model of it (tests/models.py)
            continue
        if parallel.refusal_of(directory, 2):
            continue
        try:
            loaded = parallel.load(group, directory, "float32")
            runner = parallel.open_parallel(group, loaded.model, 2**26)
        except UnsupportedModel as error:
            late.append(f"{model_type}: {error}")
            if group.problem:
                group.close()
                group = Leader(2, parallel.__name__)
            continue
        try:
            with torch.inference_mode():
                _check_texts(runner, reference, (1,))
            exact.append(model_type)
        except UnsupportedModel:
            wrong.append(model_type)
    group.close()
    assert wrong == late == []
    assert len(exact) > 70


@pytest.mark.skipif("NIGHTLY" not in os.environ, reason="starts two servers: NIGHTLY=1")
def test_a_server_shares_the_demo_model_among_three_processes_and_says_when_one_dies(demo_weights: Path) -> None:
    settings: Any = {"WEIGHTS_DIR": str(demo_weights), "DTYPE": "float32", "COMPILE": "off"}
    inputs = {"prompt": "Why is the sky blue?", "max_tokens": 24}
    with serving(**settings) as one:
        expected = asked(one, "/predictions", {"input": inputs})["output"]
    with serving(**settings, PARALLEL="3") as three:
        assert asked(three, "/predictions", {"input": inputs})["output"] == expected
        tree = psutil.Process(three.process.pid).children(recursive=True)
        others = [process for process in tree if parallel.__name__ in process.cmdline()]
        assert len(others) == 2
        others[1].kill()
        killed = time.monotonic()
        health: dict[str, Any] = {}
        while health.get("status") != "UNHEALTHY" and time.monotonic() < killed + 5:
            health = asked(three, "/health-check")
        assert "that compute the model was ended by SIGKILL" in health["user_healthcheck_error"]
        assert not psutil.wait_procs(others, 5)[1]


def asked(server: Server, path: str, body: object = None) -> dict[str, Any]:
    """What a server answers to a GET, or to the POST of a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
