"""The page of a GPU's results: what `script/benchmark --gpu` measured, as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import markdown_table, number


def page(found: Mapping[str, Any]) -> str:
    """Markdown for the results of benchmarks/gpu.py, by the names of its parts; a part that is missing is left out."""
    parts = [
        f"# {found['machine']}\n\ntorch {found['torch']}. Random models of Llama's code, bfloat16, unless a line says"
        " otherwise. The floor is the time to read what a step reads (weights, but of the table of embeddings; keys and"
        " values) at the rate of a copy, which reads and writes.",
        _table(
            "A decode step of the model",
            ("model", "rows x columns", "ms", "floor ms", "of the floor"),
            [
                (*_split(name), number(each["ms"]), number(each["floor ms"]), number(each["of the floor"]))
                for name, each in _of(found, "decode")
            ],
        ),
        _table(
            "Tokens a second, greedy, prompts of 128 tokens, 128 new ones",
            ("model", "rows", "ours", "generate", "ours / generate", "continuous batching", "vLLM"),
            [_served(found, *_split(name), each) for name, each in _of(found, "engine")],
        ),
        _table(
            "One layer's attention in a decode step",
            ("rows x columns", "µs", "floor µs", "of the floor"),
            [
                (name, number(each["us"]), number(each["floor us"]), number(each["of the floor"]))
                for name, each in _attention(found)
            ],
        ),
        _table(
            "Other parts",
            ("part", "result"),
            [(name, _words(each)) for name, each in found.items() if _is_other(name) or _has_failed(each)],
        ),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _of(found: Mapping[str, Any], part: str) -> list[tuple[str, Any]]:
    """The results of a part that were measured, by what follows its name."""
    return [
        (name.removeprefix(f"{part} "), each)
        for name, each in found.items()
        if name.startswith(f"{part} ") and not isinstance(each, str)
    ]


def _attention(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    measured = found.get("attention")
    return list(measured.items()) if isinstance(measured, Mapping) else []


def _split(name: str) -> tuple[str, str]:
    model, rows = name.split(" ", 1)
    return model, rows


def _served(found: Mapping[str, Any], model: str, rows: str, ours: float) -> tuple[str, ...]:
    own = found.get(f"generate {model} {rows}")
    others = [found.get(f"{peer} {model}") if rows == "64" else None for peer in ("continuous batching", "vLLM")]
    ratio = number(ours / own) if isinstance(own, float) else ""
    return model, rows, number(ours), _words(own), ratio, *map(_words, others)


def _is_other(name: str) -> bool:
    return name.split()[0] in ("GB/s", "tests", "loading", "grammar", "setup", "prefill", "score", "syncs")


def _has_failed(result: Any) -> bool:
    return isinstance(result, str) and result.startswith("failed")


def _words(result: Any) -> str:
    if isinstance(result, Mapping):
        return ", ".join(f"{name}: {_words(each)}" for name, each in result.items() if each != "")
    return "" if result is None else number(result) if isinstance(result, int | float) else str(result)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    return f"## {title}\n\n{markdown_table(head, *rows)}"
