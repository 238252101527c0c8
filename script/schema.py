"""The OpenAPI schema of predict.py, as `cog build` puts it into the image.

Cog's runtime reads it from `.cog/openapi_schema.json` to validate inputs and to stream. Without Docker, whatever starts
the runtime writes that file first. The SDK describes a predictor but does not write the document, so that is done here.
tests/test_predict_signature.py checks that `cog build`, which does not run predict.py, reads the same from its source.
"""

import contextlib
import inspect
import json
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cog import _inspector

JsonObject = dict[str, Any]


class SchemaError(Exception):
    """predict.py cannot be imported, its `predict` is not one that Cog serves, or its schema has no room; says why."""


@dataclass(frozen=True)
class Signature:
    """How the predictor is called."""

    inputs: dict[str, JsonObject]
    """The JSON Schema of each input, in order; choices inline as `enum`."""
    required: list[str]
    output: JsonObject
    streaming: bool
    concurrency: int
    """How many predictions may run at once; `cog build` sets COG_MAX_CONCURRENCY to it."""


def read_signature() -> Signature:
    """Import predict.py and describe `Predictor.predict`. Raises SchemaError."""
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # predict() is now called run()
            described = _inspector.create_predictor("predict", "Predictor")
    except Exception as error:  # the file may raise anything
        raise SchemaError(f"predict.py: {error}") from error
    predict = sys.modules["predict"].Predictor.predict
    return Signature(
        inputs={name: _input(field) for name, field in described.inputs.items()},
        required=[name for name, field in described.inputs.items() if field.default is None and not _optional(field)],
        output=described.output.json_type(),
        # Unlike @cog.concurrent, the decorator leaves no mark on the function.
        streaming=bool(re.search(r"^\s*@(cog\.)?streaming\b", inspect.getsource(predict), re.MULTILINE)),
        concurrency=getattr(predict, "__cog_concurrent_max__", 1),
    )


def _optional(field: Any) -> bool:
    return "OPTIONAL" in field.type.repetition.name


def _input(field: Any) -> JsonObject:
    described: JsonObject = field.type.json_type()
    if _optional(field):
        described["nullable"] = True
    if field.default is not None or _optional(field):
        described["default"] = field.default
    given = {
        "description": field.description,
        "minimum": field.ge,
        "maximum": field.le,
        "minLength": field.min_length,
        "maxLength": field.max_length,
        "pattern": field.regex,
        "deprecated": field.deprecated,
        "enum": field.choices,
    }
    # The SDK makes every bound a float.
    numbers = {key: int(value) for key, value in given.items() if isinstance(value, float) and value.is_integer()}
    return described | {key: value for key, value in (given | numbers).items() if value is not None}


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
            title = " ".join(word[:1].upper() + word[1:] for word in name.split("_"))
            properties[name] = {"title": title, **described}
    inputs = _object("Input", **properties)
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
    string, time = {"type": "string"}, {"type": "string", "format": "date-time"}
    location = {"type": "array", "items": {"anyOf": [string, {"type": "integer"}]}}
    schemas = {
        "Input": inputs,
        "Output": signature.output,
        **choices,
        "PredictionRequest": _object("PredictionRequest", id=string, input=_reference("Input")),
        "PredictionResponse": _object(
            "PredictionResponse",
            input=_reference("Input"),
            output=_reference("Output"),
            id=string,
            version=string,
            created_at=time,
            started_at=time,
            completed_at=time,
            status=string,
            error=string,
            logs=string,
            metrics={"type": "object"},
        ),
        "HTTPValidationError": _object(
            "HTTPValidationError", detail={"type": "array", "items": _reference("ValidationError")}
        ),
        "ValidationError": {
            **_object("ValidationError", loc=location, msg=string, type=string),
            "required": ["loc", "msg", "type"],
        },
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {"/predictions": {"post": predict}},
        "components": {"schemas": schemas},
    }


def write(signature: Signature, root: Path) -> None:
    """Write the schema to where a runtime started in `root` reads it, in one move: it never reads half a file.

    Raises SchemaError if it cannot be written. One that is there already is left alone.
    """
    path = root / ".cog" / "openapi_schema.json"
    draft = path.with_suffix(f".{os.getpid()}")
    text = json.dumps(openapi(signature), indent=2)
    try:
        if path.exists() and path.read_bytes() == text.encode():
            return
        path.parent.mkdir(exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise SchemaError(f"The runtime needs {path}, which cannot be written: {error.strerror}.") from error


def _reference(name: str) -> JsonObject:
    return {"$ref": f"#/components/schemas/{name}"}


def _json_content(name: str) -> JsonObject:
    return {"content": {"application/json": {"schema": _reference(name)}}}


def _object(title: str, **properties: JsonObject) -> JsonObject:
    return {"title": title, "type": "object", "properties": properties}
