"""A mix of everything through HTTP, by 48 clients, judged by a table that Transformers alone made.

    make soak                         two minutes
    make soak SOAK_SECONDS=600        ten
    make soak NIGHTLY=1               four hours
    SOAK_SEED=7 make soak             the predictions of another seed

In `make test` it takes a few seconds. The figures are printed at the end.
"""

import asyncio
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
import pytest

from tests.server import ROOT, Server, serving
from tests.soak import model, table
from tests.soak.client import WAYS, Client, Document, connected
from tests.soak.mix import ENDLESS_TOKENS, NO_END, Call, Mix, StateError, WrongError

SECONDS = float(os.environ.get("SOAK_SECONDS") or 4)
SEED = int(os.environ.get("SOAK_SEED") or 0)
NAME = f"soak-{os.getpid()}-"
"""Every prediction's id begins with it."""

DIRECTORIES = Path("/tmp/coglet/predictions")
"""Where the runtime makes a directory for each prediction."""

CLIENTS = 48
PLACES = 64
"""Predictions that the server takes at once."""

MAX_SECONDS = 30
"""The server's bound on a prediction: what the runtime never tells about ends by then."""

ANSWER_SECONDS = 90.0
"""A prediction that takes longer is not answered."""

LEFT_SECONDS = 5.0
"""How soon a prediction ends after its client left."""

STEADY_SECONDS = 120.0
"""A shorter soak is all warm-up: its memory is not judged."""

MAX_GROWTH = 0.02
"""Of the worker's memory, between the third and the fourth quarter of a soak."""


@dataclass
class Figures:
    """What a soak counts."""

    started: float = field(default_factory=time.monotonic)
    predictions: Counter[str] = field(default_factory=Counter)
    """Ended, by kind and way."""
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    outlived: int = 0
    """Predictions that still ran LEFT_SECONDS after their client left."""
    memory: list[int] = field(default_factory=list)
    """Bytes that the server's processes hold, once a second."""

    def growth(self) -> float:
        """By how much the memory grew from the third quarter to the fourth."""
        quarter = len(self.memory) // 4
        if not quarter:
            return 0.0
        return median(self.memory[-quarter:]) / median(self.memory[-2 * quarter : -quarter]) - 1


@pytest.fixture(scope="module")
def mix() -> Mix:
    return Mix(table.make(model.tiny_model(), model.tokenizer()), SEED)


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    weights = model.install(model.tiny_model(), tmp_path_factory.mktemp("soak"))
    settings = {"KV_CACHE_GB": "0.1", "OMP_NUM_THREADS": "1", "MAX_SECONDS": str(MAX_SECONDS)}
    with serving(ROOT, WEIGHTS_DIR=str(weights), DTYPE="float32", COMPILE="off", **settings) as server:
        yield server


