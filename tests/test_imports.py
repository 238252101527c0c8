"""What a server does without when it starts, and that all of it is there for who asks later."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(program: str, **environment: str) -> str:
    """What a Python process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_server_starts_and_generates_without_compiler_and_distributed_tensors(demo_weights: Path) -> None:
    program = """
import asyncio, sys
from predict import Predictor
from lmtp.protocol import Generate

predictor = Predictor()
predictor.setup()
prediction = asyncio.run(predictor.engine.predict([Generate(stream_id=0, prompt=[504], max_tokens=4, regex="[a-z ]+")]))
assert sum(len(replies) for replies in prediction) == 4
print(*(name for name in ("torch._dynamo.eval_frame", "torch.distributed.tensor") if name in sys.modules))
"""
    printed = run(program, WEIGHTS_DIR=str(demo_weights), HF_HUB_OFFLINE="1").splitlines()
    assert printed[-1] == ""


@pytest.mark.parametrize(
    "first_use",
    [
        "compiled = torch.compile(twice, backend='eager')",
        "import torch._dynamo.utils",
        "from torch._dynamo import config",
        "torch._dynamo.reset()",
    ],
)
def test_the_compiler_comes_whole_with_its_first_use(first_use: str) -> None:
    run(f"""
from lmtp import imports
imports.lighten()
import sys
import torch
import transformers.modeling_utils

assert "torch._dynamo.eval_frame" not in sys.modules

@torch.compiler.disable
def kept_from_it():
    return torch.compiler.is_compiling()

@torch.compiler.allow_in_graph
def allowed(x):
    return x + 1

@torch._dynamo.assume_constant_result
def constant():
    return 3

def twice(x):
    return allowed(x) * 2 if constant() == 3 else x

assert not kept_from_it()
{first_use}
import torch._dynamo.convert_frame, torch._dynamo.trace_rules, torch._dynamo.utils
from torch._dynamo import config
assert torch._dynamo is sys.modules["torch._dynamo"]
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
assert torch._dynamo.convert_frame.config is config is torch._dynamo.config
assert torch._dynamo.utils.__spec__.origin == torch._dynamo.utils.__file__
assert torch._dynamo.trace_rules.is_callable_allowed(allowed)
assert constant._dynamo_marked_constant
assert torch.compile(twice, backend="eager", fullgraph=True)(torch.ones(1)).item() == 4

@torch.compiler.disable
class Kept:
    pass

assert isinstance(Kept(), Kept)
both = torch.compile(lambda: (torch.compiler.is_compiling(), kept_from_it()), backend="eager")
assert both() == (True, False)
""")
