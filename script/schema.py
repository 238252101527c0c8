"""The OpenAPI schema of predict.py, read from its source without running it, as `cog build` does.

Cog's runtime validates inputs and streams by what `.cog/openapi_schema.json` says; `cog build` puts it into the image.
Whatever starts the runtime without Docker has to write that file first.

`cog build` reads source text with a small parser of its own and, where it does not understand an argument, mostly drops
it without a word: a description in parentheses is lost, one in two adjacent literals keeps the quotes between them.
Such a predictor would serve other inputs in the container than here, so all of that is an error here.
Source: pkg/schema of Cog (github.com/replicate/cog).
"""

import ast
import json
import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JsonObject = dict[str, Any]

PRIMITIVES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
"""Input types, and what JSON Schema calls them."""

OUTPUT_EXTENSIONS = {
    "Iterator": {"x-cog-array-type": "iterator"},
    "AsyncIterator": {"x-cog-array-type": "iterator"},
    "ConcatenateIterator": {"x-cog-array-type": "iterator", "x-cog-array-display": "concatenate"},
    "AsyncConcatenateIterator": {"x-cog-array-type": "iterator", "x-cog-array-display": "concatenate"},
}
"""Generic output types, and how clients are told to show them."""

CONSTRAINTS = {
    "description": "description",
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "regex": "pattern",
    "deprecated": "deprecated",
}
"""Arguments of Input() that become one property of the schema."""


class SchemaError(Exception):
    """The predictor's signature cannot be read without running it; says which argument, and why."""


@dataclass(frozen=True)
class Signature:
    """What the source of a predictor says about calling it."""

    inputs: dict[str, JsonObject]
    """The JSON Schema of each input, in order; choices inline as `enum`."""
    required: list[str]
    output: JsonObject
    streaming: bool
    concurrency: int
    """How many predictions may run at once; `cog build` turns it into COG_MAX_CONCURRENCY."""


def read_signature(path: Path, predictor: str = "Predictor") -> Signature:
    """Read the signature of `predictor`'s method `predict` in the file at `path`.

    Raises:
        SchemaError: The file, the class or the method is missing, or the signature is not statically readable.
    """
    try:
        source = path.read_text(encoding="utf-8")
        module = ast.parse(source)
    except OSError as error:
        raise SchemaError(f"{path} cannot be read: {error.strerror}") from error
    except SyntaxError as error:
        raise SchemaError(f"{path.name}, line {error.lineno}: {error.msg}") from error
    return _Reader(source, path.name).read(_find_predict(module, predictor, path.name))


def openapi(signature: Signature) -> JsonObject:
    """The OpenAPI document of a predictor, as the container image carries it."""
    properties: JsonObject = {}
    choices: JsonObject = {}
    for order, (name, given) in enumerate(signature.inputs.items()):
        described = {**given, "x-order": order}
        if "enum" in described:
            choices[name] = {
                "title": name,
                "description": "An enumeration.",
                "type": described.pop("type"),
                "enum": described.pop("enum"),
            }
            properties[name] = {"allOf": [_reference(name)], **described}
        else:
            properties[name] = {"title": _title(name), **described}
    inputs = {"title": "Input", "type": "object", "properties": properties}
    if signature.required:
        inputs["required"] = signature.required
    predict: JsonObject = {
        "summary": "Predict",
        "description": "Run a single prediction on the model",
        "operationId": "predict_predictions_post",
        "requestBody": _json_content("PredictionRequest"),
        "responses": {
            "200": {"description": "Successful Response", **_json_content("PredictionResponse")},
            "422": {"description": "Validation Error", **_json_content("HTTPValidationError")},
        },
    }
    if signature.streaming:
        predict["x-cog-streaming"] = True
    schemas = {
        "Input": inputs,
        "Output": {"title": "Output", **signature.output},
        **choices,
        "PredictionRequest": _object("PredictionRequest", id={"type": "string"}, input=_reference("Input")),
        "PredictionResponse": _object(
            "PredictionResponse",
            input=_reference("Input"),
            output=_reference("Output"),
            id={"type": "string"},
            version={"type": "string"},
            created_at={"type": "string", "format": "date-time"},
            started_at={"type": "string", "format": "date-time"},
            completed_at={"type": "string", "format": "date-time"},
            status={"type": "string"},
            error={"type": "string"},
            logs={"type": "string"},
            metrics={"type": "object"},
        ),
        "HTTPValidationError": _object(
            "HTTPValidationError", detail={"type": "array", "items": _reference("ValidationError")}
        ),
        "ValidationError": {
            **_object(
                "ValidationError",
                loc={"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
                msg={"type": "string"},
                type={"type": "string"},
            ),
            "required": ["loc", "msg", "type"],
        },
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {"/predictions": {"post": predict}},
        "components": {"schemas": schemas},
    }


def write(signature: Signature, root: Path) -> Path:
    """Write the schema to where the runtime started in `root` reads it; return the file's path.

    The file is put in place in one move: a runtime that is starting never reads half of it.
    """
    path = root / ".cog" / "openapi_schema.json"
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(openapi(signature), indent=2), encoding="utf-8")
    draft.replace(path)
    return path


