"""The protocol's lines: accepted and refused operations, error messages, encoded replies."""

import json

import pytest

from lmtp.protocol import (
    BATCH_LIMIT,
    Failure,
    Generate,
    Info,
    ModelInfo,
    RequestError,
    Score,
    Token,
    encode,
    finite,
    parse_batch,
    parse_logit_bias,
)


def only(payload: str) -> Failure:
    (failure,) = parse_batch(payload)
    assert isinstance(failure, Failure)
    return failure


def test_a_batch_from_lmql_is_parsed_with_its_defaults() -> None:
    batch = parse_batch(
        '[["GENERATE", {"stream_id": 1, "prompt": [1, 2], "model": "m", "logit_bias": {"7": 100}, "length_penalty": 1.0}],'
        ' ["SCORE", {"stream_id": 2, "prompt": [], "scored": [5], "model": "m"}],'
        ' ["MODEL_INFO", {"stream_id": "three", "model": "m", "data": {"model": "m"}}]]'
    )
    assert batch == [
        Generate(stream_id=1, prompt=[1, 2], model="m", logit_bias={7: 100.0}, length_penalty=1.0),
        Score(stream_id=2, prompt=[], scored=[5], model="m"),
        ModelInfo(stream_id="three", model="m", data={"model": "m"}),
    ]
    generate = batch[0]
    assert isinstance(generate, Generate)
    assert (generate.max_tokens, generate.temperature, generate.top_logprobs) == (32, 0.0, 1)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("{", "must be a JSON array"),
        ("[1", "is not JSON"),
        ("{}", "must be a JSON array of operations"),
        ("[]", "holds no operations"),
        (json.dumps([["MODEL_INFO", {"stream_id": i}] for i in range(BATCH_LIMIT + 1)]), "takes at most 256"),
        ('[["GENERATE", {"stream_id": 1, "prompt": [1], "temperature": NaN}]]', "is not JSON"),
    ],
)
def test_input_without_a_stream_to_answer_fails_the_prediction(payload: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("[", r"\[")):
        parse_batch(payload)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ('["GENERATE", {"stream_id": 1}]', "missing required field prompt"),
        ('["GENERATE", {"stream_id": 1, "prompt": [1, "a"]}]', "GENERATE prompt[1]: expected int, got str."),
        ('["GENERATE", {"stream_id": 1, "prompt": [1, -2]}]', "GENERATE prompt[1]: expected int >= 0."),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "max_tokens": 0}]', "GENERATE max_tokens: expected int >= 1."),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "max_tokens": 1.5}]', "max_tokens: expected int"),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "tempature": 1}]', "no field 'tempature'; did you mean 'temperature'?"),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "logit_bias": {"a": 1}}]', "GENERATE logit_bias: expected int, got str."),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "stop": [""]}]', "stop[0]: expected str of length >= 1."),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "top_k": 9223372036854775808}]', "GENERATE top_k: expected int"),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "temperature": 1e39}]', "temperature: expected float <= 10000"),
        ('["SCORE", {"stream_id": 1, "prompt": [1]}]', "missing required field scored"),
        ('["GENRATE", {"stream_id": 1}]', "unknown operation 'GENRATE'"),
    ],
)  # fmt: skip
def test_an_invalid_operation_fails_its_own_stream_only(operation: str, message: str) -> None:
    failure, other = parse_batch(f'[{operation}, ["MODEL_INFO", {{"stream_id": 2}}]]')
    assert isinstance(failure, Failure)
    assert failure.stream_id == 1
    assert message in failure.error
    assert other == ModelInfo(stream_id=2)


def test_an_unknown_operation_names_the_nearest_known_one() -> None:
    assert "did you mean 'GENERATE'?" in only('[["GENRATE", {"stream_id": 1}]]').error


def test_a_malformed_operation_is_named_by_its_index() -> None:
    failure, _ = parse_batch('[7, ["MODEL_INFO", {"stream_id": 1}]]')
    assert failure == Failure(stream_id=None, error="operation 0: must be [name, {fields}].", kind="MSG")


def test_operations_that_share_a_stream_id_get_one_error() -> None:
    failure, other = parse_batch(
        '[["GENERATE", {"stream_id": 1, "prompt": [1]}], ["SCORE", {"stream_id": 1, "prompt": [1], "scored": [1]}],'
        ' ["GENERATE", {"stream_id": 2, "prompt": [1]}]]'
    )
    assert isinstance(failure, Failure)
    assert "stream_id 1 is used by 2 operations" in failure.error
    assert other.stream_id == 2


def test_replies_are_encoded_as_lines_of_strict_json() -> None:
    token = Token(token=7042, stream_id=7, logprob=-0.283, finish_reason=None, top_logprobs={7042: -0.283, 260: -2.589})
    lines = encode(
        [token, Info(stream_id=3, model_info={"model": "m"}), Failure(stream_id=4, error="no", kind="TOKEN")]
    )
    assert lines.endswith("\n")
    commands, objects = zip(*(line.split(" ", 1) for line in lines.splitlines()), strict=True)
    assert commands == ("TOKEN", "MSG", "TOKEN")
    assert [json.loads(text) for text in objects] == [
        {
            "token": 7042,
            "stream_id": 7,
            "logprob": -0.283,
            "finish_reason": None,
            "top_logprobs": {"7042": -0.283, "260": -2.589},
        },
        {"stream_id": 3, "model_info": {"model": "m"}},
        {"stream_id": 4, "error": "no"},
    ]


def test_text_never_breaks_a_line() -> None:
    token = Token(token=1, stream_id="a\nb", logprob=0.0, finish_reason="stop", text='line\nline\u2028\x85\u2029"')
    line = encode([token])
    assert len(line.splitlines()) == 1
    assert json.loads(line.split(" ", 1)[1])["text"] == 'line\nline\u2028\x85\u2029"'


def test_a_logprob_is_always_a_valid_json_number() -> None:
    assert finite(float("-inf")) == pytest.approx(-3.4e38, rel=0.01)
    assert str(finite(-0.0)) == "0.0"


def test_logit_bias_is_parsed_or_refused_with_an_example() -> None:
    assert parse_logit_bias(' {"3": -100} ') == {3: -100.0}
    assert parse_logit_bias("") is None
    with pytest.raises(RequestError, match="logit_bias must be a JSON object like"):
        parse_logit_bias("[3]")