async def test_a_mix_of_everything_is_answered_rightly_and_leaves_nothing_behind(
    tiny_server: Server, mix: Mix, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = Figures()
    numbers = iter(range(10**9))
    async with connected(tiny_server.url) as client:
        watching = asyncio.create_task(watch(tiny_server, figures))
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(work(client, mix, numbers, figures))
        watching.cancel()
        seconds = time.monotonic() - figures.started
        leaked = await leaks(client, tiny_server)
    directories = list(DIRECTORIES.glob(f"{NAME}*"))
    if len(directories) > PLACES:
        leaked.append(f"the directories of {len(directories):,} predictions")
    for directory in directories:
        shutil.rmtree(directory)
    with capsys.disabled():
        report(figures, seconds, client.refusals, leaked)
    assert not figures.wrong
    assert not figures.states
    assert not figures.unanswered
    assert not leaked
    if SECONDS >= STEADY_SECONDS:
        assert figures.growth() < MAX_GROWTH


async def work(client: Client, mix: Mix, numbers: Iterator[int], figures: Figures) -> None:
    """Be one client until the time is over."""
    while time.monotonic() < figures.started + SECONDS:
        number = next(numbers)
        call, chance = mix.call(number)
        reproduction = f"prediction {number}, {call.kind}, {json.dumps({'input': call.inputs})[:2000]}"
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                tokens = await make(client, call, chance, f"{NAME}{number}", figures)
            figures.tokens += tokens
        except TimeoutError:
            figures.unanswered.append(reproduction)
        except StateError as error:
            figures.states.append(f"{error}\n    {reproduction}")
        except (WrongError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            figures.wrong.append(f"{type(error).__name__}: {error}\n    {reproduction}")
        except OSError as error:  # aiohttp's errors of a connection are among these
            figures.unanswered.append(f"{error}\n    {reproduction}")


async def make(client: Client, call: Call, chance: random.Random, id: str, figures: Figures) -> int:
    """Make one prediction and check its answer; returns the number of its tokens."""
    way = chance.choice(WAYS)
    if call.kind == "endless":
        after = chance.choice((0.0, 0.01, 0.1, 0.5)) * chance.random()
        if way != "webhook" and chance.random() < 0.5:
            await client.predict_and_leave(way, id, call.inputs, after)
            figures.predictions["left"] += 1
            gone = time.monotonic()
            while await client.runs(id):
                if time.monotonic() > gone + LEFT_SECONDS:
                    figures.outlived += 1
                    break
                await asyncio.sleep(0.2)
            return 0
        answer = await client.predict_and_cancel(way, id, call.inputs, after)
    else:
        answer = await client.predict(way, id, call.inputs)
    figures.predictions[f"{call.kind}, {way}"] += 1
    return call.check(answer)


async def watch(server: Server, figures: Figures) -> None:
    """Note the memory once a second."""
    script = psutil.Process(server.process.pid)
    while True:
        total = 0
        for process in script.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        figures.memory.append(total)
        await asyncio.sleep(1)


async def leaks(client: Client, server: Server) -> list[str]:
    """What is still taken after everything has ended: places that are not free again, or streams that still run."""
    found = []
    info = {"ops_batch_json": '[["MODEL_INFO", {"stream_id": 1}]]'}
    fields = {"stream_id": 1, "prompt": [5], "max_tokens": ENDLESS_TOKENS, "logit_bias": NO_END}
    endless = {"ops_batch_json": json.dumps([["GENERATE", fields]])}
    deadline = time.monotonic() + MAX_SECONDS + LEFT_SECONDS
    while (await client.health()).get("status") == "BUSY" and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    while (load := await asyncio.to_thread(cpu_seconds, server, 1.0)) > 0.3 and time.monotonic() < deadline:
        pass
    if load > 0.3:
        found.append(f"the idle server computes for {load:.1f} of a second's time")
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            answer = await client.predict("wait", f"{NAME}info", info)
            if "model_info" not in "".join(answer.output):
                found.append(f"MODEL_INFO is answered {answer}")
    except TimeoutError:
        found.append("MODEL_INFO is not answered")
    ids = [f"{NAME}place-{i}" for i in range(PLACES)]
    begun = await asyncio.gather(*(begin(client, id, endless) for id in ids))
    places = sum(called is not None for called in begun)
    if places < PLACES:
        found.append(f"{PLACES - places} of {PLACES} places are taken")
    deadline = time.monotonic() + MAX_SECONDS
    while not all(called.done() for called in begun if called) and time.monotonic() < deadline:
        await asyncio.gather(
            *(client.cancel(id) for id, called in zip(ids, begun, strict=True) if called and not called.done())
        )
        await asyncio.sleep(0.2)
    running = sum(not called.done() for called in begun if called)
    if running:
        found.append(f"{running} of {places} cancelled predictions still run")
    return found


async def begin(client: Client, id: str, inputs: Document) -> asyncio.Future[Document] | None:
    """Take a place; None if there is none within seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LEFT_SECONDS):
            return await client.begin(id, inputs)
    return None


def cpu_seconds(server: Server, seconds: float) -> float:
    """The processor time that the server's processes take meanwhile."""

    def used() -> float:
        total = 0.0
        for process in psutil.Process(server.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds


def report(figures: Figures, seconds: float, refusals: int, leaked: list[str]) -> None:
    """Print the figures and every defect."""
    made = figures.predictions.total()
    memory = figures.memory or [0]
    half = memory[len(memory) // 2 :]
    lines = {
        "seed": SEED,
        "predictions": f"{made:,} in {seconds:.0f} s, {made / seconds:.1f} a second, by {CLIENTS} clients",
        "tokens": f"{figures.tokens:,}, {figures.tokens / seconds:,.0f} a second",
        "wrong": len(figures.wrong),
        "wrong terminal states": len(figures.states),
        "unanswered": len(figures.unanswered),
        "leaked": len(leaked),
        "ran on after the client left": f"{figures.outlived} of {figures.predictions['left']}",
        "refused as busy and repeated": refusals,
        "memory, second half": f"{min(half) / 1e6:,.0f} to {max(half) / 1e6:,.0f} MB, growth {figures.growth():+.1%}",
    }
    print("\n")
    for name, value in lines.items():
        print(f"{name:32}{value}")
    print("; ".join(f"{kind} {count}" for kind, count in sorted(figures.predictions.items())))
    defects = {"wrong": figures.wrong, "state": figures.states, "unanswered": figures.unanswered, "leaked": leaked}
    for kind, found in defects.items():
        for defect in found[:20]:
            print(f"\n{kind}: {defect}")