def _title(name: str) -> str:
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))


def _reference(name: str) -> JsonObject:
    return {"$ref": f"#/components/schemas/{name}"}


def _json_content(name: str) -> JsonObject:
    return {"content": {"application/json": {"schema": _reference(name)}}}


def _object(title: str, **properties: JsonObject) -> JsonObject:
    return {"title": title, "type": "object", "properties": properties}


def _find_predict(module: ast.Module, predictor: str, file: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    for statement in module.body:
        if isinstance(statement, ast.ClassDef) and statement.name == predictor:
            for member in statement.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and member.name == "predict":
                    return member
            raise SchemaError(f"{file}: class {predictor} has no method predict")
    raise SchemaError(f"{file} has no class {predictor}")


def _called(node: ast.expr) -> str:
    """The name of what is called, decorated or annotated, without the module in front."""
    if isinstance(node, ast.Call):
        return _called(node.func)
    return ast.unparse(node).rpartition(".")[2]


class _Reader:
    """Reads one method; keeps the source, in which `cog build` sees more than Python's syntax tree keeps."""

    def __init__(self, source: str, file: str) -> None:
        self.lines = source.encode().splitlines(keepends=True)
        self.file = file

    def read(self, method: ast.FunctionDef | ast.AsyncFunctionDef) -> Signature:
        arguments = method.args
        unsupported = [arguments.vararg, arguments.kwarg, *arguments.kwonlyargs, *arguments.posonlyargs]
        for argument in unsupported:
            if argument is not None:
                raise self.error(argument, argument.arg, "must be an ordinary argument with a type")
        if arguments.args and arguments.args[0].arg != "self":
            raise self.error(method, "self", "must be the first argument of predict")
        named = arguments.args[1:]
        defaults: list[ast.expr | None] = [None] * (len(named) - len(arguments.defaults))
        defaults += arguments.defaults
        inputs: dict[str, JsonObject] = {}
        required = []
        for argument, default in zip(named, defaults, strict=True):
            name = argument.arg
            if argument.annotation is None:
                raise self.error(argument, name, "has no type")
            described = self.read_type(argument.annotation, name)
            if default is not None:
                described |= self.read_default(default, name)
            if "choices" in described:
                described["enum"] = described.pop("choices")
            nullable = described.get("nullable", False)
            # `= None` on a type that is not Optional does not make an input optional, for `cog build` either.
            if "default" in described and described["default"] is None and not nullable:
                del described["default"]
            if "default" not in described and not nullable:
                required.append(name)
            inputs[name] = described
        streaming, concurrency = self.read_decorators(method)
        return Signature(inputs, required, self.read_output(method), streaming, concurrency)

    def read_type(self, node: ast.expr, name: str) -> JsonObject:
        """str, int, float or bool; a list of one; either of these or None."""
        if isinstance(node, ast.Subscript) and _called(node.value) == "Optional":
            return {**self.read_type(node.slice, name), "nullable": True}
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = [node.left, node.right]
            others = [side for side in sides if not (isinstance(side, ast.Constant) and side.value is None)]
            if len(others) == 1:
                return {**self.read_type(others[0], name), "nullable": True}
        if isinstance(node, ast.Subscript) and _called(node.value) in ("list", "List"):
            items = self.read_type(node.slice, name)
            if items["type"] != "array" and "nullable" not in items:
                return {"type": "array", "items": items}
        if isinstance(node, ast.Name) and node.id in PRIMITIVES:
            return {"type": PRIMITIVES[node.id]}
        raise self.error(
            node,
            name,
            f"has the type `{ast.unparse(node)}`; what works: {', '.join(PRIMITIVES)}, Optional and list of these",
        )

    def read_default(self, node: ast.expr, name: str) -> JsonObject:
        """What follows `=` in the signature: Input(…) or a literal."""
        if not (isinstance(node, ast.Call) and _called(node) == "Input"):
            return {"default": self.read_literal(node, name)}
        if node.args:
            raise self.error(node, name, "gives Input() an argument without its keyword, which `cog build` ignores")
        described = {}
        for keyword in node.keywords:
            key = keyword.arg
            if key is None or key not in {"default", "choices", *CONSTRAINTS}:
                raise self.error(keyword, name, f"gives Input() the argument {key or '**'}, which is unknown here")
            between = self.text(keyword)
            if not re.match(rf"{key}\s*=\s*[^\s(]", between):
                raise self.error(
                    keyword, name, f"gives {key} in parentheses, which `cog build` ignores: write one literal"
                )
            described[CONSTRAINTS.get(key, key)] = self.read_literal(keyword.value, name)
        return described

    def read_literal(self, node: ast.expr, name: str) -> Any:
        try:
            value = ast.literal_eval(node)
        except ValueError:
            raise self.error(
                node, name, f"is given `{ast.unparse(node)}`, which only running the file would tell: write a literal"
            ) from None
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and self.as_cog_reads(part) != part.value:
                raise self.error(
                    part,
                    name,
                    f"has the string {textwrap.shorten(repr(part.value), 40, placeholder='…')}, which `cog build` reads"
                    " differently: write one literal without prefix and backslashes, not several side by side",
                )
        return value

    def text(self, node: ast.expr | ast.keyword) -> str:
        """The node's own text. ast.get_source_segment would split the whole file into lines every time."""
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        lines = self.lines[first : last + 1]
        lines[-1] = lines[-1][: node.end_col_offset]
        lines[0] = lines[0][node.col_offset :]
        return b"".join(lines).decode()

    def as_cog_reads(self, node: ast.Constant) -> str:
        """The text between the outermost quotes: `cog build` knows neither escapes nor adjacent literals."""
        text = self.text(node)
        quotes = 3 if text.startswith(('"""', "'''")) else 1
        return text[quotes:-quotes]

    def read_output(self, method: ast.FunctionDef | ast.AsyncFunctionDef) -> JsonObject:
        returns = method.returns
        if isinstance(returns, ast.Subscript) and _called(returns.value) in OUTPUT_EXTENSIONS:
            items = self.read_type(returns.slice, "return")
            return {"type": "array", "items": items, **OUTPUT_EXTENSIONS[_called(returns.value)]}
        if returns is None:
            raise self.error(method, "return", "has no type")
        return self.read_type(returns, "return")

    def read_decorators(self, method: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[bool, int]:
        """Whether @cog.streaming is there, and the number in @cog.concurrent(max=…)."""
        streaming, concurrency = False, 1
        for decorator in method.decorator_list:
            if _called(decorator) == "streaming":
                streaming = True
            if _called(decorator) == "concurrent" and isinstance(decorator, ast.Call):
                for keyword in decorator.keywords:
                    value = self.read_literal(keyword.value, "@concurrent")
                    if keyword.arg != "max" or type(value) is not int or value < 1:
                        raise self.error(decorator, "@concurrent", "takes max=, a whole number of at least 1")
                    concurrency = value
        return streaming, concurrency

    def error(self, node: ast.AST, name: str, problem: str) -> SchemaError:
        line = getattr(node, "lineno", 0)
        return SchemaError(f"{self.file}, line {line}: predict's `{name}` {problem}")
