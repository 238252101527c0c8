"""What the gateway learns of the model from MODEL_INFO."""

import pytest

from tests.gateway.containers import Fake, served


@pytest.mark.parametrize(("model", "name"), [("org/tiny", "org/tiny"), ("demo", "demo"), ("/somewhere/tiny/", "tiny")])
async def test_a_model_is_called_by_its_repository_or_the_end_of_its_directory(model: str, name: str) -> None:
    async with served(Fake(info={"model": model})) as client:
        models = await (await client.get("/v1/models")).json()
        assert models["data"][0]["id"] == name
        assert (await client.get(f"/v1/models/{name}")).status == 200


async def test_tokens_that_are_not_spelt_are_logged_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    async with served(Fake(spells=False)) as client:
        assert (await client.get("/v1/models")).status == 200
    assert "does not spell its tokens" in caplog.text
    assert "tokens: no" in caplog.text


@pytest.mark.parametrize(
    ("info", "scores"),
    [({}, True), ({"longest_source": 0}, True), ({"longest_source": 512}, False), ({"kind": "x"}, False)],
)
async def test_the_page_learns_whether_the_model_scores_prompts(info: dict[str, object], scores: bool) -> None:
    async with served(Fake(info=info)) as client:
        assert (await (await client.get("/inspect")).json())["scores_prompts"] is scores
