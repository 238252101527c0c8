"""Decode steps as CUDA graphs; only where there is a GPU."""

import pytest
import torch

from lmtp.protocol import Generate
from lmtp.runners.graphs import GraphedStep
from lmtp.runners.slot_runner import SlotRunner
from tests.tiny import answers, build, random_prompts, start

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_streams_decoded_by_graphs_equal_those_decoded_without() -> None:
    model = build("llama")
    torch.nn.Module.cuda(model)
    engine = start(model)
    assert engine.runner.description == "slots, decode steps as CUDA graphs"
    runner = engine.runner
    assert isinstance(runner, SlotRunner)
    assert isinstance(runner.fast, GraphedStep)
    several = [Generate(stream_id=i, prompt=p, max_tokens=30) for i, p in enumerate(random_prompts(3, 200, 41, 9, 260))]
    with_graphs = answers(engine, *several)
    runner.fast = None
    without = answers(engine, *several)
    assert [with_graphs.ids(i) for i in range(5)] == [without.ids(i) for i in range(5)]
    engine.stop()
