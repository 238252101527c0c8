"""predict.py's signature, as `cog build` reads it: from the source, without running it.

`cog build` silently drops what it does not understand. A description in parentheses is lost, and one in two adjacent
literals keeps the quotes between them. The container would then take other inputs than script/serve.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.server import ROOT

PLAIN = r"(str|int|float|bool|[Ll]ist\[(str|int|float|bool)\])"
TYPES = rf"{PLAIN}|(typing\.)?Optional\[{PLAIN}\]|{PLAIN} \| None|None \| {PLAIN}"
KEYWORDS = ("default", "description", "ge", "le", "min_length", "max_length", "regex", "choices", "deprecated")


def violations(source: str) -> Iterator[str]:
    """What `cog build` does not read in `predict` as Python does: a name and the problem with it."""
    (method,) = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == "predict"]
    assert isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
    inputs = method.args.args[1:]
    for argument in (method.args.vararg, method.args.kwarg, *method.args.kwonlyargs, *method.args.posonlyargs):
        if argument:
            yield f"{argument.arg} is not an ordinary argument"
    for argument in inputs:
        if not argument.annotation or not re.fullmatch(TYPES, ast.unparse(argument.annotation)):
            yield f"{argument.arg} has no type or one that is not plain"
    if not method.returns:
        yield "return has no type"
    for argument, default in zip(reversed(inputs), reversed(method.args.defaults), strict=False):
        if not isinstance(default, ast.Call):
            yield from (f"{argument.arg} {problem}" for problem in literal_violations(source, default))
            continue
        if default.args:
            yield f"{argument.arg} has an argument of Input() without its keyword"
        for keyword in default.keywords:
            value = ast.get_source_segment(source, keyword.value)
            if keyword.arg not in KEYWORDS:
                yield f"{argument.arg} gives Input() the unknown argument {keyword.arg or '**'}"
            elif ast.get_source_segment(source, keyword) != f"{keyword.arg}={value}":
                yield f"{argument.arg} has a value in parentheses"
            yield from (f"{argument.arg} {problem}" for problem in literal_violations(source, keyword.value))
    for decorator in method.decorator_list:
        for keyword in decorator.keywords if isinstance(decorator, ast.Call) else []:
            yield from (f"@{keyword.arg} {problem}" for problem in literal_violations(source, keyword.value))


def literal_violations(source: str, value: ast.expr) -> Iterator[str]:
    try:
        ast.literal_eval(value)
    except ValueError:
        yield f"has the value `{ast.unparse(value)}`, which is not a literal"
    # `cog build` knows no prefixes, no escapes and no adjacent literals.
    for part in ast.walk(value):
        string = part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None
        if string is not None and ast.get_source_segment(source, part) not in (f'"{string}"', f"'{string}'"):
            yield "has a string that is not one plain literal"


def test_cog_build_can_read_every_input_of_this_project() -> None:
    assert list(violations((ROOT / "predict.py").read_text())) == []


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("given", "no type"),
        ("given=1", "no type"),
        ("*given", "not an ordinary argument"),
        ("**given", "not an ordinary argument"),
        ("*, given: int", "not an ordinary argument"),
        ("given: int, /", "not an ordinary argument"),
        ("given: dict", "not plain"),
        ("given: list[list[str]]", "not plain"),
        ("given: int | str", "not plain"),
        ("given: int = LIMIT", "has the value `LIMIT`"),
        ("given: int = Input(default=2 ** 10)", "has the value `2 ** 10`"),
        ("given: int = Input(ge=LOWEST)", "has the value `LOWEST`"),
        ("given: str = Input(choices=sorted(NAMES))", "has the value `sorted(NAMES)`"),
        ("given: str = Input(description=f'{1}')", "not a literal"),
        ("given: int = Input(3)", "without its keyword"),
        ("given: int = Input(default_factory=int)", "default_factory"),
        ("given: int = Input(**OPTIONS)", "**"),
        ("given: str = Input(description='one' ' two')", "not one plain literal"),
        ("given: str = Input(description=('one'))", "in parentheses"),
        (r"given: str = Input(default='\n')", "not one plain literal"),
        ("given: str = Input(default=r'x')", "not one plain literal"),
    ],
)
def test_the_check_finds_what_cog_build_does_not_read(argument: str, problem: str) -> None:
    source = f"class Predictor:\n    async def predict(self, {argument}) -> str: ...\n"
    found = list(violations(source))
    assert any(each.startswith("given ") and problem in each for each in found), found


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def predict(self, x: int): ...", "return has no type"),
        (
            "@cog.concurrent(max=N)\nasync def predict(self) -> str: ...",
            "@max has the value `N`, which is not a literal",
        ),
    ],
)
def test_the_check_reads_output_and_decorators(source: str, problem: str) -> None:
    assert list(violations(source)) == [problem]


def test_the_check_accepts_what_cog_build_reads() -> None:
    arguments = "a: str, b: Optional[int] = None, c: list[float] = Input(description='It is \"plain\"', choices=[1, 2])"
    assert list(violations(f"def predict(self, {arguments}) -> str: ...")) == []


def test_importing_the_predictor_imports_nothing_heavy() -> None:
    check = "import sys, predict; print({'torch', 'transformers', 'numpy', 'llguidance'} & set(sys.modules))"
    imported = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert imported.stdout == "set()\n"
