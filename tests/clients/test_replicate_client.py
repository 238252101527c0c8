"""Replicate's own clients, for Python and for Node, against the stand-in for its API."""

import json
from pathlib import Path
from typing import Any

import pytest
from replicate.client import Client
from replicate.exceptions import ModelError, ReplicateError

from tests import node
from tests.replicate_stand_in import MODEL, OWNER, TOKEN, VERSION, StandIn
from tests.server import ENDLESS

NAME = f"{OWNER}/{MODEL}"
QUESTION = {"prompt": "What is the capital of France?", "max_tokens": 20}
ANSWER = "The capital of France is Paris."
NODE_PACKAGE = "replicate@1.4.0"


@pytest.fixture
def client(api: StandIn) -> Client:
    return Client(api_token=TOKEN, base_url=api.url)


class TestPython:
    def test_run_by_name_gives_the_chunks(self, client: Client) -> None:
        assert "".join(client.run(NAME, input=QUESTION)) == ANSWER

    def test_run_by_version_gives_an_iterator(self, client: Client) -> None:
        assert "".join(client.run(f"{NAME}:{VERSION}", input=QUESTION)) == ANSWER

    def test_run_can_poll(self, client: Client) -> None:
        assert "".join(client.run(f"{NAME}:{VERSION}", input=QUESTION, wait=False)) == ANSWER

    async def test_run_works_asynchronously(self, client: Client) -> None:
        output: Any = await client.async_run(NAME, input=QUESTION)
        assert "".join(output) == ANSWER

    def test_stream_gives_the_text_as_it_grows(self, client: Client) -> None:
        events = list(client.stream(NAME, input=QUESTION))
        assert "".join(str(event) for event in events) == ANSWER
        assert [event.event.value for event in events[-2:]] == ["output", "done"]
        assert len(events) > 3

    def test_stream_keeps_newlines(self, client: Client) -> None:
        inputs = {"prompt": "List three colours, one a line.", "max_tokens": 24}
        streamed = "".join(str(event) for event in client.stream(NAME, input=inputs))
        assert streamed == "".join(client.run(NAME, input=inputs))
        assert "\n" in streamed

    def test_stream_carries_whole_protocol_lines(self, client: Client) -> None:
        operation = ["GENERATE", {"stream_id": 1, "prompt": [504, 3575], "max_tokens": 5}]
        events = client.stream(NAME, input={"ops_batch_json": json.dumps([operation])})
        lines = "".join(str(event) for event in events).splitlines()
        assert [json.loads(line.removeprefix("TOKEN "))["finish_reason"] for line in lines][-1] == "length"
        assert len(lines) == 5

    def test_a_running_prediction_can_be_cancelled(self, client: Client) -> None:
        prediction = client.models.predictions.create(NAME, input=ENDLESS)
        events = prediction.stream()
        assert next(events).data
        prediction.cancel()
        assert prediction.status == "canceled"
        *_, done = events
        assert json.loads(done.data) == {"reason": "canceled"}

    def test_a_deployment_serves_predictions(self, client: Client) -> None:
        deployment = client.deployments.get(NAME)
        prediction = deployment.predictions.create(input=QUESTION)
        prediction.wait()
        assert "".join(prediction.output or []) == ANSWER
        assert (prediction.metrics or {})["output_token_count"] > 0

    def test_a_prediction_that_fails_raises_its_message(self, client: Client) -> None:
        with pytest.raises(ModelError, match="prompt is empty"):
            client.run(NAME, input={"prompt": ""})
        with pytest.raises(RuntimeError, match="prompt is empty"):
            list(client.stream(NAME, input={"prompt": ""}))

    def test_inputs_that_the_schema_excludes_are_refused(self, client: Client) -> None:
        with pytest.raises(ReplicateError, match=r"input\.max_tokens: 0 is less than the minimum of 1"):
            client.run(NAME, input={"prompt": "x", "max_tokens": 0})


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """A directory with the Node client."""
    return node.installed(NODE_PACKAGE)


class TestNode:
    @pytest.fixture
    def run(self, api: StandIn, node_modules: Path) -> Any:
        """Run JavaScript as the body of an async function with a client; return its result."""

        def run(body: str) -> Any:
            program = f"""
                const Replicate = require("replicate");
                const replicate = new Replicate({{auth: "{TOKEN}", baseUrl: "{api.url}/v1"}});
                const question = {{input: {json.dumps(QUESTION)}}}, endless = {{input: {json.dumps(ENDLESS)}}};
                (async () => {{ {body} }})().then((value) => console.log(JSON.stringify(value)));
            """
            return node.run(node_modules, "-e", program)

        return run

    def test_run_gives_the_chunks(self, run: Any) -> None:
        assert "".join(run(f'return await replicate.run("{NAME}", question)')) == ANSWER

    def test_stream_gives_the_text_as_it_grows(self, run: Any) -> None:
        events = run(f"""
            const events = [];
            for await (const event of replicate.stream("{NAME}", question)) events.push([event.event, `${{event}}`]);
            return events;
        """)
        assert "".join(text for _, text in events) == ANSWER
        assert [name for name, _ in events[-2:]] == ["output", "done"]
        assert len(events) > 3

    def test_a_running_prediction_can_be_cancelled(self, run: Any) -> None:
        status = run(f"""
            const prediction = await replicate.predictions.create({{model: "{NAME}", ...endless}});
            return (await replicate.predictions.cancel(prediction.id)).status;
        """)
        assert status == "canceled"

    def test_a_webhook_is_told_what_it_asks_for(self, run: Any) -> None:
        told = run(f"""
            const told = [];
            let done;
            const ended = new Promise((resolve) => {{ done = resolve; }});
            const server = require("http").createServer(async (request, response) => {{
                let body = "";
                for await (const part of request) body += part;
                response.end();
                told.push(JSON.parse(body));
                if (told.at(-1).completed_at) done();
            }});
            await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
            const webhook = `http://127.0.0.1:${{server.address().port}}/told`;
            const asked = {{model: "{NAME}", ...question, webhook, webhook_events_filter: ["start", "completed"]}};
            const prediction = await replicate.predictions.create(asked);
            await ended;
            server.close();
            return told.map(({{id, status, output}}) => [id === prediction.id, status, output]);
        """)
        assert [(own, status) for own, status, _ in told] == [(True, "processing"), (True, "succeeded")]
        assert "".join(told[-1][2]) == ANSWER
