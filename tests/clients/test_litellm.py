"""LiteLLM's replicate provider, unmodified, against the stand-in for Replicate's API."""

import importlib
from typing import Any

import httpx
import pytest

from tests.replicate_stand_in import MODEL, OWNER, TOKEN, StandIn

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture
def litellm(api: StandIn, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with Replicate's address replaced by the stand-in's."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else importing it fetches a price list
    # Its main module: a directory left by an uninstalled litellm would be imported as an empty package.
    pytest.importorskip("litellm.main", reason="litellm is not installed: it brings 60 packages")
    send = httpx.Client.send

    def redirected(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        stand_in = httpx.URL(api.url)
        request.url = request.url.copy_with(scheme=stand_in.scheme, host=stand_in.host, port=stand_in.port)
        return send(client, request, **options)

    monkeypatch.setattr(httpx.Client, "send", redirected)
    return importlib.import_module("litellm")


def ask(litellm: Any, **options: Any) -> Any:
    model = f"replicate/deployments/{OWNER}/{MODEL}"
    return litellm.completion(model=model, messages=QUESTION, api_key=TOKEN, temperature=0, num_retries=0, **options)


def test_a_deployment_answers(litellm: Any, api: StandIn) -> None:
    assert ask(litellm).choices[0].message.content == ANSWER


def test_max_tokens_ends_the_answer(litellm: Any) -> None:
    assert ask(litellm, max_tokens=3).choices[0].message.content == "The capital of"


def test_a_stream_gives_the_answer(litellm: Any) -> None:
    parts = [part.choices[0].delta.content or "" for part in ask(litellm, stream=True)]
    assert "".join(parts) == ANSWER


def test_one_stop_sequence_is_a_text(litellm: Any) -> None:
    assert ask(litellm, stop=" France").choices[0].message.content == "The capital of"


def test_a_list_of_stop_sequences_is_refused_by_the_schema(litellm: Any) -> None:
    with pytest.raises(Exception, match="stop_sequences"):
        ask(litellm, stop=[" France", " Paris"])
