"""OpenAI's own clients, for Python and for Node, on the demo model."""

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import node
from tests.server import Server

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def client(gateway: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def name(client: openai.OpenAI) -> str:
    (model,) = client.models.list()
    return model.id


@pytest.fixture(scope="module")
def reference(demo_weights: Path) -> Any:
    """Transformers' tokenizer, and log-probabilities of one plain forward pass over token ids."""
    tokenizer = AutoTokenizer.from_pretrained(demo_weights)
    model = AutoModelForCausalLM.from_pretrained(demo_weights, dtype=torch.float32).eval()

    @cache
    @torch.inference_mode()
    def logprobs(*ids: int) -> Any:
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    return tokenizer, logprobs


class TestModels:
    def test_a_model_that_is_listed_can_be_retrieved(self, client: openai.OpenAI, name: str) -> None:
        assert client.models.retrieve(name).id == name

    def test_another_one_is_not_found(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as raised:
            client.completions.create(model="gpt-5", prompt="x")
        assert raised.value.code == "model_not_found"
        assert raised.value.param == "model"


class TestCompletions:
    def test_a_text_is_continued(self, client: openai.OpenAI, name: str) -> None:
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=2, temperature=0)
        assert answer.choices[0].text == " Paris."
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].logprobs is None
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 2)

    def test_a_stream_gives_the_same_text_and_its_usage(self, client: openai.OpenAI, name: str) -> None:
        asked: Any = {"model": name, "prompt": "Colours: red,", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**asked)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        *parts, last = chunks
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
        assert len(parts) > 2
        assert parts[-1].choices[0].finish_reason == "length"
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == 8

    def test_stop_ends_the_text_before_the_sequence(self, client: openai.OpenAI, name: str) -> None:
        answer = client.completions.create(model=name, prompt="1, 2, 3, 4,", max_tokens=30, temperature=0, stop=", 7")
        assert answer.choices[0].text == " 5, 6"
        assert answer.choices[0].finish_reason == "stop"

    def test_several_prompts_get_n_choices_each_in_order(self, client: openai.OpenAI, name: str) -> None:
        prompts = [PROMPT, "Two plus two is"]
        answer = client.completions.create(model=name, prompt=prompts, n=2, max_tokens=2, temperature=0)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        texts = [choice.text for choice in answer.choices]
        assert texts[0] == texts[1] == " Paris."
        assert texts[2] == texts[3] != " Paris."

    def test_a_seed_repeats_samples(self, client: openai.OpenAI, name: str) -> None:
        asked: Any = {"model": name, "prompt": "My favourite animal is", "max_tokens": 4, "n": 3, "seed": 7}
        first, second = ([c.text for c in client.completions.create(**asked).choices] for _ in range(2))
        assert first == second
        assert len(set(first)) > 1

    def test_a_bias_forbids_a_token(self, client: openai.OpenAI, name: str, reference: Any) -> None:
        tokenizer, _ = reference
        (paris,) = tokenizer.encode(" Paris")
        answer = client.completions.create(
            model=name, prompt=PROMPT, max_tokens=1, temperature=0, logit_bias={str(paris): -100}
        )
        assert answer.choices[0].text != " Paris"

    def test_logprobs_name_tokens_and_alternatives(self, client: openai.OpenAI, name: str, reference: Any) -> None:
        tokenizer, forward = reference
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=2, temperature=0, logprobs=3)
        given = answer.choices[0].logprobs
        assert given is not None
        assert given.tokens == [" Paris", "."]
        assert given.text_offset == [0, 6]
        assert given.top_logprobs is not None
        expected = forward(*tokenizer.encode(PROMPT))[-1].topk(3)
        assert list(given.top_logprobs[0]) == [tokenizer.decode([i]) for i in expected.indices]
        assert list(given.top_logprobs[0].values()) == pytest.approx(expected.values.tolist(), abs=1e-4)

    @pytest.mark.parametrize("as_text", [True, False])
    def test_an_echo_scores_the_prompt_as_lm_eval_asks(
        self, client: openai.OpenAI, name: str, reference: Any, as_text: bool
    ) -> None:
        """The requests of lm_eval's local-completions; its scores are sums over ``token_logprobs[start:-1]``."""
        tokenizer, forward = reference
        texts = [f"{PROMPT} Paris", "Café über naïve — résumé"]
        ids = [tokenizer.encode(text) for text in texts]
        asked: Any = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
        answer = client.completions.create(model=name, prompt=texts if as_text else ids, **asked)
        for text, tokens, choice in zip(texts, ids, answer.choices, strict=True):
            given = choice.logprobs
            assert given is not None
            assert given.token_logprobs is not None
            assert given.top_logprobs is not None
            assert choice.text.startswith(text)
            assert given.token_logprobs[0] is None
            assert len(given.token_logprobs) == len(tokens) + 1
            rows = forward(*tokens)
            expected = [rows[i, token].item() for i, token in enumerate(tokens[1:])]
            assert given.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
            greedy = [max(top.values()) for top in given.top_logprobs[1:]]
            assert greedy == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)

    def test_an_echo_without_new_tokens_only_scores(self, client: openai.OpenAI, name: str) -> None:
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
        assert answer.choices[0].text == PROMPT
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.tokens == ["The", " capital", " of", " France", " is"]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 0)

    def test_the_end_of_the_sequence_has_a_logprob_and_no_text(self, client: openai.OpenAI, name: str) -> None:
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=3, logit_bias={"2": 100}, logprobs=1)
        assert answer.choices[0].text == ""
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.tokens == ["<|im_end|>"]

    def test_constraints_of_this_project_are_extra_parameters(self, client: openai.OpenAI, name: str) -> None:
        extra = {"regex": " (Rome|Paris)!"}
        answer = client.completions.create(model=name, prompt=PROMPT, temperature=0, extra_body=extra)
        assert answer.choices[0].text == " Paris!"

    def test_an_error_of_the_model_server_is_a_bad_request(self, client: openai.OpenAI, name: str) -> None:
        with pytest.raises(openai.BadRequestError, match="token ids; the model's context is 8192"):
            client.completions.create(model=name, prompt=[1] * 9000)
        with pytest.raises(openai.BadRequestError, match="regex"):
            client.completions.create(model=name, prompt="x", stream=True, extra_body={"regex": "(a"})


