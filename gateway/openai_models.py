"""OpenAI's `/v1/models`: the served model, and each of its adapters as a model of its own."""

import time
from typing import Any

from aiohttp import web

from gateway.model import Models
from gateway.openai_answers import document
from gateway.openai_requests import adapter_of

SINCE = int(time.time())


async def list_models(request: web.Request, models: Models) -> web.Response:
    """`GET /v1/models`."""
    model = await models.get()
    return document({"object": "list", "data": [_described(name) for name in (model.name, *model.adapters)]})


async def get_model(request: web.Request, models: Models) -> web.Response:
    """`GET /v1/models/NAME`."""
    name = request.match_info["name"]
    adapter_of(name, await models.get())
    return document(_described(name))


def _described(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": SINCE, "owned_by": "gateway"}