class TestChat:
    MESSAGES: ClassVar[Any] = [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
    ]

    def test_a_conversation_is_answered(self, client: openai.OpenAI, name: str) -> None:
        answer = client.chat.completions.create(model=name, messages=self.MESSAGES, temperature=0, max_tokens=20)
        assert answer.choices[0].message.role == "assistant"
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 20

    def test_a_stream_gives_the_same_text(self, client: openai.OpenAI, name: str) -> None:
        asked: Any = {"model": name, "messages": self.MESSAGES, "temperature": 0, "max_completion_tokens": 12}
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason

    def test_logprobs_have_bytes_and_alternatives(self, client: openai.OpenAI, name: str) -> None:
        answer = client.chat.completions.create(
            model=name, messages=self.MESSAGES, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
        )
        given = answer.choices[0].logprobs
        assert given is not None
        assert given.content is not None
        assert "".join(token.token for token in given.content) == answer.choices[0].message.content
        for token in given.content:
            assert bytes(token.bytes or []).decode() == token.token
            assert [top.logprob for top in token.top_logprobs] == sorted(t.logprob for t in token.top_logprobs)[::-1]
            assert len(token.top_logprobs) == 2
            assert math.isclose(token.logprob, token.top_logprobs[0].logprob)

    def test_a_response_format_is_kept(self, client: openai.OpenAI, name: str) -> None:
        schema = {
            "type": "object",
            "properties": {"capital": {"enum": ["Paris", "Rome"]}},
            "required": ["capital"],
            "additionalProperties": False,
        }
        response_format: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        answer = client.chat.completions.create(
            model=name, messages=self.MESSAGES, temperature=0, response_format=response_format, seed=1
        )
        assert set(json.loads(answer.choices[0].message.content or "")) == {"capital"}


class TestNode:
    @pytest.fixture
    def run(self, gateway: Server) -> Any:
        """Run JavaScript as the body of an async function with a client; return its result."""
        packages = node.installed("openai@6.49.0")

        def run(body: str) -> Any:
            program = f"""
                const {{ OpenAI }} = require("openai");
                const client = new OpenAI({{ baseURL: "{gateway.url}/v1", apiKey: "unused", maxRetries: 0 }});
                (async () => {{ {body} }})().then((value) => console.log(JSON.stringify(value)));
            """
            return node.run(packages, "-e", program)

        return run

    def test_completions_and_streams_are_the_same_text(self, run: Any, name: str) -> None:
        whole, parts, reason, message = run(f"""
            const asked = {{ model: "{name}", prompt: "{PROMPT}", max_tokens: 5, temperature: 0, logprobs: 2 }};
            const whole = (await client.completions.create(asked)).choices[0];
            const parts = [];
            let reason;
            for await (const part of await client.completions.create({{ ...asked, stream: true }})) {{
                parts.push(part.choices[0].text);
                reason = part.choices[0].finish_reason;
            }}
            const error = await client.completions.create({{ ...asked, suffix: "x" }}).catch((error) => error);
            return [whole.text, parts, reason, error.message];
        """)
        assert "".join(parts) == whole
        assert len(parts) == 5
        assert reason == "length"
        assert message == "400 'suffix' is not supported."

    def test_a_chat_is_streamed(self, run: Any, name: str) -> None:
        text, kinds = run(f"""
            const messages = [{{ role: "user", content: "What is the capital of France?" }}];
            const stream = client.chat.completions.stream({{ model: "{name}", messages, max_tokens: 8, temperature: 0 }});
            const kinds = new Set();
            for await (const chunk of stream) kinds.add(chunk.object);
            return [(await stream.finalChatCompletion()).choices[0].message.content, [...kinds]];
        """)
        assert text == "The capital of France is Paris."
        assert kinds == ["chat.completion.chunk"]
